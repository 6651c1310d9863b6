"""Patterns of long-context language models and encoders.

Arguments are the papers' sizes, in tokens or blocks; defaults are those of the cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....errors import BadInput
from ....method import positive
from ..lifts import blocks, chunks, cross_chunks, heads, layers, on_layers, parts
from ..pattern import Pattern
from ..relations import key_is, permutation, query_is, random
from ..words import around, block, elastic, every, full, shards, sinks, strided, summaries, tokens, window, word
from .example import Example

MOST = 4096
"""Parts, first tokens and layers that are written out one by one."""


@word
def bigbird(size: int = 64, near: int = 1, drawn: int = 3, seed: int = 0) -> Pattern:
    """BigBird (Zaheer et al. 2020, arXiv 2007.14062): blocks of `size`; `near` on both sides, the first and last global, `drawn` random ones."""
    return blocks(size, around(near) | tokens(0, -1) | random(drawn, seed))


@word
def longformer(width: int = 512, first: int = 1) -> Pattern:
    """Longformer (Beltagy et al. 2020, arXiv 2004.05150), which Clinical-Longformer keeps: width / 2 on both sides, the first tokens global."""
    positive("first", first, MOST)
    return around(positive("width", width) // 2) | tokens(*range(first))


@word
def sparse_transformer(stride: int = 128) -> Pattern:
    """Sparse Transformer, strided (Child et al. 2019, arXiv 1904.10509, eq. 4): half the heads the last `stride` keys, half every stride-th."""
    return heads(window(stride), strided(stride))


@word
def sparse_transformer_fixed(stride: int = 128, c: int = 8) -> Pattern:
    """Sparse Transformer, fixed (eq. 5): half the heads the own block, half the last c keys of each block."""
    return heads(block(stride), summaries(stride, c))


@word
def longlora(group: int = 2048) -> Pattern:
    """LongLoRA's shifted sparse attention (Chen et al. 2023, arXiv 2309.12307): half the heads roll the sequence by half a group.

    The rolled heads' last group holds the two ends of the sequence; causality is by position here, so that nobody sees ahead.
    """
    return heads(chunks(group), chunks(group, shift=positive("group", group) // 2, wrap=True))


@word
def sinklora(group: int = 2048, first: int = 4, shifted: float = 0.25) -> Pattern:
    """SinkLoRA's SF-Attn (Zhang 2024, arXiv 2406.05678): part of the shifted heads put back in order, and global first tokens.

    Args:
        shifted: the part of the heads that stays shifted, a quarter, a third or a half.
    """
    whole = round(1 / shifted) if 0 < shifted <= 0.5 else 0
    if not whole or abs(whole * shifted - 1) > 1e-6:
        raise BadInput(f"shifted={shifted} must be 1 / n for a whole n of at least 2: heads are shared out evenly")
    moved = chunks(group, shift=positive("group", group) // 2, wrap=True)
    return heads(*[chunks(group)] * (whole - 1), moved) | sinks(first)


@word
def scca(chunk: int = 1024, shifts: Sequence[int] = (0, 512)) -> Pattern:
    """SCCA (Guo 2023, arXiv 2312.07305): keys and values moved by part of a chunk, each head group by its own part."""
    return heads(*(cross_chunks(chunk, shift) for shift in shifts))


@word
def sda(width: int = 256, dilations: Sequence[int] = (1, 2, 4, 8)) -> Pattern:
    """SDA, in the same paper: dilated windows, of another dilation in each head group."""
    return heads(*(window(width, d) for d in dilations))


@word
def moa(first: int = 64, least: Sequence[int] = (64, 64, 256, 256), shares: Sequence[float] = (0.0, 0.125, 0.25, 0.5)) -> Pattern:
    """MoA (Fu et al. 2024, arXiv 2406.14909, eq. 2): sinks, and in each head group a window of alpha + beta * length keys."""
    if len(least) != len(shares):
        raise BadInput(f"least={tuple(least)} and shares={tuple(shares)} must be one each a head group")
    return sinks(first) | heads(*(elastic(a, b) for a, b in zip(least, shares, strict=True)))


@word
def s2(size: int = 64, local: int = 4, stride: int = 16) -> Pattern:
    """S2-Attention (Lin et al. 2024, arXiv 2407.17678): `local` recent blocks, and every stride-th one from a start of each head's own."""
    return blocks(size, window(local) | shards(stride))


@word
def blockbert(count: int = 4, split: Sequence[int] = (3, 1)) -> Pattern:
    """BlockBERT (Qiu et al. 2019, arXiv 1911.02972): `count` parts; heads with the own part against heads with the next one, as `split` says."""
    if len(split) != 2:
        raise BadInput(f"split={tuple(split)} must be two numbers: heads that stay, heads that move on")
    positive("count", count, MOST)
    stay, move = (positive("split", n, MOST) for n in split)
    same, ahead = permutation(*range(count)), permutation(*((i + 1) % count for i in range(count)))
    return parts(count, heads(*[same] * stay, *[ahead] * move))


@word
def longgen(depth: int = 12, width: int = 1024, first: int = 4) -> Pattern:
    """LongGen (Ge et al. 2024, arXiv 2410.01485): the middle third of `depth` layers sees all, the others a window with sinks."""
    positive("depth", depth, MOST)
    return on_layers(list(range(depth // 3, depth - depth // 3)), full(), window(width) | sinks(first))


@word
def masformer(seeing: Sequence[int] = (0, 12, 23), width: int = 256) -> Pattern:
    """MASFormer (Zhang et al. 2023, arXiv 2310.12442): the layers in `seeing` see all, the others a window."""
    return on_layers(seeing, full(), window(width))


@word
def mgpt(size: int = 16, local: int = 8, stride: int = 16) -> Pattern:
    """mGPT (Shliazhko et al. 2022, arXiv 2204.07580), as GPT-3: dense layers in turn with fixed block-sparse ones.

    The block-sparse layers see local blocks and the last block of each `stride`, as Sparse Transformer's fixed heads.
    """
    return layers(full(), blocks(size, window(local) | summaries(stride, 1)))


@word
def lsg(size: int = 128, sparsity: int = 4, reach: int = 5, first: int = 1) -> Pattern:
    """LSG with stride selection (Condevaux, Harispe 2022, arXiv 2210.15497): near blocks, every so many-th token of farther ones, global first.

    Args:
        reach: blocks on both sides from which the strided tokens come. The selections that look at keys are no static pattern.
    """
    positive("first", first, MOST)
    return blocks(size, around(1)) | blocks(size, around(reach)) & every(sparsity) | tokens(*range(first))


@word
def ltcontext(width: int = 64) -> Pattern:
    """LTContext (Bahrami et al. 2023, arXiv 2308.11358): layers of windows of frames in turn with layers of every width-th frame."""
    return layers(block(width), strided(width))


@word
def socialformer(near: int = 32, remote: int = 4, seed: int = 0) -> Pattern:
    """Socialformer (Zhou et al. 2022, arXiv 2202.10870): near ties, random remote ones, and central terms (label "hub") tied to all.

    The paper draws remote ties by distance and content; uniform draws give the same small world without its probabilities.
    """
    return around(near) | random(remote, seed) | key_is("hub") | query_is("hub")


def _hubs(length: int) -> Mapping[str, Tensor]:
    hub = torch.zeros(length, dtype=torch.long)
    hub[:: max(16, length // 32)] = 1
    return {"hub": hub}


EXAMPLES = (
    Example("bigbird", lambda n: bigbird(max(4, n // 64), 1, 2 if n < 256 else 3), causal=False),
    Example("longformer", lambda n: longformer(max(8, n // 16)), causal=False),
    Example("sparse_transformer", lambda n: sparse_transformer(round(n**0.5)), heads=2),
    Example("sparse_transformer_fixed", lambda n: sparse_transformer_fixed(round(n**0.5), max(2, round(n**0.5) // 16)), heads=2),
    Example("longlora", lambda n: longlora(n // 4), heads=2),
    Example("sinklora", lambda n: sinklora(n // 4, max(2, n // 1024)), heads=4),
    Example("scca", lambda n: scca(n // 4, (0, n // 8)), heads=2),
    Example("sda", lambda n: sda(max(8, n // 32), (1, 2, 4, 8) if n > 64 else (1, 2, 3, 4)), heads=4),
    Example("moa", lambda n: moa(max(2, n // 128), (4, n // 16, n // 8, 0), (0.0, 0.0, 0.125, 0.5)), heads=4),
    Example("s2", lambda n: s2(max(4, n // 64), 2, 4), heads=4),
    Example("blockbert", lambda n: blockbert(4, (3, 1)), causal=False, heads=4),
    Example("longgen", lambda n: longgen(6, n // 8, 2), layers=6),
    Example("masformer", lambda n: masformer((0, 2), n // 16), layers=4),
    Example("mgpt", lambda n: mgpt(max(2, n // 64), 3, 4), layers=2),
    Example("lsg", lambda n: lsg(max(4, n // 32), 3, 3), causal=False),
    Example("ltcontext", lambda n: ltcontext(round(n**0.5)), causal=False, layers=2),
    Example("socialformer", lambda n: socialformer(max(2, n // 64), 2), _hubs, causal=False),
)
