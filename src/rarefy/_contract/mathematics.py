"""Laws about what is selected and what is computed: L1 to L6, M9."""

from __future__ import annotations

import torch

from ..cost import counted_flops
from .spec import Case, Law, NotApplicable, chosen, close, require, same_bits


def forward_is_reference(case: Case) -> None:
    """L1, for several budgets and batches of 1, 2 and 33."""
    for budget in case.spec.budgets or (1.0,):
        method = case.ready(budget, torch.float64)
        for batch in (1, 2, 33):
            inputs = case.inputs(batch, seed=batch, dtype=torch.float64)
            with torch.no_grad():
                close(method(*inputs), method.reference(*inputs), 1e-10, f"budget {budget}, batch {batch}")
    method, inputs = case.ready(), case.inputs(7)
    with torch.no_grad():
        close(method(*inputs), method.reference(*inputs), 1e-5, "float32")


def everything_is_dense(case: Case) -> None:
    """L2: at budget 1 the output is the dense module's."""
    if case.spec.dense is None:
        raise NotApplicable(case.spec.not_dense or "no dense module is given")
    if 1.0 not in case.spec.budgets:
        raise NotApplicable("it cannot be made at budget 1")
    method, inputs = case.ready(1.0, torch.float64), case.inputs(17, dtype=torch.float64)
    with torch.no_grad():
        close(method(*inputs), case.spec.dense(method, inputs), 1e-12, "budget 1 against the dense module")


def more_budget_more_units(case: Case) -> None:
    """L3 and M6: what a smaller budget keeps, a larger one keeps too."""
    if len(case.spec.budgets) < 2:
        raise NotApplicable("the number of units is learned, not set")
    inputs = case.inputs(9, seed=3)
    masks = [(b, chosen(case.ready(b), inputs).mask) for b in sorted(case.spec.budgets)]
    for (low, less), (high, more) in zip(masks, masks[1:], strict=False):
        require((less.sum(-1) <= more.sum(-1)).all(), f"budget {low} keeps more than {high} in some row")
        require(not (less & ~more).any(), f"budget {low} keeps {int((less & ~more).sum())} units that {high} drops")


def density_is_budget(case: Case) -> None:
    """L4, measured on inputs like those fitted to."""
    if not case.spec.budgets:
        raise NotApplicable("the number of units is learned, not set")
    inputs = case.inputs(64, seed=1)
    for budget in case.spec.budgets:
        method = case.ready(budget)
        selection = chosen(method, inputs)
        got = selection.density if case.spec.density is None else case.spec.density(method, inputs)
        slack = case.spec.density_slack(selection.n)
        require(abs(got - budget) <= slack, f"asked {budget}, measured {got:.4f}, allowed to differ by {slack:.4f}")
        require(abs(method.budget - budget) <= 0.5 / selection.n + 1e-9, f"asked {budget}, .budget says {method.budget}")


def rows_are_alone(case: Case) -> None:
    """L5 and C9: outside training a row's selection and output do not depend on its batch mates, nor does noise in those spread."""
    method, inputs = case.ready(dtype=torch.float64), case.inputs(12, seed=5, dtype=torch.float64)
    with torch.no_grad():
        whole, mask = method(*inputs), chosen(method, inputs).mask
        for row in (0, 7, 11):
            alone = tuple(x[row : row + 1] for x in inputs)
            close(method(*alone), whole[row : row + 1], 1e-12, f"row {row} alone against in a batch of 12")
            mine = chosen(method, alone).mask
            if mask.shape[0] == 12 and mine.shape[0] == 1:
                same_bits(mine, mask[row : row + 1], f"selection of row {row}")
        back = torch.arange(11, -1, -1)
        close(method(*(x[back] for x in inputs)), whole[back], 1e-12, "rows in another order")
        huge = tuple(torch.cat((x[:1], x[1:] * 1e6)) for x in inputs)
        close(method(*huge)[:1], whole[:1], 1e-12, "row 0 beside rows a million times as large")


def permuting_units(case: Case) -> None:
    """L6: units in another order are selected in that order."""
    if case.spec.permuted is None or case.spec.units is None:
        raise NotApplicable(case.spec.not_permuted or "no permutation is given")
    method, inputs = case.ready(dtype=torch.float64), case.spec.permutable(case.inputs(16, seed=8, dtype=torch.float64))
    order = torch.randperm(case.spec.units(method, inputs), generator=torch.Generator().manual_seed(2))
    other, others = case.spec.permuted(method, inputs, order)
    before, after = chosen(method, inputs).mask, chosen(other, others).mask
    # Units beyond those permuted stay where they are.
    whole = torch.arange(before.shape[-1])
    whole[: len(order)] = order
    same_bits(after, before[..., whole], "selection after permuting units")


def cost_is_counted(case: Case) -> None:
    """M9: dense flops are what torch counts for the dense module; cost rises with density and is dense at the end."""
    method, inputs = case.ready(), case.inputs(5)
    with torch.no_grad():
        method(*inputs)
    low, high, dense = method.cost(0.25), method.cost(0.5), method.dense_cost()
    require(0 < low.flops <= high.flops and 0 < low.bytes <= high.bytes, f"cost falls with density: {low} at .25, {high} at .5")
    require(low.flops <= dense.flops, f"{low.flops} flops at density .25, {dense.flops} dense")
    if case.spec.dense is None:
        return
    rows = inputs[0].shape[:-1].numel() if len(inputs) == 1 else inputs[0].shape[0] * inputs[0].shape[2]
    if len(inputs) == 3:
        inputs = (inputs[0][:, :, -1:], *inputs[1:])       # torch counts causal attention as full: compare one query
        rows = inputs[0].shape[0]
        with torch.no_grad():
            method(*inputs)
        dense = method.dense_cost()
    counted = counted_flops(lambda: case.spec.dense(method, inputs)) / rows  # type: ignore[misc]
    require(abs(counted - dense.flops) < 0.5, f"dense_cost says {dense.flops} flops a row, torch counts {counted}")


LAWS: dict[str, Law] = {
    "L1 forward equals reference": forward_is_reference,
    "L2 budget 1 is dense": everything_is_dense,
    "L3 more budget never selects fewer": more_budget_more_units,
    "L4 measured density is the budget": density_is_budget,
    "L5 rows do not depend on their batch": rows_are_alone,
    "L6 permuting units permutes the selection": permuting_units,
    "M9 counted flops": cost_is_counted,
}
