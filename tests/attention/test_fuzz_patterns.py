"""Drawn pattern expressions: block masks against the definition pair by pair, the laws of the algebra, text and back, counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import reduce

import pytest
import torch
from torch import Tensor

from rarefy.attention import patterns as w
from rarefy.attention.patterns import Pattern, parse
from rarefy.attention.patterns.compile import newest

HEADS = 4


def atom(pick: random.Random, lifted: bool) -> Pattern:
    """A leaf; words that read tables of positions stand outside of lifts only."""
    n = pick.randint
    choices: list[Callable[[], Pattern]] = [
        w.full, w.none, w.causal, w.own, lambda: w.lag(n(-5, 9)), lambda: w.band(*sorted((n(-9, 20), n(-9, 20)))),
        lambda: w.window(n(1, 30), n(1, 4)),
        lambda: w.around(n(0, 9), n(1, 4)), lambda: w.elastic(n(0, 5), pick.choice([0, 0.1, 0.5, 1])), lambda: w.strided(n(1, 9), n(-3, 9)),
        lambda: w.block(n(1, 20)), lambda: w.sinks(n(1, 9)), lambda: w.every(n(1, 9), n(-3, 9)), lambda: w.summaries(8, n(1, 8)),
        lambda: w.keys(n(-20, 70), n(0, 70)), lambda: w.queries(n(-20, 70)), lambda: w.tokens(n(-20, 70), 0), lambda: w.shards(n(1, 5)),
        lambda: w.neighbours(n(1, 20), n(1, 3), pick.choice(["shift", "cut"])), lambda: w.random(n(1, 6), n(0, 5), past=pick.random() < 0.5),
        lambda: w.expander(2 * n(1, 3), n(0, 5)),
    ]
    if not lifted:
        choices += [
            lambda: w.chunks(n(1, 20), n(0, 9), pick.random() < 0.5), lambda: w.cross_chunks(n(1, 20), n(0, 9)), lambda: w.same("row"),
            lambda: w.key_is("row", n(-1, 4)), lambda: w.query_is("row", n(-1, 4)), lambda: w.match("row", "col"), lambda: w.members("sets"),
            lambda: w.edges("pairs", pick.random() < 0.5), lambda: w.parent("row"), lambda: w.child("row"), lambda: w.sibling("row"),
            lambda: w.ancestor("row"), lambda: w.relation("row", "rel"), lambda: w.boxes((n(1, 5), n(1, 6), n(1, 4)), n(1, 4), n(0, 2)),
            lambda: w.neighbourhood((n(1, 6), n(1, 9)), n(1, 5), n(1, 2), pick.choice(["shift", "cut"]), n(0, 9)),
        ]
    return pick.choice(choices)()


def drawn(pick: random.Random, depth: int, lifted: bool = False) -> Pattern:
    def part(up: bool = lifted) -> Pattern:
        return drawn(pick, depth - 1, up)

    if depth == 0 or pick.random() < 0.25:
        return atom(pick, lifted)
    choices: list[Callable[[], Pattern]] = [
        lambda: part() | part(), lambda: part() | part(), lambda: part() & part(), lambda: ~part(), lambda: w.blocks(pick.randint(1, 20), part(True)),
        lambda: w.parts(pick.randint(1, 9), part(True)), lambda: w.on(pick.randint(0, 1), (pick.randint(1, 9), 5), part(True), pick.randint(0, 9)),
        lambda: w.heads(part(), part()), lambda: w.layers(part(), part()), lambda: w.on_heads([pick.randint(0, 3)], part(), part()),
        lambda: w.on_layers([0, 2], part(), part()),
    ]
    return pick.choice(choices if lifted else [*choices, lambda: w.by("row", part(True))])()


def tables(r: torch.Generator, S: int, pick: random.Random) -> dict[str, Tensor]:
    row = torch.randint(-1, 5, (S + 3,), generator=r)
    return {
        "row": row.sort().values if pick.random() < 0.3 else row, "col": torch.randint(-1, 5, (S,), generator=r),
        "pairs": torch.randint(-1, S, (pick.choice([0, 1, 40]), 2), generator=r), "sets": torch.randint(-1, S, (6, 3), generator=r),
        "row_parent": torch.tensor([-1, 0, 0, 1, -1]), "rel": torch.rand(5, 5, generator=r) < 0.4,
    }


@pytest.mark.parametrize("seed", range(0, 80, 8))
def test_drawn_expressions(seed: int) -> None:
    for one in range(seed, seed + 8):
        pick, r = random.Random(one), torch.Generator().manual_seed(one)
        S = pick.choice([1, 5, 16, 33, 64, 70])
        T, block, query_block = pick.choice([S, S, 1, pick.randint(1, S)]), pick.choice([1, 7, 16, 64]), pick.choice([1, 4, 7, 16, 64])
        given = {"causal": pick.random() < 0.5, "heads": HEADS, "layer": pick.randint(0, 3), "tables": tables(r, S, pick)}
        a, b = drawn(pick, 2), drawn(pick, 1)

        def naive(p: Pattern, T: int, S: int = S, given: Mapping = given) -> Tensor:
            return torch.stack([p.mask(T, S, head=h, **given) for h in range(HEADS)])

        def cut(p: Pattern, T: int = T, S: int = S, R: int = query_block, M: int = block, given: Mapping = given) -> Tensor:
            return p.block_mask(T, S, block=M, query_block=R, **given).pairs(T, S, given["causal"])[0].expand(HEADS, T, S)

        expected = naive(a, T)
        assert torch.equal(cut(a), expected), a
        assert torch.equal(naive(a, S)[:, S - T :], expected), a                 # decoding sees what prefill does
        index = newest(a, S, heads=HEADS, layer=given["layer"], tables=given["tables"]).expand(1, HEADS, 1, -1)[0, :, 0]
        step = torch.zeros(HEADS, S, dtype=torch.long).scatter_add_(1, index.clamp_min(0), (index >= 0).long())
        assert torch.equal(step, naive(a, 1)[:, 0].long()), a                    # each key once
        again = parse(str(a))
        assert again == a and hash(again) == hash(a) and str(again) == str(a) and torch.equal(cut(again), expected)
        assert torch.equal(cut(~(a | b)), cut(~a & ~b)) and torch.equal(cut(~(a & b)), cut(~a | ~b)), (a, b)
        assert torch.equal(cut(~~a), expected) and torch.equal(cut(a | a), expected) and torch.equal(cut(a & a), expected)
        count, seen = int(naive(a, S).sum()), HEADS * (S * (S + 1) // 2 if given["causal"] else S * S)
        assert a.density(S, block=block, **given) == pytest.approx(count / seen, abs=1e-12)
        assert a.cost(S, width=8, block=16, **given)[0].flops == pytest.approx(32 * count / S)


def test_sets_without_members_see_nothing() -> None:
    assert not w.members("sets").mask(4, 4, tables={"sets": torch.full((3, 2), -1)}).any()


def test_long_chains_are_read_back() -> None:
    """As many as are made side by side, not as deep as their brackets."""
    chain = reduce(lambda a, b: a | b, (w.lag(i) for i in range(120)))
    assert parse(str(chain)) == chain == parse(" | ".join(f"lag({i})" for i in range(120)))
    assert torch.equal(chain.mask(130, 130), w.window(120).mask(130, 130))
