"""Documents as trees of sections of sentences of tokens, from real text; anchors are put in where something begins (HDT, arXiv 2407.08330).

Python source is cut by its grammar: what is at the top level of a module by class and function, those by statement. Any other text is cut by
paragraphs and lines. Every character stays: joined, the sentences are the text.

Shape letters: B = documents, L = positions, anchors among them.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput

LEVELS = ("document", "section", "sentence", "token")
DOCUMENT, SECTION, SENTENCE, TOKEN, NOTHING = range(5)
_LINE = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
"""Where the grammar begins a line; `splitlines` would at form feeds too."""
_BEGINS = re.compile(r"(?:async\s+def|def|class)\b|@")


@dataclass(frozen=True)
class Tree:
    """A document, or with [B, L] tensors several, laid out with its anchors: each stands before what is under it."""

    ids: Tensor
    """Token ids; -1 at anchors, -2 at what fills up the shorter of several documents."""
    level: Tensor
    """DOCUMENT, SECTION, SENTENCE, TOKEN; NOTHING at what fills up."""
    under: Tensor
    """Number of the anchor that a position stands under, -1 for the document's."""
    anchor: Tensor
    """An anchor's own number, -1 for tokens."""
    rank: Tensor
    """How many came before it under the same anchor."""

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """What the pattern `hdt()` reads."""
        return {"under": self.under, "anchor": self.anchor}

    def __len__(self) -> int:
        return self.ids.shape[-1]


def tree(sections: Sequence[Sequence[Sequence[int]]]) -> Tree:
    """The tree of token ids in sentences in sections; empty sentences and sections are left out.

    Raises:
        BadInput: no token at all.
    """
    rows: list[tuple[int, int, int, int, int]] = [(-1, DOCUMENT, -1, 0, 0)]
    count, section_rank = 1, 0
    for section in sections:
        full = [sentence for sentence in section if len(sentence)]
        if not full:
            continue
        mine, count = count, count + 1
        rows.append((-1, SECTION, 0, mine, section_rank))
        section_rank += 1
        for rank, sentence in enumerate(full):
            rows.append((-1, SENTENCE, mine, count, rank))
            rows += [(int(token), TOKEN, count, -1, n) for n, token in enumerate(sentence)]
            count += 1
    if len(rows) == 1:
        raise BadInput("a document of no tokens has no tree")
    return Tree(*torch.tensor(rows).T.contiguous())


def together(trees: Sequence[Tree], length: int | None = None) -> Tree:
    """Several documents as one batch, filled up to the longest or cut and filled to `length`."""
    if not trees:
        raise BadInput("no trees to put together")
    L = max(len(one) for one in trees) if length is None else length
    fill = {"ids": -2, "level": NOTHING, "under": -1, "anchor": -1, "rank": 0}
    out = {name: torch.full((len(trees), L), value) for name, value in fill.items()}
    for b, one in enumerate(trees):
        for name in fill:
            part = getattr(one, name)[:L]
            out[name][b, : len(part)] = part
    return Tree(**out)


def python_sections(text: str) -> list[list[str]]:
    """Sections of statements: classes and functions at the top level, and what stands between two of them.

    A compound statement's head is a statement of its own, and so is each statement of its body. Text that does not parse (a piece cut out of
    a file) is cut by lines instead, with sections where a line at the left margin begins a class or function or the code after one.
    """
    lines = [line for line in _LINE.split(text) if line]
    try:
        with warnings.catch_warnings():                 # such as of escapes, which are the file's own business
            warnings.simplefilter("ignore")
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        starts, tops = _by_lines(lines)
    else:
        starts = {_first(node) for node in ast.walk(module) if isinstance(node, ast.stmt)}
        tops, before = {0}, False
        for node in module.body:
            defines = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if defines or before:
                tops.add(_first(node))
            before = defines
    sections: list[list[str]] = []
    for n, line in enumerate(lines):
        if n in tops or not sections:
            sections.append([line])
        elif n in starts:
            sections[-1].append(line)
        else:
            sections[-1][-1] += line
    return sections


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1


def _by_lines(lines: Sequence[str]) -> tuple[set[int], set[int]]:
    starts = {n for n, line in enumerate(lines) if line.strip()}
    tops, inside = {0}, False
    for n in sorted(starts):
        if lines[n][0].isspace():
            continue
        begins = bool(_BEGINS.match(lines[n]))
        decorated = begins and n > 0 and lines[n - 1].startswith("@")
        if (begins or inside) and not decorated:
            tops.add(n)
        inside = begins
    return starts, tops


def text_sections(text: str) -> list[list[str]]:
    """Paragraphs (parted by blank lines, which go with the one before) of lines."""
    paragraphs: list[list[str]] = []
    blank = True
    for line in _LINE.split(text):
        if line:
            if blank and line.strip() or not paragraphs:
                paragraphs.append([])
            paragraphs[-1].append(line)
            blank = not line.strip()
    return paragraphs


def document_tree(text: str, encode: Callable[[str], Sequence[int]], *, length: int | None = None, python: bool = True) -> Tree:
    """The tree of a text.

    Args:
        encode: text -> token ids; sentences are encoded one by one.
        length: most positions, anchors among them; the rest of the text is left away. All of it unless told.
        python: cut by Python's grammar, else by paragraphs and lines.
    """
    sections = python_sections(text) if python else text_sections(text)
    made = tree([[encode(sentence) for sentence in section] for section in sections])
    return made if length is None else Tree(*(getattr(made, name)[:length] for name in ("ids", "level", "under", "anchor", "rank")))
