"""One picture for every kind of sparsity: quality kept against cost paid, measured on the same held-out text.

`Judge` runs the dense model once and keeps what it said; each plan is then measured against it. Intervals are 95 %
over documents: tokens of one document are not independent, documents nearly are.

Shape letters: B = windows of a batch, T = tokens, V = vocabulary, D = width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from .cost import Cost
from .errors import BadInput, Damaged
from .families import config_of
from .fidelity import Interval, ratio_interval
from .method import Sparse
from .places import sites_of
from .site import replaced
from .store.lines import append_line, read_lines

LOG_PROBS_KEPT = 768 << 20
"""Bytes of dense log-probabilities kept between plans; past it they are computed again for each."""


@dataclass(frozen=True)
class Point:
    """One method at one budget: what it kept, what it cost."""

    method: str
    unit: str
    role: str
    """method, baseline or dense."""
    budget: float
    density: float
    """Fraction of units really kept, measured."""
    metrics: dict[str, Interval]
    """ce, ce_increase, kl (nats a token), top1 (agreement with dense), and what the site adds (fvu, l0, ...)."""
    cost: dict[str, float] = field(default_factory=dict)
    """flops, bytes, dense_flops, dense_bytes a token; ms, dense_ms where timed."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON: a bound that one document cannot give, and a value that is no number, is null."""
        return _tidy(asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Point:
        """The reverse of `as_json`. Raises Damaged for a record that is no point."""
        try:
            return cls(**{**record, "metrics": {k: _interval(**v) for k, v in record["metrics"].items()}})
        except (TypeError, KeyError, AttributeError) as error:
            raise Damaged(f"a line of a frontier is no point ({error}); move the file away and measure again") from None


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(mean: float | None, low: float | None, high: float | None) -> Interval:
    return Interval(math.nan if mean is None else mean, -math.inf if low is None else low, math.inf if high is None else high)


@dataclass
class Frontier:
    """Points, with those that no other point beats."""

    points: list[Point] = field(default_factory=list)

    def pareto(self, x: str = "density", y: str = "ce_increase", *, low_is_better: bool = True) -> list[Point]:
        """See the function of that name; over every point, the dense model too where it is one of them."""
        return pareto(self.points, x, y, low_is_better=low_is_better)

    def save(self, path: Path) -> None:
        """Append the points that the file does not hold yet, as JSON Lines."""
        have = {_key(Point.from_json(r)) for r in read_lines(path)} if path.exists() else set()
        for point in self.points:
            if _key(point) not in have:
                append_line(path, point.as_json())

    @classmethod
    def load(cls, path: Path) -> Frontier:
        """Points kept by `save`; an absent file holds none."""
        return cls([Point.from_json(r) for r in read_lines(path)] if path.exists() else [])


def _key(point: Point) -> tuple[str, str, float]:
    return point.unit, point.method, round(point.budget, 6)


def _axis(point: Point, name: str) -> float:
    if name in ("density", "budget"):
        return getattr(point, name)
    if name in point.cost:
        return point.cost[name]
    if name in point.metrics:
        return point.metrics[name].mean
    raise BadInput(f"{point.method} has no {name!r}; it has density, budget, {', '.join([*point.cost, *point.metrics])}")


def pareto(points: Iterable[Point], x: str, y: str, *, low_is_better: bool = True) -> list[Point]:
    """Points that no other beats, sorted by cost.

    One point beats another when it is at least as cheap in `x` (density, budget or a cost field) and at least as good in
    `y` (a metric), and better in one of them. Equal points all stay; a point without a finite x and y is left out.
    """
    sign = 1 if low_is_better else -1
    places = [(_axis(p, x), sign * _axis(p, y), p) for p in points]
    kept: list[tuple[float, float, Point]] = []
    for place in sorted((q for q in places if math.isfinite(q[0]) and math.isfinite(q[1])), key=lambda q: q[:2]):
        if not kept or place[1] < kept[-1][1] or place[:2] == kept[-1][:2]:
            kept.append(place)
    return [point for _, _, point in kept]


class _Sums:
    """Per-document sums of token values."""

    def __init__(self, documents: int) -> None:
        self.count = torch.zeros(documents, dtype=torch.float64)
        self.total: dict[str, Tensor] = {}

    def add(self, doc_N: Tensor, **values_N: Tensor) -> None:
        self.count.index_add_(0, doc_N, torch.ones(len(doc_N), dtype=torch.float64))
        for name, value_N in values_N.items():
            into = self.total.setdefault(name, torch.zeros_like(self.count))
            into.index_add_(0, doc_N, value_N.double())

    def interval(self, name: str) -> Interval:
        return ratio_interval(self.total[name], self.count)


class Judge:
    """Measures plans against the dense model on one list of held-out batches.

    Args:
        batches: each with `.input_ids` [B, T], `.doc` [B, T] document numbers, `.attention_mask` [B, T] or None.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        if not batches:
            raise BadInput("no held-out text to judge on; give --data with at least one context")
        self.model, self.batches = model, list(batches)
        self.documents = 1 + max(int(b.doc.max()) for b in self.batches)
        self.tokens = sum(int(b.input_ids.numel()) for b in self.batches)
        self._kept: list[Tensor] | None = None
        self._dense = self._run({}, compare=False)

    def _logits(self, batch: Any) -> Tensor:
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    @torch.no_grad()
    def _run(self, plan: Mapping[str, Any], *, compare: bool) -> _Sums:
        sums = _Sums(self.documents)
        keeping: list[Tensor] | None = None
        if not compare:
            size = self.tokens * config_of(self.model).vocab_size * 4
            keeping = [] if size <= LOG_PROBS_KEPT else None
        for i, batch in enumerate(self.batches):
            dense_BTV = None
            if compare:
                dense_BTV = self._kept[i] if self._kept else log_softmax(self._logits(batch).float(), -1)
            with replaced(self.model, dict(plan)):
                log_BTV = log_softmax(self._logits(batch).float(), -1)
            if keeping is not None:
                keeping.append(log_BTV)
            self._add(sums, batch, log_BTV, dense_BTV)
        if keeping is not None:
            self._kept = keeping
        return sums

    def _add(self, sums: _Sums, batch: Any, log_BTV: Tensor, dense_BTV: Tensor | None) -> None:
        same = batch.doc[:, 1:] == batch.doc[:, :-1]          # a document's first token is nobody's prediction
        if batch.attention_mask is not None:
            same = same & batch.attention_mask[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
        target_N, log_NV, doc_N = batch.input_ids[:, 1:][same], log_BTV[:, :-1][same], batch.doc[:, 1:][same]
        ce_N = cross_entropy(log_NV, target_N, reduction="none")
        if dense_BTV is None:
            sums.add(doc_N, ce=ce_N)
            return
        dense_NV = dense_BTV[:, :-1][same]
        sums.add(
            doc_N, ce=ce_N, ce_increase=ce_N - cross_entropy(dense_NV, target_N, reduction="none"),
            kl=kl_div(log_NV, dense_NV, reduction="none", log_target=True).sum(-1),
            top1=(log_NV.argmax(-1) == dense_NV.argmax(-1)).float(),
        )

    def dense(self, unit: str) -> Point:
        """The dense model itself, as a point."""
        zero, one = Interval(0.0, 0.0, 0.0), Interval(1.0, 1.0, 1.0)
        metrics = {"ce": self._dense.interval("ce"), "ce_increase": zero, "kl": zero, "top1": one}
        return Point("dense", unit, "dense", 1.0, 1.0, metrics, {})

    def measure(
        self, plan: Mapping[str, Any], *, method: str, unit: str, role: str = "method", budget: float | None = None, note: str = "",
    ) -> Point:
        """Put `plan` in, read the same text, take it out.

        Args:
            plan: site -> method (or callable, for ablations), as `site.replaced` takes it.
            budget: fraction of units asked for; default the methods' own, 1 for functions.
        """
        standing = _standing(self.model, plan)
        if budget is None:
            budget = sum(m.budget for m, _ in standing) / len(standing) if standing else 1.0
        with _Watch(standing) as watch:
            sums = self._run(plan, compare=True)
        metrics = {name: sums.interval(name) for name in ("ce", "ce_increase", "kl", "top1")}
        density = watch.density() if standing else budget
        return Point(method, unit, role, budget, density, metrics, _costs(standing), note)


def _standing(model: nn.Module, plan: Mapping[str, Any]) -> list[tuple[Sparse, int]]:
    """Each method of a plan, once, with the number of sites it stands at: a glob names many, and one object may serve several."""
    times: dict[int, tuple[Sparse, int]] = {}
    for new, found in zip(plan.values(), sites_of(model, plan), strict=True):
        if isinstance(new, Sparse):
            times[id(new)] = new, times.get(id(new), (new, 0))[1] + len(found)
    return list(times.values())


class _Watch:
    """Counts what methods keep of what they choose from, over every row that reaches them.

    The selection counted is the one that `forward` made: while watched, a method's `select` leaves it here, so that
    choosing is not done twice.
    """

    def __init__(self, standing: Sequence[tuple[Sparse, int]]) -> None:
        self.standing, self.handles = standing, []
        self.made: dict[int, Any] = {}
        """id of a method -> its last selection."""
        self.seen: dict[int, tuple[float, float]] = {}
        """id of a method -> units kept and units there, summed over rows."""

    def __enter__(self) -> _Watch:
        for method, _ in self.standing:
            if (own := getattr(method, "measured_density", None)) is not None:
                own()                                       # attention counts for itself since it was last asked: begin anew
            elif method.unit != "weight":
                self.handles.append(method.register_forward_hook(self._count))
                method.__dict__["select"] = self._noting(method)
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        for method, _ in self.standing:
            method.__dict__.pop("select", None)

    def _noting(self, method: Sparse) -> Callable[..., Any]:
        select = method.select

        def noted(*inputs: Tensor) -> Any:
            self.made[id(method)] = made = select(*inputs)
            return made

        return noted

    @torch.no_grad()
    def _count(self, method: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        if id(method) not in self.made:                     # a forward that does not go through select
            method.select(*inputs)
        selection, rows = self.made.pop(id(method)), inputs[0].shape[:-1].numel()
        kept, there = self.seen.get(id(method), (0.0, 0.0))
        self.seen[id(method)] = kept + selection.density * rows * selection.n, there + float(rows * selection.n)

    def density(self) -> float:
        """Mean over sites, each weighted by the units that it chooses from."""
        kept = there = 0.0
        for method, times in self.standing:
            if method.unit == "weight":
                density, size = method.select().density, method.select().mask.numel()
            elif (own := getattr(method, "measured_density", None)) is not None:
                density, size = own(), 1
            else:
                k, size = self.seen.get(id(method), (0.0, 0.0))
                density = k / size if size else 0.0
            kept, there = kept + density * size * times, there + size * times
        return kept / there if there else 0.0


def _costs(standing: Sequence[tuple[Sparse, int]]) -> dict[str, float]:
    if not standing:
        return {}
    try:
        mine = sum((m.cost() * times for m, times in standing), Cost(0, 0))
        dense = sum((m.dense_cost() * times for m, times in standing), Cost(0, 0))
    except NotImplementedError:
        return {}
    return {"flops": mine.flops, "bytes": mine.bytes, "dense_flops": dense.flops, "dense_bytes": dense.bytes}


def measure(model: nn.Module, plan: Mapping[str, Any], batches: Sequence[Any], *, budget: float | None = None) -> Point:
    """One plan against the dense model on `batches`; for several plans make one `Judge` and keep it. See `Judge.measure`."""
    first = next(iter(plan.values()), None)
    name = first.name if isinstance(first, Sparse) else "function"
    unit = first.unit if isinstance(first, Sparse) else ""
    return Judge(model, batches).measure(plan, method=name, unit=unit, budget=budget)


def sweep(
    judge: Judge, methods: Sequence[str], budgets: Sequence[float], make: Callable[[str, float], Mapping[str, Any]], *,
    path: Path | None = None, on_point: Callable[[Point], None] | None = None,
) -> Frontier:
    """Measure methods x budgets; points already in `path` are not measured again.

    Args:
        make: (catalogue name, budget) -> fitted plan.
    """
    from .catalogue import entry

    frontier = Frontier.load(path) if path else Frontier()
    done = {_key(p) for p in frontier.points}
    for name in methods:
        card = entry(name)
        for budget in budgets:
            if (card.unit, name, round(budget, 6)) in done:
                continue
            role = "baseline" if card.baseline else "method"
            point = judge.measure(make(name, budget), method=name, unit=card.unit, role=role, budget=budget)
            frontier.points.append(point)
            if path:
                append_line(path, point.as_json())
            if on_point:
                on_point(point)
    return frontier
