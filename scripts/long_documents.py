"""Readers of long documents compared: windows, global tokens, segments with overlap and pooling, HAT's layouts, HDT, all attention.

    python scripts/long_documents.py [files|scattered|structure ...] [--only NAME] [--length 128] [--steps 300] [--seeds 1]

Prints the tables of docs/attention-suite.md ("Which library is this file from?") and docs/structured-attention.md: accuracy on held-out
files [95 % over files, seeds of a file together], the pairs that a layer forms for a head against all of them, and seconds of training.
"""
import argparse
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import rarefy
from rarefy.attention.structured.encoder import Layer
from rarefy.attention.structured.hat import HAT
from rarefy.attention.structured.hdt import HDT, Walk
from rarefy.attention.structured.trees import TOKEN, document_tree, together
from rarefy.builtin.corpus import documents
from rarefy.tasks.sources import (
    POOLS,
    Reader,
    SegmentReader,
    Sources,
    documents_of,
    reading_accuracy,
    reading_mask,
    scattered,
    segments_of,
    train_reader,
)

WIDTH, HEADS, LAYERS, SEGMENT = 64, 4, 3, 32


def sweep_arms(length, windows, marks, segments):
    """Name -> (reader of a seed, share of pairs formed in a layer)."""
    def reader(kind, **how):
        return lambda vectors, classes, seed: Reader(vectors, classes, kind, length=length, seed=seed, **how)

    def segmented(**how):
        return lambda vectors, classes, seed: SegmentReader(vectors, classes, length=length, seed=seed, **how)

    def share(kind, **how):
        return reading_mask(kind, length, **how).float().mean().item()

    arms = {"bag": (reader("bag"), 0.0), "full": (reader("full"), 1.0)}
    arms |= {f"window {w}": (reader("window", window=w), share("window", window=w)) for w in windows}
    arms |= {f"window {windows[0]}, {m} global": (reader("global", window=windows[0], marks=m), share("global", window=windows[0], marks=m))
             for m in marks}
    arms |= {f"hierarchical {segments[0]}": (reader("hierarchical", window=segments[0]), share("hierarchical", window=segments[0]))}
    for w in segments:
        for overlap in (0, w // 2):
            for pool in POOLS if w == segments[0] else ("max",):
                at, _ = segments_of(length, w, overlap)
                formed = (at.numel() * w + len(at) ** 2) / 2 / length**2
                arms[f"segments {w}, overlap {overlap}, {pool}"] = segmented(segment=w, overlap=overlap, pool=pool), formed
    return arms


class Masked(nn.Module):
    """Layers of the same kind as HAT's and HDT's under one mask."""

    def __init__(self, vectors, classes, seed, mask):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("vectors", vectors)
        self.mask, self.enter = mask, nn.Linear(vectors.shape[1], WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(len(mask), WIDTH))
        self.layers = nn.ModuleList([Layer(WIDTH, HEADS, 2 * WIDTH) for _ in range(LAYERS)])
        self.leave = nn.Linear(WIDTH, classes)

    def forward(self, ids):
        x = self.enter(self.vectors[ids]) + self.place
        for layer in self.layers:
            x = layer(x, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=self.mask))
        return self.leave(torch.relu(x).mean(1))


class Segmental(nn.Module):
    """HAT and a classifier on the mean of its CLS tokens."""

    def __init__(self, vectors, classes, seed, stack, length):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("vectors", vectors)
        self.enter = nn.Linear(vectors.shape[1], WIDTH)
        self.hat = HAT(WIDTH, HEADS, SEGMENT, -(-length // SEGMENT), stack, wide=2 * WIDTH, seed=seed)
        self.leave = nn.Linear(WIDTH, classes)

    def forward(self, ids):
        return self.leave(torch.relu(self.hat(self.enter(self.vectors[ids]))[1]).mean(1))


class Treelike(nn.Module):
    """HDT over numbered trees and a classifier on the mean of all positions."""

    def __init__(self, vectors, classes, seed, trees):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("vectors", vectors)
        self.trees, self.enter = trees, nn.Linear(vectors.shape[1], WIDTH)
        self.hdt = HDT(WIDTH, HEADS, LAYERS, wide=2 * WIDTH, seed=seed)
        self.leave = nn.Linear(WIDTH, classes)

    def forward(self, number_B1):
        batch = together([self.trees[n] for n in number_B1[:, 0].tolist()])
        x = self.hdt(self.enter(self.vectors[batch.ids.clamp_min(0)]), batch)
        there = (batch.level <= TOKEN)[..., None]
        return self.leave((torch.relu(x) * there).sum(1) / there.sum(1))


def compared(title, arms, vectors, sources, options):
    print(f"\n{title}\n\n| reader | accuracy | pairs | s |\n|---|---|---|---|", flush=True)
    for name, (make, pairs, *own) in ((n, arm) for n, arm in arms.items() if options.only in n):
        mine, begin = own[0] if own else sources, time.perf_counter()
        made = [train_reader(make(vectors, len(sources.packages), seed), mine, steps=options.steps, seed=seed) for seed in range(options.seeds)]
        took, got = (time.perf_counter() - begin) / options.seeds, reading_accuracy(made, mine)
        print(f"| {name} | {got.mean:.2f} [{got.low:.2f}, {got.high:.2f}] | {pairs:.3f} | {took:.0f} |", flush=True)


def structure_arms(sources, tokenizer, length):
    """HAT's layouts, HDT over lines and blocks of the same pieces, windows and all attention, of LAYERS layers that read tokens."""
    trees = [document_tree(tokenizer.decode(ids), lambda t: tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
             for ids in sources.ids_BT.tolist()]
    numbered = Sources(torch.arange(len(trees))[:, None], sources.label_B, sources.file_B, sources.held_B, sources.packages)
    some = together(trees[::8])
    L = some.level.shape[1]
    walk = Walk(some)
    along = walk.mask.density(L, L, False) * (L / length) ** 2
    arms = {"full": (lambda v, c, s: Masked(v, c, s, torch.ones(length, length, dtype=torch.bool)), 1.0)}
    for w in (SEGMENT, 2 * SEGMENT):
        mask = reading_mask("window", length, window=w)
        arms[f"window {w}"] = (lambda v, c, s, mask=mask: Masked(v, c, s, mask)), mask.float().mean().item()
    for name, stack in (("segments alone", "SSS"), ("interleaved", "SDSDSD"), ("early", "SDSS"), ("late", "SSSD"), ("ad hoc", "SSSDDD")):
        formed = HAT(WIDTH, HEADS, SEGMENT, 64, stack).pairs(length) / LAYERS / length**2
        arms[f"HAT {name} ({stack})"] = (lambda v, c, s, stack=stack: Segmental(v, c, s, stack, length)), formed
    return arms | {"HDT": ((lambda v, c, s: Treelike(v, c, s, trees)), along, numbered)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", default=["files", "scattered", "structure"])
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--length", type=int, default=128, help="tokens of a piece in the table of files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = rarefy.open_model("builtin")[:2]
    vectors, files = model.get_input_embeddings().weight.detach().float(), list(documents("stdlib"))
    if "files" in options.tables:
        arms = sweep_arms(options.length, (32, 8, 64), (1, 4, 16), (32, 16, 64))
        compared(f"Files, {options.length} tokens", arms, vectors, documents_of(files, tokenizer, options.length), options)
    if "scattered" in options.tables:
        longer = SimpleNamespace(steps=8 * options.steps // 3, seeds=options.seeds, only=options.only)
        arms = sweep_arms(48, (8,), (1, 4), (16,))
        some = {name: arm for name, arm in arms.items() if "first" not in name and "mean" not in name}
        compared("Scattered evidence, 48 tokens", some, torch.eye(5), scattered(4000, 48, gap=24, words=1), longer)
    if "structure" in options.tables:
        made = documents_of(files, tokenizer, 256)
        compared("Structure, 256 tokens", structure_arms(made, tokenizer, 256), vectors, made, options)


if __name__ == "__main__":
    main()
