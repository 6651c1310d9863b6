"""What a dictionary stands between, at several L0 on the built-in model: CE increase with everything replaced at once.

    python scripts/latents_objects.py --out runs/objects            # half an hour on one core; goes on where it was
    python scripts/latents_objects.py --out runs/objects --write    # also docs/benchmarks/latents_objects.{json,md} and the pictures

Within a family all arms replace the same sites, read the same tokens, and have as many latents, as many of them active a token, and as
many steps of as many rows for each site that they serve. Selection is TopK's, but for the cross-layer transcoder, whose own it is.
"""
from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.builtin.corpus import text
from rarefy.fidelity import Interval, fvu
from rarefy.fit import Recipe, train
from rarefy.frontier import Judge, Point
from rarefy.hub import open_model
from rarefy.jobs.dictionaries import Spliced, rows_of
from rarefy.jobs.judge_joined import SplicedLayers, SplicedRow
from rarefy.jobs.report import unit_panel
from rarefy.latents.cross_layer import CrossLayer
from rarefy.latents.dictionary import Dictionary
from rarefy.latents.topk import TopK
from rarefy.plots import frontier_svg
from rarefy.site import capture
from rarefy.store.lines import append_line, read_lines
from rarefy.streams import Flow, TensorStream, windows

ROOT = Path(__file__).parents[1]
D, WIDTH, CONTEXT, LEVELS = 256, 1024, 256, (4, 16, 64)
INS, OUTS = tuple(f"layers.{n}.mlp.in" for n in range(6)), tuple(f"layers.{n}.mlp.out" for n in range(6))
Part = tuple[Dictionary, Flow]
Arm = Callable[[int], list[Part]]


def single(site: str, target: str = "", **more: Any) -> Arm:
    """One dictionary of one site."""
    return lambda k: [(TopK(D, WIDTH, k, d_out=D if target else 0, **more), Flow((site,), (target or site,)))]


def each(*arms: Arm) -> Arm:
    """Dictionaries side by side, none knowing of another."""
    return lambda k: [part for arm in arms for part in arm(k)]


STREAM = ("layers.1.resid_post", "layers.3.resid_post")
FAMILIES: dict[str, tuple[str, dict[str, Arm]]] = {
    "mlp": ("the output of one MLP, `layers.2.mlp.out`", {
        "autoencoder": single(OUTS[2]), "transcoder": single(INS[2], OUTS[2]), "skip transcoder": single(INS[2], OUTS[2], skip=True),
    }),
    "stream": ("the residual stream at two places, `layers.1.resid_post` and `layers.3.resid_post`", {
        "two autoencoders": each(*(single(site) for site in STREAM)),
        "crosscoder": lambda k: [(TopK([D, D], 2 * WIDTH, 2 * k), Flow(STREAM, STREAM, "concat"))],
        "one autoencoder for both": lambda k: [(TopK(D, 2 * WIDTH, k), Flow(STREAM, STREAM, "mix"))],
    }),
    "mlps": ("all six MLPs", {
        "six transcoders": each(*(single(*pair) for pair in zip(INS, OUTS, strict=True))),
        "six skip transcoders": each(*(single(*pair, skip=True) for pair in zip(INS, OUTS, strict=True))),
        "cross-layer transcoder": lambda k: [(CrossLayer([D] * 6, 6 * WIDTH, 6 * k, d_out=[D] * 6), Flow(INS, OUTS, "concat"))],
    }),
    "attention": ("the heads' values in one layer, `layers.2.attn.z`", {"attention-output autoencoder": single("layers.2.attn.z")}),
}
"""Name -> (what is replaced, arms)."""


@dataclass
class Bench:
    """Model, tokens, judge."""

    model: Any
    ids_NT: Tensor
    board: Judge
    steps: int
    batch: int

    def flows(self, flows: list[Flow]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows at every site named, of the text fitted on and of that judged on."""
        sites = {name for flow in flows for name in (*flow.sites, *flow.targets)}
        fit = [capture(self.model, sites, input_ids=ids) for ids in self.ids_NT.split(16)]
        held = [(capture(self.model, sites, input_ids=b.input_ids), rows_of(b)) for b in self.board.batches]
        return (
            {s: torch.cat([got[s][:, 1:].flatten(0, 1) for got in fit]) for s in sites},
            {s: torch.cat([got[s][keep] for got, keep in held]) for s in sites},
        )

    def train(self, method: Dictionary, flow: Flow, rows: dict[str, Tensor]) -> None:
        """On the rows that its flow makes."""
        x, y = (joined(flow, names, rows) for names in (flow.sites, flow.targets))
        times = len(flow.sites) if flow.join == "mix" else 1
        stream = TensorStream(x, self.batch, y_NE=y if flow.transcodes else None)
        train({"it": method}, stream, Recipe(steps=self.steps * times, lr=1e-3, log_every=10_000))


def joined(flow: Flow, names: tuple[str, ...], rows: dict[str, Tensor]) -> Tensor:
    """Rows of several sites: below each other, or side by side."""
    return torch.cat([rows[name] for name in names], 0 if flow.join == "mix" else -1)


@contextlib.contextmanager
def spliced(parts: list[Part], model: Any) -> Iterator[dict[str, Any]]:
    """A plan in which every part stands at all its targets."""
    plan: dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        for method, flow in parts:
            if flow.join == "concat":
                put = SplicedLayers(method, flow) if type(method).join else SplicedRow(method, flow)
                held.enter_context(put.reading(model))
                plan |= put.plan(flow.targets)
            else:
                for site, target in zip(flow.sites, flow.targets, strict=True):
                    plan |= Spliced(method, site, target).plan()
        yield plan


@torch.no_grad()
def reconstructed(parts: list[Part], held: dict[str, Tensor]) -> tuple[float, float]:
    """(latents active a token over all parts, FVU, mean over what is reproduced), on rows judged on."""
    l0, errors = 0.0, []
    for method, flow in parts:
        x, y = (joined(flow, names, held) for names in (flow.sites, flow.targets))
        some = [(method.select(rows).count.sum(), method(rows)) for rows in x.split(2048)]
        tokens, made = len(held[flow.sites[0]]), torch.cat([m for _, m in some])
        l0 += float(sum(int(count) for count, _ in some)) / tokens
        got, want = (rows.chunk(len(flow.targets), 0 if flow.join == "mix" else -1) for rows in (made, y))
        errors += [fvu(there, here) for here, there in zip(got, want, strict=True)]
    return l0, sum(errors) / len(errors)


def measured(out: Path, bench: Bench, names: list[str]) -> None:
    """Train and judge what is not in the folder yet."""
    there = out / "points.jsonl"
    done = {(r["arm"], r["level"]) for r in read_lines(there)} if there.exists() else set()
    for family in names:
        arms = FAMILIES[family][1]
        left = [(level, arm) for level in LEVELS for arm in arms if (arm, level) not in done]
        if not left:
            continue
        rows, held = bench.flows([flow for make in arms.values() for _, flow in make(1)])
        for level, arm in left:
            parts = arms[arm](level)
            for method, flow in parts:
                bench.train(method, flow, rows)
            with spliced(parts, bench.model) as plan:
                point = bench.board.measure(plan, method=arm, unit="latent")
            l0, error = reconstructed(parts, held)
            point = replace(point, metrics={**point.metrics, "l0": Interval(l0, l0, l0), "fvu": Interval(error, error, error)})
            append_line(there, {"family": family, "arm": arm, "level": level, "point": point.as_json()})
            print(family, arm, level, f"L0 {l0:.1f} FVU {error:.3f} CE {point.metrics['ce_increase'].mean:+.4f}", flush=True)


def write(out: Path, steps: int, batch: int) -> None:
    """The page, the points and the pictures."""
    lines = read_lines(out / "points.jsonl")
    page = [
        "# Objects at several L0 on the built-in model", "",
        f"    python scripts/latents_objects.py --out runs/objects --steps {steps} --batch {batch} --write", "",
        f"{WIDTH:,} latents a site, k {', '.join(map(str, LEVELS))} a site, {steps} steps of {batch} rows a site, one seed: short runs, of which",
        "only differences within a family mean something. CE increase is with everything named replaced at once, in nats a token on held-out files,",
        "with a 95 % interval over documents; L0 counts latents active a token over all sites; FVU is the mean over what is reproduced.",
        "A crosscoder's sites get what it makes of an undisturbed pass, so that only the error at the last of them reaches the output; others read",
        "what those before them have disturbed: compare it by FVU.", "",
    ]
    for family, (what, arms) in FAMILIES.items():
        own = [r for r in lines if r["family"] == family]
        if not own:
            continue
        points = [Point.from_json(r["point"]) for r in sorted(own, key=lambda r: (list(arms).index(r["arm"]), r["level"]))]
        svg = frontier_svg(unit_panel("latents", points, "", x=("l0", "latents active a token")))
        (ROOT / f"docs/pictures/objects-{family}.svg").write_text(svg, encoding="utf-8")
        page += [f"## Replacing {what}", "", f"![frontier](../pictures/objects-{family}.svg)", ""]
        page += ["| | L0 | FVU | CE increase |", "|---|---|---|---|"]
        for p in points:
            l0, error, ce = (p.metrics[name] for name in ("l0", "fvu", "ce_increase"))
            page.append(f"| {p.method} | {l0.mean:.1f} | {error.mean:.3f} | {ce.mean:+.3f} ({ce.low:+.3f} to {ce.high:+.3f}) |")
        absent = [f"{arm} at k {level}" for level in LEVELS for arm in arms if not any((r["arm"], r["level"]) == (arm, level) for r in own)]
        page += ["", f"Not run: {', '.join(absent)}.", ""] if absent else [""]
    (ROOT / "docs/benchmarks/latents_objects.md").write_text("\n".join(page), encoding="utf-8")
    (ROOT / "docs/benchmarks/latents_objects.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--steps", type=int, default=150)
    ask.add_argument("--batch", type=int, default=512)
    ask.add_argument("--families", default=",".join(FAMILIES))
    ask.add_argument("--write", action="store_true", help="write the docs from what the folder holds")
    asked = ask.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = open_model("builtin")
    found = text("stdlib", tokenizer, context=CONTEXT, fit_tokens=asked.steps * asked.batch, judge_tokens=8_000)
    measured(asked.out, Bench(model, windows(found.fit), Judge(model, found.judge), asked.steps, asked.batch), asked.families.split(","))
    if asked.write:
        write(asked.out, asked.steps, asked.batch)


if __name__ == "__main__":
    main()
