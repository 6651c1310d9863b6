"""Patterns from text. The text is parsed to a syntax tree and walked: words, numbers, names in quotes, |, & and ~, nothing else."""

from __future__ import annotations

import ast
import difflib
import inspect
from typing import Any

from ...errors import BadInput
from . import lifts, relations, words, zoo  # noqa: F401  (entering the words)
from .pattern import Pattern
from .words import WORDS

LONGEST = 20_000
"""Characters."""
DEEPEST = 60
"""Brackets within brackets."""


def parse(text: str) -> Pattern:
    """The pattern that an expression says, such as "window(256) | sinks(4)"; `str` of a pattern is such an expression.

    Raises:
        BadInput: names the offending part, and near words for an unknown one.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"a pattern is an expression such as 'window(256) | sinks(4)', not {text!r}")
    if len(text) > LONGEST:
        raise BadInput(f"the pattern has {len(text)} characters; at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        what = f"{error.msg} at character {error.offset}" if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise BadInput(f"the pattern {_short(text)!r} cannot be read: {what}") from None
    made = _read(tree.body, text.strip(), 0)
    if not isinstance(made, Pattern):
        raise BadInput(f"{_short(text)!r} is {made!r}, not a pattern; one is for example window(256)")
    return made


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _read(node: ast.expr, text: str, depth: int) -> Any:
    part = _short(ast.get_source_segment(text, node) or text)
    if depth > DEEPEST:
        raise BadInput(f"the pattern is nested more than {DEEPEST} deep at {part!r}")
    if isinstance(node, ast.Call):
        return _called(node, text, depth, part)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd):
        left, right = (_operand(side, text, depth) for side in (node.left, node.right))
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_operand(node.operand, text, depth)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _read(node.operand, text, depth + 1)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_read(one, text, depth + 1) for one in node.elts)
    if isinstance(node, ast.Name):
        raise BadInput(f"{node.id!r} in the pattern {_short(text)!r} is a bare name; {_hint(node.id, call=True)}")
    raise BadInput(f"{part!r} in the pattern {_short(text)!r} is not understood; patterns are words such as window(256), joined by |, & and ~")


def _operand(node: ast.expr, text: str, depth: int) -> Pattern:
    value = _read(node, text, depth + 1)
    if not isinstance(value, Pattern):
        raise BadInput(f"{value!r} in the pattern {_short(text)!r} is no pattern: |, & and ~ join patterns")
    return value


def _called(node: ast.Call, text: str, depth: int, part: str) -> Pattern:
    if not isinstance(node.func, ast.Name) or node.func.id not in WORDS:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        raise BadInput(f"unknown word {name!r} in the pattern {_short(text)!r}; {_hint(name)}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise BadInput(f"{part!r} spreads arguments with **, which patterns do not have")
    make = WORDS[node.func.id]
    given = [_read(one, text, depth + 1) for one in node.args]
    options = {str(keyword.arg): _read(keyword.value, text, depth + 1) for keyword in node.keywords}
    try:
        inspect.signature(make).bind(*given, **options)
    except TypeError as error:
        takes = str(inspect.signature(make, eval_str=False)).split(" ->")[0].replace("'", "")
        raise BadInput(f"{part!r}: {error}; it is {node.func.id}{takes}") from None
    try:
        return make(*given, **options)
    except BadInput as error:
        raise BadInput(f"{part!r}: {error}") from None


def _hint(name: str, *, call: bool = False) -> str:
    if call and name in WORDS:
        return f"did you mean {name}(...)?"
    near = difflib.get_close_matches(name, WORDS, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"words are {', '.join(sorted(WORDS))}"
