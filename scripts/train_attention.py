"""Train a small Llama from scratch with trained attention, on the standard library, and compare held-out loss at equal steps.

    python scripts/train_attention.py --out build/attention --methods dense moba nsa diff sparsek

Every model has the same initial weights, sees the same windows in the same order and is trained by `rarefy.train`. An interrupted run
goes on from its last checkpoint in --out. Prints a table: loss on held-out files (nats a token, 95 % interval over files), share of
(query, key) pairs attended, seconds a step.
"""
import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rarefy
from rarefy.attention.trained import Trained
from rarefy.builtin.model import builtin_folder
from rarefy.frontier import Judge

OWN = {
    "moba": {"budget": 0.25, "block": 16},
    "nsa": {"budget": 0.25, "block": 16, "compress": 16, "stride": 8, "window": 32, "local": 1},
    "fsa": {"budget": 0.25, "block": 16, "compress": 16, "stride": 8, "window": 32, "local": 1},
    "diff": {},
    "sparsek": {"budget": 0.25, "window": 32},
    "window": {"budget": 0.25, "block": 16},
    "random": {"budget": 0.25, "block": 16},
    "routing": {"window": 32},
    "shared_diff": {},
    "nosa": {"budget": 0.25, "block": 16, "pool": 8, "local": 1},
    "llsa": {"top": 4, "block": 8, "shared": False, "coarse": "rest"},
    "sma": {"window": 256},
    "swat": {"window": 32},
    "pattern": {"pattern": "window(32)"},
}
"""Settings of each method: about a quarter of the pairs of a 256-token context; swat against softmax in the same window, pattern."""


def small_llama(vocab: int, hidden: int, layers: int, embeddings: float = 0.0) -> LlamaForCausalLM:
    """Of the same weights each time; `embeddings`: their deviation, 0 for transformers' own."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    ))
    if embeddings:
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=embeddings)
    return model


def plan_of(name: str, model: LlamaForCausalLM) -> dict[str, rarefy.Sparse]:
    given = dict(OWN[name])
    return dict(rarefy.plan(f"attention/{name}", model, given.pop("budget", 0.5), **given))


class Dense(rarefy.Sparse):
    """The model's own attention, trained by the same loop."""

    fitted = "trained"

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    @property
    def arguments(self) -> dict:
        return {"objective": "dense"}

    @property
    def budget(self) -> float:
        return 1.0

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> rarefy.Loss:
        logits = self.model(input_ids=x, use_cache=False).logits
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        return rarefy.Loss(ce, {"ce": ce})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["dense", "moba", "nsa"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--embeddings", type=float, default=0.0, help="deviation of the token embeddings, 0 for the model's own (0.02)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    text = rarefy.text("stdlib", tokenizer, context=args.context, fit_tokens=args.steps * args.batch * args.context, judge_tokens=20_000)
    stream = rarefy.TensorStream(torch.cat([b.input_ids for b in text.fit]), args.batch)
    recipe = rarefy.Recipe(steps=args.steps, lr=args.lr, betas=(0.9, 0.95), save_every=100, log_every=20)
    other = f"-embeddings{args.embeddings:g}" * (args.embeddings != 0)
    print(f"{args.layers} layers, width {args.hidden}, context {args.context}, {args.steps} steps of {args.batch * args.context} tokens")
    for name in args.methods:
        model = small_llama(len(tokenizer), args.hidden, args.layers, args.embeddings)
        plan = {} if name == "dense" else plan_of(name, model)
        wrapper = Trained(plan, model) if plan else Dense(model)
        began = time.perf_counter()
        rarefy.train({name: wrapper}, stream, recipe, args.out / f"{name}-{args.layers}x{args.hidden}-{args.context}-{args.steps}{other}")
        seconds = time.perf_counter() - began
        with torch.no_grad():
            point = judged(model.eval(), plan, text.judge)
        print(f"{name:11s} ce {point['ce']}  density {point['density']:.3f}  {seconds / args.steps:.2f} s a step", flush=True)


def judged(model: LlamaForCausalLM, plan: dict[str, rarefy.Sparse], batches: list) -> dict:
    """Held-out loss of the model with its plan in place, and the density measured on the way."""
    with rarefy.replaced(model, plan):
        for method in plan.values():
            method.measured_density()
        judge = Judge(model, batches)
        ce = judge.dense("key").metrics["ce"]
        found = [method.measured_density() for method in plan.values()]
    return {"ce": f"{ce.mean:.3f} [{ce.low:.3f}, {ce.high:.3f}]", "density": sum(found) / len(found) if found else 1.0}


if __name__ == "__main__":
    main()
