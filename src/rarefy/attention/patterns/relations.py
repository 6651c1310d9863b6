"""Words of labels and lists: metadata of tokens, trees of documents, edges, random graphs, sets.

Metadata comes in tensors bound by name (`method.bind(row=...)`); a negative entry means that a token has none.

Shape letters: L = positions, E = pairs, S = sets, K = members of a set, r = random keys a query.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import BadInput
from ...method import positive
from .atoms import Listed, Marked, Related
from .grid import Need, Scene
from .lifts import by, named
from .pattern import Lift, Pattern
from .words import own, said, whole, word


@word
def same(name: str) -> Pattern:
    """Keys with the query's label: the same row, column, segment, document, speaker."""
    out = by(name, own())
    out.text = said("same", name)
    return out


@word
def match(query: str, key: str) -> Pattern:
    """Keys whose label in one table is the query's in another: `match("under", "anchor")` is a token's own anchor."""
    text = said("match", named(query), named(key))
    return Lift(
        text, own(), lambda q, scene: scene.table(query, text)[q], lambda scene: None, lambda part: match(query, key),
        (Need(query, 1, True), Need(key, 1, True)), key_to=lambda k, scene: scene.table(key, text)[k],
    )


@word
def key_is(name: str, value: int = 1) -> Pattern:
    """Keys whose label is `value`, for every query."""
    return _labelled("key_is", name, value, "key")


@word
def query_is(name: str, value: int = 1) -> Pattern:
    """Queries whose label is `value` see every key."""
    return _labelled("query_is", name, value, "query")


def _labelled(word: str, name: str, value: int, side: str) -> Pattern:
    named(name)
    whole("value", value)
    text = said(word, name, value=(value, 1))
    return Marked(text, lambda x, scene: scene.table(name, text)[x] == value, side, (Need(name, 1, True),))


def _tree(word: str, name: str, relate: Callable[[Tensor], Tensor]) -> Lift:
    """Labels related by their places in a tree, whose parents stand in the table `<name>_parent`, negative at a root."""
    named(name)
    text, table = said(word, name), f"{name}_parent"

    def matrix(scene: Scene) -> Tensor:
        parent = scene.table(table, text)
        if bool((parent >= len(parent)).any()):
            raise BadInput(f"{table!r} names parent {int(parent.max())}, but there are {len(parent)} labels")
        up = torch.zeros(len(parent), len(parent), dtype=torch.bool)
        child = (parent >= 0).nonzero()[:, 0]
        up[child, parent[child]] = True
        return relate(up)

    out = by(name, Related(text, matrix, (Need(table, 1, False),)))
    out.text = text
    return out


def _closed(up: Tensor) -> Tensor:
    """Every ancestor of each label."""
    out, step = up, up
    for _ in range(len(up)):
        step = (step.float() @ up.float()) > 0
        if not bool(step.any()):
            return out
        out = out | step
    raise BadInput("the tree of labels has a circle: some label is its own ancestor")


@word
def parent(name: str) -> Pattern:
    """Keys of the parent of the query's document (or post, or section)."""
    return _tree("parent", name, lambda up: up)


@word
def child(name: str) -> Pattern:
    """Keys of the children of the query's document."""
    return _tree("child", name, lambda up: up.T)


@word
def sibling(name: str) -> Pattern:
    """Keys of other documents with the same parent."""
    return _tree("sibling", name, lambda up: (up.float() @ up.T.float() > 0) & ~torch.eye(len(up), dtype=torch.bool))


@word
def ancestor(name: str) -> Pattern:
    """Keys of the parent, its parent, and so on."""
    return _tree("ancestor", name, _closed)


@word
def relation(name: str, matrix: str) -> Pattern:
    """Keys whose label a bound [labels, labels] matrix relates to the query's."""
    named(name)
    named(matrix)
    text = said("relation", name, matrix)
    out = by(name, Related(text, lambda scene: scene.table(matrix, text) != 0, (Need(matrix, 2, False),)))
    out.text = text
    return out


@word
def permutation(*to: int) -> Pattern:
    """Query i sees key to[i]; meant for few parts, `parts(4, permutation(1, 2, 3, 0))` (BlockBERT)."""
    if sorted(to) != list(range(len(to))) or not to:
        raise BadInput(f"permutation{to} must name each of 0..{max(len(to) - 1, 0)} once")

    def matrix(scene: Scene) -> Tensor:
        out = torch.zeros(len(to), len(to), dtype=torch.bool)
        out[torch.arange(len(to)), torch.tensor(to)] = True
        return out

    return Related(said("permutation", *to), matrix)


@word
def edges(name: str, both: bool = False) -> Pattern:
    """Pairs of a bound list [E, 2] of (query, key); `both` adds every pair the other way round."""
    named(name)
    text = said("edges", name, both=(both, False))

    def pairs(scene: Scene) -> Tensor:
        given = scene.table(name, text)
        return torch.cat([given, given.flip(1)]) if both else given

    def keys(at: int, scene: Scene) -> Tensor:
        given = scene.table(name, text)
        one = given[given[:, 0] == at, 1]
        return torch.cat([one, given[given[:, 1] == at, 0]]) if both else one

    return Listed(text, pairs, (Need(name, 2, False),), keys)


@word
def members(name: str) -> Pattern:
    """Keys listed in the query's set, of bound sets [S, K] of positions (-1: no member).

    A position listed in several sets asks in the last of them and is a key in all, as where sets of equal size are
    filled up by listing some members twice (DSVT).
    """
    named(name)
    text = said("members", name)

    def pairs(scene: Scene) -> Tensor:
        sets_SK = scene.table(name, text)
        if not sets_SK.numel():
            return torch.zeros(0, 2, dtype=torch.long)
        home = torch.full((max(1, int(sets_SK.max()) + 1),), -1)
        at = torch.arange(len(sets_SK))[:, None].expand_as(sets_SK)
        home = home.scatter_reduce_(0, sets_SK.clamp_min(0).flatten(), torch.where(sets_SK >= 0, at, -1).flatten(), "amax")
        query = (home >= 0).nonzero()[:, 0]
        return torch.stack([query[:, None].expand(-1, sets_SK.shape[1]), sets_SK[home[query]]], -1).flatten(0, 1)

    return Listed(text, pairs, (Need(name, 2, False),))


def mixed(x: Tensor) -> Tensor:
    """A hash of int64 to 0 .. 2^62 - 1 (splitmix64's finaliser)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x & ((1 << 62) - 1)


def _draws(at_X: Tensor, among_X: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """(draw, last) [X, r]: the i-th number drawn for each query from 0 .. last, which grows by one each time."""
    i = torch.arange(r)
    last = torch.where(among_X >= r, among_X - r, 0)[:, None] + i
    return mixed(mixed(at_X + mixed(torch.tensor(seed)))[:, None] + i) % (last + 1), last


@lru_cache(maxsize=8)
def drawn(L: int, r: int, seed: int, past: bool) -> Tensor:
    """[L, r] different keys for each query, uniform among all L or those before it; -1 where there are too few.

    Floyd's way: draw among one more each time; what is drawn twice is replaced by the newest.
    """
    at = torch.arange(L)
    among = at if past else torch.full_like(at, L)
    out = torch.full((r, L), -1)
    for i, (draw, last) in enumerate(zip(*(x.T.contiguous() for x in _draws(at, among, r, seed)), strict=True)):
        taken = (out[:i] == draw).any(0)
        out[i] = torch.where(i < among, torch.where(taken, last, draw), -1)
    return out.T.contiguous()


def drawn_for(at: int, L: int, r: int, seed: int, past: bool) -> Tensor:
    """`drawn` of one query alone, without the places that stay empty."""
    among, out = at if past else L, dict[int, None]()
    draws, lasts = (x[0].tolist() for x in _draws(torch.tensor([at]), torch.tensor([among]), r, seed))
    for draw, last in zip(draws[:among], lasts[:among], strict=True):
        out[last if draw in out else draw] = None
    return torch.tensor(list(out), dtype=torch.long)


@word
def random(r: int, seed: int = 0, past: bool = False) -> Pattern:
    """r different keys for each query, drawn by seed (BigBird, arXiv 2007.14062).

    Args:
        past: draw among the keys before the query; each query's draw then does not depend on the length, as decoding needs.
    """
    positive("random", r)
    whole("seed", seed, 0)
    text = said("random", r, seed=(seed, 0), past=(past, False))

    def pairs(scene: Scene) -> Tensor:
        key = drawn(scene.size(text), min(r, scene.size(text)), seed, bool(past))
        return torch.stack([torch.arange(len(key))[:, None].expand_as(key), key], -1).flatten(0, 1)

    def keys(at: int, scene: Scene) -> Tensor:
        return drawn_for(at, scene.size(text), min(r, scene.size(text)), seed, bool(past))

    return Listed(text, pairs, keys=keys)


@word
def expander(degree: int, seed: int = 0) -> Pattern:
    """A random regular graph: degree / 2 permutations, each walked both ways (Exphormer, arXiv 2303.06147)."""
    positive("expander", degree)
    if degree % 2:
        raise BadInput(f"expander={degree} must be even: each permutation gives every node two neighbours")
    whole("seed", seed, 0)
    text = said("expander", degree, seed=(seed, 0))

    def cycles(scene: Scene) -> list[Tensor]:
        generator, L = torch.Generator().manual_seed(seed), scene.size(text)
        return [torch.randperm(L, generator=generator) for _ in range(degree // 2)]

    def pairs(scene: Scene) -> Tensor:
        one_way = torch.cat([torch.stack([a, a.roll(-1)], 1) for a in cycles(scene)])
        return torch.cat([one_way, one_way.flip(1)])

    def keys(at: int, scene: Scene) -> Tensor:
        made = cycles(scene)
        return torch.cat([a[(a == at).nonzero()[:, 0] + torch.tensor([-1, 1 - len(a)])] for a in made])

    return Listed(text, pairs, keys=keys)
