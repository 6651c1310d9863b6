"""LongLoRA's claim on the recall model: from 512 to 2,048 tokens by training under shifted sparse attention, served dense.

    python scripts/extend_context.py [--steps 60] [--seeds 1] [--methods dense,longlora] [--out FILE.json]

The recall model knows positions up to 512; at 2,048 it loses most answers. All weights (the paper: adapters, embeddings and norms) are
trained for equal steps of 8,192 tokens, with attention that is dense, of groups of 512 with half the heads shifted, or of groups without
shift. Two kinds of text: recall over any distance, of which groups show a part only, and recall within 512 tokens (four short sequences one
after another), as text mostly is. Accuracy is that of dense attention. --positions interpolated
divides positions by 4 first, as the paper does for Llama 2. Shape letters: B = sequences, T = tokens.
"""
import argparse
import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rarefy.attention.pattern import PatternAttention
from rarefy.attention.structured.shifted import SCCA, LongLoRA, SinkLoRA
from rarefy.builtin.model import recall_model
from rarefy.site import replaced
from rarefy.tasks.needles import needles
from rarefy.tasks.recall import CONTEXT, FILLER, KEYS, VALUES, Recall, mqar, recall_accuracy
from rarefy.tasks.recall_training import any_task, learn
from rarefy.tasks.variables import variables

LONGER, BATCH = 4 * CONTEXT, 4
TRAINED: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "longlora": lambda: LongLoRA(CONTEXT).train(),
    "sinklora": lambda: SinkLoRA(CONTEXT).train(),
    "scca": lambda: SCCA(CONTEXT).train(),
    "unshifted": lambda: PatternAttention(f"chunks({CONTEXT})").train(),
}


def start(positions: str) -> Any:
    """The recall model; "interpolated" divides all positions by 4."""
    short = recall_model()
    config = copy.deepcopy(short.config)
    config.max_position_embeddings = LONGER
    if positions == "interpolated":
        config.rope_parameters = {"rope_type": "linear", "rope_theta": config.rope_parameters["rope_theta"], "factor": LONGER / CONTEXT}
    model = type(short)(config)
    model.load_state_dict(short.state_dict())
    return model.eval()


def near(step: int, seed: int) -> Recall:
    """Four sequences of 512 tokens in one of 2,048: every answer stands within 512 tokens of its question."""
    short = any_task(step, CONTEXT, BATCH * LONGER // CONTEXT, seed)
    return Recall(short.input_ids.view(BATCH, LONGER), short.answer.view(BATCH, LONGER), short.gap)


def judged(model: Any) -> dict[str, float]:
    """Accuracies of dense attention."""
    out = {}
    for length, count in ((CONTEXT, 32), (LONGER, 16)):
        room = KEYS, VALUES, FILLER, length
        tasks = {"mqar": mqar(*room, 64, count // 2, power=0.2, seed=7), "needles": needles(*room, 16, count, asked=8, seed=7),
                 "variables": variables(*room, 2 * count, seed=7)}
        out |= {f"{name} {length}": round(recall_accuracy(model, task, at_once=2).mean, 3) for name, task in tasks.items()}
    return out


def trained(model: Any, method: Any, far: bool, steps: int, seed: int) -> float:
    """Mean loss of the last fifth of the steps, in nats an answer; the model is dense again afterwards."""
    losses = []
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    inside = replaced(model, {"layers.*.attn": method}) if method is not None else contextlib.nullcontext()
    with inside:
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10, 2 * (steps - step) / steps)
            number = seed * 1_000_003 + 700_001 + step
            losses.append(learn(model, optimiser, any_task(step, LONGER, BATCH, number) if far else near(step, number)))
    last = losses[-max(1, steps // 5):]
    model.eval()
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", default=list(TRAINED), type=lambda text: text.split(","))
    parser.add_argument("--texts", default=["any distance", "within 512"], type=lambda text: text.split(","))
    parser.add_argument("--positions", choices=["shipped", "interpolated"], default="shipped")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [{"trained": "not", **judged(start(args.positions))}]
    print(json.dumps(rows), flush=True)
    for text in args.texts:
        for name in args.methods:
            for seed in range(args.seeds):
                model = start(args.positions)
                loss = trained(model, TRAINED[name](), text == "any distance", args.steps, seed)
                rows.append({"trained": name, "text": text, "seed": seed, "loss": round(loss, 3), **judged(model)})
                print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
