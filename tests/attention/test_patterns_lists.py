"""Patterns with lists of single pairs, worked on in two parts, against the mask of all their pairs."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.pattern import PatternAttention
from rarefy.attention.patterns import parse
from rarefy.attention.patterns.lists import apart

EDGES = torch.randint(0, 500, (600, 2), generator=torch.Generator().manual_seed(0))
CASES = ["random(8)", "window(9) | random(5, past=True)", "random(3) | (tokens(0, 7) | expander(4))", "heads(random(4), window(30)) | sinks(2)",
         'edges("links") | block(10)', 'edges("links", both=True) | random(2)', "window(9) | random(5) & window(200)"]


def heads(T: int, S: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(S)
    return tuple(torch.randn(2, n, s, 8, generator=generator, dtype=torch.float64) for n, s in ((4, T), (2, S), (2, S)))


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("T, causal", [(500, True), (500, False), (37, True)])
def test_two_parts_are_the_whole(text: str, T: int, causal: bool) -> None:
    S, links = 500, "links" in text
    tables = {"links": torch.stack([EDGES, EDGES.flip(0).roll(3, 1)])} if links else {}
    method, pattern = PatternAttention(text, block=16, query_block=16), parse(text)
    parts = apart(pattern, T, S, block=16, query_block=16, causal=causal, heads=4, tables=tables)
    assert (parts is None) == ("&" in text)
    keep = torch.stack([torch.stack([pattern.mask(T, S, causal=causal, head=h, heads=4, tables={n: t[b] for n, t in tables.items()})
                                     for h in range(4)]) for b in range(2)])
    if parts is not None:
        listed = torch.zeros(*parts[1].shape[:3], S + 1, dtype=torch.bool).scatter_(3, torch.where(parts[1] < 0, S, parts[1]), True)[..., :S]
        rest = parts[0].pairs(T, S, causal)
        assert not bool((listed & rest).any()) and torch.equal((listed | rest).expand(keep.shape), keep)
    given = [x.requires_grad_() for x in heads(T, S)]
    score = (given[0] @ given[1].repeat_interleave(2, 1).mT * 0.3).masked_fill(~keep, torch.finfo(torch.float64).min).softmax(-1) * keep
    want = score @ given[2].repeat_interleave(2, 1)
    with method.bind(**tables):
        got = method.attend(*given, scale=0.3, causal=causal)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    visible = T * S - T * (T - 1) // 2 if causal else T * S
    assert method.measured_density() == pytest.approx(float(keep.sum()) / (8 * visible), abs=1e-12)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), given) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_density_counts_both_parts() -> None:
    pattern = parse("window(9) | random(5, past=True)")
    mask = pattern.mask(700, 700)
    assert apart(pattern, 700, 700, block=64, query_block=64, causal=True) is not None
    assert pattern.density(700) == pytest.approx(float(mask.sum()) / (700 * 701 / 2), abs=1e-12)


def test_a_random_graph_over_long_sequences_makes_no_tiles() -> None:
    parts = apart(parse("window(64) | random(16)"), 16384, 16384, block=64, query_block=64, causal=True)
    assert parts is not None and parts[0].tiles is not None and len(parts[0].tiles) < 10 and parts[1].shape == (1, 1, 16384, 16)
