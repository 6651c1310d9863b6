"""What every weights method shares: a linear layer of which some entries are kept.

Shape letters: O = outputs, I = inputs, ... = rows.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..cost import Cost
from ..errors import BadInput
from ..kernels.gather_linear.modules import linear_parts
from ..method import Sparse, fraction, positive
from ..selection import Selection, check_finite, kept


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """Weight [O, I], on the module's own storage, of a Linear or of transformers' Conv1D, which keeps it transposed.

    Raises:
        Unsupported: another module, a quantised weight or one not in memory. BadInput: NaN or inf in it.
    """
    return linear_parts(module, name)[0]


def keep_highest(scores: Tensor, k: int) -> Tensor:
    """Bool mask of the k highest of the last dim; among equals the lower index wins, so masks of rising k are nested."""
    n = scores.shape[-1]
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    tau = scores.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, equal = scores > tau, scores == tau
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


class MaskedLinear(Sparse):
    """y = (W * mask) x + b. Subclasses say how entries are scored.

    Args:
        d_in, d_out: I and O.
        budget: fraction of each output's weights kept (row by row, as Wanda compares them).
        n, m: keep n of every m consecutive inputs instead; the budget is then n / m.
        group: "row" compares within an output, "layer" over the whole matrix (unstructured only).
    """

    unit = "weight"

    mask_OI: Tensor

    def __init__(
        self, d_in: int, d_out: int, budget: float = 0.5, n: int = 0, m: int = 0, bias: bool = True, group: str = "row",
    ) -> None:
        super().__init__()
        positive("d_in", d_in)
        positive("d_out", d_out)
        fraction("budget", budget)
        if (n or m) and not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
            raise BadInput(f"n={n}, m={m}: give both, with 1 <= n <= m, or neither")
        if m and d_in % m:
            raise BadInput(f"m={m} does not divide d_in={d_in}; choose an m that does")
        if m and budget not in (0.5, n / m):
            raise BadInput(f"budget={budget} contradicts {n}:{m}, which keeps {n / m:g}; leave one out")
        if group not in ("row", "layer") or (m and group == "layer"):
            raise BadInput(f"group={group!r} must be row or layer, and row with n and m")
        self.d_in, self.d_out, self.n, self.m, self.group = d_in, d_out, n, m, group
        self._budget = n / m if m else float(budget)
        self.weight_OI = nn.Parameter(torch.zeros(d_out, d_in))
        self.bias_O = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.register_buffer("mask_OI", torch.ones(d_out, d_in, dtype=torch.bool))

    @classmethod
    def for_module(cls, module: nn.Module, **arguments: Any) -> Self:
        """Stand in for a Linear or Conv1D, with a copy of its weight; methods that need no data choose at once."""
        weight_OI = dense_weight(module, cls.name)
        bias = getattr(module, "bias", None)
        made = cls(weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, **arguments).to(weight_OI)
        with torch.no_grad():
            made.weight_OI.copy_(weight_OI)
            if bias is not None and made.bias_O is not None:
                made.bias_O.copy_(bias)
        made.mask_OI = made.mask_OI.bool()
        if cls.fitted == "none":
            made.mask_OI = made._choose()
        return made

    @property
    def budget(self) -> float:
        """Fraction of weights kept."""
        return self._budget

    def scores(self) -> Tensor:
        """[O, I] float32 importance of each weight; only its order within a group matters."""
        raise NotImplementedError

    def _choose(self) -> Tensor:
        score_OI = self.scores()
        if self.m:
            return keep_highest(score_OI.unflatten(-1, (-1, self.m)), self.n).flatten(-2)
        if self.group == "layer":
            return keep_highest(score_OI.flatten(), kept(self._budget, score_OI.numel())).view_as(score_OI)
        return keep_highest(score_OI, kept(self._budget, self.d_in))

    def ready(self) -> None:
        """Raise BadInput if used before calibration."""

    def select(self, x: Tensor | None = None) -> Selection:
        """[O, I] mask; the same for every input."""
        self.ready()
        return Selection(self.d_in, self.weight_OI, mask_=self.mask_OI)

    def sparse_weight(self) -> Tensor:
        """[O, I] with zeros where weights were dropped."""
        self.ready()
        return self.weight_OI * self.mask_OI

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        check_finite(x, f"input of {self.name}")
        return linear(x, self.sparse_weight(), self.bias_O)

    def reference(self, x: Tensor) -> Tensor:
        """y_o = sum over kept i of w_oi x_i + b_o, as a product with the selection's dense form."""
        out = x @ self.select().dense.t()
        return out if self.bias_O is None else out + self.bias_O

    def bake(self, module: nn.Module) -> None:
        """Write the pruned weight into the module this stands in for, in its own orientation."""
        weight_OI = dense_weight(module, self.name)
        if weight_OI.shape != self.weight_OI.shape:
            raise BadInput(f"{self.name} was fitted to {list(self.weight_OI.shape)}, not to {list(weight_OI.shape)}")
        with torch.no_grad():
            weight_OI.copy_(self.sparse_weight())

    def cost(self, density: float | None = None) -> Cost:
        """Counted for the cheaper of compressed sparse rows (value + 4-byte column) and dense storage."""
        density = self._budget if density is None else density
        size, entries = self.weight_OI.element_size(), self.weight_OI.numel()
        index = 0.25 if self.m else 4
        return Cost(2 * entries * density, min(entries * density * (size + index), entries * size))

    def dense_cost(self) -> Cost:
        """A full matrix-vector product a row."""
        entries = self.weight_OI.numel()
        return Cost(2 * entries, entries * self.weight_OI.element_size())
