"""Methods that choose by content and need no training, on text: KL from the dense built-in model and density, a line each.

    python scripts/dynamic_text.py [NAME ...]    # rewrites the table of docs/dynamic-attention.md; with names, prints theirs alone

Contexts of 512; sizes that papers give for contexts of thousands are scaled to that (OTHER). Fitted methods see other documents than the judge.
"""
import argparse
from pathlib import Path

import torch

import rarefy
from rarefy.catalogue import ENTRIES, Entry
from rarefy.errors import RarefyError
from rarefy.frontier import Judge, Point
from rarefy.jobs.build import make_plan
from rarefy.method import Sparse

PAGE = Path(__file__).parents[1] / "docs/dynamic-attention.md"
BUDGETS = (0.1, 0.25)
BLOCK = 16
GROUPS = ("attention.dynamic", "attention.quest", "attention.window", "attention.random", "attention.mapped.top_k")
OTHER: dict[str, dict[str, object]] = {
    "attention/sparge": {"theta": -1.0}, "attention/tidal": {"dense": 1}, "attention/lserve": {"part": 4},
    "attention/squeezed": {"segment": 64, "size": 4}, "attention/rettention": {"pattern": "window(64) | sinks(4)"},
    "attention/sparse_video": {"frame": 64}, "attention/chunked": {"chunk": 128, "last": 32},
    "attention/antidiagonal": {"stride": 4}, "attention/antidiagonal_top_p": {"stride": 4},
}
"""Arguments beside budget and block."""
LINES = ["| method | budget | density | KL, nats a token | loss increase |", "|---|---|---|---|---|"]


def arguments(card: Entry, budget: float) -> dict[str, object]:
    """Budget and block where the method takes them, and its own of OTHER."""
    given: dict[str, object] = dict(OTHER.get(card.name, {}))
    known = card.load()(**given).arguments
    if "block" in known:
        given |= {"block": BLOCK} | ({"query_block": BLOCK} if known.get("query_block", 1) > 1 else {})
    return given | ({"budget": budget} if "budget" in known else {})


def measured(card: Entry, budget: float, model: torch.nn.Module, judge: Judge, fit: list[object]) -> Point:
    """One point, in every layer of the model."""
    given = arguments(card, budget)
    plan: dict[str, Sparse] = make_plan(model, card, "layers.*.attn", float(given.pop("budget", 1.0)), given)  # type: ignore[arg-type]
    rarefy.calibrate(model, plan, fit)
    return judge.measure(plan, method=card.name, unit=card.unit, budget=budget)


def row(point: Point, budget: str) -> str:
    """A line of the table."""
    kl, more = point.metrics["kl"], point.metrics["ce_increase"]
    return (f"| `{point.method.removeprefix('attention/')}` | {budget} | {point.density:.3f} | "
            f"{kl.mean:.3f} [{kl.low:.3f}, {kl.high:.3f}] | {more.mean:.3f} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out tokens judged")
    parser.add_argument("--calibration", type=int, default=4_096, help="tokens that fitted methods see")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = rarefy.open_model("builtin")
    text = rarefy.text("stdlib", tokenizer, context=512, fit_tokens=args.calibration, judge_tokens=args.tokens)
    judge = Judge(model, text.judge)
    wanted = {f"attention/{name.removeprefix('attention/')}" for name in args.names}
    for card in ENTRIES:
        if not card.target.startswith(GROUPS) or wanted and card.name not in wanted:
            continue
        for budget in BUDGETS if "budget" in arguments(card, BUDGETS[0]) else ("-",):
            try:
                point = measured(card, budget if isinstance(budget, float) else 1.0, model, judge, text.fit)
            except RarefyError as error:
                LINES.append(f"| `{card.name.removeprefix('attention/')}` | {budget} | - | not served: {error} | - |")
            else:
                LINES.append(row(point, str(budget)))
            print(LINES[-1], flush=True)
    if not wanted:
        head, start, rest = PAGE.read_text(encoding="utf-8").partition("<!-- text -->\n")
        _, stop, tail = rest.partition("<!-- /text -->")
        PAGE.write_text(head + start + "\n".join(LINES) + "\n" + stop + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
