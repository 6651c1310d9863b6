"""How much attention choices keep, head by head, in the built-in model on held-out text.

    python scripts/dynamic_masses.py blocks     # recall of block choices beside the exact one
    python scripts/dynamic_masses.py drift      # AdaSpa: a mask kept, searched with an old log-sum-exp, searched exactly
    python scripts/dynamic_masses.py target     # chunks: budgets by recall beside equal shares
    python scripts/dynamic_masses.py patterns   # FlexPrefill: heads whose block means can be trusted
"""
import argparse
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import rarefy
from rarefy.attention.block import BlockAttention
from rarefy.attention.dynamic.adaspa import AdaSpa, wide_logits
from rarefy.attention.dynamic.antidiagonal import Antidiagonal
from rarefy.attention.dynamic.chunked import Chunked
from rarefy.attention.dynamic.flex_prefill import FlexPrefill
from rarefy.attention.dynamic.pooled import Pooled
from rarefy.attention.dynamic.scores import block_sums, probabilities
from rarefy.attention.dynamic.sparse_d import SparseD
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.quest import Quest
from rarefy.builtin.corpus import Text
from rarefy.frontier import Judge
from rarefy.kernels.block_attention import BlockMask

BLOCK = 16
Heads = dict[int, tuple[Tensor, Tensor, Tensor]]


class Spy(BlockAttention):
    """Dense attention that keeps what it is given, layer by layer."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: Heads = {}

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
               layer: int = 0, cache: object = None) -> Tensor:
        """Queries are kept scaled, so that logits are q k / sqrt(D)."""
        self.seen[layer] = q_BHTD * scale * q_BHTD.shape[-1] ** 0.5, k_BGSD, v_BGSD
        return scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, is_causal=causal, scale=scale, enable_gqa=True)


def recall(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """(share of attention that a block mask keeps [H], density)."""
    kept = BlockMask(mask, None, None, BLOCK, BLOCK)
    T = q.shape[2]
    return (probabilities(q, k, True) * kept.pairs(T, T, True)).sum(-1).mean((0, 2)), kept.density(T, T, True)


def blocks(heads: Heads) -> Iterable[str]:
    """Choices of blocks at two budgets."""
    yield from ("| choice | budget | density | recall | worst head |", "|---|---|---|---|---|")
    for budget in (0.1, 0.25):
        made = {"exact, even": SparseD(budget, BLOCK, BLOCK), "adaspa": AdaSpa(budget, BLOCK, BLOCK), "pooled": Pooled(budget, BLOCK, BLOCK)}
        made |= {"quest": Quest(budget, BLOCK, BLOCK)}
        made |= {f"antidiagonal, stride {s}": Antidiagonal(budget, BLOCK, BLOCK, s) for s in (1, 2, 4, 8)}
        for name, method in made.items():
            found = [recall(method.choose(q, k, True), q, k) for q, k, _ in heads.values()]
            each = torch.cat([r for r, _ in found])
            yield f"| {name} | {budget} | {sum(d for _, d in found) / len(found):.3f} | {each.mean():.3f} | {each.min():.3f} |"


def drift(heads: Heads) -> Iterable[str]:
    """Recall at step two of masks found in three ways, the inputs moved by noise of a share of their spread."""
    yield from ("| drift | mask of the old step | old log-sum-exp | exact |", "|---|---|---|---|")
    method, draw = AdaSpa(0.2, BLOCK, BLOCK), torch.Generator().manual_seed(0)
    for share in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
        found: list[list[Tensor]] = [[], [], []]
        for old, old_k, _ in heads.values():
            q, k = (x + share * x.std() * torch.randn(x.shape, generator=draw) for x in (old, old_k))
            stale = method.masses(q, k, True, wide_logits(old, old_k, True).logsumexp(-1))
            masks = method.choose(old, old_k, True), method.heaviest(stale, q.shape[2], k.shape[2], True), method.choose(q, k, True)
            for into, mask in zip(found, masks, strict=True):
                into.append(recall(mask, q, k)[0])
        yield f"| {share} | " + " | ".join(f"{torch.cat(each).mean():.3f}" for each in found) + " |"


def target(heads: Heads, model: torch.nn.Module, text: Text) -> Iterable[str]:
    """Heads raised to a recall on other text, and the same number of pairs in equal shares."""
    yield from ("| target | density | recall | worst head | KL | equal shares: recall | worst head | KL |", "|---|---|---|---|---|---|---|---|")
    judge = Judge(model, text.judge)
    for wanted in (0.8, 0.9, 0.95):
        plan = {f"layers.{n}.attn": Chunked(0.02, wanted, chunk=128, last=32).eval() for n in heads}
        rarefy.calibrate(model, plan, text.fit, sequential=False)
        each = torch.stack([method.recall(*heads[n]).mean((0, 2)) for n, method in zip(heads, plan.values(), strict=True)])
        point = judge.measure(plan, method="attention/chunked", unit="key")
        same = VerticalSlash(point.density, last=32).eval()
        even = judge.measure({"layers.*.attn": same}, method="attention/vertical_slash", unit="key")
        other = torch.stack([(probabilities(q, k, True) * same.choose(q, k, True)).sum(-1).mean((0, 2)) for q, k, _ in heads.values()])
        kl, even_kl = (p.metrics["kl"].mean for p in (point, even))
        yield (f"| {wanted} | {point.density:.3f} | {each.mean():.3f} | {each.min():.3f} | {kl:.3f} | "
               f"{other.mean():.3f} | {other.min():.3f} | {even_kl:.3f} |")


def patterns(heads: Heads) -> Iterable[str]:
    """Share of heads that are query-aware, by tau."""
    method = FlexPrefill(block=BLOCK, dial=0.9)
    found = [method.divergences(q, block_sums(method.probe.lines(q, k, True)[0], BLOCK), k) for q, k, _ in heads.values()]
    for tau in (0.05, 0.1, 0.2, 0.3):
        yield f"tau {tau}: {float((torch.cat(found) < tau).double().mean()):.1%} of the heads are query-aware"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("blocks", "drift", "target", "patterns"))
    what = parser.parse_args().what
    torch.set_num_threads(1)
    model, tokenizer, _ = rarefy.open_model("builtin")
    text = rarefy.text("stdlib", tokenizer, context=512, fit_tokens=4_096, judge_tokens=4_096)
    spy = Spy()
    with rarefy.replaced(model, {"layers.*.attn": spy}):
        model(input_ids=text.judge[0].input_ids[:4], use_cache=False)
    lines = target(spy.seen, model, text) if what == "target" else {"blocks": blocks, "drift": drift, "patterns": patterns}[what](spy.seen)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
