"""HAT (Chalkidis et al. 2022, arXiv 2210.05529): an encoder over segments, each with a CLS of its own, in which only CLS tokens meet.

    S, segment-wise:  [CLS_n, tokens of n] <- layer over the segment's own 1 + K tokens
    D, cross-segment: CLS_1 .. CLS_N       <- layer over the N CLS tokens plus their segments' positions
A stack is a word over these letters: "SDSDSD" interleaves, "SDSDSS" brings segments together early, "SSSDSD" late, "SSSSDD" at the end alone.
T tokens cost about T (K + 1) pairs in S and (T / K)^2 in D, and no [T, T] matrix is formed anywhere. `reference` is the same stack as one
sequence under the masks of `patterns.zoo` (hat), all pairs formed.
Departures: norms stand before the parts of a layer, not behind (no warm-up is needed then).

Shape letters: B = batch, T = tokens, W = width, K = tokens of a segment, N = segments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from ...errors import BadInput
from ...kernels.block_attention.softmax import attend as masked
from ...method import positive
from ..patterns.zoo.documents import hat
from .encoder import Layer

LAYOUTS = ("interleaved", "early", "late", "ad_hoc")


def layout(kind: str, layers: int, paired: int | None = None) -> str:
    """The word of a layout with `layers` segment-wise layers; `paired` cross-segment ones (half as many unless told, all of them interleaved).

    Raises:
        BadInput: an unknown layout, more pairs than layers.
    """
    positive("layers", layers)
    if kind not in LAYOUTS:
        raise BadInput(f"no layout {kind!r}; there are {', '.join(LAYOUTS)}, or give a word of S and D")
    paired = positive("paired", -(-layers // 2) if paired is None else paired, layers)
    rest = "S" * (layers - paired)
    return {"interleaved": "SD" * layers, "early": "SD" * paired + rest, "late": rest + "SD" * paired, "ad_hoc": "S" * layers + "D" * paired}[kind]


class HAT(nn.Module):
    """Tokens in, tokens and one vector a segment out.

    Args:
        width: W. heads: of every layer.
        segment: K, tokens of a segment without its CLS.
        segments: most segments of a document.
        stack: word of S and D, as `layout` makes it; "|" may stand anywhere.
        wide: hidden units of the feed-forward nets, 4 W unless told.
        seed: of the initial weights.

    Raises:
        BadInput: a stack of other letters, a document of more segments.
    """

    def __init__(self, width: int, heads: int, segment: int = 128, segments: int = 32, stack: str = "SDSDSD", wide: int | None = None,
                 seed: int = 0) -> None:
        super().__init__()
        self.segment, self.segments, self.stack = positive("segment", segment), positive("segments", segments), stack.replace("|", "")
        if not self.stack or set(self.stack) - set("SD"):
            raise BadInput(f"stack={stack!r} must be a word of S (within segments) and D (among them), such as 'SDSD'")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cls_W = nn.Parameter(0.02 * torch.randn(width))
            self.place_KW = nn.Parameter(0.02 * torch.randn(1 + segment, width))
            self.place_NW = nn.Parameter(0.02 * torch.randn(segments, width))
            self.layers = nn.ModuleList([Layer(width, heads, wide) for _ in self.stack])

    def _cut(self, x_BTW: Tensor, real_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """([B, N, 1 + K, W] with CLS first, [B, N, 1 + K] whether a token is there; a CLS is where a token of its segment is)."""
        B, T, W = x_BTW.shape
        N, K = -(-T // self.segment), self.segment
        if N > self.segments:
            raise BadInput(f"{T} tokens are {N} segments of {K}; this HAT was made for {self.segments}: cut the text or make it with more")
        if real_BT is not None and (real_BT.shape != (B, T) or real_BT.dtype != torch.bool):
            raise BadInput(f"real must be bool [{B}, {T}], not {real_BT.dtype} {list(real_BT.shape)}")
        there = torch.ones(B, T, dtype=torch.bool, device=x_BTW.device) if real_BT is None else real_BT
        there = pad(there, (0, N * K - T)).view(B, N, K)
        x = torch.cat([self.cls_W.expand(B, N, 1, W), pad(x_BTW, (0, 0, 0, N * K - T)).view(B, N, K, W)], 2)
        return x + self.place_KW, torch.cat([there.any(-1, keepdim=True), there], -1)

    def forward(self, x_BTW: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(tokens [B, T, W], CLS [B, N, W]); what stands for padding and for segments of padding alone means nothing.

        Args:
            x_BTW: token embeddings without positions and CLS.
            real_BT: True at real tokens; segments are cut with the padding in place.
        """
        x, there = self._cut(x_BTW, real_BT)
        B, N, _, W = x.shape
        for letter, layer in zip(self.stack, self.layers, strict=True):
            if letter == "S":
                keep = there.view(B * N, 1, 1, -1)
                x = layer(x.flatten(0, 1), lambda q, k, v, keep=keep: _over(q, k, v, keep)).view(x.shape)
            else:
                keep = there[:, None, None, :, 0]
                cls = layer(x[:, :, 0] + self.place_NW[:N], lambda q, k, v, keep=keep: _over(q, k, v, keep))
                x = torch.cat([cls[:, :, None], x[:, :, 1:]], 2)
        return x[:, :, 1:].reshape(B, -1, W)[:, : x_BTW.shape[1]], x[:, :, 0]

    def reference(self, x_BTW: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` must return: every layer over the whole sequence, masked by the zoo's pattern."""
        x, there = self._cut(x_BTW, real_BT)
        B, N, K1, W = x.shape
        at = torch.arange(N * K1)
        tables = {"segment": at // K1, "cls": (at % K1 == 0).long()}
        first = (at % K1 == 0).to(x.device)[:, None]
        flat, real = x.flatten(1, 2), there.flatten(1)[:, None, None]
        for letter, layer in zip(self.stack, self.layers, strict=True):
            mask = hat().mask(N * K1, N * K1, causal=False, layer="SD".index(letter), tables=tables).to(x.device) & real
            given = flat if letter == "S" else torch.where(first, flat + self.place_NW[:N].repeat_interleave(K1, 0), flat)
            new = layer(given, lambda q, k, v, mask=mask: masked(q, k, v, mask, q.shape[-1] ** -0.5)[0])
            flat = new if letter == "S" else torch.where(first, new, flat)
        x = flat.view(x.shape)
        return x[:, :, 1:].reshape(B, -1, W)[:, : x_BTW.shape[1]], x[:, :, 0]

    def pairs(self, T: int) -> int:
        """Query-key pairs that the stack forms for T tokens, a head; dense layers over T tokens would form len(stack) T^2."""
        N = -(-T // self.segment)
        return sum(N * (1 + self.segment) ** 2 if letter == "S" else N * N for letter in self.stack)


def _over(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Dense attention to the keys that are there; zeros where none is."""
    if bool(keep.all()):
        return scaled_dot_product_attention(q, k, v)
    return masked(q, k, v, keep, q.shape[-1] ** -0.5)[0]
