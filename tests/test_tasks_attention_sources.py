"""Which package is a file from: pieces, masks against their definitions, and readers that need to look as far as the evidence is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rarefy.builtin.corpus import Document
from rarefy.errors import BadInput
from rarefy.tasks.sources import KINDS, Reader, Sources, documents_of, reading_accuracy, reading_mask, train_reader


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
        reader.out[-1].register_forward_hook(partial(note, seen))
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
