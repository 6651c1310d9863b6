"""A page for every dictionary of the catalogue: what its file says, and what it did here. And the planted suite's tables.

    python scripts/make_latent_docs.py                        # from the figures in docs/benchmarks
    python scripts/make_latent_docs.py --planted runs/planted # take these figures from a finished suite first

Figures: docs/benchmarks/latents_frontier.json (scripts/latents_frontier.py) and docs/benchmarks/planted.json
(rarefy judge --suite planted).
"""
from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from rarefy.catalogue import ENTRIES, Entry
from rarefy.frontier import Point
from rarefy.jobs.report import unit_panel
from rarefy.jobs.suite_result import figure
from rarefy.plots import frontier_svg
from rarefy.store.lines import read_lines
from rarefy.tasks.planted_kinds import KINDS

DOCS = Path(__file__).parents[1] / "docs"
PLANTED, FRONTIER = DOCS / "benchmarks/planted.json", DOCS / "benchmarks/latents_frontier.json"
CLAIMS = DOCS / "benchmarks/latents_claims.json"
"""Written by hand, of short runs here: whether a claim shows at this scale, not whether it is true of another."""
SHOWN = ("l0", "fvu", "mcc", "f1", "span", "absorbed", "shared", "size", "bits")
BESIDE = ("latents/topk", "latents/relu")
"""Drawn on every page's picture."""


def paragraphs(card: Entry) -> str:
    """The module's docstring without its legend of letters."""
    text = inspect.getdoc(sys.modules[card.load().__module__]) or ""
    kept = [part for part in text.split("\n\n") if not re.match(r"Shape letters?\b", part.strip())]
    return "\n\n".join(" ".join(part.split()) if not re.search(r"\n {2,}", part) else f"```\n{part.strip()}\n```" for part in kept)


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Rows of one kind of planted data."""
    shown = [m for m in SHOWN if any(line["seeds"][0].get(m) is not None for line in lines)]
    out = [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    return out + [f"| `{line['method']}` | {' | '.join(figure(line, m) for m in shown)} |" for line in lines]


def page(card: Entry, points: list[dict[str, Any]], planted: list[dict[str, Any]]) -> str:
    """One method."""
    name = f"[{card.title}]({card.link})" if card.link else card.title
    source = card.load().__module__.replace(".", "/")
    out = [f"# `{card.name}`", "", f"{name}, {card.year}. Source: [`src/{source}.py`](../../src/{source}.py).", "", paragraphs(card), ""]
    signature = str(inspect.signature(inspect.unwrap(card.load().__init__)))
    for old, new in (("'", ""), ("(self, ", "("), (" -> None", "")):
        signature = signature.replace(old, new)
    out += ["## Arguments", "", "```", inspect.getdoc(card.load()) or "", "", signature, "```", ""]
    claims = json.loads(CLAIMS.read_text())
    if card.name in claims:
        out += ["## What was seen here of what the paper claims", "", claims[card.name], ""]
    own = [p for p in points if p["method"] == card.name]
    if own:
        beside = [Point.from_json(p) for p in points if p["method"] in (card.name, *BESIDE, "latents/random")]
        svg = frontier_svg(unit_panel("latents", beside, "", x=("l0", "latents active a token")))
        (DOCS / "latents" / f"{card.name.split('/')[1]}.svg").write_text(svg, encoding="utf-8")
        out += ["## On the built-in model", "", f"![frontier]({card.name.split('/')[1]}.svg)", "",
                "Settings and all methods: [latents_frontier](../benchmarks/latents_frontier.md).", ""]
        out += ["| L0 | FVU | loss recovered | CE increase | dead |", "|---|---|---|---|---|"]
        for p in sorted(own, key=lambda p: p["metrics"]["l0"]["mean"]):
            m = {key: value["mean"] for key, value in p["metrics"].items()}
            out.append(f"| {m['l0']:.1f} | {m['fvu']:.3f} | {m['loss_recovered']:.3f} | {m['ce_increase']:+.3f} | {m['dead']:.1%} |")
        out.append("")
    mine = {line["cell"] for line in planted if line["method"] == card.name}
    if mine:
        out += ["## On planted data", "",
                "Columns and settings: [ground truth](../ground-truth.md); all methods: [planted](../benchmarks/planted.md).", ""]
        for cell in [line["cell"] for line in planted if line["method"] == card.name]:
            wanted = ("truth", "latents/topk", card.name)
            found = {line["method"]: line for line in planted if line["cell"] == cell and line["method"] in wanted}
            out += [f"**{cell.split('-')[0]}**", "", *table([found[m] for m in dict.fromkeys(wanted) if m in found]), ""]
    out += ["## Try it", "", "```sh", f"rarefy fit {card.name} builtin --site layers.3.resid_post --width 2048 --out runs/{card.name.split('/')[1]}",
            f"rarefy judge runs/{card.name.split('/')[1]}", "```", ""]
    return "\n".join(out)


def planted_page(lines: list[dict[str, Any]]) -> str:
    """All methods on all kinds."""
    first = lines[0]
    out = ["# Dictionaries on planted data", "",
           f"    {first['command']}", "",
           f"Width 32, {first['features']} features and as many latents, L0 {first['l0']:g}; columns: [ground truth](../ground-truth.md).",
           "± is the standard deviation over three seeds of the initialisation. Runs are short, so that figures tell of methods as they are",
           "after 1,000 steps of 256 rows. Kinds on which only some methods stand were run for the claims about those.", ""]
    order = {kind: i for i, kind in enumerate(KINDS)}
    for cell in sorted({line["cell"] for line in lines}, key=lambda c: order[c.split("-")[0]]):
        out += [f"## {cell.split('-')[0]}", "", *table([line for line in lines if line["cell"] == cell]), ""]
    return "\n".join(out)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--planted", type=Path, help="folder of a finished `rarefy judge --suite planted`")
    asked = ask.parse_args()
    (DOCS / "latents").mkdir(exist_ok=True)
    if asked.planted:
        request = json.loads((asked.planted / "run.json").read_text())["made"]["request"]
        names = list(dict.fromkeys(line["method"] for line in read_lines(asked.planted / "results.jsonl") if line["arguments"] != [{}]))
        command = f"rarefy judge {' '.join(n for n in names if n != 'latents/random')} --suite planted --steps {request['steps']}"
        kept = [{**line, "command": command} for line in read_lines(asked.planted / "results.jsonl")]
        for line in kept:
            line.pop("arguments")
            line["seeds"] = [{k: round(v, 4) for k, v in seed.items() if v is not None} for seed in line["seeds"]]
        PLANTED.write_text("[\n" + ",\n".join(json.dumps(line) for line in kept) + "\n]\n", encoding="utf-8")
    planted = json.loads(PLANTED.read_text()) if PLANTED.exists() else []
    points = json.loads(FRONTIER.read_text()) if FRONTIER.exists() else []
    if planted:
        (DOCS / "benchmarks/planted.md").write_text(planted_page(planted), encoding="utf-8")
    rows = ["# Dictionaries", "", "One page a method: what its file says, and what it did here.", "", "| method | paper |", "|---|---|"]
    for card in ENTRIES:
        if card.unit != "latent" or card.fitted != "trained":
            continue
        short = card.name.split("/")[1]
        (DOCS / "latents" / f"{short}.md").write_text(page(card, points, planted), encoding="utf-8")
        rows.append(f"| [`{card.name}`]({short}.md) | {card.title}, {card.year} |")
    (DOCS / "latents/README.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
