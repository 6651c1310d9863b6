"""Rows of Python source with everything that the judges of dictionaries ask of them, read once.

Shape letters: B = windows, T = tokens, N = rows, C = concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .concepts import CONCEPTS, label, spans_of
from .disentangle import Attribute

SENSES: dict[str, tuple[str, ...]] = {
    "attribute": ("attribute",), "parameter": ("parameter",), "import": ("imported module", "imported name"),
    "keyword argument": ("keyword argument",),
}
PARENTS = ("name", "keyword", "string", "builtin name", "inside brackets", "import line")
"""Concepts that contain others: keyword > keyword def, string > docstring, builtin name > exception name, ..."""
KINDS = ("string", "comment", "number", "keyword", "name", "open paren", "dot", "comma", "line break", "assign")
"""Kinds of token of which none is another's: what targeted perturbation tells apart."""
ROLES = ("attribute", "parameter", "function called", "keyword argument", "imported name", "assignment target")
CASES = ("snake_case name", "CamelCase name", "UPPER_CASE name")
_LETTERS = 6


@dataclass(frozen=True)
class PythonRows:
    """N tokens of packed batches, in order, with labels. Only tokens that were asked for and whose file is Python."""

    at_N: Tensor
    """Place among all tokens of the batches, flattened one batch after another."""
    doc_N: Tensor
    side_N: Tensor
    """int8: documents alternate between 0 and 1, within each package."""
    concept_NC: Tensor
    """[N, len(CONCEPTS)] bool."""
    letter_N: Tensor
    """0..25, the first letter of the name that begins at the token; -1 where none does or it begins with another character."""
    word_N: Tensor
    """Number in `words` of the name that ends at the token; -1 where none does."""
    words: list[str]
    packages: list[str]
    """Of each document, by its number; "" for those left out."""

    def of(self, *names: str) -> Tensor:
        """[N, len(names)] bool columns of concepts."""
        return self.concept_NC[:, [CONCEPTS.index(n) for n in names]]

    @property
    def sense_N(self) -> Tensor:
        """0.. number in SENSES of what the name that ends at the token is used as; -1 for none or several."""
        has_NS = torch.stack([self.of(*names).any(1) for names in SENSES.values()], 1)
        return torch.where((has_NS.sum(1) == 1) & (self.word_N >= 0), has_NS.float().argmax(1), -1)

    def common(self, least: int, documents: int = 5) -> list[str]:
        """Concepts with at least `least` rows in at least `documents` documents, and as many without, on either side."""
        out = []
        for c, name in enumerate(CONCEPTS):
            y_N = self.concept_NC[:, c]
            sides = [(y_N[self.side_N == s], self.doc_N[self.side_N == s]) for s in (0, 1)]
            if all(int(y.sum()) >= least and int((~y).sum()) >= least and len(doc[y].unique()) >= documents for y, doc in sides):
                out.append(name)
        return out

    def letters(self, least: int) -> Tensor:
        """Letters that begin at least `least` names on either side."""
        counts = [torch.bincount(self.letter_N[(self.side_N == s) & (self.letter_N >= 0)].long(), minlength=26) for s in (0, 1)]
        return (torch.minimum(*counts) >= least).nonzero()[:, 0]

    def attributes(self) -> list[Attribute]:
        """Properties of a name, at its first token: role, brackets around it, spelling, first letter."""
        begins_N = self.letter_N >= 0
        depth_N = self.of("inside brackets", "inside two brackets").sum(1)
        frequent = torch.bincount(self.letter_N[begins_N].long(), minlength=26).topk(_LETTERS).indices.sort().values
        hit_NL = self.letter_N[:, None] == frequent
        letter_N = torch.where(hit_NL.any(1), hit_NL.float().argmax(1), -1)
        made = [("role", _exclusive(self.of(*ROLES))), ("brackets", depth_N), ("spelling", _exclusive(self.of(*CASES))), ("letter", letter_N)]
        out = []
        for name, value_N in made:
            value_N = torch.where(begins_N, value_N, -1)
            there = [v for v in value_N[value_N >= 0].unique().tolist() if all(int((value_N[self.side_N == s] == v).sum()) >= 10 for s in (0, 1))]
            new_N = torch.full_like(value_N, -1)
            for number, v in enumerate(there):
                new_N[value_N == v] = number
            if len(there) > 1:
                out.append(Attribute(name, new_N, len(there)))
        return out


def _exclusive(has_NV: Tensor) -> Tensor:
    """0 for none of V, 1.. for exactly one of them, -1 for several."""
    count_N = has_NV.sum(1)
    return torch.where(count_N == 0, 0, torch.where(count_N == 1, has_NV.float().argmax(1) + 1, -1))


def package_of(name: str) -> str:
    """First part of a document's path below its root: "stdlib/asyncio/base.py" -> "asyncio"; a module of its own for itself."""
    return name.removeprefix("stdlib/").partition("/")[0].removesuffix(".py")


def python_rows(batches: Sequence[Any], docs: Sequence[Any], keep: Sequence[Tensor]) -> PythonRows:
    """Label tokens of packed batches.

    Args:
        batches: with `.input_ids`, `.doc` and `.offsets` as `builtin.corpus.Batch`. docs: in the order of their numbers.
        keep: per batch [B, T] bool, tokens that count.

    Raises:
        BadInput: no document is Python source, or only one.
    """
    doc_L, keep_L = torch.cat([b.doc.flatten() for b in batches]), torch.cat([k.flatten() for k in keep])
    offset_L2 = torch.cat([b.offsets.flatten(0, 1) for b in batches])
    words: dict[str, int] = {}
    turns: dict[str, int] = {}
    packages, parts = [""] * len(docs), []
    for number, document in enumerate(docs):
        at_R = (doc_L == number).nonzero()[:, 0]
        found = label(document.text, offset_L2[at_R]) if len(at_R) else None
        if found is None:
            continue
        packages[number] = package_of(document.name)
        letter_R, word_R = _names(document.text, offset_L2[at_R], words)
        side = turns.get(packages[number], len(turns) % 2)      # packages of one document alternate too
        turns[packages[number]] = 1 - side
        kept = keep_L[at_R]
        concept_RC = torch.stack([found[name] for name in CONCEPTS], 1)
        parts.append((at_R[kept], torch.full((int(kept.sum()),), side, dtype=torch.int8), concept_RC[kept], letter_R[kept], word_R[kept]))
    if len(parts) < 2:
        raise BadInput(f"{len(parts)} of {len(docs)} documents are Python source; judging on concepts of Python needs two or more: --data stdlib")
    at_N, side_N, concept_NC, letter_N, word_N = (torch.cat(p) for p in zip(*parts, strict=True))
    order = at_N.argsort()
    return PythonRows(at_N[order], doc_L[at_N[order]], side_N[order], concept_NC[order], letter_N[order], word_N[order], list(words), packages)


def _names(text: str, offset_T2: Tensor, words: dict[str, int]) -> tuple[Tensor, Tensor]:
    """[T] first letter of the name that begins at each token, and [T] number of the name that ends there."""
    found = spans_of(text) or {"name": []}
    begins = {start: text[start].lower() for start, _ in found["name"]}
    ends = {end - 1: text[start:end] for start, end in found["name"]}
    letter_T, word_T = torch.full((len(offset_T2),), -1), torch.full((len(offset_T2),), -1)
    for t, (a, b) in enumerate(offset_T2.tolist()):
        bare = a + len(text[a:b]) - len(text[a:b].lstrip())
        first = begins.get(bare, "") if bare < b else ""
        if first and "a" <= first <= "z":
            letter_T[t] = ord(first) - ord("a")
        last = a + len(text[a:b].rstrip()) - 1
        if last >= bare and last in ends:
            word_T[t] = words.setdefault(ends[last], len(words))
    return letter_T, word_T
