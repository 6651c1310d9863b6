"""Every pattern of the zoo against its paper's own definition, written in loops over pairs and knowing nothing of the algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rarefy import catalogue
from rarefy.attention.patterns import parse
from rarefy.attention.patterns.relations import drawn
from rarefy.attention.patterns.zoo import EXAMPLES, documents, pictures, points, text
from rarefy.errors import BadInput


class Case(NamedTuple):
    pattern: object
    S: int
    rule: Callable[[int, int, int, int], bool]
    """(query, key, head, layer)"""
    tables: Mapping[str, Tensor] = {}
    causal: bool = False
    heads: int = 1
    layers: int = 1


def bigbird(q: int, k: int, h: int, l: int) -> bool:
    i, j, n = q // 4, k // 4, 9                                # 35 tokens in 9 blocks of 4
    return abs(i - j) <= 1 or i in (0, n - 1) or j in (0, n - 1) or j in drawn(n, 2, 7, False)[i].tolist()


def rolled_group(x: int, S: int, group: int) -> int:
    """The group of a token once the sequence is rolled left by half a group, as torch.roll(x, -group / 2) does; the ends meet."""
    order = torch.arange(S).roll(-(group // 2)).tolist()
    return order.index(x) // group


def longlora(q: int, k: int, h: int, l: int) -> bool:
    """The roll of LongLoRA's code: the last group of shifted heads is of the sequence's two ends."""
    S, group = 40, 8
    if h < 2:
        return q // group == k // group
    return rolled_group(q, S, group) == rolled_group(k, S, group)


def scca(q: int, k: int, h: int, l: int) -> bool:
    """K rolled right by the head's shift, then plain chunks: query q meets whatever now lies in its chunk."""
    S, chunk, shift = 32, 8, (0, 4)[h // 2]
    rolled = torch.arange(S).roll(shift).tolist()
    return k in rolled[q // chunk * chunk : (q // chunk + 1) * chunk]


def nearest(x: int, n: int, d: int, length: int) -> list[int]:
    phase = list(range(x % d, length, d))
    first = min(max(phase.index(x) - n // 2, 0), max(len(phase) - n, 0))
    return phase[first : first + n]


def dinat(q: int, k: int, h: int, l: int) -> bool:
    d = (1, 2)[l]
    return k // 7 in nearest(q // 7, 3, d, 6) and k % 7 in nearest(q % 7, 3, d, 7)


def favit(q: int, k: int, h: int, l: int) -> bool:
    """Cut the map in regions of size * dilation, take every dilation-th patch of one: a window of size x size patches."""
    d, size = (1, 2)[h], 2
    for x, y in ((q // 8, k // 8), (q % 8, k % 8)):
        window = [(x // (size * d)) * size * d + x % d + i * d for i in range(size)]
        if y not in window:
            return False
    return True


def godiva(q: int, k: int, h: int, l: int) -> bool:
    if k < 4:
        return True                                            # the text
    if q < 4:
        return False
    a, b = ((q - 4) // 12, (q - 4) // 4 % 3, (q - 4) % 4), ((k - 4) // 12, (k - 4) // 4 % 3, (k - 4) % 4)
    return all(x == y for axis, (x, y) in enumerate(zip(a, b, strict=True)) if axis != l)


def osp(q: int, k: int, h: int, l: int) -> bool:
    unit = (1, 2)[l]                                           # single patches, then groups of two, of frames of 4 x 4
    return all(a // unit % 2 == b // unit % 2 for a, b in ((q // 4 % 4, k // 4 % 4), (q % 4, k % 4)))


def sets_of(name: str) -> Callable[[int, int], bool]:
    """DSVT's sets from the paper's formula, over the voxels of each window in order."""
    axis = "xy".index(name)
    at, sets = VOXELS.tolist(), []
    for window in sorted({(a // 8, b // 8) for a, b in at}):
        mine = sorted((v for v in range(len(at)) if (at[v][0] // 8, at[v][1] // 8) == window), key=lambda v: (at[v][axis], at[v][1 - axis]))
        count = math.ceil(len(mine) / 6)
        sets += [[mine[math.floor((j * 6 + i) / (count * 6) * len(mine))] for i in range(6)] for j in range(count)]
    return lambda q, k: k in [s for s in sets if q in s][-1]


def group_of(name: str) -> list[int]:
    """FlatFormer: all voxels sorted by window, then inside it, cut in equal runs."""
    axis, shift = ("xy".index(name), 0 if name == "x" else 4)
    at = VOXELS.tolist()
    order = sorted(range(len(at)), key=lambda v: ((at[v][0] + shift) // 8, (at[v][1] + shift) // 8, at[v][axis], at[v][1 - axis]))
    return [order.index(v) // 6 for v in range(len(at))]


VOXELS = points.scattered(45, seed=3)
VOXEL_TABLES = {
    "sets_x": points.dsvt_sets(VOXELS, 8, 6, 0), "sets_y": points.dsvt_sets(VOXELS, 8, 6, 1),
    "group_x": points.flat_groups(VOXELS, 8, 6, 0), "group_y": points.flat_groups(VOXELS, 8, 6, 1, 4),
    "window": points.voxel_windows(VOXELS, 8), "shifted": points.voxel_windows(VOXELS, 8, 4),
}
SETS, GROUPS = [sets_of("x"), sets_of("y")], [group_of("x"), group_of("y")]
WHERE = VOXELS.tolist()
GRAPH = torch.tensor([[0, 5], [5, 9], [9, 2], [17, 30], [30, 31], [4, 4]])
NODE = torch.tensor([*range(32), -1, -1])
RING = {(min(e), max(e)) for e in GRAPH.tolist()}


def expander_edges(n: int, degree: int, seed: int) -> set[tuple[int, int]]:
    generator, out = torch.Generator().manual_seed(seed), set()
    for _ in range(degree // 2):
        walk = torch.randperm(n, generator=generator).tolist()
        out |= {tuple(sorted((walk[i], walk[i - 1]))) for i in range(n)}
    return out


EXPANDER = expander_edges(32, 4, 1)


def exphormer(q: int, k: int, h: int, l: int) -> bool:
    return q == k or q >= 32 or k >= 32 or tuple(sorted((q, k))) in RING or tuple(sorted((q, k))) in EXPANDER


HUB = torch.tensor([1 if i in (3, 20) else 0 for i in range(33)])
TABLE = documents._table(40)
ROW, COLUMN, QUESTION = (TABLE[n].tolist() for n in ("row", "column", "question"))
TREE = documents.tree(48, seed=2)
UNDER, ANCHOR = TREE["under"].tolist(), TREE["anchor"].tolist()
SEGMENT = torch.tensor([i // 7 for i in range(40)])
CLS = torch.tensor([int(i % 7 == 0) for i in range(40)])
PACKED = documents.packed([(6, (5, 4)), (3, (7, 2))])
PART = PACKED["part"].tolist()
DOC, UP = [0] * 8 + [1] * 6 + [2] * 9 + [3] * 5 + [4] * 7, [-1, 0, 0, 1, 2]
INSIDE = torch.tensor([[30, 3], [30, 4], [30, 9], [31, 4], [31, 5]])
MATCHES = torch.tensor([[0, 12], [12, 25], [3, 30]])


def hdt(q: int, k: int, h: int, l: int) -> bool:
    """Siblings (same parent), the own anchor, and what stands under an anchor."""
    sibling = UNDER[q] == UNDER[k] >= 0
    mine, below = ANCHOR[k] >= 0 and ANCHOR[k] == UNDER[q], ANCHOR[q] >= 0 and UNDER[k] == ANCHOR[q]
    return q == k or sibling or mine or below


def prefix(q: int, k: int, h: int, l: int) -> bool:
    """What separate sequences prompt + chosen and prompt + rejected would show, each pair for itself."""
    lines = [(0, 1), (0, 2), (3, 4), (3, 5)]
    return any(PART[q] in line and PART[k] in line for line in lines)


def rammer(q: int, k: int, h: int, l: int) -> bool:
    a, b = DOC[q], DOC[k]
    return a == b or (False, UP[a] == b, UP[b] == a, UP[a] == UP[b] >= 0)[h]


CASES: dict[str, Case] = {
    "bigbird": Case(text.bigbird(4, 1, 2, 7), 35, bigbird),
    "longformer": Case(text.longformer(8, 2), 33, lambda q, k, h, l: abs(q - k) <= 4 or q < 2 or k < 2),
    "sparse_transformer": Case(
        text.sparse_transformer(6), 37, lambda q, k, h, l: k in range(max(0, q - 5), q + 1) if h == 0 else (q - k) % 6 == 0, causal=True, heads=2),
    "sparse_transformer_fixed": Case(
        text.sparse_transformer_fixed(6, 2), 37, lambda q, k, h, l: q // 6 == k // 6 if h == 0 else k % 6 in (4, 5), causal=True, heads=2),
    "longlora": Case(text.longlora(8), 40, longlora, causal=True, heads=4),
    "sinklora": Case(text.sinklora(8, 2, 0.25), 40, lambda q, k, h, l: k < 2 or longlora(q, k, 3 if h == 3 else 0, l), causal=True, heads=4),
    "scca": Case(text.scca(8, (0, 4)), 32, scca, heads=4),
    "sda": Case(text.sda(3, (1, 2)), 30, lambda q, k, h, l: k in [q - i * (1, 2)[h] for i in range(3)], causal=True, heads=2),
    "moa": Case(
        text.moa(2, (3, 1), (0.0, 0.25)), 36, lambda q, k, h, l: k < 2 or 0 <= q - k < (3, 1 + 36 // 4)[h], causal=True, heads=2),
    "s2": Case(text.s2(4, 2, 3), 47, lambda q, k, h, l: 0 <= q // 4 - k // 4 < 2 or k // 4 % 3 == h % 3, causal=True, heads=4),
    "blockbert": Case(text.blockbert(4, (3, 1)), 32, lambda q, k, h, l: k // 8 == (q // 8 if h < 3 else (q // 8 + 1) % 4), heads=4),
    "longgen": Case(text.longgen(6, 5, 2), 29, lambda q, k, h, l: l in (2, 3) or q - k < 5 or k < 2, causal=True, layers=6),
    "masformer": Case(text.masformer((0, 2), 5), 29, lambda q, k, h, l: l in (0, 2) or q - k < 5, causal=True, layers=4),
    "mgpt": Case(
        text.mgpt(3, 2, 4), 41, lambda q, k, h, l: l == 0 or 0 <= q // 3 - k // 3 < 2 or k // 3 % 4 == 3, causal=True, layers=2),
    "lsg": Case(
        text.lsg(5, 3, 3), 52, lambda q, k, h, l: abs(q // 5 - k // 5) <= 1 or abs(q // 5 - k // 5) <= 3 and k % 3 == 0 or q == 0 or k == 0),
    "ltcontext": Case(text.ltcontext(6), 36, lambda q, k, h, l: q // 6 == k // 6 if l == 0 else q % 6 == k % 6, layers=2),
    "socialformer": Case(
        text.socialformer(3, 2, 4), 33, lambda q, k, h, l: abs(q - k) <= 3 or k in drawn(33, 2, 4, False)[q].tolist() or bool(HUB[q] or HUB[k]),
        {"hub": HUB}),
    "dinat": Case(pictures.dinat((6, 7), 3, 2), 42, dinat, layers=2),
    "favit": Case(pictures.favit((8, 8), 2, (1, 2)), 64, favit, heads=2),
    "godiva": Case(pictures.godiva((3, 3, 4), 4), 40, godiva, causal=True, layers=3),
    "tune_a_video": Case(pictures.tune_a_video((5, 2, 3)), 30, lambda q, k, h, l: k // 6 in (0, q // 6 - 1)),
    "condition_video": Case(pictures.condition_video((7, 5), 3), 35, lambda q, k, h, l: k // 5 in (0, 3, 6, q // 5)),
    "mind_animator": Case(
        pictures.mind_animator((6, 6), 2, 3), 36, lambda q, k, h, l: k // 6 in (q // 6, *drawn(6, 2, 3, True)[q // 6].tolist())),
    "efficient_vdit": Case(pictures.efficient_vdit((5, 6), (0, 3)), 30, lambda q, k, h, l: q // 6 == k // 6 or {0, 3} & {q // 6, k // 6} != set()),
    "sparse_vdit": Case(
        pictures.sparse_vdit((4, 9), 2, 5), 36,
        lambda q, k, h, l: (True, abs(q - k) <= 2, abs(q % 9 - k % 9) <= 2, k % 5 == 0)[h], heads=4),
    "osp_next": Case(pictures.osp_next((2, 4, 4), 2), 32, osp, layers=2),
    "pemf_vvto": Case(pictures.pemf_vvto(), 36, lambda q, k, h, l: q == k or [min(q, k), max(q, k)] in MATCHES.tolist(), {"matches": MATCHES}),
    "mv2d": Case(pictures.mv2d(), 33, lambda q, k, h, l: [q, k] in INSIDE.tolist(), {"inside": INSIDE}),
    "exphormer": Case(
        points.exphormer(4, 1), 34, exphormer, {"graph": GRAPH, "node": NODE, "virtual": (NODE < 0).long()}),
    "scene_graph": Case(points.scene_graph(), 32, lambda q, k, h, l: q == k or tuple(sorted((q, k))) in RING, {"graph": GRAPH}),
    "dsvt": Case(points.dsvt(), 45, lambda q, k, h, l: SETS[l](q, k), VOXEL_TABLES, layers=2),
    "flatformer": Case(points.flatformer(), 45, lambda q, k, h, l: GROUPS[l][q] == GROUPS[l][k], VOXEL_TABLES, layers=2),
    "swin3d": Case(
        points.swin3d(), 45, lambda q, k, h, l: all((x + 4 * l) // 8 == (y + 4 * l) // 8 for x, y in zip(WHERE[q], WHERE[k], strict=True)),
        VOXEL_TABLES, layers=2),
    "mate": Case(
        documents.mate(), 40,
        lambda q, k, h, l: bool(QUESTION[q] or QUESTION[k]) or (ROW[q] == ROW[k] >= 0 if h == 0 else COLUMN[q] == COLUMN[k] >= 0), TABLE, heads=2),
    "hat": Case(
        documents.hat(), 40, lambda q, k, h, l: q // 7 == k // 7 if l == 0 else q % 7 == k % 7 == 0, {"segment": SEGMENT, "cls": CLS}, layers=2),
    "hdt": Case(documents.hdt(), 48, hdt, TREE),
    "prefix_sharing": Case(documents.prefix_sharing(), 27, prefix, PACKED, causal=True),
    "rammer": Case(documents.rammer(), 35, rammer, {"doc": torch.tensor(DOC), "doc_parent": torch.tensor(UP)}, heads=4),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_pattern(name: str) -> None:
    pattern, S, rule, tables, causal, H, L = CASES[name]
    assert parse(str(pattern)) == pattern
    for layer in range(L):
        expected = torch.tensor([[[rule(q, k, h, layer) and (k <= q or not causal) for k in range(S)] for q in range(S)] for h in range(H)])
        made = pattern.block_mask(S, S, block=8, query_block=5, causal=causal, heads=H, layer=layer, tables=tables)
        assert torch.equal(made.pairs(S, S, causal).expand(1, H, S, S)[0], expected), layer


def test_every_card_has_a_case_an_example_and_its_expression() -> None:
    cards = {card.name.removeprefix("patterns/"): card for card in catalogue.CARDS if card.kind == "pattern"}
    assert set(cards) == set(CASES) == set(EXAMPLES)
    for name, card in cards.items():
        made = card.object()
        assert made.__name__ == name and card.note.split(";")[0] == str(made()), f"{name}: {made()}"
        assert card.link.startswith("https://") and 1990 < card.year < 2030


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_fit_their_length(name: str) -> None:
    one = EXAMPLES[name]
    for length in (64, 1024):
        how = {"causal": one.causal, "heads": one.heads, "tables": one.tables(length)}
        densities = [one.at(length).density(length, layer=n, **how) for n in range(one.layers)]
        assert all(0 < d <= 1 for d in densities) and sum(densities) / len(densities) < 0.7


def test_heads_of_s2_see_the_whole_prefix_between_them() -> None:
    """S2-Attention's claim: the union over heads of the shards is causal attention, while each head's is sparse."""
    S = 192
    made = text.s2(8, 1, 8).block_mask(S, S, block=8, query_block=8, heads=8).pairs(S, S, True)[0]
    assert torch.equal(made.any(0), torch.ones(S, S, dtype=torch.bool).tril())
    assert float(made.float().mean()) < 0.2 * 0.5
    assert not torch.equal(text.s2(8, 1, 8).block_mask(S, S, block=8, query_block=8, heads=7).pairs(S, S, True)[0].any(0), made.any(0))


def test_two_hops_connect_every_pair_of_a_factorised_pattern() -> None:
    """Sparse Transformer: a path of two steps joins any key to any later query; GODIVA and OSP-Next reach all in three and two."""
    for pattern in (text.sparse_transformer(8), text.sparse_transformer_fixed(8, 8)):
        a, b = pattern.block_mask(64, 64, block=8, query_block=8, heads=2).pairs(64, 64, True)[0].float()
        assert torch.equal((a @ b + b @ a) > 0, torch.ones(64, 64, dtype=torch.bool).tril())
    volume = [pictures.godiva((3, 4, 4), 1).mask(49, 49, causal=False, layer=n)[1:, 1:].float() for n in range(3)]
    assert bool((volume[2] @ volume[1] @ volume[0] > 0).all())
    skip = [pictures.osp_next((1, 8, 8), 2).mask(64, 64, causal=False, layer=n).float() for n in range(2)]
    assert bool((skip[1] @ skip[0] > 0).all())


def test_bigbird_reaches_everything_in_two_hops() -> None:
    one = text.bigbird(4, 1, 2).mask(64, 64, causal=False).float()
    assert bool((one @ one > 0).all()) and float(one.mean()) < 0.6


def test_a_socialformer_is_a_small_world() -> None:
    hub = torch.zeros(256, dtype=torch.long)
    one = text.socialformer(2, 2, 0).mask(256, 256, causal=False, tables={"hub": hub}).float()

    def hops(graph: Tensor) -> int:
        reached, n = torch.eye(256), 0
        while not bool(reached.all()):
            reached, n = ((reached @ graph) > 0).float(), n + 1
        return n

    assert float(one.sum(1).mean()) < 8 and hops(one) <= 8
    near = (torch.arange(256)[:, None] - torch.arange(256)).abs() <= 4
    assert hops(near.float()) == 64                            # as many ties, none of them remote


def test_dsvt_sets_are_of_equal_size_and_leave_nobody_out() -> None:
    for axis in (0, 1):
        sets = points.dsvt_sets(VOXELS, 8, 6, axis)
        assert sets.shape[1] == 6 and set(sets.flatten().tolist()) == set(range(45))
        assert all(len({tuple(x // 8 for x in WHERE[v]) for v in one}) == 1 for one in sets.tolist())


def test_positions_of_answers_go_on_after_their_prompt() -> None:
    got = documents.answer_positions(PACKED["part"], PACKED["part_parent"]).tolist()
    assert got == [*range(6), *range(6, 11), *range(6, 10), *range(3), *range(3, 10), *range(3, 5)]
    with pytest.raises(BadInput, match="later part"):
        documents.answer_positions(torch.tensor([0, 1]), torch.tensor([1, -1]))
    with pytest.raises(BadInput, match="at least 1"):
        documents.packed([(0, (2, 3))])


@pytest.mark.parametrize("make, message", [
    (lambda: text.sinklora(8, 2, 0.3), "shifted=0.3"), (lambda: text.moa(2, (1, 2), (0.1,)), "one each a head group"),
    (lambda: text.blockbert(4, (3, 1, 2)), "two numbers"), (lambda: text.longformer(8, 10**9), "first=1000000000"),
    (lambda: pictures.osp_next((4, 4)), "frames, rows, columns"),
    (lambda: points.voxel_windows(torch.rand(4, 2), 4), "whole numbers"), (lambda: parse("bigbird(0)"), "'bigbird\\(0\\)'.*blocks=0"),
])
def test_bad_sizes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()
