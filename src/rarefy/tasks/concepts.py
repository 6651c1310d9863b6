"""Concepts of Python source, token by token, read off `tokenize` and `ast`; and which latent tracks which.

A concept covers characters of a file. A model token carries it if the first character of the token that is not a
space does; a token of spaces and line breaks alone is judged by its last character, so that indentation belongs to the
line that it begins.

Shape letters: T = tokens, M = activations in index form, C = concepts, F = latents, L = thresholds, N = rows.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import re
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput

Span = tuple[int, int]
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # Python's line ends; str.splitlines also breaks at form feeds and others
_KEYWORDS = (
    "def", "class", "return", "import", "from", "if", "else", "for", "in", "not", "raise", "try", "except", "with", "None",
    "is", "and", "or", "assert",
)
_PUNCTUATION = {
    "open paren": "(", "close paren": ")", "open square": "[", "close square": "]", "open brace": "{", "comma": ",", "colon": ":",
    "dot": ".", "assign": "=", "equals": "==",
}
_ARITHMETIC = {"+", "-", "*", "/", "//", "%", "**", "@", "+=", "-=", "*=", "/="}
_COMPARE = {"==", "!=", "<", ">", "<=", ">="}
_BUILTINS = {name for name in dir(builtins) if not name.startswith("_")}
_EXCEPTIONS = {name for name in _BUILTINS if isinstance(getattr(builtins, name), type) and issubclass(getattr(builtins, name), BaseException)}
_STRINGS = {tokenize.STRING, *(getattr(tokenize, n) for n in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, n))}

CONCEPTS: tuple[str, ...] = (
    "string", "docstring", "f-string", "comment", "number", "name", "keyword", *(f"keyword {k}" for k in _KEYWORDS), *_PUNCTUATION,
    "arithmetic operator", "comparison", "inside brackets", "inside two brackets", "call arguments", "subscript",
    "line break", "indent 0", "indent 1", "indent 2", "indent 3+", "first of line",
    "function name", "class name", "parameter", "parameter default", "attribute", "method called", "function called", "keyword argument",
    "import line", "imported module", "imported name", "decorator", "annotation", "base class",
    "builtin name", "exception name", "self", "dunder name", "private name", "UPPER_CASE name", "CamelCase name", "snake_case name",
    "condition of if", "header of for", "header of while", "header of with", "header of except", "return value", "raised value",
    "assignment target", "assigned value", "comprehension", "lambda", "dict key", "True or False", "assertion",
)


class _Spans:
    """Character spans per concept, from line and column positions."""

    def __init__(self, text: str) -> None:
        self.found: dict[str, list[Span]] = {name: [] for name in CONCEPTS}
        self.lines = _LINE.findall(text)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        """Character of a tokenize position (columns in characters)."""
        return self.starts[min(line - 1, len(self.starts) - 1)] + column

    def at_bytes(self, line: int, column: int) -> int:
        """Character of an ast position (columns in UTF-8 bytes)."""
        text = self.lines[line - 1]
        return self.starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode(errors="ignore")))

    def add(self, name: str, start: int, end: int) -> None:
        self.found[name].append((start, end))

    def node(self, name: str, node: Any) -> None:
        self.add(name, self.at_bytes(node.lineno, node.col_offset), self.at_bytes(node.end_lineno, node.end_col_offset))


def _tokens(spans: _Spans, text: str) -> None:
    depth, indent, fresh = [], 0, True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = spans.at(*token.start), spans.at(*token.end)
        if token.type == tokenize.INDENT:
            indent += 1
        elif token.type == tokenize.DEDENT:
            indent -= 1
        elif token.type in (tokenize.NEWLINE, tokenize.NL):
            spans.add("line break", start, max(end, start + 1))
            fresh = fresh or token.type == tokenize.NEWLINE
        elif token.type == tokenize.COMMENT:
            spans.add("comment", start, end)
        elif end > start:
            if fresh:
                spans.add("first of line", start, start + 1)
                line = spans.starts[token.start[0] - 1]
                spans.add(f"indent {min(indent, 3)}" if indent < 3 else "indent 3+", line, spans.starts[min(token.start[0], len(spans.starts) - 1)])
                fresh = False
            _one(spans, token, start, end, depth)


def _one(spans: _Spans, token: Any, start: int, end: int, depth: list[int]) -> None:
    text = token.string
    if token.type in _STRINGS:
        spans.add("string", start, end)
        if token.type != tokenize.STRING or "f" in text[: text.find(text[-1])].lower():
            spans.add("f-string", start, end)
    elif token.type == tokenize.NUMBER:
        spans.add("number", start, end)
    elif token.type == tokenize.NAME:
        _name(spans, text, start, end)
    elif token.type == tokenize.OP:
        for name, sign in _PUNCTUATION.items():
            if text == sign:
                spans.add(name, start, end)
        if text in _ARITHMETIC:
            spans.add("arithmetic operator", start, end)
        if text in _COMPARE:
            spans.add("comparison", start, end)
        if text in "([{":
            depth.append(end)
        elif text in ")]}" and depth:
            opened = depth.pop()
            spans.add("inside brackets", opened, start)
            if depth:
                spans.add("inside two brackets", opened, start)


def _name(spans: _Spans, text: str, start: int, end: int) -> None:
    if keyword.iskeyword(text):
        spans.add("keyword", start, end)
        if text in _KEYWORDS:
            spans.add(f"keyword {text}", start, end)
        if text in ("True", "False"):
            spans.add("True or False", start, end)
        return
    bare = text.strip("_")
    kinds = {
        "name": True, "self": text == "self", "builtin name": text in _BUILTINS,
        "exception name": text in _EXCEPTIONS or text.endswith(("Error", "Exception", "Warning")),
        "dunder name": text.startswith("__") and text.endswith("__"), "private name": text.startswith("_") and not text.startswith("__"),
        "UPPER_CASE name": len(bare) > 1 and bare.isupper(), "CamelCase name": bare[:1].isupper() and not bare.isupper() and "_" not in bare,
        "snake_case name": "_" in bare and bare.islower(),
    }
    for name, true in kinds.items():
        if true:
            spans.add(name, start, end)


def _word(spans: _Spans, concept: str, line: int, column: int, word: str) -> None:
    """A name that ast gives no position of its own: look for it from its statement's start."""
    text = spans.lines[line - 1]
    at = text.find(word, column)
    if at >= 0:
        spans.add(concept, spans.starts[line - 1] + at, spans.starts[line - 1] + at + len(word))


def _function(spans: _Spans, node: Any) -> None:
    skip = len("async def ") if isinstance(node, ast.AsyncFunctionDef) else len("def ")
    _word(spans, "function name", node.lineno, node.col_offset + skip, node.name)
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    for arg in every:
        begin = spans.at_bytes(arg.lineno, arg.col_offset)
        spans.add("parameter", begin, begin + len(arg.arg))
    for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
        spans.node("parameter default", default)
    for annotation in filter(None, (node.returns, *(a.annotation for a in every))):
        spans.node("annotation", annotation)
    for decorator in node.decorator_list:
        spans.node("decorator", decorator)


def _class(spans: _Spans, node: Any) -> None:
    _word(spans, "class name", node.lineno, node.col_offset + len("class "), node.name)
    for base in node.bases:
        spans.node("base class", base)
    for decorator in node.decorator_list:
        spans.node("decorator", decorator)


def _call(spans: _Spans, node: ast.Call) -> None:
    end = spans.at_bytes(node.func.end_lineno, node.func.end_col_offset)  # type: ignore[arg-type]
    spans.add("call arguments", end + 1, spans.at_bytes(node.end_lineno, node.end_col_offset) - 1)  # type: ignore[arg-type]
    if isinstance(node.func, ast.Attribute):
        spans.add("method called", end - len(node.func.attr), end)
    elif isinstance(node.func, ast.Name):
        spans.node("function called", node.func)
    for argument in node.keywords:
        if argument.arg:
            begin = spans.at_bytes(argument.lineno, argument.col_offset)
            spans.add("keyword argument", begin, begin + len(argument.arg))


def _import(spans: _Spans, node: Any) -> None:
    spans.node("import line", node)
    if isinstance(node, ast.ImportFrom) and node.module:
        _word(spans, "imported module", node.lineno, node.col_offset + len("from "), node.module)
    for alias in node.names:
        spans.node("imported name" if isinstance(node, ast.ImportFrom) else "imported module", alias)


def _attribute(spans: _Spans, node: ast.Attribute) -> None:
    end = spans.at_bytes(node.end_lineno, node.end_col_offset)  # type: ignore[arg-type]
    spans.add("attribute", end - len(node.attr), end)


def _docstring(spans: _Spans, node: Any) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        spans.node("docstring", first.value)


def _with(spans: _Spans, node: ast.With) -> None:
    for item in node.items:
        spans.node("header of with", item.context_expr)


def _nodes(*pairs: tuple[str, str]) -> Callable[[_Spans, Any], None]:
    """A visitor that marks fields of a node (or the node itself, ""), one or a list of them."""

    def visit(spans: _Spans, node: Any) -> None:
        for concept, part in pairs:
            value = getattr(node, part) if part else node
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    spans.node(concept, one)

    return visit


_VISIT: dict[type, Callable[[_Spans, Any], None]] = {
    ast.FunctionDef: _function, ast.AsyncFunctionDef: _function, ast.ClassDef: _class, ast.Call: _call, ast.Import: _import,
    ast.ImportFrom: _import, ast.Attribute: _attribute, ast.If: _nodes(("condition of if", "test")),
    ast.While: _nodes(("header of while", "test")), ast.For: _nodes(("header of for", "target"), ("header of for", "iter")),
    ast.With: _with,
    ast.ExceptHandler: _nodes(("header of except", "type")), ast.Return: _nodes(("return value", "value")),
    ast.Raise: _nodes(("raised value", "exc")), ast.Assign: _nodes(("assignment target", "targets"), ("assigned value", "value")),
    ast.AugAssign: _nodes(("assignment target", "target"), ("assigned value", "value")),
    ast.AnnAssign: _nodes(("assignment target", "target"), ("annotation", "annotation"), ("assigned value", "value")),
    ast.Subscript: _nodes(("subscript", "slice")), ast.Lambda: _nodes(("lambda", "")), ast.Dict: _nodes(("dict key", "keys")),
    ast.Assert: _nodes(("assertion", "test")),
    **{kind: _nodes(("comprehension", "")) for kind in (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)},
}


def spans_of(text: str) -> dict[str, list[Span]] | None:
    """Character spans of every concept in a source file; None if it is not Python of this version."""
    try:
        tree = ast.parse(text)
        spans = _Spans(text)
        _tokens(spans, text)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return None
    for node in ast.walk(tree):
        visit = _VISIT.get(type(node))
        if visit:
            visit(spans, node)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            _docstring(spans, node)
    return spans.found


def _deciding(text: str, start: int, end: int) -> int:
    piece = text[start:end]
    bare = piece.lstrip()
    return start + len(piece) - len(bare) if bare else max(start, end - 1)


def label(text: str, offsets_T2: Tensor) -> dict[str, Tensor] | None:
    """Concept -> [T] bool for tokens that cover characters `offsets_T2` of `text`; None if it does not parse."""
    found = spans_of(text)
    if found is None:
        return None
    at_T = torch.tensor([_deciding(text, a, b) for a, b in offsets_T2.tolist()], dtype=torch.long).clamp(0, len(text))
    there_T = offsets_T2[:, 1] > offsets_T2[:, 0]
    out = {}
    for name in CONCEPTS:
        cover = torch.zeros(len(text) + 2, dtype=torch.int32)
        if found[name]:
            edges = torch.tensor(found[name]).clamp(0, len(text) + 1)
            one = torch.ones(len(edges), dtype=torch.int32)
            cover.index_add_(0, edges[:, 0], one)
            cover.index_add_(0, edges[:, 1], -one)
        out[name] = (cover.cumsum(0)[at_T] > 0) & there_T
    return out


def label_batches(batches: Sequence[Any], docs: Sequence[Any]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Labels of packed batches, and which side each token is on.

    Returns:
        per batch {concept: [B, T] bool}, and per batch [B, T] int8: 0 choose on, 1 report on (documents alternate),
        -1 leave out (files that are not Python).
    """
    labels = [{name: torch.zeros_like(b.input_ids, dtype=torch.bool) for name in CONCEPTS} for b in batches]
    sides = [torch.full_like(b.input_ids, -1, dtype=torch.int8) for b in batches]
    parsed = 0
    for number, document in enumerate(docs):
        where = [b.doc == number for b in batches]
        offsets = torch.cat([b.offsets[w] for b, w in zip(batches, where, strict=True)])
        found = label(document.text, offsets) if len(offsets) else None
        if found is None:
            continue
        sizes = [int(w.sum()) for w in where]
        for name, values in found.items():
            for into, w, piece in zip(labels, where, values.split(sizes), strict=True):
                into[name][w] = piece
        for side, w in zip(sides, where, strict=True):
            side[w] = parsed % 2
        parsed += 1
    return labels, sides


@dataclass(frozen=True)
class Best:
    """Each latent's best concept, chosen on one half of the documents and measured on the other. All [F]."""

    concept: Tensor
    """Number of the concept; -1 for a latent that never fired where concepts are known."""
    threshold: Tensor
    """Activation from which on the latent counts as predicting; 0: wherever it is active."""
    precision: Tensor
    recall: Tensor
    f1: Tensor


class ConceptScores:
    """Counts from which precision and recall of every latent for every concept follow, at several thresholds.

    A latent predicts a concept where its activation reaches a threshold. Thresholds are 0 (wherever it is active) and
    octaves of activation, from 2^-3 to 2^(LEVELS - 5), so that one pass suffices. Memory is 2 * F * LEVELS * C counts.
    """

    LEVELS = 10

    def __init__(self, width: int, names: Sequence[str]) -> None:
        if width < 1 or not names:
            raise BadInput(f"width={width} and {len(names)} concepts: need at least one of each")
        self.width, self.names = width, list(names)
        self.hits = torch.zeros(2, self.LEVELS * width, len(names))
        self.fires = torch.zeros(2, self.LEVELS * width)
        self.truth = torch.zeros(2, len(names), dtype=torch.float64)

    def observe(self, latent_M: Tensor, value_M: Tensor, row_M: Tensor, labels_NC: Tensor, side_N: Tensor) -> None:
        """Take in activations of N rows in index form: latent, value and row of each, labels and side (0, 1; -1 left out)."""
        level_M = (value_M.float().clamp_min(2.0**-4).log2() + 4).floor().clamp(0, self.LEVELS - 1).long()
        for side in (0, 1):
            here = side_N[row_M] == side
            unit = level_M[here] * self.width + latent_M[here]
            order = unit.argsort()
            unit, row = unit[order], row_M[here][order]
            for some_u, some_r in zip(unit.split(1 << 16), row.split(1 << 16), strict=True):
                self.hits[side].index_add_(0, some_u, labels_NC[some_r].float())
                self.fires[side].index_add_(0, some_u, torch.ones(len(some_u)))
            self.truth[side] += labels_NC[side_N == side].double().sum(0)

    def _f1(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.LEVELS, self.width)
        hits_LFC = self.hits[side].view(*shape, -1).flip(0).cumsum(0).flip(0)        # activations at or above a level
        fires_LF = self.fires[side].view(shape).flip(0).cumsum(0).flip(0)
        truth_C = self.truth[side].float()
        precision = hits_LFC / fires_LF[..., None].clamp_min(1)
        recall = hits_LFC / truth_C.clamp_min(1)
        return 2 * hits_LFC / (fires_LF[..., None] + truth_C).clamp_min(1), precision, recall

    def best(self) -> Best:
        """Best concept and threshold of each latent on side 0, with its figures on side 1."""
        f1_LFC, _, _ = self._f1(0)
        top_F, at_F = f1_LFC.permute(1, 0, 2).flatten(1).max(-1)
        level_F, concept_F = at_F // len(self.names), at_F % len(self.names)
        latent_F = torch.arange(self.width)
        held = [v[level_F, latent_F, concept_F] for v in self._f1(1)]
        none = top_F == 0
        threshold_F = (2.0 ** (level_F - 4)).masked_fill(level_F == 0, 0)
        return Best(concept_F.masked_fill(none, -1), threshold_F, *(v.masked_fill(none, 0) for v in (held[1], held[2], held[0])))
