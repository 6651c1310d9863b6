"""The keys of one query, named by the words themselves, against the definition pair by pair; and steps that read no others."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.cache import Cache
from rarefy.attention.pattern import PatternAttention
from rarefy.attention.patterns import parse
from rarefy.attention.patterns.compile import newest
from rarefy.attention.patterns.grid import Scene
from rarefy.attention.patterns.zoo import EXAMPLES
from rarefy.errors import BadInput

WORDS = [
    "window(7) | sinks(2)", "window(5, 3)", "strided(9, offset=1)", "~window(4) & causal()", "around(3, 2)", "random(5)", "random(5, past=True)",
    "random(90, past=True)", "random(90)", "expander(4)", "expander(2, seed=3)", "blocks(4, window(3) | shards(8))", "on(1, (8, 8), own())",
    "parts(4, permutation(1, 2, 3, 0))", "chunks(5, shift=2, wrap=True)", "cross_chunks(8, 3)", "elastic(3, 0.2)", "tokens(0, -1)", "keys(3, -2)",
    "queries(-1)", "every(5, 2)", "every(7, 90)", "summaries(8, 2)", "block(8)", "lag(100)", "band(-2, 9)", "neighbours(5, 3)", "full()", "none()",
    "heads(window(5), strided(4))", "~random(3)", "random(6) & window(40)", "blocks(3, random(2))", "blocks(3, chunks(2))", "blocks(4, ~own())",
    "neighbourhood((8, 8), 3)",
]


@pytest.mark.parametrize("text", WORDS)
def test_the_keys_of_a_query_are_its_row_of_the_mask(text: str) -> None:
    pattern = parse(text)
    for S in (1, 2, 7, 31, 64):
        for head in range(2):
            mask = pattern.mask(S, S, causal=False, head=head, heads=2)
            one, scene = pattern.at(head, 2, 0), Scene(S)
            for at in {0, S // 2, S - 2, S - 1} & set(range(S)):
                assert torch.equal(one.row(at, scene).unique(), mask[at].nonzero()[:, 0]), (S, head, at)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_newest_query_of_a_zoo_pattern_reads_its_row(name: str) -> None:
    example = EXAMPLES[name]
    pattern, tables, H = example.at(64), dict(example.tables(64)), example.heads
    for layer in range(example.layers):
        for S in (64, 50):
            index = newest(pattern, S, heads=H, layer=layer, tables=tables).expand(1, H, 1, -1)
            for h in range(H):
                want = pattern.mask(1, S, causal=False, head=h, heads=H, layer=layer, tables=tables)[0].nonzero()[:, 0]
                assert torch.equal(index[0, h, 0][index[0, h, 0] >= 0], want), (layer, S, h)
                assert bool((index[0, h, 0, len(want) :] == -1).all())


def test_steps_within_a_block_keep_its_blocks_and_no_longer() -> None:
    pattern = parse("blocks(4, window(2) | strided(3))")
    for S in (9, 10, 12, 13, 20, 11):                                   # onwards, and back
        want = pattern.mask(1, S)[0].nonzero()[:, 0]
        assert torch.equal(newest(pattern, S)[0, 0, 0], want), S


def test_the_keys_of_bound_labels_follow_the_tables() -> None:
    method = PatternAttention(pattern='blocks(2, by("row", own()))', block=4)
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (1, 12, 12))
    for row in (torch.tensor([0, 0, 1, 1, 0, 0]), torch.tensor([0, 1, 1, 1, 1, 1])):
        keep = (row[5] == row).repeat_interleave(2)
        want = (q @ k[:, :, keep].mT * 8**-0.5).softmax(-1) @ v[:, :, keep]
        with method.bind(row=row.repeat(2)):
            torch.testing.assert_close(method(q, k, v), want)
        assert method.measured_density() == pytest.approx(float(keep.double().mean()))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("text", ["window(8)", "heads(window(8), sinks(3) | own())", "full()"])
def test_a_step_refuses_what_it_reads_by_name(text: str, cached: bool) -> None:
    """An infinite key can have weight 0: what comes out would not show it."""
    q, k, v = (torch.randn(1, n, s, 8) for n, s in ((2, 1), (2, 20), (2, 20)))
    for which, bad in (("keys", 19), ("keys", 14), ("values", 19), ("values", 14)):
        broken = {"keys": k.clone(), "values": v.clone()}
        broken[which][0, 0, bad, 3] = -torch.inf if which == "values" else -torch.inf * q[0, 0, 0, 3].sign()
        method, cache = PatternAttention(pattern=text), Cache()
        keys, values = cache.update(broken["keys"], broken["values"], 0)
        with pytest.raises(BadInput, match=rf"{which} of attention/pattern in layer 3"):
            method.attend(q, keys, values, scale=0.3, layer=3, cache=cache.layers[0] if cached else None)


def test_a_step_makes_no_mask_and_reads_old_keys_only_where_the_pattern_says(monkeypatch: pytest.MonkeyPatch) -> None:
    method = PatternAttention(pattern="window(8) | sinks(2)", block=4)
    monkeypatch.setattr(method, "block_mask", lambda *_: pytest.fail("a step asked for a mask"))
    q, k, v = (torch.randn(1, 2, n, 8) for n in (1, 40, 40))
    k[:, :, 2:32], v[:, :, 2:32] = torch.nan, torch.nan
    read = torch.tensor([0, 1, *range(32, 40)])
    want = (q @ k[:, :, read].mT * 8**-0.5).softmax(-1) @ v[:, :, read]
    torch.testing.assert_close(method(q, k, v), want)
