"""SPT's sparse attention (Gui et al. 2023, arXiv 2312.10365): keys are ranked by how many of their codes they share with the query.

    a head of width D is cut in M parts; the code of a part is the nearest of E codewords, the same words for queries and keys of a key head
    a query attends exactly to the L keys with the most equal codes; of as many, to the nearest

The codewords follow the data by their quantisation error, mean ||x - codeword(x)||^2 over queries and keys (`Distilled`). L is the budget's share
of the keys seen. The other half of the paper, a routed feed-forward layer, is no attention and not here.

Shape letters as in base.py; M = parts, E = codewords, C = D / M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import Loss, fraction, positive
from .base import PairAttention, causal_mask, drawn, top_share


class SPT(PairAttention):
    """The budget's share of keys by product-quantised codes; train it with `Distilled`.

    Args:
        budget: share of the keys a query sees. parts: that a head is cut in, a divisor of its width. words: in each part's codebook.
    """

    name = "attention/spt"

    def __init__(self, heads: int, key_heads: int, d_head: int, budget: float = 0.25, parts: int = 8, words: int = 16, seed: int = 0) -> None:
        super().__init__()
        draw = self.sized(heads, key_heads, d_head, seed)
        self._budget, self.parts, self.words = fraction("budget", budget), positive("parts", parts), positive("words", words)
        if d_head % parts:
            raise BadInput(f"parts={parts} must divide d_head={d_head}")
        self.word_GMEC = drawn(draw, key_heads, parts, words, d_head // parts, std=1.0)

    @property
    def budget(self) -> float:
        """Share of visible keys kept."""
        return self._budget

    def distances(self, x_BHND: Tensor) -> Tensor:
        """[B, H, N, M, E] squared distances of each part to the codewords, for queries or keys."""
        word = self.word_GMEC.repeat_interleave(x_BHND.shape[1] // self.key_heads, 0)
        part = x_BHND.unflatten(3, (self.parts, -1))
        cross = torch.einsum("bhnmc,hmec->bhnme", part, word)
        return part.square().sum(-1, keepdim=True) - 2 * cross + word.square().sum(-1)[:, None]

    def matches(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, T, S] number of equal codes, by products of one-hot codes."""
        code_q, code_k = (torch.nn.functional.one_hot(self.distances(x).argmin(-1), self.words).flatten(3).to(q.dtype) for x in (q, k))
        return code_q @ code_k.repeat_interleave(self.heads // self.key_heads, 1).mT

    @torch.no_grad()
    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool."""
        T, S = q.shape[2], k.shape[2]
        seen = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
        far = (torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)).abs()
        rank = self.matches(q, k).double() * S - far                                     # whole numbers: equal codes first, then distance
        return top_share(rank, seen, self._budget)

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """Squared distance of queries and keys from their codewords, a part."""
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        error = (self.distances(q_BHTD).amin(-1).mean() + self.distances(k_BGSD).amin(-1).mean()) / 2
        return Loss(error, {"quantisation": error})

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Codes of a query and its key; comparing codes is no arithmetic on floats."""
        return 2 * (heads + self.key_heads) * width * self.words
