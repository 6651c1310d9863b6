"""From points, curves and latents to a page."""

from __future__ import annotations

import contextlib
import datetime
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..builtin.corpus import Text
from ..catalogue import FAMILY_OF_UNIT
from ..errors import BadInput
from ..frontier import Frontier, Point
from ..store.lines import read_lines
from ..store.run import MANIFEST, read_run
from ..ui import export as write_page
from ..ui import read_report, serve
from ..ui import write_report as write_json
from ..ui.report import NAME
from .models import Opened
from .screen import Screen

QUESTIONS = {
    "latents": "How much of the stream do a few active latents carry?",
    "weights": "How many weights can go before the text is predicted worse?",
    "neurons": "How many inputs of each linear layer does a token need?",
    "attention": "How few keys can each query look at?",
}


def unit_panel(unit: str, points: Sequence[Point], verdict: str, *, x: tuple[str, str] = ("density", "fraction kept"),
               y: tuple[str, str, str] = ("ce_increase", "CE increase (nats a token)", "low")) -> dict[str, Any]:
    """One frontier of the page."""
    return {
        "unit": unit, "question": QUESTIONS[unit], "x": {"key": x[0], "label": x[1]},
        "y": {"key": y[0], "label": y[1], "better": y[2]}, "verdict": verdict,
        "points": [
            {"method": p.method, "role": p.role, "budget": p.budget, "density": p.density, "metrics": p.as_json()["metrics"], "cost": p.cost}
            for p in points
        ],
    }


def curves(log: Path) -> list[dict[str, Any]]:
    """Training curves from a run's log."""
    records = read_lines(log) if log.exists() else []
    out = []
    for name in dict.fromkeys(n for r in records for n in r["methods"]):
        rows = [r for r in records if name in r["methods"]]
        series: dict[str, list[Any]] = {"step": [r["step"] for r in rows], "tokens_per_s": [r["rows_per_s"] for r in rows]}
        for part in ("loss", "fvu", "l0", "dead"):
            if any(part in r["methods"][name] for r in rows):
                series[part] = [r["methods"][name].get(part) for r in rows]
        out.append({"method": name, "series": series})
    return out


def cost_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Cost table: each point that has counted work."""
    return [
        {"what": f"{p.method} at {p.budget:.0%}" if p.budget >= 0.005 else p.method, **p.cost, "note": p.note}
        for p in points if p.cost and p.role != "dense"
    ]


def _made(seconds: float) -> dict[str, Any]:
    packages = ("rarefy", "torch", "transformers", "numpy")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except Exception:  # a package that runs from source has no metadata
            found[name] = "source"
    return {
        "command": " ".join(["rarefy", *sys.argv[1:]]), "versions": {"python": platform.python_version(), **found},
        "seconds": round(seconds, 1), "machine": f"{platform.system()} {platform.machine()}, {_cores()} cores",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def page(
    title: str, opened: Opened, text: Text, data: str, units: list[dict[str, Any]], screen: Screen, *, points: Sequence[Point] = (),
    log: Path | None = None, latents: dict[str, Any] | None = None, notes: Sequence[str] = (), same: bool = True,
) -> dict[str, Any]:
    """The whole report as the page takes it.

    Args:
        same: whether the text judged on is held out of the very text fitted on.
    """
    card = opened.card()
    count = len(text.judge_names)
    held = f"{count:,} document{'s' if count != 1 else ''} held out by name" + (", none fitted on" if same else "")
    return {
        "schema": 1, "title": title, "made": _made(sum(s["seconds"] for s in screen.stages)),
        "model": {k: card[k] for k in ("name", "params", "layers", "d_model", "vocab")} | {"data": data, "heldout": held, "sha256": card["sha256"]},
        "steps": screen.stages, "units": units, "curves": curves(log) if log else [], "latents": latents,
        "costs": cost_rows(points), "notes": list(notes),
    }


def write_report(run: Path, report: dict[str, Any]) -> Path:
    """report.json and the self-contained report.html of a run."""
    write_json(run, report)
    return write_page(report, run / "report.html")


def verdict(points: Sequence[Point]) -> str:
    """Who wins where, in a sentence that holds up: by intervals of CE increase at each budget, among methods of one unit.

    Methods told to keep everything, or not told how much (dictionaries that learn it), are compared with none.
    """
    said = []
    judged = [p for p in points if p.role != "dense" and p.budget < 1]
    for unit in dict.fromkeys(FAMILY_OF_UNIT[p.unit] for p in judged):
        for budget in sorted({p.budget for p in judged}):
            row = [p for p in judged if p.budget == budget and FAMILY_OF_UNIT[p.unit] == unit]
            if len(row) < 2:
                continue
            first, second, *_ = sorted(row, key=lambda p: p.metrics["ce_increase"].mean)
            a, b = first.metrics["ce_increase"], second.metrics["ce_increase"]
            clear = "clearly" if a.high < b.low else "not clearly"
            kept = f"{budget:.0%}" if budget >= 0.1 else f"{budget:.2%}"
            said.append(f"At {kept} kept, {first.method} is best ({a.mean:+.3f} nats), {clear} ahead of {second.method} ({b.mean:+.3f}).")
    return " ".join(said)


def sweep_report(request: Any, opened: Opened, text: Text, frontier: Frontier, screen: Screen) -> dict[str, Any]:
    """The page of a sweep."""
    units = []
    for unit in dict.fromkeys(FAMILY_OF_UNIT[p.unit] for p in frontier.points):
        points = [p for p in frontier.points if FAMILY_OF_UNIT[p.unit] == unit]
        units.append(unit_panel(unit, points, verdict(points)))
    notes = [
        "Intervals are 95 % over held-out documents. A method's place is clear only where intervals do not overlap.",
        "Calibrated methods saw what flows in the dense model, in one pass; `rarefy apply` calibrates layer after layer, each after those before "
        "it were pruned.",
        "Costs are counted from shapes for the layers a method replaces, a token, at batch 1; selection is included.",
    ]
    title = f"{', '.join(dict.fromkeys(p.method for p in frontier.points if p.role != 'dense'))} on {opened.info.name}"
    return page(title, opened, text, request.data, units, screen, points=frontier.points, notes=notes)


def show(run: Path, *, port: int, host: str, token: str, export: Path | None, say: Callable[[str, str], None]) -> None:
    """Serve a run's page until interrupted, or write it as one file.

    Args:
        say: told what came of it, "page" or "url", and where.
    """
    if not run.is_dir():
        way = f"a pattern is drawn by `rarefy draw '{run}'`" if "(" in str(run) else "`rarefy demo` makes runs/demo"
        raise BadInput(f"{run}: no such folder; {way}")
    if not (run / NAME).exists() and (run / MANIFEST).exists():
        command = read_run(run)["made"].get("command")
        way = f"`rarefy judge {run}` makes one" if command == "fit" else f"run its `rarefy {command}` to the end"
        way = f"a planted suite has pictures (.svg) and {run / 'results.jsonl'}" if command == "suite" else way
        raise BadInput(f"{run} holds no page yet; {way}")
    if export is not None:
        say("page", str(write_page(read_report(run), export)))
        return
    with contextlib.suppress(KeyboardInterrupt):
        serve(run, port=port, host=host, token=token, on_ready=lambda url: say("url", url))
