"""From results of the latent suite to points, and what can be said: seeds as spread, and where proxies and practice rank apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..fidelity import Interval
from ..frontier import Point

PROXIES = {"fvu": "low", "loss_recovered": "high"}
PRACTICAL = {
    "probe_1": "high", "probe_5": "high", "match_f1": "high", "absorption": "low", "absorption_kinds": "low", "removal": "high",
    "perturbation": "high", "disentanglement": "high", "control": "high", "senses": "high", "unlearn_selective": "high",
}
"""What the suite is for -> which way is better."""
COLUMNS = ("l0", *PROXIES, *PRACTICAL)
LEAST = 4
"""Dictionaries from which on ranks are compared."""


@dataclass(frozen=True)
class Row:
    """One reader's results."""

    name: str
    role: str
    budget: float
    width: int
    group: str
    metrics: dict[str, Interval]


def grouped(rows: Sequence[Row]) -> list[Point]:
    """One point a group: the mean over its seeds, and as interval the least and the most of them; of a lone one its own."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    out = []
    for some in groups.values():
        metrics = {name: _spread([r.metrics[name] for r in some]) for name in some[0].metrics if all(name in r.metrics for r in some)}
        first, l0 = some[0], metrics.get("l0")
        note = f"{len(some)} seeds" if len(some) > 1 else ""
        out.append(Point(first.name, "latent", first.role, first.budget, l0.mean / first.width if l0 else math.nan, metrics, {}, note))
    return out


def _spread(values: Sequence[Interval]) -> Interval:
    if len(values) == 1:
        return values[0]
    means = [v.mean for v in values]
    return Interval(sum(means) / len(means), min(means), max(means))


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = [0.0] * len(values)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for at in order[i : j + 1]:
            out[at] = (i + j) / 2 + 1
        i = j + 1
    return out


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; NaN where one of them has no order."""
    x, y = ranks(a), ranks(b)
    middle = (len(x) + 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    size = math.sqrt(sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y))
    return both / size if size else math.nan


def _good(points: Sequence[Point], name: str, better: Mapping[str, str]) -> list[float]:
    return [(1 if better[name] == "high" else -1) * p.metrics[name].mean for p in points]


def agreement(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """proxy -> practical metric -> Spearman's rho over fitted dictionaries, both turned so that more is better."""
    fitted = [p for p in points if p.role == "method"]
    out: dict[str, dict[str, float]] = {}
    if len(fitted) < LEAST:
        return out
    for proxy in (p for p in PROXIES if all(p in q.metrics for q in fitted)):
        for name in (n for n in PRACTICAL if all(n in q.metrics for q in fitted)):
            rho = spearman(_good(fitted, proxy, PROXIES), _good(fitted, name, PRACTICAL))
            if math.isfinite(rho):
                out.setdefault(proxy, {})[name] = rho
    return out


def label(point: Point) -> str:
    """A dictionary by name and measured L0."""
    return f"{point.method} (L0 {point.metrics['l0'].mean:.0f})" if "l0" in point.metrics else point.method


def disagreement(points: Sequence[Point]) -> str:
    """Where proxies and practical metrics rank dictionaries differently, in words; "" where there are too few to rank."""
    fitted, said = [p for p in points if p.role == "method"], []
    l0 = [p.metrics["l0"].mean for p in fitted if "l0" in p.metrics]
    many = f"{len(fitted)} dictionaries" + (f" (L0 {min(l0):.0f} to {max(l0):.0f})" if l0 else "")
    for proxy, by in agreement(points).items():
        against = sorted((n for n in by if by[n] < 0), key=lambda n: by[n])
        first = fitted[max(range(len(fitted)), key=_good(fitted, proxy, PROXIES).__getitem__)]
        if not against:
            said.append(f"No practical metric ranks the {many} against {proxy} (least rho {min(by.values()):+.2f}).")
            continue
        worst = against[0]
        other = fitted[max(range(len(fitted)), key=_good(fitted, worst, PRACTICAL).__getitem__)]
        listed = ", ".join(f"{n} {by[n]:+.2f}" for n in against)
        ends = f"{label(first)} is best by both all the same"
        if first is not other:
            ends = f"{label(first)} is best by {proxy}, {label(other)} by {worst}"
        said.append(f"Ranked against {proxy} over {many}, by Spearman's rho where it is below 0: {listed}; {ends}.")
    return " ".join(said)
