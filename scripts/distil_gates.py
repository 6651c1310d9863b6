"""SeerAttention's gates against pooled scores at equal density, on the built-in model.

    python scripts/distil_gates.py --out build/gates [--steps 300] [--budgets 0.1 0.25]

The model is frozen; a gate a layer learns the block-pooled dense map (`Distilled`), two windows of --context tokens a step. Then, on held-out
files and with every layer replaced: the share of dense attention's mass on the chosen blocks, KL from the dense model and loss increase (95 %
intervals over windows), for the gates, mean keys (moba), key bounds (quest) and random blocks, all in blocks of 16 keys and 16 queries. A run
that was stopped goes on from its last checkpoint.

Shape letters: B = batch, H = query heads, G = key heads, T = tokens, D = head width.
"""
import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rarefy
from rarefy.attention.trained import Distilled
from rarefy.attention.trained.base import dense_map
from rarefy.frontier import Judge
from rarefy.kernels.block_attention import token_mask

BLOCK = 16
RIVALS = ("moba", "quest", "random")


class Mass:
    """Dense attention that notes, by method, how much of its map lies on the blocks that the method would take."""

    wants = ()

    def __init__(self, methods: dict[str, list[Any]]) -> None:
        self.methods = methods
        self.kept: dict[str, list[float]] = defaultdict(list)

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        p_BHTT, T = dense_map(q_BHTD, k_BGTD, scale, causal), q_BHTD.shape[2]
        for name, layers in self.methods.items():
            blocks = layers[layer % len(layers)].choose(q_BHTD, k_BGTD, causal)
            self.kept[name].append(float((p_BHTT * token_mask(blocks, T, T, block=BLOCK, query_block=BLOCK, causal=causal)).sum(-1).mean()))
        return p_BHTT @ v_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], 1)

    __call__ = attend


def compare(model: Any, steps: int, budget: float, gates: dict[str, Any], batches: list[Any]) -> None:
    """A line of the table for each way of choosing."""
    plans: dict[str, dict[str, Any]] = {"seer": gates}
    plans |= {name: dict(rarefy.plan(f"attention/{name}", model, budget, block=BLOCK, query_block=BLOCK)) for name in RIVALS}
    mass = Mass({name: list(plan.values()) for name, plan in plans.items()})
    with torch.no_grad(), rarefy.replaced(model, {"layers.*.attn": mass}):
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False)
    judge = Judge(model, batches)
    for name, plan in plans.items():
        with torch.no_grad():
            point = judge.measure(plan, method=name, unit="key block", budget=budget)
        kl, ce = point.metrics["kl"], point.metrics["ce_increase"]
        kept = sum(mass.kept[name]) / len(mass.kept[name])
        print(
            f"{steps} steps  {name:7s} kept {point.density:.3f}  mass {kept:.3f}  KL {kl.mean:.3f} [{kl.low:.3f}, {kl.high:.3f}]  "
            f"loss increase {ce.mean:.3f} [{ce.low:.3f}, {ce.high:.3f}]", flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = rarefy.open_model("builtin")[:2]
    text = rarefy.text("stdlib", tokenizer, context=args.context, fit_tokens=args.steps * 2 * args.context, judge_tokens=8192)
    stream = rarefy.TensorStream(torch.cat([b.input_ids for b in text.fit]), 2)
    made = {"block": BLOCK, "query_block": BLOCK}
    learned = Distilled(dict(rarefy.plan("attention/seer", model, **made)), model)
    recipe, run = rarefy.Recipe(steps=args.steps, lr=3e-3, save_every=50, log_every=20), args.out / f"seer-{args.context}-{args.steps}"
    rarefy.train({"seer": learned}, stream, recipe, run, on_log=lambda r: print(r["step"], r["methods"], flush=True))
    for budget in args.budgets:
        gates = dict(rarefy.plan("attention/seer", model, budget, **made))
        for name, method in gates.items():
            method.load_state_dict(learned.plan[name].state_dict())
            method.eval()
        compare(model, args.steps, budget, gates, text.judge)


if __name__ == "__main__":
    main()
