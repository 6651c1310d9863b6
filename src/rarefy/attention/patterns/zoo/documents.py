"""Patterns of tables, documents, threads and packed answers: who sees whom follows from what the tokens belong to.

Shape letters: L = positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....errors import BadInput
from ..lifts import heads, layers
from ..pattern import Pattern
from ..relations import ancestor, child, key_is, match, parent, query_is, same, sibling
from ..words import own, word
from .example import Example, labels, pieces


@word
def mate() -> Pattern:
    """MATE (Eisenschlos et al. 2021, arXiv 2109.04312): half the heads see the own row, half the own column; global "question" tokens.

    Reads "row" and "column" (-1 outside the table) and "question" (1 for its tokens).
    """
    return heads(same("row"), same("column")) | key_is("question") | query_is("question")


@word
def hat() -> Pattern:
    """HAT (Chalkidis et al. 2022, arXiv 2210.05529), interleaved: layers within "segment", in turn with layers among the segments' "cls" tokens.

    In the layers across segments other tokens have no key: their states pass by, as the paper's do.
    """
    return layers(same("segment"), query_is("cls") & key_is("cls"))


@word
def hdt() -> Pattern:
    """HDT (He et al. 2024, arXiv 2407.08330): tokens and anchors see those under the same anchor, their own anchor, and what is under them.

    Reads "under" (number of the anchor a position stands under, -1 for the document's) and "anchor" (an anchor's own number, -1 for tokens).
    """
    return same("under") | match("under", "anchor") | match("anchor", "under") | own()


@word
def prefix_sharing() -> Pattern:
    """Prefix sharing for preference pairs (Wang, Hegde 2024, arXiv 2410.20305): causal; an answer sees itself and its prompt, not the other.

    Reads "part" (prompt, chosen, rejected, ... of every pair, numbered) and "part_parent" (an answer's prompt, -1 for prompts).
    Any tree of shared prefixes does, deeper ones too; positions of an answer begin again after its prompt (`answer_positions`).
    """
    return same("part") | ancestor("part")


@word
def rammer() -> Pattern:
    """Rammer (Li et al. 2023, arXiv 2305.01498): heads for the own document, the one it answers, its answers, and others that answer the same.

    Each sees the own document too, so that no token is left without a key. Reads "doc" and "doc_parent".
    """
    return heads(same("doc"), same("doc") | parent("doc"), same("doc") | child("doc"), same("doc") | sibling("doc"))


def packed(pairs: Sequence[tuple[int, Sequence[int]]]) -> Mapping[str, Tensor]:
    """"part" and "part_parent" for `prefix_sharing` of packed prompts, each (prompt length, answers' lengths).

    Raises:
        BadInput: a length below 1.
    """
    sizes, parents = [], []
    for prompt, answers in pairs:
        parents += [-1, *[len(sizes)] * len(answers)]
        sizes += [prompt, *answers]
    if not sizes or min(sizes) < 1:
        raise BadInput(f"lengths of prompts and answers must be at least 1, not {pairs}")
    return {"part": labels(sizes), "part_parent": torch.tensor(parents)}


def answer_positions(part: Tensor, part_parent: Tensor) -> Tensor:
    """[L] position ids: every part goes on where its prefix ends."""
    sizes = part.bincount(minlength=len(part_parent))
    begin: list[int] = []
    for n, up in enumerate(part_parent.tolist()):
        if up >= n:
            raise BadInput(f"part {n} has the later part {up} for its prefix; a prefix comes first")
        begin.append(0 if up < 0 else begin[up] + int(sizes[up]))
    within = torch.arange(len(part)) - (sizes.cumsum(0) - sizes)[part]
    return torch.tensor(begin)[part] + within


def _table(length: int) -> Mapping[str, Tensor]:
    question, columns = max(4, length // 16), 6
    cell = torch.arange(length - question) // 2
    outside = torch.full((question,), -1)
    return {
        "row": torch.cat([outside, cell // columns]), "column": torch.cat([outside, cell % columns]),
        "question": (torch.arange(length) < question).long(),
    }


def _segments(length: int) -> Mapping[str, Tensor]:
    size = max(8, round(length**0.5))
    at = torch.arange(length)
    return {"segment": at // size, "cls": (at % size == 0).long()}


def tree(length: int, seed: int = 0) -> Mapping[str, Tensor]:
    """"under" and "anchor" of a document of sections of sentences, anchors first; made up."""
    generator = torch.Generator().manual_seed(seed)
    under, anchor, section = [-1], [0], -1
    while len(under) < length:
        if section < 0 or int(torch.randint(4, (1,), generator=generator)) == 0:
            section = len(under)
            under.append(0)
            anchor.append(section)
        sentence = len(under)
        under.append(section)
        anchor.append(sentence)
        words = int(torch.randint(3, 9, (1,), generator=generator))
        under += [sentence] * words
        anchor += [-1] * words
    return {"under": torch.tensor(under[:length]), "anchor": torch.tensor(anchor[:length])}


def _pairs(length: int) -> Mapping[str, Tensor]:
    half = length // 2
    rest = length - half
    return packed([(half // 2, (half // 4, half - half // 2 - half // 4)), (rest // 3, (rest // 4, rest - rest // 3 - rest // 4))])


def _thread(length: int) -> Mapping[str, Tensor]:
    sizes = pieces(length, max(4, length // 16), max(6, length // 8))
    up = torch.tensor([-1 if n == 0 else (n - 1) // 2 for n in range(len(sizes))])
    return {"doc": labels(sizes), "doc_parent": up}


EXAMPLES = (
    Example("mate", lambda n: mate(), _table, causal=False, heads=2),
    Example("hat", lambda n: hat(), _segments, causal=False, layers=2),
    Example("hdt", lambda n: hdt(), tree, causal=False),
    Example("prefix_sharing", lambda n: prefix_sharing(), _pairs),
    Example("rammer", lambda n: rammer(), _thread, causal=False, heads=4),
)
