"""Train the small recall model that ships with rarefy, in about ten minutes on one core; see rarefy.tasks.recall_training.

    python scripts/train_recall.py --out src/rarefy/builtin/recall_files

With --model FOLDER it measures that model and writes its card instead of training.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from rarefy.tasks.needles import needles
from rarefy.tasks.recall import CONTEXT, FILLER, KEYS, VALUES, key_value, mqar, needle, recall_accuracy
from rarefy.tasks.recall_training import train_recall_model
from rarefy.tasks.turns import turns
from rarefy.tasks.variables import variables

SEED = 1_000_009
ROOM = KEYS, VALUES, FILLER, CONTEXT


def measured(model: Any) -> dict[str, dict[str, float]]:
    """Accuracy on each task at the model's context, with its interval over sequences no training has seen."""
    tasks = {
        "32 pairs, gap 384": key_value(KEYS, VALUES, 32, 64, filler=FILLER, gap=384, seed=SEED),
        "mqar, 64 pairs, power 0.01": mqar(*ROOM, 64, 64, seed=SEED),
        "mqar, 64 pairs, even gaps": mqar(*ROOM, 64, 64, power=1.0, seed=SEED),
        "needle": needle(*ROOM, 512, seed=SEED),
        "16 needles, 8 asked": needles(*ROOM, 16, 128, asked=8, seed=SEED),
        "variables, 4 chains of 4": variables(*ROOM, 256, seed=SEED),
        "6 turns about 16 pairs": turns(*ROOM, 16, 64, seed=SEED).recall,
    }
    scores = {name: recall_accuracy(model, task) for name, task in tasks.items()}
    return {name: {"mean": s.mean, "low": s.low, "high": s.high} for name, s in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model:
        from transformers import LlamaForCausalLM

        model: Any = LlamaForCausalLM.from_pretrained(args.model).eval()
    else:
        began = time.perf_counter()
        model = train_recall_model(on_step=lambda step, loss: print(step, round(loss, 4), flush=True) if step % 200 == 0 else None)
        print(f"{time.perf_counter() - began:.0f} s")
    scores = measured(model)
    print(json.dumps(scores, indent=1))
    assert min(score["mean"] for score in scores.values()) >= 0.99, "a model that does not recall shows nothing about what sparsity loses"
    model.save_pretrained(args.out)
    card = {"context": CONTEXT, "accuracy": scores, "trained_on": "sequences made by rarefy.tasks", "licence": "Apache-2.0"}
    (args.out / "card.json").write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
