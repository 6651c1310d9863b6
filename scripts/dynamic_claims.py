"""What papers of attention that chooses by content claim, in direction: one line a claim, with figures. Nothing here is tuned.

    python scripts/dynamic_claims.py [NAME ...]     # names of the functions below; all without names, a minute on one thread

Built-in: queries, keys and values of the built-in model on held-out files of the standard library (512 tokens, 4 files for measuring, 4 others for
fitting). Share kept: attention of a query that lies on chosen keys, a mean over heads, layers and the queries from 128 on.
"""
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rarefy
from rarefy import maps
from rarefy.attention.block import BlockAttention
from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.loki import Loki
from rarefy.attention.dynamic.magicpig import MagicPIG
from rarefy.attention.dynamic.minference import PATTERNS, MInference, a_shape
from rarefy.attention.dynamic.permuted import PermutedBlocks
from rarefy.attention.dynamic.pooled import Pooled
from rarefy.attention.dynamic.rules import TopP
from rarefy.attention.dynamic.sample import SampleAttention
from rarefy.attention.dynamic.scores import logits, probabilities
from rarefy.attention.dynamic.sparge import SpargeAttention
from rarefy.attention.dynamic.squeezed import Squeezed
from rarefy.attention.dynamic.svg import SparseVideo
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.heads import per_head
from rarefy.attention.quest import Quest
from rarefy.kernels.block_attention import BlockMask

T = 512
SEEN = torch.ones(T, T, dtype=torch.bool).tril()


@dataclass
class Recorder:
    """Dense attention that keeps what it is given, [B, H, T, D] scaled so that logits are q k / sqrt(D)."""

    held: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **_: object) -> Tensor:
        self.held.append((q * scale * q.shape[-1] ** 0.5, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    __call__ = attend


@functools.cache
def layers() -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[tuple[Tensor, Tensor, Tensor]]]:
    """(q, k, v) of each layer: to measure, and to fit."""
    model, tokenizer, _ = rarefy.open_model("builtin")
    text = rarefy.text("stdlib", tokenizer, context=T, fit_tokens=4 * T, judge_tokens=4 * T)
    out = []
    for batches in (text.judge, text.fit):
        ids = torch.cat([batch.input_ids for batch in batches if batch.input_ids.shape[1] == T])[:4]
        plan = {f"layers.{n}.attn": Recorder() for n in range(model.config.num_hidden_layers)}
        with rarefy.replaced(model, plan):  # type: ignore[arg-type]
            model(input_ids=ids, use_cache=False)
        out.append([one.held[0] for one in plan.values()])
    return out[0], out[1]


def share(q: Tensor, k: Tensor, mask: Tensor) -> tuple[float, float]:
    """(attention kept, pairs kept) by a mask [B, H, T, T] of the queries from 128 on."""
    seen = (SEEN & mask)[..., 128:, :]
    kept = (probabilities(q, k, True)[:, :, 128:] * seen).sum(-1).mean()
    return float(kept), float(seen.double().sum() / SEEN[128:].expand(seen.shape).sum())


def fitted(make: Callable[[], BlockAttention]) -> list[BlockAttention]:
    """A method a layer, fitted to the layer's own queries, keys and values."""
    methods = []
    for q, k, v in layers()[1]:
        method = make()
        if hasattr(method, "ready"):
            method.observe(q, k, v)
            method.finish()
        methods.append(method)
    return methods


def pairs(method: BlockAttention, q: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, T] what a method chooses."""
    return BlockMask(method.choose(q, k, True), None, None, method.block, method.query_block).pairs(T, T, True)


def highest(weight: Tensor, budget: float) -> Tensor:
    """[..., N, N] bool: the budget's share of the keys that a query sees, those of the largest weights."""
    rank = weight.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (budget * (torch.arange(weight.shape[-1])[:, None] + 1)).round().clamp_min(1)


def kept(make: Callable[[], BlockAttention]) -> str:
    """Share of the attention kept at which share of the pairs, over the built-in model's layers."""
    found = [share(q, k, pairs(method, q, k)) for method, (q, k, _) in zip(fitted(make), layers()[0], strict=True)]
    mass, density = (sum(x) / len(found) for x in zip(*found, strict=True))
    return f"{mass:.3f} at {density:.3f}"


def exact(budget: float) -> str:
    """As `kept`, of the highest scores of each query."""
    found = []
    for q, k, _ in layers()[0]:
        found.append(share(q, k, highest(probabilities(q, k, True), budget)))
    return f"{sum(m for m, _ in found) / len(found):.3f} at {sum(d for _, d in found) / len(found):.3f}"


class ExactTopP(TopP):
    """Top-p of exact attention, key by key."""

    name = "exact top-p"

    def __init__(self, budget: float) -> None:
        super().__init__(budget, 1, 1)

    def scores(self, q_BHTD: Tensor, k_BGSD: Tensor, rows: int, causal: bool) -> Tensor:
        return logits(q_BHTD, k_BGSD)


def top_p() -> Iterable[str]:
    """Twilight: where heads differ in how far attention spreads, equal mass spends better than equal number."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 4, 256, 32, generator=draw, dtype=torch.float64) for _ in range(3))
    q = q * torch.tensor([6.0, 6.0, 0.5, 0.5], dtype=torch.float64)[:, None, None]
    weight, seen = probabilities(q, k, True), SEEN[:256, :256]
    method = ExactTopP(0.15)
    method.observe(q, k, v)
    method.finish()
    dense, out = weight @ v, []
    for mask in (highest(weight, 0.15), method.choose(q, k, True)):
        got = logits(q, k).masked_fill(~(mask & seen), -torch.inf).softmax(-1) @ v
        apart = (got - dense).square().sum((0, 2, 3))
        heads = (apart / dense.square().sum((0, 2, 3))).sqrt()
        out.append((heads, float((apart.sum() / dense.square().sum()).sqrt()), (mask & seen).double().sum((0, 2, 3)) / seen.sum() / 4))
    for name, (heads, joint, density) in zip(("top-k", "top-p"), out, strict=True):
        yield (f"{name}, two peaked heads and two diffuse ones at {float(density.mean()):.3f}: pairs a head {[round(float(x), 3) for x in density]}, "
               f"errors {[round(float(x), 2) for x in heads]}, of all together {joint:.3f}")
    yield f"built-in, attention kept at a tenth: top-k {exact(0.1)}, top-p {kept(lambda: ExactTopP(0.1))}"


def sampling() -> Iterable[str]:
    """MagicPIG: sampled keys with their weights beat the largest ones on aggregation."""
    draw = torch.Generator().manual_seed(0)
    k, free = torch.randn(1, 1, 4096, 64, generator=draw), torch.randn(1, 1, 4096, 64, generator=draw)
    unit, method = torch.randn(1, 32, 1, 64, generator=draw), MagicPIG(bits=8, tables=75)
    for name, v in (("values follow keys", k), ("values free of keys", free)):
        for spread in (0.25, 0.5, 1.0, 2.0, 6.0):
            q = unit * spread
            score = logits(q, k)
            dense, drawn = score.softmax(-1) @ v, method.choose(q, k, True)
            number = round(float(drawn.double().sum() / 32))
            largest = torch.zeros_like(drawn).scatter(-1, score.topk(number, -1).indices, True)
            some = torch.zeros_like(drawn).index_fill(-1, torch.randperm(4096, generator=draw)[:number], True)
            outs = {"sampled": method.attend(q, k, v, scale=64**-0.5)} | {
                what: score.masked_fill(~mask, -torch.inf).softmax(-1) @ v
                for what, mask in (("sampled, weights left out", drawn), ("top-k", largest), ("uniform", some))}
            errors = ", ".join(f"{what} {float((out - dense).norm() / dense.norm()):.2f}" for what, out in outs.items())
            yield f"{name}, spread of the logits {spread}, {number / 4096:.3f} of 4,096 keys: {errors}"


def labels() -> Iterable[str]:
    """Double Sparsity and Loki: a few channels, or components, rank the keys."""
    for part in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        yield (f"built-in, a tenth of the keys by {part:.4f} of the width: channels {kept(lambda: DoubleSparsity(0.1, part))}, "  # noqa: B023
               f"components {kept(lambda: Loki(0.1, part))}, every product {exact(0.1)}")  # noqa: B023
    ranks = []
    for _, k, _ in layers()[0]:
        centred = k.transpose(0, 1).flatten(1, 2).double()
        values = torch.linalg.svdvals(centred - centred.mean(1, keepdim=True)).square()
        ranks += ((values.cumsum(-1) / values.sum(-1, keepdim=True)) < 0.9).sum(-1).add(1).tolist()
    yield (f"built-in, components of {layers()[0][0][1].shape[-1]} that hold nine tenths of the keys' variance: {min(ranks)} to {max(ranks)}, "
           f"mean {sum(ranks) / len(ranks):.1f}")


def positions() -> Iterable[str]:
    """TidalDecode: layers behind a selecting one attend to the same positions, head by head."""
    held = layers()[0]

    top = [highest(probabilities(q, k, True), 0.1) for q, k, _ in held]
    window = SEEN & ~SEEN.tril(-(T // 10))
    for n in range(1, len(held)):
        own, before, first, near = (share(*held[n][:2], mask)[0] for mask in (top[n], top[n - 1], top[1], window))
        yield (f"built-in, layer {n}, attention kept at a tenth of the keys: its own top keys {own:.3f}, those of the layer before {before:.3f}, "
               f"of layer 1 {first:.3f}, a window of 51 {near:.3f}")


def lines() -> Iterable[str]:
    """MInference: columns and diagonals that the last queries show, and a pattern a head, keep more than one pattern for all."""
    window = BlockAttention(0.25, 1, 1)
    window.choose = lambda q, k, causal: a_shape(T, T, 0.25, 4, True, q.device).expand(*q.shape[:2], T, T)  # type: ignore[method-assign]
    methods = fitted(lambda: MInference(0.25))
    count = torch.cat([torch.as_tensor(m.pattern_H).long() for m in methods]).bincount(minlength=3).tolist()
    found = {"window and sinks": kept(lambda: window), "columns and diagonals": kept(lambda: VerticalSlash(0.25)),
             "pooled blocks": kept(lambda: Pooled(0.25, 16, 16)), "a pattern a head": kept(lambda: MInference(0.25))}
    yield "built-in, attention kept at a quarter: " + ", ".join(f"{name} {text}" for name, text in found.items())
    yield "built-in, heads by pattern: " + ", ".join(f"{name} {n}" for name, n in zip(PATTERNS, count, strict=True))


def columns() -> Iterable[str]:
    """SampleAttention: a twentieth of the rows tells the columns that hold attention."""
    for every in (1, 20):
        yield f"built-in, columns by one row in {every} and a window, a quarter of the pairs: {kept(lambda: SampleAttention(0.25, every=every))}"  # noqa: B023


def guard() -> Iterable[str]:
    """SpargeAttn: pooled blocks are trusted where tokens are alike."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, T, 32, generator=draw) for _ in range(2))
    way = torch.randn(1, 4, T // 16, 32, generator=draw).repeat_interleave(16, 2)
    for name, width in (("unlike", 0.0), ("alike", 2.0)):
        keys, queries = k + width * way, q + width * way.roll(64, 2)
        found = {theta: SpargeAttention(dial=0.9, block=16, query_block=16, theta=theta) for theta in (-1.0, 0.5)}
        yield f"planted, blocks of tokens {name}, tau 0.9: " + ", ".join(
            "attention {:.3f} at {:.3f} ".format(*share(queries, keys, pairs(m, queries, keys))) + ("guarded" if theta > 0 else "unguarded")
            for theta, m in found.items())
    yield (f"built-in, a quarter of the blocks: unguarded {kept(lambda: SpargeAttention(0.25, 16, 16, theta=-1.0))}, "
           f"by means alone {kept(lambda: Pooled(0.25, 16, 16))}")


def clusters() -> Iterable[str]:
    """Squeezed Attention: centroids of keys find what matters better than pages in the order of the text."""
    yield (f"built-in: clusters of 4 in segments of 64 {kept(lambda: Squeezed(0.3, segment=64, size=4))}, "
           f"pages of 4 {kept(lambda: Quest(0.3, 4))}, every product {exact(0.3)}")


def sorting() -> Iterable[str]:
    """PBS-Attn: sorted by what the newest queries want, the keys that matter fill fewer blocks."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1024, 32, generator=draw) for _ in range(3))
    way = torch.nn.functional.normalize(torch.randn(1, 1, 1, 32, generator=draw), dim=-1)
    k[:, :, torch.randperm(1024, generator=draw)[:96]] += 8 * way
    scattered, built_in = [(q + 8 * way, k, v)], layers()[0]
    for name, inputs, block, segment in (("planted, 96 of 1,024 keys", scattered, 8, 64), ("built-in", built_in, 16, 64)):
        for permute in (True, False):
            found = []
            for dial in (0.5, 0.7, 0.9, 0.97):
                method = PermutedBlocks(block=block, query_block=block, segment=segment, dial=dial, permute=permute)
                errors = []
                for x, y, z in inputs:
                    dense = torch.nn.functional.scaled_dot_product_attention(x, y, z, is_causal=True, enable_gqa=True)
                    errors.append(float((method(x, y, z) - dense).norm() / dense.norm()))
                found.append(f"{sum(errors) / len(errors):.3f} at {method.measured_density():.3f}")
            yield f"{name}, {'sorted' if permute else 'unsorted'}: error " + ", ".join(found)


def video() -> Iterable[str]:
    """Sparse VideoGen: a few sampled queries give each head its pattern."""
    frame, at, draw = 16, torch.arange(256), torch.Generator().manual_seed(0)
    code = torch.cat([torch.nn.functional.one_hot(x, 16).float() for x in (at // frame, at % frame)], -1)
    asks = torch.zeros(8, 32)
    asks[:4, :16], asks[4:, 16:] = 1.0, 1.0                                    # half the heads look along space, half along time
    k = code.expand(1, 8, 256, 32) + 0.2 * torch.randn(1, 8, 256, 32, generator=draw)
    q = 40 * code * asks[:, None] + 0.2 * torch.randn(1, 8, 256, 32, generator=draw)
    v = torch.randn(1, 8, 256, 32, generator=draw)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for samples in (2, 8, 64):
        method = SparseVideo(frame, samples=samples)
        error = method.errors(q, k, v, False)
        right = float(((error[0] <= error[1])[0] == (torch.arange(8) < 4)).double().mean())
        got = method.attend(q, k, v, scale=32**-0.5, causal=False)
        one = [logits(q, k).masked_fill(~p, -torch.inf).softmax(-1) @ v for p in method.patterns(256, 256, False, q)]
        apart = [float((out - dense).norm() / dense.norm()) for out in (got, *one)]
        yield (f"planted, 8 heads, {samples} sampled queries: {right:.0%} of the heads right, error {apart[0]:.3f} "
               f"at {method.measured_density():.3f}; all spatial {apart[1]:.3f}, all temporal {apart[2]:.3f}")


def by_moments() -> Iterable[str]:
    """Statistical top-k: two moments find the k highest of scores that are normal."""
    draw = torch.Generator().manual_seed(0)
    rows = {"normal": torch.randn(64, 4096, generator=draw)}
    rows["Laplace"] = (torch.rand(64, 4096, generator=draw) - 0.5) * 2
    rows["Laplace"] = -rows["Laplace"].sign() * torch.log1p(-rows["Laplace"].abs().clamp_max(1 - 1e-6))
    rows["built-in"] = torch.cat([logits(q, k)[:, :, -1].flatten(0, 1) for q, k, _ in layers()[0]])
    for budget in (0.02, 0.1, 0.25):
        yield f"share kept where {budget} was asked for: " + ", ".join(
            f"{name} {float((maps.statistical_top_k(x, budget * x.shape[-1]) > 0).double().mean()):.3f}" for name, x in rows.items())


def zeros() -> Iterable[str]:
    """Sparse maps: rows of exact zeros, put in softmax's place without training."""
    for name, alpha in (("1.5-entmax", 1.5), ("sparsemax", 2.0)):
        found = []
        for q, k, v in layers()[0]:
            score, value = logits(q, k).masked_fill(~SEEN, -torch.inf)[:, :, 128:], per_head(v, q.shape[1])
            weight, dense = maps.entmax(score, alpha), score.softmax(-1) @ value
            used = (weight > 0).double().sum() / SEEN[128:].expand(weight.shape).sum()
            found.append((float(used), float((weight @ value - dense).norm() / dense.norm())))
        density, error = (sum(x) / len(found) for x in zip(*found, strict=True))
        yield f"built-in, {name} for softmax: {density:.3f} of the pairs have weight, outputs differ by {error:.2f} of their size"


CLAIMS = (top_p, sampling, labels, positions, lines, columns, guard, clusters, sorting, video, by_moments, zeros)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for claim in CLAIMS:
        if claim.__name__ in (sys.argv[1:] or [c.__name__ for c in CLAIMS]):
            for line in claim():
                print(f"{claim.__name__}: {line}", flush=True)


if __name__ == "__main__":
    main()
