"""What one training step of a sharded TopK dictionary costs each GPU: memory, flops, bytes of memory and of network, counted.

    python scripts/plan_scale.py --latents 16777216 --width 4096 --k 64 --batch 32768 --gpus 64 --shards 64

Counted as the code works (latents/sharded.py, kernels/): encoder in bfloat16 with chosen values in float32, selection in one pass over
each chunk of pre-activations, sparse gradients, Adam in float32. Seconds follow from the rates given and are what no step can beat.
"""

from __future__ import annotations

import argparse

GIB = 2**30


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("latents", 2**24), ("width", 4096), ("k", 64), ("batch", 32768), ("gpus", 64), ("shards", 64), ("chunk", 1024)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--tflops", type=float, default=400, help="bfloat16 product, sustained")
    ask.add_argument("--memory", type=float, default=2500, help="GB/s of a GPU's memory")
    ask.add_argument("--network", type=float, default=45, help="GB/s a GPU sends and receives")
    a = ask.parse_args()
    if a.gpus % a.shards or a.latents % a.shards or a.batch % (a.gpus // a.shards):
        ask.error("shards must divide gpus and latents, and the sets of shards the batch")
    here, rows = a.latents // a.shards, a.batch // (a.gpus // a.shards)
    sets, numbers = a.gpus // a.shards, 2 * here * a.width
    pairs = rows * a.k / a.shards
    memory = {
        "parameters, float32": 4 * numbers, "encoder, bfloat16": numbers, "moments of Adam, float32": 8 * numbers,
        "gradients, float32": 4 * numbers, "pre-activations of a chunk of rows": 4 * a.chunk * here, "rows in, out and error": 3 * 4 * rows * a.width,
    }
    print(f"{a.latents:,} latents, width {a.width}, k {a.k}, {a.batch:,} tokens a step; {a.gpus} GPUs: {sets} set(s) of {a.shards} shards\n")
    print("| held by each GPU | GiB |\n|---|---|")
    for name, size in (*memory.items(), ("all", sum(memory.values()))):
        print(f"| {name} | {size / GIB:.1f} |")
    gather, total = 4 * rows * a.k * (a.shards - 1), 2 * 4 * rows * a.width * (a.shards - 1) / a.shards
    average = 2 * 4 * numbers * (sets - 1) / sets
    work = [
        ("encoder product", 2 * rows * here * a.width / (a.tflops * 1e12), f"{2 * rows * here * a.width / 1e12:,.0f} Tflop"),
        ("pre-activations written and read", 8 * rows * here / (a.memory * 1e9), f"{8 * rows * here / 1e9:,.1f} GB of memory"),
        ("decoder rows, forward and backward", 6 * 4 * pairs * a.width / (a.memory * 1e9), f"{6 * 4 * pairs * a.width / 1e9:,.1f} GB of memory"),
        ("Adam: 4 numbers read, 3 written", 7 * 4 * numbers / (a.memory * 1e9), f"{7 * 4 * numbers / 1e9:,.1f} GB of memory"),
        ("candidates of the other shards", gather / (a.network * 1e9), f"{gather / 1e9:,.2f} GB of network"),
        ("sum of reconstructions", total / (a.network * 1e9), f"{total / 1e9:,.2f} GB of network"),
        ("mean of gradients over sets", average / (a.network * 1e9), f"{average / 1e9:,.2f} GB of network"),
    ]
    print("\n| a step, each GPU | counted | ms |\n|---|---|---|")
    for name, seconds, counted in work:
        print(f"| {name} | {counted} | {seconds * 1e3:,.1f} |")
    step = sum(seconds for _, seconds, _ in work)
    print(f"| all, nothing overlapped | | {step * 1e3:,.1f} |")
    hours = 1e9 / a.batch * step / 3600
    print(f"\n{a.batch / step:,.0f} tokens/s on all GPUs; the product is {work[0][1] / step:.0%} of it; a billion tokens in {hours:.1f} hours.")


if __name__ == "__main__":
    main()
