"""ActQKV (Xiao et al. 2025): blocks retrieved for a window of tokens by one probe, in which unusual tokens weigh more.

Shape letters: B = batch, H = query heads, G = key heads, T = new tokens, S = tokens held, N = blocks, D = head width, E = width of
the model, L = layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import Unsupported
from ...method import positive
from .aligned import Aligned
from .entries import attend_entries, dense, first_of
from .policy import Policy, PolicyLayer, Rotary


def activation_weights(hidden_BTE: Tensor, real_BT: Tensor) -> Tensor:
    """[B, T] summing to 1: how far each token's activations are from the window's mean, as a share of all; 0 at padding."""
    real = real_BT[..., None].to(hidden_BTE.dtype)
    mean = (hidden_BTE * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    bias = (hidden_BTE - mean).norm(dim=-1) * real_BT + 1e-12 * real_BT
    return bias / bias.sum(1, keepdim=True).clamp_min(1e-30)


def shares(density_L: Tensor, budget: float) -> Tensor:
    """[L] fractions in (0, 1] in proportion to the densities, cut off at 1, whose mean is the budget."""
    density = density_L.double().clamp_min(1e-9)
    full = torch.zeros_like(density, dtype=torch.bool)
    share = torch.ones_like(density)
    for _ in range(len(density)):
        left = budget * len(density) - float(full.sum())
        share = torch.where(full, 1.0, density * left / density[~full].sum().clamp_min(1e-30))
        over = (share >= 1) & ~full
        if not bool(over.any()):
            break
        full |= over
    return share.clamp_max(1.0)


class _Layer(PolicyLayer):
    policy: ProbeQuery

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__(policy, index)
        self.all = Aligned()
        self.mean: Tensor | None = None
        """Mean key of each block [B, G, N, D]."""
        self.density: Tensor | None = None
        """[B] share of its blocks over which the last choice was spread: exp(entropy) / N."""

    def answer(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, at_BT: Tensor, *, scale: float, rotary: Rotary, hidden_BTD: Tensor | None
    ) -> Tensor:
        held = len(self.all)
        self.all.place(at_BT, k=k_BGTD, v=v_BGTD)
        self._means(int(at_BT.clamp_min(0).amin()) if held else 0)
        if not held:
            return dense(q_BHTD, k_BGTD, v_BGTD, at_BT, scale)
        if q_BHTD.shape[2] == 1:
            weight_BT = (at_BT >= 0).to(q_BHTD.dtype)
        elif hidden_BTD is None:
            raise Unsupported(f"{self}: a window is weighted by its activations, and the attention module's input was not seen")
        else:
            weight_BT = activation_weights(hidden_BTD, at_BT >= 0).to(q_BHTD.dtype)
        at_BGS = self._choose((q_BHTD * weight_BT[:, None, :, None]).sum(2), at_BT, scale)
        count_B = (at_BGS >= 0).sum(-1).amax(1)
        index = first_of(torch.zeros(at_BGS.shape, device=q_BHTD.device), at_BGS, count_B.clamp_min(1))
        wide = index.clamp_min(0)[..., None].expand(*index.shape, k_BGTD.shape[-1])
        k, v = self.all["k"].gather(2, wide), self.all["v"].gather(2, wide)
        return attend_entries(q_BHTD, k, v, index, at_BT, scale)[0]

    def _means(self, first_new: int) -> None:
        start, block = first_new // self.policy.block, self.policy.block
        there = (self.all.at()[:, start * block :] >= 0)[:, None, :, None]
        keys = self.all["k"][:, :, start * block :] * there
        short = -keys.shape[2] % block
        total, count = (torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block)).sum(3) for x in (keys, there.to(keys.dtype)))
        new = total / count.clamp_min(1)
        self.mean = new if self.mean is None else torch.cat([self.mean[:, :, :start], new], 2)

    def _choose(self, probe_BHD: Tensor, at_BT: Tensor, scale: float) -> Tensor:
        """[B, G, S] places that are read, -1 at the others: the best blocks of the past, its last one, and all new tokens."""
        assert self.mean is not None
        block, place_BS = self.policy.block, self.all.at()
        first_B = at_BT.masked_fill(at_BT < 0, 2**31 - 1).amin(1).minimum(place_BS.amax(1) + 1)     # first new place of each row
        past_B = -(-first_B // block)
        score = (probe_BHD.unflatten(1, (self.mean.shape[1], -1)).sum(2)[:, :, None] * self.mean).sum(-1) * scale    # [B, G, N]
        n = torch.arange(score.shape[-1], device=score.device)
        past_BN = n < past_B[:, None]
        p = score.masked_fill(~past_BN[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        entropy_B = -(p * p.clamp_min(1e-30).log()).sum(-1).mean(1)
        share_B = self.policy.share_of(self, len(first_B)) if at_BT.shape[1] == 1 else [self.budget] * len(first_B)
        self.density = entropy_B.exp() / past_B.clamp_min(1)
        keep_B = torch.tensor([max(1, round(s * n)) for s, n in zip(share_B, past_B.tolist(), strict=True)], device=score.device)
        ranked = score.masked_fill(n == (past_B - 1)[:, None, None], torch.inf).masked_fill(~past_BN[:, None], -torch.inf)
        rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = (rank < keep_B[:, None, None]) & past_BN[:, None]
        read = chosen.repeat_interleave(block, 2)[..., : place_BS.shape[1]] | (place_BS >= first_B[:, None])[:, None]
        return torch.where(read & (place_BS >= 0)[:, None], place_BS[:, None], -1)

    def kept(self) -> Tensor:
        assert self.all.count_B is not None
        return self.all.count_B[:, None].expand(-1, self.all["k"].shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return self.all.tensors() | {name: x for name, x in (("mean", self.mean), ("density", self.density)) if x is not None}

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        self.all.rows(take)
        self.mean = None if self.mean is None else take(self.mean)
        self.density = None if self.density is None else take(self.density)


class ProbeQuery(Policy):
    """Every entry stays; each window of tokens (a call's) reads the past blocks that its probe scores highest, the last among them.

    The probe is the window's queries weighted by how far each token's activations (here the attention module's input) lie from
    the window's mean; blocks are scored by probe . mean key, query heads of a key head summed. A first window has no past and is
    dense, so the text should be read in windows of some hundred tokens. In single-token steps the layers share the budget in
    proportion to how spread their last choice was, exp(entropy) / blocks, their mean staying the budget. The abstract leaves both
    formulas open; these are ours.

    Args:
        budget: fraction of past blocks read.
        block: entries in a block.
    """

    name = "cache/probe"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, block: int = 16) -> None:
        super().__init__(budget)
        self.block = positive("block", block)

    def share_of(self, layer: _Layer, rows: int) -> list[float]:
        """This layer's fraction of the blocks, for each row."""
        density = [one.density for one in self.layers if isinstance(one, _Layer) and one.density is not None]
        if len(density) < len(self.layers) or len(self.budgets) > 1:
            return [layer.budget] * rows
        return [float(shares(column, layer.budget)[layer.index]) for column in torch.stack(density).T]
