"""Commands of sparse attention; `rarefy.cli` calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import BadInput


def split(text: str) -> list[str]:
    """Names separated by commas; a comma inside the brackets of a pattern's expression is its own."""
    out, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            out.append("")
        else:
            out[-1] += letter
    return [name.strip() for name in out if name.strip()]


def run_suite(
    suite: str, *, methods: str, model: str, budgets: list[float], out: Path, tasks: list[str], phases: list[str], lengths: list[str],
    sequences: int, data: str, tokens: int, settings: dict[str, Any], screen: Any,
) -> Any:
    """`rarefy sweep --suite attention`. Raises BadInput for another suite or lengths that are no whole numbers."""
    if suite != "attention":
        raise BadInput(f"no suite {suite!r} to sweep; there is attention (`rarefy judge --suite` has those for dictionaries)")
    if bad := [text for text in lengths if not text.isdecimal()]:
        raise BadInput(f"--lengths {bad[0]!r}: write whole numbers of tokens, such as 256,512")
    from .jobs.attention_suite import AttentionRequest, attention_suite
    from .jobs.attention_suite_tasks import TASKS

    request = AttentionRequest(
        methods=split(methods), model=model, budgets=budgets, out=out, tasks=tasks or list(TASKS), phases=phases, lengths=[int(n) for n in lengths],
        sequences=sequences, data=data, tokens=tokens, settings=settings,
    )
    return attention_suite(request, screen=screen)
