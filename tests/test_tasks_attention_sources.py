"""Which package is a file from: pieces, masks against their definitions, and readers that need to look as far as the evidence is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rarefy.builtin.corpus import Document
from rarefy.errors import BadInput
from rarefy.tasks.sources import (
    KINDS,
    POOLS,
    Reader,
    SegmentReader,
    Sources,
    documents_of,
    reading_accuracy,
    reading_mask,
    scattered,
    segments_of,
    train_reader,
)


class Words:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}


def test_pieces_are_cut_from_files_that_lie_on_one_side() -> None:
    text = "import secret\n{}\nfrom secret import secret\n"
    docs = [Document(f"stdlib/{p}/m{i}.py", text.format(p * 5) + f"x{i}" * 10) for p in ("aa", "bb") for i in range(8)]
    got = documents_of(docs, Words(), 10, packages=("aa", "bb"), most=7)
    assert got.ids_BT.shape[1] == 10 and got.packages == ("aa", "bb")
    for label in (0, 1):
        for side in (False, True):
            assert 1 <= int(((got.label_B == label) & (got.held_B == side)).sum()) <= 7
    for file in got.file_B.unique():
        assert len(got.held_B[got.file_B == file].unique()) == 1 and len(got.label_B[got.file_B == file].unique()) == 1
    assert "secret" not in "".join(chr(t) for t in got.ids_BT.flatten().tolist())
    with pytest.raises(BadInput, match="'cc'"):
        documents_of(docs, Words(), 10, packages=("cc",))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_masks_follow_their_definition(kind: str) -> None:
    T, window, marks = 20, 6, 2
    got = reading_mask(kind, T, window=window, marks=marks)
    for i in range(T):
        for j in range(T):
            near, mark = abs(i - j) <= 3, {i, j} & {0, 10}
            first = i % 6 == 0 and j % 6 == 0
            want = {"full": True, "window": near, "global": near or bool(mark), "hierarchical": i // 6 == j // 6 or first}[kind]
            assert bool(got[i, j]) == want, (i, j)
    with pytest.raises(BadInput, match="no attention 'bag'"):
        reading_mask("bag", 4)


def note(seen: list[torch.Tensor], module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    seen.append(output[0, 12])


def test_a_reader_sees_no_further_than_its_mask() -> None:
    """Two layers of a window of 8 reach 8 tokens: what changes further off leaves a token alone; a global token carries it over."""
    vectors = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 40, dtype=torch.long)
    other = ids.clone()
    other[0, 35] = 3
    moved = {}
    for kind in ("window", "global", "hierarchical", "full"):
        seen: list[torch.Tensor] = []
        reader = Reader(vectors, 3, kind, length=40, window=8).eval()
        reader.layers[-1].out.register_forward_hook(partial(note, seen))
        with torch.no_grad():
            for given in (ids, other):
                reader(given)
        moved[kind] = not torch.equal(*seen)
    assert moved == {"window": False, "global": True, "hierarchical": False, "full": True}


def test_accuracy_is_over_files_and_training_learns_what_can_be_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(60) % 2
    ids = torch.randint(4, 10, (60, 32), generator=generator)
    ids[torch.arange(60), torch.randint(32, (60,), generator=generator)] = label         # one token tells, anywhere
    made = Sources(ids, label, torch.arange(60) // 2, torch.arange(60) >= 40, ("a", "b"))
    reader = train_reader(Reader(torch.eye(10), 2, "full", length=32, window=8, width=16), made, steps=150)
    assert reading_accuracy(reader, made).mean > 0.9
    wrong = torch.nn.Linear(1, 1)
    wrong.forward = lambda ids: torch.eye(2)[torch.ones(len(ids), dtype=torch.long)]       # type: ignore[method-assign]
    assert reading_accuracy(wrong, made).mean == 0.5
    with pytest.raises(BadInput, match="no reader 'x'"):
        Reader(torch.eye(3), 2, "x", length=4)


@pytest.mark.parametrize("gap", [1, 7, 19])
def test_scattered_evidence_tells_the_class_together_only(gap):
    made = scattered(400, 20, gap=gap, kinds=3, words=5)
    apart = []
    for row, label in zip(made.ids_BT.tolist(), made.label_B.tolist(), strict=True):
        a, b = [n for n, x in enumerate(row) if x < 3], [n for n, x in enumerate(row) if 3 <= x < 6]
        assert len(a) == len(b) == 1 and max(row) < 11 and (row[a[0]] + row[b[0]]) % 3 == label
        apart.append(b[0] - a[0])
    assert min(map(abs, apart)) == gap and (min(apart) < 0 < max(apart)) and max(map(abs, apart)) == 19
    for word in range(3):                                             # one piece alone leaves all classes open
        assert len(made.label_B[(made.ids_BT == word).any(1)].unique()) == 3
    with pytest.raises(BadInput, match="20 apart in 20"):
        scattered(4, 20, gap=20)
    with pytest.raises(BadInput, match="kinds=1"):
        scattered(4, 20, gap=2, kinds=1)


@pytest.mark.parametrize(("length", "segment", "overlap"), [(20, 8, 0), (20, 8, 4), (5, 8, 2), (16, 8, 0), (21, 8, 7)])
def test_segments_reach_every_token_and_share_what_they_say(length, segment, overlap):
    at, there = segments_of(length, segment, overlap)
    rows = [[x for x, real in zip(row, mask, strict=True) if real] for row, mask in zip(at.tolist(), there.tolist(), strict=True)]
    assert sorted({x for row in rows for x in row}) == list(range(length)) and int(at.max()) < length
    for before, after in zip(rows, rows[1:], strict=False):
        assert len(set(before) & set(after)) == min(overlap, len(after)) and after[-1] > before[-1]


@pytest.mark.parametrize("pool", POOLS)
def test_a_segment_reader_pools_real_tokens_and_meets_across_segments(pool):
    vectors = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    reader = SegmentReader(vectors, 3, length=10, segment=4, overlap=1, pool=pool, width=8, heads=2).eval()
    ids = torch.randint(10, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = reader.enter(vectors[ids]) + reader.place_TD
        pooled = []
        for start in (0, 3, 6):                                       # tokens 0-3, 3-6, 6-9
            inside = reader.inside(x[:, start : start + 4], None)
            score = reader.weigh(inside).softmax(1)
            pooled.append({"first": inside[:, 0], "mean": inside.mean(1), "max": inside.amax(1), "attentive": (score * inside).sum(1)}[pool])
        want = reader.leave(torch.relu(reader.across(torch.stack(pooled, 1), None)).mean(1))
        torch.testing.assert_close(reader(ids), want)
        short = SegmentReader(vectors, 3, length=6, segment=4, pool=pool, width=8, heads=2)       # the last segment has two tokens
        states = short.enter(vectors[ids[:, :6]]) + short.place_TD
        parts = [short.inside(states[:, a:b], None) for a, b in ((0, 4), (4, 6))]
        score = [short.weigh(part).softmax(1) for part in parts]
        pooled = [{"first": p[:, 0], "mean": p.mean(1), "max": p.amax(1), "attentive": (s * p).sum(1)}[pool]
                  for p, s in zip(parts, score, strict=True)]
        torch.testing.assert_close(short(ids[:, :6]), short.leave(torch.relu(short.across(torch.stack(pooled, 1), None)).mean(1)))
    for wrong in ({"pool": "x"}, {"overlap": 4}, {"segment": 0}):
        with pytest.raises(BadInput):
            SegmentReader(vectors, 3, **{"length": 10, "segment": 4, **wrong})


def test_several_readers_are_judged_over_files_together():
    made = Sources(torch.zeros(4, 1, dtype=torch.long), torch.tensor([0, 0, 1, 1]), torch.arange(4), torch.ones(4, dtype=torch.bool), ("a", "b"))
    says = []
    for answer in (0, 1, 1):
        one = torch.nn.Linear(1, 1)
        one.forward = lambda ids, answer=answer: torch.eye(2)[torch.full((len(ids),), answer)]       # type: ignore[method-assign]
        says.append(one)
    got = reading_accuracy(says, made)
    assert got.mean == 0.5 and got.low < 0.5 < got.high
    assert reading_accuracy(says[:1], made).mean == 0.5


@pytest.mark.slow
def test_scattered_evidence_is_found_by_all_attention_and_by_no_window():
    made, vectors = scattered(2000, 48, gap=24, words=1), torch.eye(5)
    share = {}
    for kind in ("full", "window"):
        reader = train_reader(Reader(vectors, 2, kind, length=48, window=8), made, steps=800)
        share[kind] = reading_accuracy(reader, made).mean
    assert share["full"] > 0.9 and share["window"] < 0.65
