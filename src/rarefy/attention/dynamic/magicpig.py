"""MagicPIG (Chen et al. 2024, arXiv 2410.16179): keys drawn by hashing, weighed by the odds of being drawn.

Where attention is spread out, the largest weights say little of the mean over all. Keys that share their bucket with the query in two of L
tables of K bits are a sample of all keys with probabilities known in closed form,
    u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1),   p = 1 - angle(q, k - c) / pi,
so softmax over the sample of logits minus log u estimates the whole softmax (self-normalised importance sampling). First and recent
keys are attended to exactly. Keys are hashed about their mean c, since they lie on one side of the origin.

The paper takes c over the prompt but for first and recent keys, and hashes in decoding only. Here prefill draws too, and c is the mean of the
first `centre` keys but for the sinks, so that a query's draw does not depend on what follows it; queries that see no more than those attend to
everything. The authors' kernel adds 1e-4 to u, here it is exact.
Shape letters as in hashing.py; X = listed keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...kernels.block_attention import token_attention
from ...method import not_negative, positive
from ..block import TokenAttention
from ..heads import per_head
from ..trained.base import listed
from .hashing import codes, collisions, planes, share_two


class MagicPIG(TokenAttention):
    """Sampled attention. How many keys are drawn follows from bits, tables and the angles; `measured_density` says.

    Args:
        bits: of a table; more draw fewer keys, nearer to the query.
        tables: more draw more keys.
        sinks: first keys that are always attended to.
        window: newest keys that are always attended to, the query's own among them.
        centre: keys at the start whose mean, but for the sinks among them, is taken off before hashing.
        seed: of the hyperplanes; averaged over seeds, numerator and normaliser are those of dense attention.
    """

    name = "attention/magicpig"
    wants = ("cache",)

    def __init__(self, bits: int = 8, tables: int = 75, sinks: int = 4, window: int = 64, centre: int = 128, seed: int = 0) -> None:
        super().__init__(1.0)
        self.bits, self.tables = positive("bits", bits, 24), positive("tables", tables)
        if tables < 2:
            raise BadInput(f"tables={tables} must be at least 2: a key is drawn when two of them agree")
        if sinks < 0:
            raise BadInput(f"sinks={sinks} must be >= 0")
        self.sinks, self.window, self.centre = sinks, positive("window", window), positive("centre", centre)
        self.seed = int(not_negative("seed", seed))

    def exact(self, T: int, S: int, causal: bool, like: Tensor) -> Tensor:
        """[T, S] bool: pairs that are attended to whatever the hashes say."""
        at_S, at_T = torch.arange(S, device=like.device), torch.arange(S - T, S, device=like.device)[:, None]
        if not causal:
            return ((at_S - at_T).abs() < self.window) | (at_S < self.sinks) | (self.centre >= S)
        return ((at_T - at_S < self.window) | (at_S < self.sinks) | (at_T < self.centre)) & (at_S <= at_T)

    def drawn(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        """[B, H, T, S] bool: pairs that share their bucket in two tables or more."""
        normal, centre = planes(q_BHTD.shape[-1], self.tables, self.bits, self.seed, q_BHTD), self._centre(k_BGSD)

        def hashed(k: Tensor) -> Tensor:
            return codes(k - centre, normal, self.bits)

        keep = getattr(self._cache, "summary", None)
        code_k = hashed(k_BGSD) if keep is None else keep(f"{self.name}/{self.bits}/{self.tables}/{self.seed}/{self.centre}", hashed, 1)
        return collisions(codes(q_BHTD, normal, self.bits), code_k) >= 2

    def _centre(self, k_BGSD: Tensor) -> Tensor:
        return k_BGSD[:, :, min(self.sinks, self.centre - 1) : self.centre].mean(2, keepdim=True)

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        exact = self.exact(T, S, causal, q_BHTD)
        if self.centre >= S or not q_BHTD.numel():          # nothing is drawn yet, and the mean that hashes go by is not known
            return exact.expand(*q_BHTD.shape[:2], T, S)
        drawn = self.drawn(q_BHTD.detach(), k_BGSD.detach())
        at_S = torch.arange(S, device=q_BHTD.device)
        return exact | (drawn & (at_S <= at_S[S - T :, None]) if causal else drawn)

    def log_weights(self, q_BHTD: Tensor, k_BHTXD: Tensor, centre_BGD: Tensor, exact_BHTX: Tensor) -> Tensor:
        """[B, H, T, X] -log u of drawn keys, 0 of those attended to exactly. A graph of its own: gradients go through u too."""
        moved = k_BHTXD - per_head(centre_BGD, q_BHTD.shape[1]).unsqueeze(3)
        cosine = torch.cosine_similarity(q_BHTD[..., None, :].double(), moved.double(), -1)
        odds = share_two(cosine.masked_fill(exact_BHTX, 0.0), self.bits, self.tables)
        return torch.where(exact_BHTX, 0.0, -odds.clamp_min(1e-30).log()).to(torch.promote_types(q_BHTD.dtype, torch.float32))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        (B, H, T, D), S = q.shape, k.shape[2]
        self._shape = (H, D, S, T)
        mask = self._chosen(q, k, v, causal)
        self._count(mask, T, S, causal)
        index, centre, exact = listed(mask), self._centre(k), self.exact(T, S, causal, q)
        at = index.clamp_min(0)
        keys = per_head(k, H)
        bias = []
        step = max(1, (1 << 21) // max(1, B * H * index.shape[-1] * D))
        for start in range(0, T, step):
            cut = at[:, :, start : start + step]
            near = keys.gather(2, cut.flatten(2)[..., None].expand(-1, -1, -1, D)).unflatten(2, cut.shape[2:])
            sure = exact[start : start + step].expand(B, H, -1, -1).gather(3, cut)
            bias.append(self.log_weights(q[:, :, start : start + step], near, centre, sure))
        return token_attention(q, k, v, index, scale=scale, bias_BHTK=torch.cat(bias, 2))

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Dense scores minus log u, undrawn pairs at minus infinity."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        (_, H, T, D), S = q_BHTD.shape, k_BGSD.shape[2]
        k, v = per_head(k_BGSD, H), per_head(v_BGSD, H)
        mask, exact = self.choose(q_BHTD, k_BGSD, True), self.exact(T, S, True, q_BHTD)
        weight = self.log_weights(q_BHTD, k[:, :, None], self._centre(k_BGSD), exact.expand(mask.shape))
        score = (q_BHTD @ k.mT * D**-0.5 + weight).masked_fill(~mask, -torch.inf)
        return score.softmax(-1).to(v.dtype) @ v

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Hashes of the query and of one new key; comparing buckets is whole-number work."""
        return 4 * heads * width * self.bits * self.tables
