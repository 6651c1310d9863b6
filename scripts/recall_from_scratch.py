"""Does attention that is sparse from the first step learn far retrieval? The recall model's architecture, trained with each method in place.

    python scripts/recall_from_scratch.py --out build/recall --methods dense nsa moba window diff

Same initial weights, same lessons in the same order, loss on answers only: 4 pairs back to back (16 tokens) until their loss is below 0.1 nats,
then 256, 128 and 64 tokens in turn, an eighth as many pairs, asked back at even gaps, until 99 % of held-out answers in 256 tokens are right.
Each part has its limit of steps. A line of JSON a method, kept in --out; methods that have theirs are not run again. The model is drawn as
transformers draws it, embeddings with a deviation of 0.02; --embeddings gives them another (DIFF's authors draw their decoders' with
hidden^-0.5, here 0.125). --tries N runs the short lessons alone, from N seeds: how long each method takes to find the lookup. With dense and
differential attention also the share of the last layer's attention, from questions, that lies on the answer's place.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import rarefy
from rarefy.attention.trained.base import dense_map
from rarefy.attention.trained.diff import Diff
from rarefy.builtin.model import recall_model
from rarefy.tasks.recall import FILLER, KEYS, VALUES, Recall, accuracy_by_gap, distances, hits, key_value, mqar, recall_accuracy

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", {}),
    "nsa": ("nsa", {"block": 8, "compress": 16, "stride": 8, "window": 8, "local": 1, "top": 4}),
    "nsa, means": ("nsa", {"block": 8, "compress": 16, "stride": 8, "window": 8, "local": 1, "top": 4, "phi": "mean"}),
    "moba": ("moba", {"block": 8, "top": 4, "order": "queries"}),
    "moba, last layer dense": ("moba", {"block": 8, "top": 4, "order": "queries"}),
    "window": ("pattern", {"pattern": "window(34)"}),
    "random": ("random", {"budget": 0.25, "block": 8}),
    "diff": ("diff", {}),
    "sparsek": ("sparsek", {"budget": 0.25, "window": 16}),
    "routing": ("routing", {"clusters": 4, "local_heads": 2, "window": 16, "decay": 0.99}),
    "shared_diff": ("shared_diff", {}),
    "nosa": ("nosa", {"budget": 0.25, "block": 8, "pool": 4, "local": 1}),
    "llsa": ("llsa", {"top": 4, "block": 8, "shared": False}),
    "sma": ("sma", {"window": 36}),
}
"""About a quarter of the pairs of 256 tokens, where a method saves pairs at all."""
EVERY = 25
"""Steps from one judgement to the next."""


def lesson(step: int, long: int, args: argparse.Namespace) -> Recall:
    """Of the step; `long` counts those after the short ones."""
    seed = args.seed * 1_000_003 + step
    if long < 0:
        return key_value(KEYS, VALUES, 4, 128, seed=seed)
    length = args.context >> long % 3
    return mqar(KEYS, VALUES, FILLER, length, length // 8, 2048 // length, power=1.0, seed=seed)


def drawn(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(recall_model().config)
    if args.embeddings:
        nn.init.normal_(model.model.embed_tokens.weight, std=args.embeddings)
    return model


def plan_of(name: str, model: nn.Module) -> dict[str, Any]:
    method, given = METHODS[name]
    if not method:
        return {}
    made = rarefy.plan(f"attention/{method}", model, **given)
    return {layer: m.train() for layer, m in list(made.items())[: 1 if "last layer dense" in name else None]}


@contextlib.contextmanager
def judging(plan: dict[str, Any]) -> Iterator[None]:
    """Methods out of training mode, their counts begun anew."""
    for method in plan.values():
        method.eval()
        method.measured_density()
    try:
        yield
    finally:
        for method in plan.values():
            method.train()


def trained(name: str, args: argparse.Namespace, judge: Recall) -> dict[str, Any]:
    """Train to 99 % or to the limits; the record of the run."""
    model = drawn(args)
    plan = plan_of(name, model)
    parameters = [*model.parameters(), *nn.ModuleList(plan.values()).parameters()]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    short, step, losses, curve, spent = None, 0, [], {}, 0.0
    with rarefy.replaced(model, plan) if plan else contextlib.nullcontext():
        while short is None or step - short < args.long and max(curve.values(), default=0.0) < 0.99:
            optimiser.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 50)
            task, began = lesson(step, -1 if short is None else step - short, args), time.perf_counter()
            state = model.model(input_ids=task.input_ids, use_cache=False).last_hidden_state
            loss = cross_entropy(model.lm_head(state[:, :-1][task.answer[:, 1:]]), task.input_ids[task.answer])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            for method in plan.values():
                method.after_step(step)
            spent, step = spent + time.perf_counter() - began, step + 1
            losses.append(loss.item())
            if short is None and (sum(losses[-5:]) < 0.5 or step == args.short):
                short, reached = step, sum(losses[-5:]) / 5
                print(f"  {name}: short lessons {short} steps, loss {reached:.3f} ({spent / step:.2f} s a step)", flush=True)
            elif short is not None and (step - short) % EVERY == 0:
                with judging(plan):
                    curve[step - short] = round(recall_accuracy(model, judge).mean, 4)
                print(f"  {name} {step - short}: {curve[step - short]:.3f} ({spent / step:.2f} s a step)", flush=True)
        if not args.long:
            return {"method": name, "seed": args.seed, "lr": args.lr, "embeddings": args.embeddings, "short": short, "short_loss": round(reached, 3)}
        with judging(plan):
            gaps = accuracy_by_gap(hits(model, judge), judge, (2, 32, 64, 128, 256))
            density = {layer: round(method.measured_density(), 3) for layer, method in plan.items()}
    return {
        "method": name, "context": args.context, "seed": args.seed, "lr": args.lr, "embeddings": args.embeddings,
        "short": short, "short_loss": round(reached, 3), "curve": curve,
        "to_90": first(curve, 0.9),
        "to_99": first(curve, 0.99), "by_gap": {k: [round(g.mean, 3), round(g.low, 3), round(g.high, 3)] for k, g in gaps.items()},
        "density": density, "seconds_a_step": round(spent / step, 3), "on_answer": on_answer(model, plan, judge),
    }


def first(curve: dict[int, float], accuracy: float) -> int | None:
    return next((step for step, got in curve.items() if got >= accuracy), None)


class Seen:
    """A layer's attention, computed as before, with its map's share on the answers' places kept aside."""

    wants = ()

    def __init__(self, method: Diff | None, task: Recall) -> None:
        self.method, self.at, self.away = method, task.answer.nonzero(as_tuple=True), distances(task)[task.answer]
        self.share_HA = torch.zeros(0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0,
    ) -> Tensor:
        maps = (self.method.maps(q, k, scale, causal) if self.method else dense_map(q, k, scale, causal)).abs()
        row, place = self.at                                      # the question stands one before its answer
        share = maps[row, :, place - 1, place - self.away] / maps[row, :, place - 1].sum(-1)
        self.share_HA = share.T
        return self.method.attend(q, k, v, scale=scale, causal=causal, layer=layer) if self.method else maps @ v

    __call__ = attend


def on_answer(model: nn.Module, plan: dict[str, Any], task: Recall) -> dict[str, float] | None:
    """Share of the last layer's absolute attention from a question that lies on its answer: the best head's and the mean over heads."""
    if plan and not all(isinstance(method, Diff) for method in plan.values()):
        return None
    layer = list(rarefy.plan("attention/moba", model))[-1]
    seen = Seen(plan.get(layer), task)
    with torch.no_grad(), rarefy.replaced(model, {**plan, layer: seen}):
        model(input_ids=task.input_ids, use_cache=False)
    each = seen.share_HA.mean(1)
    return {"best_head": round(float(each.max()), 4), "mean": round(float(each.mean()), 4)}


def tries(args: argparse.Namespace, judge: Recall) -> None:
    """Steps and loss of the short lessons, by seed."""
    args.long = 0
    with (args.out / "tries.jsonl").open("a") as out:
        for name in args.methods:
            for seed in range(args.tries):
                args.seed = seed
                record = json.dumps(trained(name, args, judge))
                print(record, flush=True)
                out.write(record + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--short", type=int, default=500, help="most steps of short lessons")
    parser.add_argument("--long", type=int, default=500, help="most steps after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--embeddings", type=float, default=0.0, help="deviation of the token embeddings, 0 for the model's own (0.02)")
    parser.add_argument("--tries", type=int, default=0, help="short lessons only, from so many seeds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    other = f"-lr{args.lr:g}" * (args.lr != 2e-3) + f"-embeddings{args.embeddings:g}" * (args.embeddings != 0)
    kept = args.out / f"recall-{args.context}-{args.seed}{other}.jsonl"
    done = {r["method"]: r for r in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    judge = mqar(KEYS, VALUES, FILLER, args.context, args.context // 8, 32, power=1.0, seed=-1 - args.seed)
    if args.tries:
        tries(args, judge)
        return
    for name in args.methods:
        if name not in done:
            done[name] = trained(name, args, judge)
            with kept.open("a") as out:
                out.write(json.dumps(done[name]) + "\n")
        print(json.dumps({k: v for k, v in done[name].items() if k != "curve"}), flush=True)


if __name__ == "__main__":
    main()
