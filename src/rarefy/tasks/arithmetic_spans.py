"""Nested arithmetic with traces that say which earlier spans each line needs (after Jin et al. 2024, arXiv 2404.09336).

An expression of K groups, each `x op y` modulo 10 where an operand is a digit or another group, stands flat in the prompt: every group has a
name in place of its parentheses, and groups stand in random order. A trace then reduces one group a line, innermost first:

    prompt   <bos>  n x op y   for every group                            an operand that is group a is written ?a
    line     @n ?a ?b : x op y =n z                                       operands as digits; ?a where x was group a, else `none`

`@n` says that group n is reduced next, `?a` and `?b` that the lines of a and b are needed for it; what follows the colon can be written from group
n, those lines and its own line alone. The last line's z is the answer. `SYNTAX` tells the markers to `rarefy.attention.trained.span.Span`.

Shape letters: B = expressions, T = tokens, K = groups.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import positive

GROUPS = 12
"""Names there are: the most groups of an expression."""
OPERATORS = "+-*"
GO, BOS, NONE = 13, 14, 15
NAMES = 16
HEADS, READS, EQUALS = NAMES + GROUPS, NAMES + 2 * GROUPS, NAMES + 3 * GROUPS
VOCABULARY = NAMES + 4 * GROUPS
LINE = 9
"""Tokens of a line."""
SYNTAX = {"names": NAMES, "heads": HEADS, "reads": READS, "count": GROUPS, "go": GO}


@dataclass(frozen=True)
class Traces:
    """Prompts with their traces."""

    ids_BT: Tensor
    prompt: int
    """Tokens before the trace; T = prompt + 9 K."""

    @property
    def answer_B(self) -> Tensor:
        """Value of each expression, 0..9."""
        return self.ids_BT[:, -1]

    @property
    def inputs_BT(self) -> Tensor:
        """Prompts alone."""
        return self.ids_BT[:, : self.prompt]


def arithmetic_traces(groups: int, batch: int, *, seed: int = 0) -> Traces:
    """`batch` random expressions of `groups` groups, with traces. Raises BadInput for more groups than names."""
    positive("batch", batch)
    if positive("groups", groups) > GROUPS:
        raise BadInput(f"groups={groups} is more than the {GROUPS} names there are")
    draw = random.Random(f"{seed}/{groups}")
    return Traces(torch.tensor([_one(groups, draw) for _ in range(batch)]), 1 + 4 * groups)


def _one(groups: int, draw: random.Random) -> list[int]:
    """One expression: groups are numbered in the order of their reduction; each but the last is an operand of exactly one later group."""
    open_, made, lines, value = [], [], [], {}
    for n in range(groups):
        least = max(0, len(open_) - (groups - 1 - n))            # else the groups left could not take up all that is open
        taken = [open_.pop(draw.randrange(len(open_))) for _ in range(draw.randint(least, min(2, len(open_))))]
        sides: list[int | None] = [*taken, *[None] * (2 - len(taken))]
        draw.shuffle(sides)
        digits = [draw.randrange(10) if a is None else value[a] for a in sides]
        op = draw.randrange(3)
        value[n] = reduced(digits[0], op, digits[1])
        written = [d if a is None else READS + a for a, d in zip(sides, digits, strict=True)]
        made.append([NAMES + n, written[0], 10 + op, written[1]])
        lines += [HEADS + n, *(NONE if a is None else READS + a for a in sides), GO, digits[0], 10 + op, digits[1], EQUALS + n, value[n]]
        open_.append(n)
    draw.shuffle(made)
    return [BOS, *(token for group in made for token in group), *lines]


def reduced(x: int, op: int, y: int) -> int:
    """x op y modulo 10; op is a place in OPERATORS."""
    return (x + y, x - y, x * y)[op] % 10


def nested(prompt: Tensor) -> str:
    """A prompt [T] as the nested expression that it stands for."""
    groups = {row[0]: row[1:] for row in prompt[1:].view(-1, 4).tolist()}

    def say(token: int) -> str:
        if token < 10:
            return str(token)
        x, op, y = groups[token - READS + NAMES]
        return f"({say(x)} {OPERATORS[op - 10]} {say(y)})"

    return say(max(groups) - NAMES + READS)
