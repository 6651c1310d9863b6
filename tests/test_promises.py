"""docs/promises.md names tests and laws that are there."""

import ast
import re
from pathlib import Path

from rarefy.contract import LAWS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8").split("## Not promised")[0]


def test_every_proof_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    there = {path: {n.name for n in ast.walk(ast.parse((TESTS / path).read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}
             for path in {path for path, _ in named}}
    assert [f"{path}::{name}" for path, name in named if name not in there[path]] == [] and len(named) > 90


def test_every_law_is_named_and_exists():
    ids = {law.split()[0] for law in LAWS}
    named = {word for line in re.findall(r"contract ((?:[LCM]\d+b?(?:, )?)+)", PAGE) for word in line.rstrip(", ").split(", ")}
    assert named - ids == set() and ids - named == {"C4"}  # C4 needs a GPU and stands under what is not promised


def test_every_line_has_a_proof():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [MCSTAUWD]\d", line)]
    assert len(rows) > 50 and [row for row in rows if "`" not in row.split("|")[3] and "contract" not in row.split("|")[3]] == []
