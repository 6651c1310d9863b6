"""Every method that chooses by content and needs no training, on the recall model: percent recalled at four budgets.

    python scripts/dynamic_recall.py [NAME ...]    # rewrites the table of docs/dynamic-attention.md; with names, prints theirs alone
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import rarefy
from rarefy.builtin.model import recall_model
from rarefy.catalogue import ENTRIES
from rarefy.errors import RarefyError
from rarefy.tasks.recall import FILLER, KEYS, VALUES, key_value, recall_accuracy

PAGE = Path(__file__).parents[1] / "docs/dynamic-attention.md"
BUDGETS = (0.05, 0.1, 0.25, 0.5)
BLOCK = 8
OTHER = {
    "attention/twilight": {"page": BLOCK}, "attention/sparge": {"theta": -1.0},
    "attention/tidal": {"dense": 1}, "attention/lserve": {"part": BLOCK}, "attention/minference": {"side": BLOCK},
    "attention/squeezed": {"segment": 64, "size": 4},
    "attention/adaspa": {"query_block": BLOCK}, "attention/chunked": {"chunk": 64, "last": 16},
    "attention/antidiagonal": {"query_block": BLOCK, "stride": 4}, "attention/antidiagonal_top_p": {"query_block": BLOCK, "stride": 4},
}
"""Arguments beside budget and block: sizes fit for 228 tokens; no guard for SpargeAttn, which would keep every block of this text."""


def measured(card, budget, model, task, fit):
    """(share recalled, density) of one method, fitted where it is calibrated."""
    cls = card.load()
    arguments = OTHER.get(card.name, {})
    made = cls(budget=budget, **arguments)
    given = {"budget": budget, **({"block": BLOCK} if "block" in made.arguments else {}), **arguments}
    one = cls(**given).eval()
    plan = {f"layers.{n}.attn": cls(**given).eval() for n in range(2)} if card.fitted == "calibrated" else {"layers.*.attn": one}
    if card.fitted == "calibrated":
        rarefy.calibrate(model, plan, fit)
    with rarefy.replaced(model, plan):
        share = recall_accuracy(model, task).mean
    return share, sum(m.measured_density() for m in plan.values()) / len(plan)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = recall_model()
    task, other = (key_value(KEYS, VALUES, 32, n, filler=FILLER, gap=100, seed=seed) for n, seed in ((24, 9), (8, 10)))
    fit = [SimpleNamespace(input_ids=other.input_ids, attention_mask=None)]
    wanted = {f"attention/{name.removeprefix('attention/')}" for name in sys.argv[1:]}
    groups = ("attention.dynamic", "attention.quest", "attention.window", "attention.random", "attention.mapped.top_k")
    lines = ["| method | " + " | ".join(map(str, BUDGETS)) + " |", "|---|" + "---|" * len(BUDGETS)]
    for card in ENTRIES:
        if not card.target.startswith(groups) or wanted and card.name not in wanted:
            continue
        cells = []
        for budget in BUDGETS:
            try:
                share, density = measured(card, budget, model, task, fit)
                cells.append(f"{share:.1%} ({density:.3f})")
            except (RarefyError, TypeError) as error:
                print(f"{card.name} at {budget}: {error}", file=sys.stderr)
                cells.append("-")
        if set(cells) == {"-"}:                     # it takes no budget, or needs another length
            continue
        lines.append(f"| `{card.name.removeprefix('attention/')}` | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if not wanted:
        head, start, rest = PAGE.read_text(encoding="utf-8").partition("<!-- recall -->\n")
        _, stop, tail = rest.partition("<!-- /recall -->")
        PAGE.write_text(head + start + "\n".join(lines) + "\n" + stop + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
