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
from ...kernels.block_attention import available, key_lists, token_attention
from ...kernels.block_attention.agree import agreements
from ...kernels.block_attention.listed import listed_products
from ...method import not_negative, positive
from ..block import AT_ONCE, TokenAttention
from ..heads import per_head
from .hashing import codes, planes, share_two


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
        self._whole: dict[str, Tensor] = {}

    def exact(self, T: int, S: int, causal: bool, like: Tensor) -> Tensor:
        """[T, S] bool: pairs that are attended to whatever the hashes say."""
        at_S, at_T = torch.arange(S, device=like.device), torch.arange(S - T, S, device=like.device)[:, None]
        if not causal:
            return ((at_S - at_T).abs() < self.window) | (at_S < self.sinks) | (self.centre >= S)
        return ((at_T - at_S < self.window) | (at_S < self.sinks) | (at_T < self.centre)) & (at_S <= at_T)

    def drawn(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        """[B, H, T, S] bool: pairs that share their bucket in two tables or more."""
        normal = planes(q_BHTD.shape[-1], self.tables, self.bits, self.seed, q_BHTD)
        return agreements(codes(q_BHTD, normal, self.bits), self._known("codes", k_BGSD)) >= 2

    def _known(self, what: str, k_BGSD: Tensor) -> Tensor:
        """Codes [B, G, S, L] of the keys about their centre, or their distances from it [B, G, S]; of new keys alone where the cache keeps them."""
        if what in self._whole:
            return self._whole[what][:, :, : k_BGSD.shape[2]]
        centre = self._centre(k_BGSD)

        def make(k: Tensor) -> Tensor:
            moved = k - centre
            return moved.norm(dim=-1) if what == "norms" else codes(moved, planes(k.shape[-1], self.tables, self.bits, self.seed, k), self.bits)

        keep = getattr(self._cache, "summary", None)
        label = f"{self.name}/{what}/{self.bits}/{self.tables}/{self.seed}/{self.sinks}/{self.centre}"
        return make(k_BGSD) if keep is None else keep(label, make, 1)

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
        wide = torch.promote_types(q_BHTD.dtype, torch.float32)
        cosine = torch.cosine_similarity(q_BHTD[..., None, :].to(wide), moved.to(wide), -1)
        odds = share_two(cosine.masked_fill(exact_BHTX, 0.0), self.bits, self.tables)
        return torch.where(exact_BHTX, 0.0, -odds.clamp_min(1e-30).log()).to(torch.promote_types(q_BHTD.dtype, torch.float32))

    def _log_weights(self, q: Tensor, k: Tensor, index: Tensor, exact_TS: Tensor) -> Tensor:
        """`log_weights` of listed keys without their vectors: cos(q, k - c) = (q k - q c) / (|q| |k - c|)."""
        H, at = q.shape[1], index.clamp_min(0)
        sure = exact_TS.expand(*q.shape[:2], -1, -1).gather(3, at)
        across = (q * per_head(self._centre(k), H)).sum(-1, keepdim=True)
        far = per_head(self._known("norms", k), H)[:, :, None].expand(-1, -1, q.shape[2], -1).gather(3, at)
        cosine = (listed_products(q, k, at) - across) / (q.norm(dim=-1, keepdim=True) * far).clamp_min(1e-12)
        odds = share_two(cosine.masked_fill(sure, 0.0), self.bits, self.tables)
        return torch.where(sure, 0.0, -odds.clamp_min(1e-30).log()).float()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        (B, H, T, D), S = q.shape, k.shape[2]
        if causal and T > AT_ONCE and S > self.centre:
            try:
                self._whole = {what: self._known(what, k.detach()) for what in ("codes", "norms")}
                return self._attend_in_turn(q, k, v, scale)
            finally:
                self._whole = {}
        self._shape = (H, D, S, T)
        mask = self._chosen(q, k, v, causal)
        self._count(mask, T, S, causal)
        index, centre, exact = key_lists(mask), self._centre(k), self.exact(T, S, causal, q)
        at = index.clamp_min(0)
        if available(q, k, v):
            return token_attention(q, k, v, index, scale=scale, bias_BHTK=self._log_weights(q, k, index, exact))
        batch, head, bias = torch.arange(B, device=q.device)[:, None, None, None], torch.arange(H, device=q.device)[:, None, None], []
        step = max(1, (1 << 21) // max(1, B * H * index.shape[-1] * D))
        for start in range(0, T, step):
            cut = at[:, :, start : start + step]
            near = k[batch, head // (H // k.shape[1]), cut]
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
