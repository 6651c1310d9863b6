"""Words of the pattern algebra against plain Python, pair by pair, and what they compile to against the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.attention.patterns import Pattern, parse, random, sinks, strided, window
from rarefy.attention.patterns.count import kept_pairs, visible_pairs
from rarefy.attention.patterns.relations import drawn
from rarefy.attention.patterns.words import WORDS
from rarefy.errors import BadInput

L = 43
R = torch.Generator().manual_seed(0)
TABLES = {
    "row": torch.randint(-1, 5, (L,), generator=R),
    "doc": torch.tensor([0] * 9 + [1] * 7 + [2] * 8 + [3] * 5 + [4] * 6 + [-1] * 2 + [5] * 6),
    "doc_parent": torch.tensor([-1, 0, 0, 1, 1, -1]),
    "graph": torch.randint(0, L, (60, 2), generator=R),
    "sets": torch.tensor([[0, 3, 5, 7], [7, 8, 20, -1], [11, 12, 20, 42]]),
    "likes": torch.rand(6, 6, generator=R) < 0.4,
}
ROW, DOC, PARENT = TABLES["row"].tolist(), TABLES["doc"].tolist(), TABLES["doc_parent"].tolist()
EDGES = {tuple(e) for e in TABLES["graph"].tolist()}
SETS = TABLES["sets"].tolist()


def above(doc: int) -> list[int]:
    return [] if doc < 0 or PARENT[doc] < 0 else [PARENT[doc], *above(PARENT[doc])]


def home(x: int) -> list[int]:
    return ([s for s in SETS if x in s] or [[]])[-1]


def nearest(x: int, n: int, dilation: int, length: int, border: str) -> set[int]:
    """The window of NATTEN: of the places of the same phase the n around the own one, pushed inward at the ends."""
    phase = [p for p in range(length) if p % dilation == x % dilation]
    at = phase.index(x)
    first = at - n // 2
    if border == "shift":
        first = max(0, min(first, len(phase) - n))
    return {phase[i] for i in range(first, first + n) if 0 <= i < len(phase)}


def grid(x: int, shape: tuple[int, ...], start: int = 0) -> tuple[int, ...] | None:
    x -= start
    total = 1
    for n in shape:
        total *= n
    if not 0 <= x < total:
        return None
    out: list[int] = []
    for n in reversed(shape):
        out.insert(0, x % n)
        x //= n
    return tuple(out)


def on_grid(rule: Callable, shape: tuple[int, ...], start: int = 0) -> Callable:
    def asked(q: int, k: int, S: int) -> bool:
        a, b = grid(q, shape, start), grid(k, shape, start)
        return a is not None and b is not None and rule(a, b)
    return asked


@cache
def draws(S: int, past: bool) -> list[list[int]]:
    return drawn(S, 3, 5, past).tolist()


@cache
def cycles(S: int) -> set[tuple[int, int]]:
    generator, out = torch.Generator().manual_seed(2), set()
    for _ in range(2):
        walk = torch.randperm(S, generator=generator).tolist()
        for a, b in zip(walk, [*walk[1:], walk[0]], strict=True):
            out |= {(a, b), (b, a)}
    return out


Rule = Callable[[int, int, int], bool]
NAIVE: dict[str, Rule] = {
    "full()": lambda q, k, S: True,
    "none()": lambda q, k, S: False,
    "causal()": lambda q, k, S: k <= q,
    "own()": lambda q, k, S: k == q,
    "lag(3)": lambda q, k, S: k == q - 3,
    "lag(-2)": lambda q, k, S: k == q + 2,
    "band(3, 8)": lambda q, k, S: 3 <= q - k <= 8,
    "window(5)": lambda q, k, S: k in range(q - 4, q + 1),
    "window(5, dilation=3)": lambda q, k, S: k in (q, q - 3, q - 6, q - 9, q - 12),
    "around(4)": lambda q, k, S: abs(q - k) <= 4,
    "around(2, dilation=3)": lambda q, k, S: k - q in (-6, -3, 0, 3, 6),
    "elastic(2, 0.25)": lambda q, k, S: 0 <= q - k < max(1, 2 + int(S * 0.25)),
    "strided(6)": lambda q, k, S: (q - k) % 6 == 0,
    "strided(6, offset=2)": lambda q, k, S: (q - k) % 6 == 2,
    "block(7)": lambda q, k, S: q // 7 == k // 7,
    "sinks(4)": lambda q, k, S: k < 4,
    "every(5)": lambda q, k, S: k % 5 == 0,
    "every(5, offset=3)": lambda q, k, S: k % 5 == 3,
    "summaries(8, 3)": lambda q, k, S: k % 8 in (5, 6, 7),
    "keys(2, -1)": lambda q, k, S: k in (2, S - 1),
    "queries(0, -2)": lambda q, k, S: q in (0, S - 2),
    "tokens(3)": lambda q, k, S: 3 in (q, k),
    "neighbours(5)": lambda q, k, S: k in nearest(q, 5, 1, S, "shift"),
    "neighbours(5, border=\"cut\")": lambda q, k, S: k in nearest(q, 5, 1, S, "cut"),
    "neighbours(3, dilation=4)": lambda q, k, S: k in nearest(q, 3, 4, S, "shift"),
    "neighbours(4, dilation=3, border=\"cut\")": lambda q, k, S: k in nearest(q, 4, 3, S, "cut"),
    "neighbours(99)": lambda q, k, S: True,
    "chunks(8, shift=3)": lambda q, k, S: (q + 3) // 8 == (k + 3) // 8,
    "chunks(8, shift=4, wrap=True)": lambda q, k, S: ((q + 4) % S) // 8 == ((k + 4) % S) // 8,
    "cross_chunks(8, 5)": lambda q, k, S: q // 8 == (k + 5) % S // 8,
    "blocks(6, window(2))": lambda q, k, S: 0 <= q // 6 - k // 6 < 2,
    "blocks(6, keys(-1))": lambda q, k, S: k // 6 == (S - 1) // 6,
    "blocks(5, random(3, seed=5, past=True))": lambda q, k, S: k // 5 in draws(-(-S // 5), True)[q // 5],
    "parts(4, permutation(2, 0, 3, 1))": lambda q, k, S: k * 4 // S == (2, 0, 3, 1)[q * 4 // S],
    "on(0, (5, 8), own())": on_grid(lambda a, b: a[0] == b[0], (5, 8)),
    "on(1, (3, 3, 4), window(2), start=5)": on_grid(lambda a, b: 0 <= a[1] - b[1] < 2, (3, 3, 4), 5),
    "(on(0, (6, 7), lag(1)) | ~on(1, (6, 7), own()))": lambda q, k, S: on_grid(lambda a, b: a[0] == b[0] + 1, (6, 7))(q, k, S)
        or not on_grid(lambda a, b: a[1] == b[1], (6, 7))(q, k, S),
    "neighbourhood((6, 7), 3)": on_grid(lambda a, b: all(y in nearest(x, 3, 1, n, "shift") for x, y, n in zip(a, b, (6, 7), strict=True)), (6, 7)),
    "neighbourhood((3, 4, 3), (3, 2, 1), (1, 2, 1), \"cut\", start=3)": on_grid(
        lambda a, b: all(y in nearest(x, n, d, m, "cut") for x, y, n, d, m in zip(a, b, (3, 2, 1), (1, 2, 1), (3, 4, 3), strict=True)), (3, 4, 3), 3),
    "boxes((6, 7), 3, shift=1)": on_grid(lambda a, b: all((x + 1) // 3 == (y + 1) // 3 for x, y in zip(a, b, strict=True)), (6, 7)),
    "same(\"row\")": lambda q, k, S: ROW[q] == ROW[k] >= 0,
    "by(\"row\", window(2))": lambda q, k, S: min(ROW[q], ROW[k]) >= 0 and 0 <= ROW[q] - ROW[k] < 2,
    "match(\"row\", \"doc\")": lambda q, k, S: ROW[q] == DOC[k] >= 0,
    "key_is(\"row\", 3)": lambda q, k, S: ROW[k] == 3,
    "query_is(\"row\")": lambda q, k, S: ROW[q] == 1,
    "parent(\"doc\")": lambda q, k, S: DOC[q] >= 0 and PARENT[DOC[q]] == DOC[k] >= 0,
    "child(\"doc\")": lambda q, k, S: DOC[k] >= 0 and PARENT[DOC[k]] == DOC[q] >= 0,
    "sibling(\"doc\")": lambda q, k, S: min(DOC[q], DOC[k]) >= 0 and DOC[q] != DOC[k] and PARENT[DOC[q]] == PARENT[DOC[k]] >= 0,
    "ancestor(\"doc\")": lambda q, k, S: DOC[k] in above(DOC[q]),
    "relation(\"doc\", \"likes\")": lambda q, k, S: min(DOC[q], DOC[k]) >= 0 and bool(TABLES["likes"][DOC[q], DOC[k]]),
    "edges(\"graph\")": lambda q, k, S: (q, k) in EDGES,
    "edges(\"graph\", both=True)": lambda q, k, S: (q, k) in EDGES or (k, q) in EDGES,
    "members(\"sets\")": lambda q, k, S: k in home(q),
    "random(3, seed=5)": lambda q, k, S: k in draws(S, False)[q],
    "random(3, seed=5, past=True)": lambda q, k, S: k in draws(S, True)[q],
    "expander(4, seed=2)": lambda q, k, S: (q, k) in cycles(S),
    "((window(3) | same(\"row\")) & ~strided(2))": lambda q, k, S: (0 <= q - k < 3 or ROW[q] == ROW[k] >= 0) and (q - k) % 2 != 0,
}
SHAPES = [(L, L, 8, 8, True), (L, L, 5, 7, False), (9, L, 8, 4, True), (1, L - 2, 16, 1, True), (37, 37, 4, 16, False), (3, 3, 8, 8, True)]


def naive(rule: Rule, T: int, S: int, causal: bool) -> torch.Tensor:
    return torch.tensor([[bool(rule(q, k, S)) and (k <= q or not causal) for k in range(S)] for q in range(S - T, S)])


@pytest.mark.parametrize("text", NAIVE)
def test_words_mean_what_they_say_and_compile_to_it(text: str) -> None:
    pattern = parse(text)
    assert parse(str(pattern)) == pattern and str(parse(str(pattern))) == str(pattern)
    for T, S, block, query_block, causal in SHAPES:
        expected = naive(NAIVE[text], T, S, causal)
        assert torch.equal(pattern.mask(T, S, causal=causal, tables=TABLES), expected), (T, S, causal)
        made = pattern.block_mask(T, S, block=block, query_block=query_block, causal=causal, tables=TABLES)
        assert torch.equal(made.pairs(T, S, causal), expected[None, None]), (T, S, block, query_block, causal)
        assert kept_pairs(made, T, S, causal) == int(expected.sum())
        # No block is chosen in vain, none of which all is allowed is called partial, no two tiles are equal.
        filled = torch.zeros_like(made.blocks[0, 0])
        whole = torch.ones_like(filled)
        for t, s in ((t, s) for t in range(T) for s in range(S) if s <= S - T + t or not causal):
            at = (S - T + t) // query_block - (S - T) // query_block, s // block
            filled[at] |= expected[t, s]
            whole[at] &= expected[t, s]
        assert torch.equal(made.blocks[0, 0], filled)
        if made.partial is not None and made.tiles is not None:
            assert torch.equal((made.partial[0, 0] >= 0), filled & ~whole)
            assert len({tuple(tile.flatten().tolist()) for tile in made.tiles}) == len(made.tiles) == len(made.partial.clamp_min(0).unique())


def test_every_word_is_tried() -> None:
    said = " ".join(NAIVE)
    apart = {"heads", "layers", "on_heads", "on_layers", "shards"}                # below
    named = [name for name, make in WORDS.items() if ".zoo." not in make.__module__]          # the papers' have tests of their own
    assert [name for name in named if f"{name}(" not in said and name not in apart] == []


CHOICES: list[tuple[str, Callable[[int, int, int, int, int], bool]]] = [
    ("heads(window(3), strided(4))", lambda q, k, h, H, l: 0 <= q - k < 3 if h < H // 2 else (q - k) % 4 == 0),
    ("on_heads([1, 3], full(), window(2))", lambda q, k, h, H, l: h in (1, 3) or 0 <= q - k < 2),
    ("layers(full(), window(2), sinks(1))", lambda q, k, h, H, l: (True, 0 <= q - k < 2, k < 1)[l % 3]),
    ("on_layers([0, 2], full(), window(2))", lambda q, k, h, H, l: l in (0, 2) or 0 <= q - k < 2),
    ("(blocks(4, (window(1) | shards(3))) | sinks(2))", lambda q, k, h, H, l: q // 4 == k // 4 or k // 4 % 3 == h % 3 or k < 2),
    ("heads(layers(full(), none()), ~shards(2), own(), window(4))",
     lambda q, k, h, H, l: (l % 2 == 0, k % 2 != h % 2, k == q, 0 <= q - k < 4)[h * 4 // H]),
]


@pytest.mark.parametrize("text, rule", CHOICES, ids=[c[0] for c in CHOICES])
def test_heads_and_layers_have_their_own(text: str, rule: Callable) -> None:
    pattern = parse(text)
    assert str(pattern) == text
    for H in (4, 8):
        for layer in range(4):
            expected = torch.stack([naive(lambda q, k, S, h=h, H=H, layer=layer: rule(q, k, h, H, layer), 31, 31, True) for h in range(H)])
            made = pattern.block_mask(31, 31, block=8, query_block=4, heads=H, layer=layer)
            assert torch.equal(made.pairs(31, 31, True).expand(1, H, 31, 31)[0], expected)
            assert all(torch.equal(pattern.mask(31, 31, head=h, heads=H, layer=layer), expected[h]) for h in range(H))


def test_labels_of_a_batch_give_each_row_its_own_mask() -> None:
    rows = torch.randint(-1, 4, (3, L), generator=R)
    pattern = parse('same("row") | sinks(2)')
    made = pattern.block_mask(L, L, block=8, query_block=8, tables={"row": rows})
    for b in range(3):
        labels = rows[b].tolist()
        expected = naive(lambda q, k, S, own=labels: own[q] == own[k] >= 0 or k < 2, L, L, True)
        assert torch.equal(made.pairs(L, L, True)[b, 0], expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_expression_compiles_to_its_pairs_and_reads_back(data: st.DataObject) -> None:
    atoms = st.sampled_from(list(NAIVE)).map(lambda text: (parse(text), NAIVE[text]))

    def joined(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.tuples(inner, inner, st.sampled_from("|&~")).map(lambda made: {
            "|": (made[0][0] | made[1][0], lambda q, k, S: made[0][1](q, k, S) or made[1][1](q, k, S)),
            "&": (made[0][0] & made[1][0], lambda q, k, S: made[0][1](q, k, S) and made[1][1](q, k, S)),
            "~": (~made[0][0], lambda q, k, S: not made[0][1](q, k, S)),
        }[made[2]])

    pattern, rule = data.draw(st.recursive(atoms, joined, max_leaves=5))
    T, block, query_block, causal = data.draw(st.tuples(st.integers(1, 23), st.integers(1, 9), st.integers(1, 9), st.booleans()))
    S = data.draw(st.integers(T, 30))
    made = pattern.block_mask(T, S, block=block, query_block=query_block, causal=causal, tables=TABLES)
    assert torch.equal(made.pairs(T, S, causal)[0, 0], naive(rule, T, S, causal))
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize("S, r, past", [(50, 3, False), (50, 7, True), (4, 6, False)])
def test_random_keys_are_different_and_evenly_spread(S: int, r: int, past: bool) -> None:
    times = torch.zeros(S, S)
    for seed in range(200):
        for q, keys in enumerate(drawn(S, r, seed, past).tolist()):
            among = q if past else S
            mine = [k for k in keys if k >= 0]
            assert len(set(mine)) == len(mine) == min(r, among) and all(k < among for k in mine)
            times[q, mine] += 1
    last = times[S - 1, : S - 1 if past else S] / 200
    p = min(1, r / len(last))
    assert float((last - p).abs().max()) <= 4.5 * (p * (1 - p) / 200) ** 0.5 + 1e-9
    assert random(3, seed=1) != random(3, seed=2) and torch.equal(random(3, seed=1).mask(S, S), random(3, seed=1).mask(S, S))


def test_a_draw_from_the_past_does_not_depend_on_the_length() -> None:
    pattern = random(4, past=True)
    assert torch.equal(pattern.mask(60, 60)[:40, :40], pattern.mask(40, 40))


def test_an_expander_mixes_fast() -> None:
    """Exphormer: the second eigenvalue of a random d-regular graph is near 2 sqrt(d - 1), far below d."""
    for degree in (4, 8):
        graph = parse(f"expander({degree}, seed=1)").mask(200, 200, causal=False).double()
        second = torch.linalg.eigvalsh(graph)[-2]
        assert torch.equal(graph, graph.T) and float(second) < 1.15 * 2 * (degree - 1) ** 0.5 < degree
        reached = torch.matrix_power(graph + torch.eye(200).double(), 7 if degree == 4 else 4) > 0
        assert bool(reached.all())


def test_a_rule_without_words_compiles_too() -> None:
    odd = Pattern("odd distance", lambda q, k: (q - k) % 2 == 1) | sinks(1)
    expected = naive(lambda q, k, S: (q - k) % 2 == 1 or k < 1, 29, 29, True)
    assert torch.equal(odd.block_mask(29, 29, block=8, query_block=8).pairs(29, 29, True)[0, 0], expected)
    assert odd != Pattern("odd distance", lambda q, k: (q - k) % 2 == 0) | sinks(1)


@pytest.mark.parametrize("text, distinct, closed", [
    ("(window(256) | sinks(4))", 3, lambda S: sum(min(p + 1, 256) + min(4, max(0, p + 1 - 256)) for p in range(S))),
    ("strided(512)", 1, lambda S: sum(p // 512 + 1 for p in range(S))),
    ("(block(512) | summaries(512, 8))", 1, lambda S: sum(p % 512 + 1 + 8 * (p // 512) for p in range(S))),
])
def test_a_long_sequence_is_cut_quickly(text: str, distinct: int, closed: Callable[[int], int]) -> None:
    S, start = 1 << 16, time.thread_time()
    made = parse(text).block_mask(S, S, block=64, query_block=64)
    assert time.thread_time() - start < 3
    assert made.tiles is not None and len(made.tiles) <= distinct
    assert kept_pairs(made, S, S, True) == closed(S)
    assert parse(text).block_mask(S, S, block=64, query_block=64) is made


def test_cost_counts_pairs_and_touched_tiles() -> None:
    S, D, H = 50, 8, 4
    fine, coarse = strided(8).cost(S, width=D, heads=H, block=16)
    pairs = sum(p // 8 + 1 for p in range(S))
    tiles = sum(range(1, 5))
    assert fine.flops == 4 * D * pairs * H / S and coarse.flops == 4 * D * tiles * 256 * H / S
    assert fine.bytes == 8 * D * tiles * 16 * H / S


BAD = [
    ("windw(3)", "unknown word 'windw' at character 1 of the pattern 'windw\\(3\\)'; did you mean window"),
    ("same('ä') & (own() | Windw(3))", "'Windw' at character 22 .*did you mean window"),
    ("window(3) |\n snks(2)", "'snks' at character 13 "),
    ("same(row)", "'row' is a bare name at character 6 .*in quotes: \"row\""),
    ("heads(window, windo)", "'window' is a bare name at character 7 .*did you mean window\\(...\\)"),
    ("heads(full(), windo)", "'windo' is a bare name at character 15 .*did you mean window\\(...\\)"),
    ("window(3) or sinks(2)", "'\\|' is or"),
    ("window(3) || sinks(2)", "at character 12, '\\| sinks\\(2\\)'"),
    ("same('\\d')", "at character 7 .*plain words"),
    ("window(99999999999999999999)", "the number '99999999999999999999' at character 8 .*numbers are below"),
    ("|".join(["own()"] * 151), "151 patterns are joined side by side"),
    ("window(3) | snks(2)", "'snks'.*did you mean sinks"),
    ("window", "bare name at character 1 .*did you mean window\\(\\.\\.\\.\\)"),
    ("window(0)", "'window\\(0\\)': window=0 must be a whole number"),
    ("window(2.5)", "window=2.5"),
    ("window()", "missing a required argument: 'n'; it is window\\(n: int, dilation: int = 1\\)"),
    ("window(3, size=2)", "unexpected keyword argument 'size'"),
    ("window(3) | 4", "4 is no pattern at character 13 "),
    ("window(3) + sinks(2)", "'window\\(3\\) \\+ sinks\\(2\\)'.*not understood"),
    ("window(3", "cannot be read"),
    ("", "a pattern is an expression"),
    ("5", "not a pattern"),
    ("window(n=__import__('os').getpid())", "unknown word \"__import__\\('os'\\).getpid\""),
    ("().__class__", "not understood"),
    ("window(*[3])", "'\\*\\[3\\]'.*not understood"),
    ("window(**{'n': 3})", "spreads arguments"),
    ("[window(n) for n in (1, 2)]", "not understood"),
    ("(lambda: window(3))()", "unknown word"),
    ("~" * 200 + "window(2)", "nested more than"),
    ("(" * 5000 + "window(2)" + ")" * 5000, "cannot be read"),
    ("window(3)\0", "cannot be read"),
    ("x" * 30000, "at most 20000"),
    ("heads()", "heads\\(\\) is empty"),
    ("blocks(4, 3)", "blocks\\(64, ...\\) takes patterns, not 3"),
    ("neighbours(3, border='wrap')", "border='wrap' must be 'shift' or 'cut'"),
    ("on(2, (4, 4), own())", "axis=2"),
    ("neighbourhood((4, 4), (3, 3, 3))", "one for each of the 2 axes"),
    ("permutation(0, 2)", "must name each of 0..1 once"),
    ("tokens()", "names no position"),
    ("expander(3)", "must be even"),
    ("same('a b')", "names no metadata"),
    ("elastic(0, 2)", "share=2"),
    ("summaries(4, 5)", "c=5 must be a whole number in 1..4"),
]


@pytest.mark.parametrize("text, message", BAD, ids=[b[0][:30] for b in BAD])
def test_bad_expressions_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(text)


PIECES = st.sampled_from([
    *(f"{name}(" for name in WORDS), ")", "(", "[", "]", "|", "&", "~", ",", "-", "1", "3", "0", "64", "2.5", "1e999", "10**9",
    '"row"', "'", "n=", "*", "**",
    "lambda: ", "x", ".", "None", "True", "\n", "{", "}", ":", "é", "\x00", "if", "f'{1}'", "_", "b''", "1j", "...",
])


@settings(max_examples=400, deadline=None)
@given(st.one_of(
    st.lists(PIECES, max_size=14).map("".join), st.text(max_size=40),
    st.tuples(st.sampled_from(sorted(NAIVE)), st.integers(0, 40), st.text("()|&~,-0 n\"", max_size=3)).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] + 1 :]),
))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        made = parse(text)
    except BadInput:
        return
    assert parse(str(made)) == made


def test_what_a_pattern_needs_it_asks_for() -> None:
    for text, tables, message in (
        ('same("row")', {}, "'row'.*not bound"),
        ('same("row")', {"row": torch.zeros(5)}, r"'row'.*\[9 or more\].*\[5\]"),
        ('edges("row")', {"row": torch.zeros(4, 3)}, "pairs, 2"),
        ('ancestor("doc")', {"doc": torch.zeros(9), "doc_parent": torch.tensor([1, 0])}, "circle"),
        ('parent("doc")', {"doc": torch.zeros(9), "doc_parent": torch.tensor([4])}, "parent 4, but there are 1"),
        ('same("a") | same("b")', {"a": torch.zeros(2, 9), "b": torch.zeros(3, 9)}, "different batches"),
    ):
        with pytest.raises(BadInput, match=message):
            parse(text).block_mask(9, 9, block=4, query_block=4, tables=tables)
    with pytest.raises(BadInput, match="3 heads"):
        parse("heads(full(), none())").block_mask(9, 9, block=4, query_block=4, heads=3)
    with pytest.raises(BadInput, match="depends on the length"):
        parse("neighbours(3)").allowed(torch.tensor(1), torch.tensor(2))
    with pytest.raises(BadInput, match="T=5"):
        window(3).block_mask(5, 4, block=4, query_block=4)
    with pytest.raises(BadInput, match="T=5"):
        window(3).mask(5, 4)
    for shape in ((5,), (2, 9)):
        with pytest.raises(BadInput, match=r"'row'.*\[9 or more\] here, for one sequence"):
            parse('same("row")').mask(9, 9, tables={"row": torch.zeros(shape)})


def test_visible_pairs() -> None:
    assert visible_pairs(3, 5, True) == 3 + 4 + 5 and visible_pairs(3, 5, False) == 15
