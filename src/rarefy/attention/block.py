"""What every attention method shares: choose key blocks, attend to those, count what was kept.

Shape letters: B = batch, H = query heads, G = key heads, T = queries, S = keys, D = head width, Q = query blocks,
N = key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import BadInput
from ..kernels.block_attention import Allowed, block_attention, block_attention_reference, blocks_of
from ..method import Sparse, fraction, positive
from ..selection import Selection, check_finite


def highest(score: Tensor, keep: Tensor) -> Tensor:
    """[..., N] bool: the `keep` [..., 1] highest scores of each row, of equal ones those with the lower index."""
    if not score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    order = score.topk(int(keep.max()), dim=-1).values
    least = order.gather(-1, (keep - 1).expand(*score.shape[:-1], 1))
    above, level = score > least, score == least
    return above | level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True))


class BlockAttention(Sparse):
    """softmax attention over chosen key blocks.

    A query at position p sees p + 1 keys in n = p // block + 1 blocks; of these max(1, round(budget * n)) are kept,
    its own always among them. With `query_block` > 1, queries of one block share a choice in prefill (faster; a query
    then is served by a choice that its block mates took part in). With query_block=1 prefill equals decoding exactly.

    Args:
        budget: fraction of the key blocks that a query can see.
        block: keys in a block (a page).
        query_block: queries that share a choice in prefill; decoding always chooses for its own query.
    """

    unit = "key block"

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1) -> None:
        super().__init__()
        self._budget = fraction("budget", budget)
        self.block, self.query_block = positive("block", block), positive("query_block", query_block)
        self._kept = self._seen = 0.0
        self._shape: tuple[int, int, int, int] | None = None

    @property
    def budget(self) -> float:
        """Fraction of visible key blocks kept."""
        return self._budget

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        """[B, H, Q, N] importance of each key block for each block of `rows` queries."""
        raise NotImplementedError

    def allowed(self) -> Allowed | None:
        """A pattern finer than a block, if the method has one."""
        return None

    def _rows(self, T: int) -> int:
        return 1 if T == 1 else self.query_block

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool block mask."""
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        rows = self._rows(T)
        score = self.scores(q_BHTD.detach(), k_BGSD.detach(), rows, causal)
        Q, N = blocks_of(T, S, self.block, rows)
        last_Q = (((S - T) // rows + torch.arange(1, Q + 1, device=score.device)) * rows).clamp_max(S) - 1
        own_Q = last_Q // self.block
        n = torch.arange(N, device=score.device)
        if causal:
            first_Q = ((S - T) // rows + torch.arange(Q, device=score.device)) * rows // self.block
            score = score.masked_fill(n > own_Q[:, None], -torch.inf)
            score = score.masked_fill((n <= own_Q[:, None]) & (n >= first_Q[:, None]), torch.inf)
            visible_Q = own_Q + 1
        else:
            visible_Q = torch.full_like(own_Q, N)
        # Python's round, for exactly the count that `budget` promises
        keep_Q = torch.tensor([max(1, round(self._budget * v)) for v in visible_Q.tolist()], device=score.device)
        return highest(score, keep_Q[:, None]) & (score > -torch.inf) | (score == torch.inf)

    def _refuse(self, x: Tensor, what: str, where: str = "") -> None:
        """check_finite, screened by a sum: a tenth of the time on a long cache, and no NaN or inf leaves a sum finite."""
        if not x.detach().sum(dtype=torch.float32 if x.element_size() < 4 else x.dtype).isfinite():
            check_finite(x, f"{what} of {self.name}{where}")

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor | None = None) -> Selection:
        """Chosen key blocks of causal attention, mask form [B, H, Q, N]."""
        self._refuse(q_BHTD, "queries")
        self._refuse(k_BGSD, "keys")
        mask = self.choose(q_BHTD, k_BGSD, True)
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True,
        padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        """[B, H, T, D]; query t stands at position S - T + t.

        Args:
            padding_BS: True at real keys. Blocks are cut over real keys only, so the side of the padding is without
                effect; padded queries give zeros.
        """
        for what, x in (("queries", q_BHTD), ("keys", k_BGSD), ("values", v_BGSD)):
            self._refuse(x, what, f" in layer {layer}")
        if q_BHTD.shape[1] % k_BGSD.shape[1]:
            raise BadInput(f"{q_BHTD.shape[1]} query heads are no multiple of {k_BGSD.shape[1]} key heads")
        if padding_BS is None:
            return self._attend(q_BHTD, k_BGSD, v_BGSD, scale, causal)
        out = torch.zeros_like(q_BHTD)
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        for b, real_S in enumerate(padding_BS):
            keys = real_S.nonzero()[:, 0]
            queries = real_S[S - T :].nonzero()[:, 0] if causal else torch.arange(T, device=real_S.device)
            if len(keys) and len(queries):
                got = self._attend(q_BHTD[b : b + 1, :, queries], k_BGSD[b : b + 1, :, keys], v_BGSD[b : b + 1, :, keys], scale, causal)
                out[b, :, queries] = got[0]
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        mask = self.choose(q, k, causal)
        self._shape = (q.shape[1], q.shape[-1], k.shape[2], q.shape[2])
        self._count(mask, q.shape[2], k.shape[2], causal)
        rows = self._rows(q.shape[2])
        return block_attention(q, k, v, mask, block=self.block, query_block=rows, scale=scale, causal=causal, allowed=self.allowed())

    @torch.no_grad()
    def _count(self, mask_BHQN: Tensor, T: int, S: int, causal: bool) -> None:
        """Add to the kept and the visible (query, key) pairs."""
        rows = self._rows(T)
        at_T = torch.arange(S - T, S, device=mask_BHQN.device)
        last_T = at_T if causal else torch.full_like(at_T, S - 1)
        start_N = torch.arange(mask_BHQN.shape[-1], device=mask_BHQN.device) * self.block
        pairs_TN = (last_T[:, None] + 1 - start_N).clamp(0, self.block).double()
        pairs_TN = pairs_TN.minimum((S - start_N).clamp_max(self.block).double())
        pairs_QN = torch.zeros(mask_BHQN.shape[2:], dtype=torch.float64, device=mask_BHQN.device)
        pairs_QN.index_add_(0, at_T // rows - (S - T) // rows, pairs_TN)
        self._kept += float((mask_BHQN * pairs_QN).sum())
        self._seen += float(pairs_QN.sum()) * mask_BHQN.shape[0] * mask_BHQN.shape[1]

    def measured_density(self) -> float:
        """Pairs kept of pairs visible, over every call since this was last asked; 1 if there was none."""
        kept, seen = self._kept, self._seen
        self._kept = self._seen = 0.0
        return kept / seen if seen else 1.0

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[-1] ** -0.5)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Dense scores, unchosen pairs at minus infinity."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        mask = self.choose(q_BHTD, k_BGSD, True)
        return block_attention_reference(
            q_BHTD, k_BGSD, v_BGSD, mask, block=self.block, query_block=self._rows(q_BHTD.shape[2]),
            scale=q_BHTD.shape[-1] ** -0.5, allowed=self.allowed(),
        )

    def _dims(self) -> tuple[int, int, float]:
        if self._shape is None:
            raise BadInput(f"{self.name}: the cost depends on heads and context; run it once, then ask")
        H, D, S, T = self._shape
        return H, D, S - (T - 1) / 2

    def selection_flops(self, heads: int, width: int, keys: float) -> float:
        """Work of choosing, a query."""
        return 0.0

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call, all heads, choosing included; bytes are keys and values in float32."""
        H, D, S = self._dims()
        density = self._budget if density is None else density
        return Cost(4 * H * D * S * density + self.selection_flops(H, D, S), 8 * H * D * S * density)

    def dense_cost(self) -> Cost:
        """Per query of dense causal attention at the same context."""
        H, D, S = self._dims()
        return Cost(4 * H * D * S, 8 * H * D * S)
