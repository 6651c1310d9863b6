"""BiFormer (Zhu et al. 2023, arXiv 2303.08810): regions of an image attend to the few regions they match best, token to token inside those.

    Q_r, K_r = mean over the tokens of each of S x S regions;  A = Q_r K_r^T;  I = top k of each row
    O = softmax(Q K_g^T s) V_g + LCE(V),  K_g, V_g = tokens of the regions I, gathered side by side

Q_r and K_r have the layer's full width, so its heads share their routes. LCE is a depthwise convolution over the map. The tokens of a map attend
to each other whatever their order: causal models are refused, and `forward` here is not causal. Maps whose sides the regions do not divide have
smaller last regions. The authors' code scales logits by the layer's width; here the scale is the caller's, 1 / sqrt(D) in `forward`.

Shape letters as in base.py; R = regions, M = tokens of the largest, K = regions attended to, C = all values of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ...errors import BadInput, Unsupported
from ...kernels.block_attention.softmax import attend
from ...method import fraction, positive
from ...selection import Selection
from ..block import highest
from .base import PairAttention, drawn, masked_softmax


class BiFormer(PairAttention):
    """Bi-level routing over the regions of a map, its tokens given row by row; trained with the model it is built into.

    Args:
        budget: share of the regions; top: a number of them in its place, 0 for the budget's share.
        regions: along each side. width: tokens in a row of the map; 0 is a square one.
        local: side of the convolution on values, odd; 0 for none.
    """

    name = "attention/biformer"
    unit = "key block"

    def __init__(
        self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, regions: int = 7, top: int = 0, width: int = 0, local: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.regions = fraction("budget", budget), positive("regions", regions)
        self.top = top if top == 0 and type(top) is int else positive("top", top)
        self.width = width if width == 0 and type(width) is int else positive("width", width)
        if type(local) is not int or local < 0 or local and local % 2 == 0:
            raise BadInput(f"local={local!r} must be an odd number, or 0 for no convolution")
        self.local = local
        self.kernel_C1LL = drawn(draw, key_heads * d_head, 1, local, local, std=1 / local) if local else None

    @property
    def budget(self) -> float:
        """Share of regions kept."""
        return self._budget

    def sides(self, S: int) -> tuple[int, int]:
        """(rows, tokens in a row) of a map of S tokens. BadInput where they do not make one."""
        width = self.width or math.isqrt(S)
        if S % width or not self.width and width * width != S:
            raise BadInput(f"{S} tokens are no {'map of rows of ' + str(width) if self.width else 'square map'}; give width= for its rows")
        return S // width, width

    def members(self, S: int, device: torch.device | None = None) -> Tensor:
        """[R, M] tokens of each region, row by row, -1 where a region is smaller."""
        height, width = self.sides(S)
        tall, wide = -(-height // self.regions), -(-width // self.regions)
        row, column = torch.arange(self.regions * tall, device=device), torch.arange(self.regions * wide, device=device)
        token = torch.where((row < height)[:, None] & (column < width), row[:, None] * width + column, -1)
        regions = token.view(self.regions, tall, self.regions, wide).transpose(1, 2).flatten(2).flatten(0, 1)
        return regions[(regions >= 0).any(1)]

    @torch.no_grad()
    def routes(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, R, R] bool: regions that a region attends to, the same in every head."""
        member_RM = self.members(k.shape[2], q.device)
        there = (member_RM >= 0)[..., None]
        mean_q, mean_k = ((x[:, :, member_RM.clamp_min(0)] * there).sum(3) / there.sum(1) for x in (q, k))
        R = len(member_RM)
        keep = min(R, self.top) if self.top else max(1, round(self._budget * R))
        match = (mean_q @ mean_k.repeat_interleave(self.heads // self.key_heads, 1).mT).sum(1, keepdim=True)      # the product at full width
        return highest(match, torch.tensor([[keep]], device=q.device)).expand(-1, self.heads, -1, -1)

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, R, R] bool. Unsupported in a causal model, BadInput for other queries than the map's own tokens."""
        if q.shape[2] != k.shape[2]:
            raise BadInput(f"{self.name}: {q.shape[2]} queries and {k.shape[2]} keys; the tokens of a map attend to that map")
        return self.routes(q, k)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
        hidden_BTD: Tensor | None = None,
    ) -> Tensor:
        """[B, H, T, D], T = S. Raises Unsupported for causal attention and for padding: a map has no holes."""
        if causal or padding_BS is not None:
            what = "is causal" if causal else "is padded"
            raise Unsupported(f"{self.name}: layer {layer} {what}; regions of a map attend both ways, over every one of its tokens")
        return super().attend(q_BHTD, k_BGSD, v_BGSD, scale=scale, causal=False, layer=layer)

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Selection:
        """Regions of each region, mask form [B, H, R, R]."""
        self._refuse(queries=q_BHTD, keys=k_BGSD, values=v_BGSD)
        mask = self.choice(q_BHTD, k_BGSD, v_BGSD, None, 1.0, False)
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Tensor:
        """Attention over the map with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[3] ** -0.5, causal=False)

    def around(self, v: Tensor) -> Tensor:
        """[B, H, S, D] the convolution of each value with those around it; 0 without one."""
        if self.kernel_C1LL is None:
            return torch.zeros_like(v).repeat_interleave(self.heads // self.key_heads, 1)
        image = v.transpose(2, 3).flatten(1, 2).unflatten(2, self.sides(v.shape[2]))
        out = conv2d(image, self.kernel_C1LL, padding=self.local // 2, groups=image.shape[1])
        return out.flatten(2).unflatten(1, (self.key_heads, -1)).mT.repeat_interleave(self.heads // self.key_heads, 1)

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Keys and values of the routed regions gathered, then dense attention region by region."""
        member_RM = self.members(k.shape[2], q.device)
        to_BHRK = mask.to(torch.uint8).topk(int(mask[0, 0, 0].sum()), -1).indices
        token = member_RM[to_BHRK].flatten(3)                                                          # [B, H, R, K * M]
        b = torch.arange(len(q), device=q.device)[:, None, None, None]
        g = (torch.arange(self.heads, device=q.device) // (self.heads // self.key_heads))[:, None, None]
        at = token.clamp_min(0)
        out = attend(q[:, :, member_RM.clamp_min(0)], k[b, g, at], v[b, g, at], (token >= 0)[..., None, :], scale)[0]
        return torch.zeros_like(q).index_copy(2, member_RM[member_RM >= 0], out[:, :, member_RM >= 0]) + self.around(v)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """From the whole score matrix."""
        return masked_softmax(q, k, self.pairs(mask, k.shape[2]), scale) @ v.repeat_interleave(self.heads // self.key_heads, 1) + self.around(v)

    def pairs(self, mask: Tensor, S: int) -> Tensor:
        """[B, H, S, S] bool of a mask of regions."""
        member_RM = self.members(S, mask.device)
        region = torch.zeros(S, dtype=torch.long, device=mask.device)
        region[member_RM[member_RM >= 0]] = torch.arange(len(member_RM), device=mask.device).repeat_interleave((member_RM >= 0).sum(1))
        return mask[:, :, region][..., region]

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Pairs of tokens in routed regions, of all pairs."""
        size = (self.members(S, mask.device) >= 0).sum(1).to(torch.float64)
        self._kept += float(torch.einsum("bhrk,r,k->", mask.to(torch.float64), size, size))
        self._seen += mask.shape[0] * mask.shape[1] * S * S

    def dims(self) -> tuple[int, int, float]:
        """(H, D, S): every key is seen."""
        H, D, keys = super().dims()
        return H, D, 2 * keys - 1                                    # the base counts S - (S - 1) / 2, the mean of a causal query

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Affinities of regions, shared out over tokens, and the convolution."""
        regions = min(self.regions**2, keys)
        return 2 * heads * width * regions**2 / max(1.0, keys) + 2 * self.key_heads * width * self.local**2
