"""Scatterbrain (Chen et al. 2021, arXiv 2110.15343): exact where it is large, low-rank everywhere else.

    A_ts = exp(q_t k_s)                     on the support S, pairs that hash alike
    A_ts = phi(q_t) . phi(k_s)              elsewhere, positive random features (Performer)
    phi(x) = exp(w_m x - |x|^2 / 2) / sqrt(M),  w_m ~ N(0, 1),  so that E[phi(q) phi(k)] = exp(q k)
Numerator and normaliser are those of A: running sums of phi(k) [v, 1], and on S the difference exp(q k) - phi(q) phi(k), without forming
A. Expected over the features A is exact everywhere; on S it is so always.

The support holds the budget's share of the keys a query sees, those that share its bucket in the most rounds of hashing, of equal ones the
newest. The paper takes buckets whole (as Reformer does), which fixes no share.
Shape letters as in hashing.py; M = features, X = listed keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.block_attention import key_lists
from ...kernels.block_attention.agree import agreements
from ...method import not_negative, positive
from ..block import TokenAttention
from ..heads import per_head
from .hashing import codes, planes
from .scores import later

STRETCH = 64
"""Keys that enter the running sums at a time."""
_AT_ONCE = 1 << 21
"""Numbers of gathered features held at a time."""


class Scatterbrain(TokenAttention):
    """A sparse support computed exactly over a low-rank estimate of the rest. Density counts the support.

    Args:
        budget: share of a query's visible keys in the support.
        features: M.
        rounds: hashes that rank keys. bits: of a bucket.
        seed: of features and hashes.
    """

    name = "attention/scatterbrain"

    def __init__(self, budget: float = 0.25, features: int = 64, rounds: int = 8, bits: int = 4, seed: int = 0) -> None:
        super().__init__(budget)
        self.features, self.rounds, self.bits = positive("features", features), positive("rounds", rounds), positive("bits", bits, 24)
        self.seed = int(not_negative("seed", seed))

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, T, S] rounds in which a pair agrees, and less than one for being new."""
        normal = planes(q_BHTD.shape[-1], self.rounds, self.bits, self.seed, q_BHTD)
        match = agreements(codes(q_BHTD, normal, self.bits), codes(k_BGSD, normal, self.bits))
        return match.double() + torch.arange(k_BGSD.shape[2], device=match.device, dtype=torch.float64) * 2.0**-40

    def logs(self, x: Tensor, scale: float) -> Tensor:
        """[..., M] log of sqrt(M) phi(x sqrt(scale)), float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * scale**0.5
        random_DM = torch.randn(x.shape[-1], self.features, generator=torch.Generator().manual_seed(self.seed + 1)).to(wide)
        return wide @ random_DM - wide.square().sum(-1, keepdim=True) / 2

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        (_, H, T, D), S, unit = q.shape, k.shape[2], scale * q.shape[-1] ** 0.5
        self._shape = (H, D, S, T)
        mask = self._chosen(q if abs(unit - 1) < 1e-12 else q * unit, k, v, causal)
        self._count(mask, T, S, causal)
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            log_q, log_k = self.logs(q, scale), per_head(self.logs(k, scale), H)
            k, v = per_head(k, H).to(wide), pad(per_head(v, H).to(wide), (0, 1), value=1.0)      # the last column adds up the normaliser
            top_q, top_k = log_q.detach().amax(-1, keepdim=True), log_k.detach().amax((-1, -2), keepdim=True)
            sums = running((log_q - top_q).exp(), (log_k - top_k).exp(), v, causal)
            size = top_q + top_k - math.log(self.features)            # log of what the sums are short of
            index, outs = key_lists(mask), []
            step = max(1, _AT_ONCE // max(1, q.shape[0] * H * index.shape[-1] * (self.features + D)))
            for at in range(0, T, step):
                cut = slice(at, at + step)
                mine = q[:, :, cut].to(wide) * scale
                outs.append(self._mend(sums[:, :, cut], size[:, :, cut], index[:, :, cut], mine, k, v, log_q[:, :, cut], log_k))
            return torch.cat(outs, 2).to(q.dtype)

    def _mend(
        self, sums: Tensor, size: Tensor, index: Tensor, q: Tensor, k: Tensor, v: Tensor, log_q: Tensor, log_k: Tensor
    ) -> Tensor:
        """[B, H, T, D] from the sums, with listed pairs at their exact weight."""

        def at(x: Tensor) -> Tensor:
            return x.gather(2, index.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, index.shape[2:])

        there = index >= 0
        exact = (at(k) @ q[..., None])[..., 0].masked_fill(~there, -torch.inf)
        rough = ((log_q[..., None, :] + at(log_k)).logsumexp(-1) - math.log(self.features)).masked_fill(~there, -torch.inf)
        top = torch.maximum(torch.maximum(exact, rough).detach().amax(-1, keepdim=True), size)
        change = (exact - top).exp() - (rough - top).exp()
        total = sums * (size - top).exp() + (change[..., None, :] @ at(v))[..., 0, :]
        return total[..., :-1] / total[..., -1:].clamp_min(torch.finfo(total.dtype).tiny)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """A, formed."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        (_, H, T, D), S = q_BHTD.shape, k_BGSD.shape[2]
        log_q, log_k = self.logs(q_BHTD, D**-0.5), per_head(self.logs(k_BGSD, D**-0.5), H)
        rough = (log_q[..., None, :] + log_k[:, :, None]).logsumexp(-1) - math.log(self.features)
        exact = (q_BHTD @ per_head(k_BGSD, H).mT * D**-0.5).to(rough.dtype)
        score = torch.where(self.choose(q_BHTD, k_BGSD, True), exact, rough)
        return score.masked_fill(later(T, S, score), -torch.inf).softmax(-1).to(v_BGSD.dtype) @ per_head(v_BGSD, H)

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Hashes and features of the query and one new key, the running sums, and the estimate on the support."""
        made = 4 * heads * width * (self.bits * self.rounds + self.features)
        return made + heads * self.features * (4 * width + 2 * self.budget * keys)


def running(q_BHTM: Tensor, k_BHSM: Tensor, v_BHSE: Tensor, causal: bool) -> Tensor:
    """[B, H, T, E] sums over the keys each query sees of (q . k) v."""
    T, S = q_BHTM.shape[2], k_BHSM.shape[2]
    if not causal:
        return q_BHTM @ (k_BHSM.mT @ v_BHSE)
    state, outs = v_BHSE.new_zeros(*v_BHSE.shape[:2], k_BHSM.shape[-1], v_BHSE.shape[-1]), []
    for start in range(0, S, STRETCH):
        stop = min(S, start + STRETCH)
        first, last = max(0, start - S + T), max(0, stop - S + T)
        if last > first:
            near = q_BHTM[:, :, first:last] @ k_BHSM[:, :, start:stop].mT
            ahead = later(last - first, stop - start, near)
            outs.append(q_BHTM[:, :, first:last] @ state + near.masked_fill(ahead, 0.0) @ v_BHSE[:, :, start:stop])
        state = state + k_BHSM[:, :, start:stop].mT @ v_BHSE[:, :, start:stop]
    return torch.cat(outs, 2)
