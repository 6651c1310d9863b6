"""Patterns from text. The text is parsed to a syntax tree and walked: words, numbers, names in quotes, |, & and ~, nothing else."""

from __future__ import annotations

import ast
import difflib
import inspect
from functools import reduce
from typing import Any, NoReturn

from ...errors import BadInput
from . import lifts, relations, words, zoo  # noqa: F401  (entering the words)
from .atoms import FAR
from .pattern import Pattern
from .words import WORDS

LONGEST = 20_000
"""Characters."""
DEEPEST = 60
"""Brackets within brackets."""
MOST = 150
"""Patterns joined side by side: Python itself reads back no more brackets than 200."""
_INSTEAD = {
    ast.Add: "'|' joins patterns", ast.Or: "'|' is or", ast.And: "'&' is and", ast.Not: "'~' is not", ast.Sub: "write a & ~b for a without b",
    ast.BitXor: "write (a & ~b) | (~a & b) for one of both",
}


def parse(text: str) -> Pattern:
    """The pattern that an expression says, such as "window(256) | sinks(4)"; `str` of a pattern is such an expression.

    Raises:
        BadInput: names the offending part and its place, and near words for an unknown one.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"a pattern is an expression such as 'window(256) | sinks(4)', not {text!r}")
    if len(text) > LONGEST:
        raise BadInput(f"the pattern has {len(text)} characters; at most {LONGEST} are read")
    text = " ".join(text.split())                           # one line: several are read as one expression
    if "\\" in text:
        raise BadInput(f"'\\' at character {text.index(chr(92)) + 1} of the pattern {_short(text)!r}: names in quotes are plain words")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        what = str(error) or "nested too deeply"
        if isinstance(error, SyntaxError):
            at = error.offset or 1
            what = f"{error.msg} at character {at}, {_short(text[at - 1 :] or 'the end', 20)!r}"
        raise BadInput(f"the pattern {_short(text)!r} cannot be read: {what}") from None
    made = _Reader(text).read(tree.body, 0)
    if not isinstance(made, Pattern):
        raise BadInput(f"{_short(text)!r} is {made!r}, not a pattern; one is for example window(256)")
    return made


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


class _Reader:
    """A walk over the syntax tree of one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def refuse(self, what: str, node: ast.expr, hint: str) -> NoReturn:
        at = len(self.text.encode()[: node.col_offset].decode()) + 1
        raise BadInput(f"{what} at character {at} of the pattern {_short(self.text)!r}{hint}")

    def part(self, node: ast.expr) -> str:
        return repr(_short(ast.get_source_segment(self.text, node) or self.text))

    def read(self, node: ast.expr, depth: int) -> Any:
        if depth > DEEPEST:
            raise BadInput(f"the pattern is nested more than {DEEPEST} deep at {self.part(node)}")
        if isinstance(node, ast.Call):
            return self.called(node, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd):
            return self.joined(node, type(node.op), depth)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self.operand(node.operand, depth)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
            if isinstance(node.value, int | float) and not abs(node.value) < FAR:
                self.refuse(f"the number {self.part(node)}", node, f": numbers are below {FAR}")
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.read(node.operand, depth + 1)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.read(one, depth + 1) for one in node.elts)
        if isinstance(node, ast.Name):
            self.refuse(f"{node.id!r} is a bare name", node, f"; {_hint(node.id, call=True)}")
        instead = _INSTEAD.get(type(getattr(node, "op", None)), "patterns are words such as window(256), joined by |, & and ~")
        self.refuse(f"{self.part(node)} is not understood", node, f"; {instead}")

    def joined(self, node: ast.expr, op: type[ast.operator], depth: int) -> Pattern:
        """A chain of one operator; as long as it may be, it lies no deeper than one."""
        nodes = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, op):
            nodes.append(node.right)
            node = node.left
        if len(nodes) >= MOST:
            raise BadInput(f"{len(nodes) + 1} patterns are joined side by side; at most {MOST} are")
        made = [self.operand(one, depth) for one in (node, *reversed(nodes))]
        return reduce(lambda a, b: a | b, made) if op is ast.BitOr else reduce(lambda a, b: a & b, made)

    def operand(self, node: ast.expr, depth: int) -> Pattern:
        value = self.read(node, depth + 1)
        if not isinstance(value, Pattern):
            self.refuse(f"{value!r} is no pattern", node, ": |, & and ~ join patterns")
        return value

    def called(self, node: ast.Call, depth: int) -> Pattern:
        if not isinstance(node.func, ast.Name) or node.func.id not in WORDS:
            name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
            self.refuse(f"unknown word {name!r}", node, f"; {_hint(name)}")
        if any(keyword.arg is None for keyword in node.keywords):
            raise BadInput(f"{self.part(node)} spreads arguments with **, which patterns do not have")
        make = WORDS[node.func.id]
        given = [self.argument(one, depth) for one in node.args]
        options = {str(keyword.arg): self.argument(keyword.value, depth) for keyword in node.keywords}
        try:
            inspect.signature(make).bind(*given, **options)
        except TypeError as error:
            takes = str(inspect.signature(make, eval_str=False)).split(" ->")[0].replace("'", "")
            raise BadInput(f"{self.part(node)}: {error}; it is {node.func.id}{takes}") from None
        try:
            return make(*given, **options)
        except BadInput as error:
            raise BadInput(f"{self.part(node)}: {error}") from None

    def argument(self, node: ast.expr, depth: int) -> Any:
        if isinstance(node, ast.Name) and node.id not in WORDS:
            near = difflib.get_close_matches(node.id.lower(), WORDS, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}(...)?" if near else f"metadata is named in quotes: \"{node.id}\""
            self.refuse(f"{node.id!r} is a bare name", node, f"; {hint}")
        return self.read(node, depth + 1)


def _hint(name: str, *, call: bool = False) -> str:
    if call and name in WORDS:
        return f"did you mean {name}(...)?"
    near = difflib.get_close_matches(name.lower(), WORDS, n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}?" if near else f"words are {', '.join(sorted(WORDS))}"
