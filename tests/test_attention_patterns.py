"""The algebra of patterns against plain Python, and the block mask against the pairs that it must cover."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.attention.patterns import Pattern, block, sinks, strided, window
from rarefy.errors import BadInput

Rule = Callable[[int, int], bool]
ATOMS = st.one_of(
    st.integers(1, 12).map(lambda n: (window(n), lambda q, k: 0 <= q - k < n)),
    st.integers(1, 12).map(lambda n: (sinks(n), lambda q, k: k < n)),
    st.integers(1, 12).map(lambda n: (strided(n), lambda q, k: (q - k) % n == 0)),
    st.integers(1, 12).map(lambda n: (block(n), lambda q, k: q // n == k // n)),
)


def _joined(parts: st.SearchStrategy) -> st.SearchStrategy:
    def both(pair: tuple) -> list:
        (p, f), (r, g) = pair
        return [(p | r, lambda q, k: f(q, k) or g(q, k)), (p & r, lambda q, k: f(q, k) and g(q, k)), (~p, lambda q, k: not f(q, k))]

    return st.tuples(parts, parts).map(both).flatmap(st.sampled_from)


EXPRESSIONS = st.recursive(ATOMS, _joined, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, st.integers(1, 20), st.integers(0, 20), st.booleans())
def test_mask_is_the_predicate_pair_by_pair(both: tuple[Pattern, Rule], T: int, past: int, causal: bool) -> None:
    pattern, rule = both
    S = T + past
    expected = torch.tensor([[rule(q, k) and (k <= q or not causal) for k in range(S)] for q in range(past, S)])
    assert torch.equal(pattern.mask(T, S, causal=causal), expected)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, st.integers(1, 20), st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_compiled_blocks_are_exactly_those_with_a_pair(both: tuple[Pattern, Rule], T: int, past: int, size: int, query_block: int) -> None:
    pattern, rule = both
    S = T + past
    pairs = {(q // query_block - past // query_block, k // size) for q in range(past, S) for k in range(q + 1) if rule(q, k)}
    compiled = pattern.compile(T, S, size=size, query_block=query_block)
    assert {tuple(at) for at in compiled.nonzero().tolist()} == pairs
    assert compiled.shape == ((S - 1) // query_block - past // query_block + 1, -(-S // size))


@settings(max_examples=30, deadline=None)
@given(EXPRESSIONS, st.integers(1, 40))
def test_density_counts_causal_pairs(both: tuple[Pattern, Rule], S: int) -> None:
    pattern, rule = both
    assert pattern.density(S) == sum(rule(q, k) for q in range(S) for k in range(q + 1)) / (S * (S + 1) / 2)


def test_density_in_closed_form() -> None:
    S, w, s = 200, 16, 4
    union = sum(min(p + 1, w) + min(s, max(0, p + 1 - w)) for p in range(S))
    assert (window(w) | sinks(s)).density(S) == union / (S * (S + 1) / 2)
    assert window(1).density(S) == 2 / (S + 1)


def test_expressions_print_as_written() -> None:
    assert str(window(256) | sinks(4)) == "(window(256) | sinks(4))"
    assert str(~(strided(8) & block(64))) == "~(strided(8) & block(64))"


@pytest.mark.parametrize("make", [window, sinks, strided, block])
@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_lengths_must_be_positive(make: Callable[[int], Pattern], n: int) -> None:
    with pytest.raises(BadInput, match=f"={n} must be a whole number"):
        make(n)
