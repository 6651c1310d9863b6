"""Training and encoding speed of a TopK dictionary beside other libraries, on CPU.

    pip install --no-deps eai-sparsify sae-lens dictionary-learning overcomplete    # those not installed are left out
    python benchmarks/bench_latents.py [--cases A,B] [--rounds 3] [--steps 12] [--out FILE.md]

Every contender works in a process of its own, on one thread pinned to a core (or --threads 2); contenders alternate within a round,
and figures are medians over rounds. tokens/s are of CPU time, which on one thread is wall time less what other programs
took. A step is loss, backward, clipping, Adam and unit-norm decoder rows, each library's own way, AuxK where it has it.
"floor" is the dense float32 encoder product alone, forward. "tuned" peers run with glibc told to keep its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CASES = {"A": (256, 4096), "B": (768, 16384), "smoke": (64, 512)}
K, BATCH, LR = 32, 2048, 5e-4
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"}
PIP = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning", "overcomplete": "overcomplete"}
Steps = tuple[Callable[[Any], object], Callable[[Any], object]]


def ours(d: int, width: int, precision: str) -> Steps:
    import torch

    from rarefy.latents.topk import TopK
    from rarefy.learner import Learner, Recipe

    method = TopK(d, width, k=K)
    learner = Learner("topk", method, Recipe(steps=10**6, lr=LR, warmup=1, precision=precision))
    done = [0]

    def step(x: torch.Tensor) -> None:
        if not done[0]:
            method.initialise(x)
        method.train()
        learner.gradient(x, x, done[0])
        learner.settle(done[0])
        learner.step(done[0])
        done[0] += 1

    return step, lambda x: method.eval().select(x)


def naive(d: int, width: int) -> Steps:
    """Thirty lines of dense PyTorch."""
    import torch

    w_enc = torch.nn.functional.normalize(torch.randn(width, d), dim=1).requires_grad_()
    w_dec, b_enc, b_dec = w_enc.detach().clone().requires_grad_(), torch.zeros(width, requires_grad=True), torch.zeros(d, requires_grad=True)
    parameters = [w_enc, w_dec, b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=LR)

    def codes(x: torch.Tensor) -> torch.Tensor:
        pre = (x - b_dec) @ w_enc.T + b_enc
        top = pre.topk(K, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def step(x: torch.Tensor) -> None:
        loss = (codes(x) @ w_dec + b_dec - x).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))

    return step, codes


def floor(d: int, width: int) -> Steps:
    import torch

    weight = torch.randn(width, d)
    out = torch.empty(256, width)

    def product(x: torch.Tensor) -> None:
        for piece in x.split(256):
            torch.mm(piece, weight.T, out=out)

    return product, product


def sparsify(d: int, width: int) -> Steps:
    import torch
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    coder = SparseCoder(d, SparseCoderConfig(num_latents=width, k=K))
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: torch.Tensor) -> None:
        out = coder(x, dead_mask=None)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step, coder.encode


def saelens(d: int, width: int, sparse: bool) -> Steps:
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.saes.sae import TrainStepInput  # type: ignore[import-not-found]

    # With its default of scaling by decoder norms the sparse variant fails in the backward pass on the CPU.
    more = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=width, k=K, **more))
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(x: torch.Tensor) -> None:
        out = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False))
        optimiser.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()

    return step, sae.encode


def dictionary_learning(d: int, width: int) -> Steps:
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(steps=10**6, activation_dim=d, dict_size=width, k=K, layer=0, lm_name="none", lr=LR, device="cpu", warmup_steps=1)
    done = [0]

    def step(x: Any) -> None:
        trainer.update(done[0], x)
        done[0] += 1

    return step, trainer.ae.encode


def overcomplete(d: int, width: int) -> Steps:
    import torch

    # Its __init__ imports vision models and plots; the dictionaries need neither.
    found = find_spec("overcomplete")
    assert found is not None
    sys.modules["overcomplete"] = package = types.ModuleType("overcomplete")
    package.__path__ = list(found.submodule_search_locations or ())
    from overcomplete.sae import TopKSAE  # type: ignore[import-not-found]

    sae = TopKSAE(d, nb_concepts=width, top_k=K, device="cpu")
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(x: torch.Tensor) -> None:
        _, _, x_hat = sae(x)
        loss = (x - x_hat).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()

    return step, sae.encode


CONTENDERS: dict[str, tuple[str, Callable[[int, int], Steps], dict[str, str]]] = {
    "floor (encoder product alone)": ("", floor, {}),
    "rarefy float32": ("", lambda d, f: ours(d, f, "float32"), {}),
    "rarefy bfloat16": ("", lambda d, f: ours(d, f, "bfloat16"), {}),
    "naive dense": ("", naive, {}),
    "sparsify": ("sparsify", sparsify, {}),
    "sparsify, tuned": ("sparsify", sparsify, TUNED),
    "SAELens TopK": ("sae_lens", lambda d, f: saelens(d, f, False), {}),
    "SAELens TopK, sparse": ("sae_lens", lambda d, f: saelens(d, f, True), {}),
    "dictionary_learning TopK": ("dictionary_learning", dictionary_learning, {}),
    "Overcomplete TopK": ("overcomplete", overcomplete, {}),
}
"""Name -> (package it needs, what makes its step and its encoder, environment)."""


def child(name: str, case: str, steps: int, threads: int) -> dict[str, float]:
    """One contender in this process. One thread is timed by CPU time, more by the clock, which also sees them wait for each other."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    d, width = CASES[case]
    directions = torch.nn.functional.normalize(torch.randn(width // 4, d), dim=1)
    rows = [torch.randn(BATCH, d) * 0.1 + torch.rand(BATCH, 16) @ directions[torch.randint(width // 4, (16,))] for _ in range(4)]
    step, encode = CONTENDERS[name][1](d, width)

    def seconds(call: Callable[[Any], object], runs: int) -> float:
        times = []
        for run in range(runs + 2):
            start = clock()
            call(rows[run % 4])
            times.append(clock() - start)
        return statistics.median(times[2:])

    train = seconds(step, steps)
    with torch.no_grad():
        encoding = seconds(encode, max(3, steps // 2))
    return {"train": BATCH / train, "encode": BATCH / encoding, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(name: str, case: str, args: argparse.Namespace) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--child", name, "--cases", case, "--steps", str(args.steps), "--threads", str(args.threads)]
    if hasattr(os, "sched_getaffinity") and args.threads == 1:
        command = ["taskset", "-c", str(args.core if args.core is not None else min(os.sched_getaffinity(0))), *command]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads), **CONTENDERS[name][2]}
    got = subprocess.run(command, capture_output=True, text=True, env=env)
    if got.returncode:
        print(f"{name}, case {case}: failed: {(got.stderr.strip().splitlines() or ['?'])[-1][:160]}", flush=True)
        return None
    return json.loads(got.stdout.splitlines()[-1])


def table(case: str, seen: dict[str, list[dict[str, float]]]) -> str:
    middle = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in seen.items() if rs}
    base, best = middle.get("floor (encoder product alone)"), [m for n, m in middle.items() if CONTENDERS[n][0] and not CONTENDERS[n][2]]
    d, width = CASES[case]
    lines = [f"### Case {case}: d {d}, {width:,} latents, k {K}, batch {BATCH:,}", "",
             "| | train tokens/s | × fastest peer | of the floor | encode tokens/s | × fastest peer | peak MB |", "|---|---|---|---|---|---|---|"]
    for name, m in middle.items():
        ratio = {k: f"{m[k] / max(b[k] for b in best):.2f}" if best else "" for k in ("train", "encode")}
        share = f"{m['train'] / base['train']:.0%}" if base else ""
        lines.append(f"| {name} | {m['train']:,.0f} | {ratio['train']} | {share} | {m['encode']:,.0f} | {ratio['encode']} | {m['peak_mb']:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default="A,B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", type=int, help="core to run on; default the first allowed")
    parser.add_argument("--out", type=Path, help="also write the tables here, as Markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.cases, args.steps, args.threads)))
        return
    names = [n for n, (package, *_) in CONTENDERS.items() if not package or find_spec(package)]
    for absent in sorted({p for p, *_ in CONTENDERS.values() if p and not find_spec(p)}):
        print(f"{absent} is not installed and is left out; to add it: pip install --no-deps {PIP[absent]}, and what it then asks for", flush=True)
    tables = []
    for case in args.cases.split(","):
        seen: dict[str, list[dict[str, float]]] = {n: [] for n in names}
        for _ in range(args.rounds):
            for name in names:
                got = measure(name, case, args)
                if got:
                    seen[name].append(got)
                    print(f"{case} {name}: train {got['train']:,.0f}, encode {got['encode']:,.0f} tokens/s, {got['peak_mb']:,.0f} MB", flush=True)
        tables.append(table(case, seen))
        print(tables[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
