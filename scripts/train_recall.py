"""Train the small recall model that ships with rarefy, in about two minutes on one core; see rarefy.tasks.recall.

    python scripts/train_recall.py --out src/rarefy/builtin/recall_files
"""
import argparse
import json
from pathlib import Path

import torch

from rarefy.tasks.recall import FILLER, KEYS, VALUES, key_value, needle, recall_accuracy, train_recall_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train_recall_model(on_step=lambda step, loss: print(step, round(loss, 4), flush=True) if step % 200 == 0 else None)
    tasks = {
        "32 pairs, gap 128": key_value(KEYS, VALUES, 32, 128, filler=FILLER, gap=128, seed=1_000_009),
        "needle in 256": needle(KEYS, VALUES, FILLER, 256, 512, seed=1_000_009),
    }
    scores = {name: recall_accuracy(model, task).mean for name, task in tasks.items()}
    print(scores)
    assert min(scores.values()) >= 0.99, "a model that does not recall shows nothing about what sparsity loses"
    model.save_pretrained(args.out)
    card = {"accuracy": scores, "trained_on": "sequences made by rarefy.tasks.recall", "licence": "Apache-2.0"}
    (args.out / "card.json").write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
