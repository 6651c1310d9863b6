"""Sparse GIN-Attention against LoRA at equal parameters: the built-in model fine-tuned on scikit-learn's source, all but the adapters frozen.

    python scripts/gin_adapter.py [--steps 200]
"""
import argparse
from pathlib import Path

import sklearn
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rarefy
from rarefy.frontier import Judge

CONTEXT, BATCH = 256, 4


class LoRA(nn.Module):
    """x W + x A B beside an output projection; B begins at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(linear.in_features, rank, generator=torch.Generator().manual_seed(0)) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down @ self.up


def gin(model: nn.Module, **more: object) -> dict[str, nn.Module]:
    return dict(rarefy.plan("attention/gin", model, **more))


def lora(model: nn.Module, rank: int) -> dict[str, nn.Module]:
    return {name: LoRA(model.get_submodule(site.module_path), rank) for name, site in rarefy.sites(model, "layers.*.o_proj").items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = rarefy.open_model("builtin")
    model.requires_grad_(False)
    text = rarefy.text(str(Path(sklearn.__file__).parent), tokenizer, context=CONTEXT, fit_tokens=200_000, judge_tokens=16_384)
    rows = torch.cat([b.input_ids for b in text.fit])
    judge = Judge(model, text.judge)
    arms = {
        "gin, keep above 0.05": lambda: gin(model, width=16), "gin, shifted by 0.05": lambda: gin(model, width=16, rule="shift"),
        "gin, no threshold": lambda: gin(model, width=16, threshold=0.0), "lora on o_proj, rank 16": lambda: lora(model, 16)}
    print(f"{rows.numel()} tokens to train on, {len(judge.batches)} batches to judge; {args.steps} steps of {BATCH} x {CONTEXT}")
    print("| adapter | parameters | rate | held-out loss less | train loss less |\n|---|---|---|---|---|")
    for name, make in arms.items():
        for rate in (1e-3, 5e-3):
            plan = make()
            moved = [p for m in plan.values() for n, p in m.named_parameters() if not n.startswith("linear.")]
            for p in moved:
                p.requires_grad_(True)
            optimiser, draw, first, last = torch.optim.Adam(moved, lr=rate), torch.Generator().manual_seed(0), [], []
            with rarefy.replaced(model, plan):
                for step in range(args.steps):
                    ids = rows[torch.randint(len(rows), (BATCH,), generator=draw)]
                    loss = cross_entropy(model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    (first if step < 20 else last if step >= args.steps - 20 else []).append(float(loss.detach()))
            for m in plan.values():
                m.eval()
            point = judge.measure(plan, method=name, unit="key", budget=1.0)
            gain = point.metrics["ce_increase"]
            print(f"| {name} | {sum(p.numel() for p in moved)} | {rate:g} | {-gain.mean:.4f} [{-gain.high:.4f}, {-gain.low:.4f}] | "
                  f"{sum(first) / len(first) - sum(last) / len(last):.4f} |", flush=True)


if __name__ == "__main__":
    main()
