"""Train the small recall model that ships with rarefy, in about ten minutes on one core; see rarefy.tasks.recall_training.

    python scripts/train_recall.py --out src/rarefy/builtin/recall_files
    python scripts/train_recall.py --long --out src/rarefy/builtin/recall_long_files

The second trains the shipped model on to 8,192 tokens, in some minutes; see rarefy.tasks.recall_long. With --model FOLDER it measures that
model and writes its card instead of training.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from rarefy.builtin.model import recall_model
from rarefy.tasks.needles import needles
from rarefy.tasks.recall import CONTEXT, FILLER, KEYS, VALUES, key_value, mqar, needle, recall_accuracy
from rarefy.tasks.recall_long import LONG_CONTEXT, train_long_recall_model
from rarefy.tasks.recall_training import train_recall_model
from rarefy.tasks.turns import turns
from rarefy.tasks.variables import variables

SEED = 1_000_009


def measured(model: Any, length: int, part: int = 1) -> dict[str, dict[str, float]]:
    """Accuracy on each task at a length, with its interval over sequences no training has seen; the sequences a task are divided by `part`."""
    room = KEYS, VALUES, FILLER, length
    tasks = {
        f"32 pairs, gap {length - 128}": key_value(KEYS, VALUES, 32, 64 // part, filler=FILLER, gap=length - 128, seed=SEED),
        "mqar, 64 pairs, power 0.01": mqar(*room, 64, 64 // part, seed=SEED),
        "mqar, 64 pairs, even gaps": mqar(*room, 64, 64 // part, power=1.0, seed=SEED),
        "needle": needle(*room, 512 // part, seed=SEED),
        "16 needles, 8 asked": needles(*room, 16, 128 // part, asked=8, seed=SEED),
        "variables, 4 chains of 4": variables(*room, 256 // part, seed=SEED),
        "6 turns about 16 pairs": turns(*room, 16, 64 // part, seed=SEED).recall,
    }
    scores = {name: recall_accuracy(model, task, at_once=max(1, 4096 // length)) for name, task in tasks.items()}
    return {name: {"mean": s.mean, "low": s.low, "high": s.high} for name, s in scores.items()}


def trained(long: bool, model: Any) -> Any:
    """A model of 512 tokens from nothing, or one of 8,192 from `model`."""
    began = time.perf_counter()
    note = lambda step, loss: print(step, round(loss, 4), flush=True) if step % (10 if long else 200) == 0 else None
    made = train_long_recall_model(model, on_step=note) if long else train_recall_model(on_step=note)
    print(f"{time.perf_counter() - began:.0f} s")
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--long", action="store_true", help=f"train the shipped model on to {LONG_CONTEXT} tokens")
    parser.add_argument("--model", type=Path, help="measure this model instead of training one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = LlamaForCausalLM.from_pretrained(args.model).eval() if args.model else trained(args.long, recall_model() if args.long else None)
    if args.long:
        scores: dict[str, Any] = {str(length): measured(model, length, part) for length, part in ((512, 1), (2048, 4), (LONG_CONTEXT, 8))}
        flat = [score for each in scores.values() for score in each.values()]
    else:
        scores = measured(model, CONTEXT)
        flat = list(scores.values())
    print(json.dumps(scores, indent=1))
    assert min(score["mean"] for score in flat) >= 0.99, "a model that does not recall shows nothing about what sparsity loses"
    model.save_pretrained(args.out)
    card: dict[str, Any] = {"context": LONG_CONTEXT if args.long else CONTEXT, "accuracy": scores}
    card |= {"trained_on": "sequences made by rarefy.tasks", "licence": "Apache-2.0"}
    (args.out / "card.json").write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
