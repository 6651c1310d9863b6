"""Several questions about one context, the cache kept between them (Li et al. 2024, SCBench, shared context, multi-turn).

What a cache has thrown away before the first question was answered is missing at the second: policies that choose by the
first question look better in a single turn than they are. A turn is filler, a key of the context and, as the answer, its value.

Shape letters: B = sequences, T = tokens, C = pairs, K = turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive
from .needles import needles
from .recall import Recall, distances


@dataclass(frozen=True)
class Turns:
    """A context with its turns."""

    recall: Recall
    """Sequences; the answers are the turns' values."""
    context: int
    """Tokens before the first turn."""
    turn: int
    """Tokens of a turn; its last two are the question and the answer."""

    @property
    def count(self) -> int:
        """Turns a sequence."""
        return (self.recall.input_ids.shape[1] - self.context) // self.turn


def turns(
    keys: Sequence[int], values: Sequence[int], filler: Sequence[int], length: int, pairs: int, batch: int, *, questions: int = 6,
    between: int = 6, announced: bool = False, seed: int = 0,
) -> Turns:
    """`pairs` needles in filler, then `questions` turns of `between` filler tokens, a key not asked before, and its value.

    Args:
        announced: the context ends with the first turn's key, so that a policy that reads the end of the prompt knows the first
            question, and it alone, before it throws anything away.

    Raises:
        BadInput: as `needles`; a length that does not hold context and turns.
    """
    positive("questions", questions, pairs)
    if between < 0:
        raise BadInput(f"between={between} must be >= 0: filler tokens before each question")
    packed = needles(keys, values, filler, length - questions * between - announced, pairs, batch, asked=questions, seed=seed)
    context, turn = length - questions * (between + 2), between + 2
    body = context - announced
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.as_tensor(filler)[torch.randint(len(filler), (batch, length), generator=generator)]
    ids[:, :body] = packed.input_ids[:, :body]
    asked_BK2 = packed.input_ids[:, body:].unflatten(1, (questions, 2))
    ids[:, context:].unflatten(1, (questions, turn))[..., -2:] = asked_BK2
    if announced:
        ids[:, context - 1] = asked_BK2[:, 0, 0]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, context:].unflatten(1, (questions, turn))[..., -1] = True
    least = int(distances(Recall(ids, answer, 0))[answer].min())
    return Turns(Recall(ids, answer, least), context, turn)


def accuracy_by_turn(right_BT: Tensor, task: Turns) -> list[Interval]:
    """Accuracy of each turn, with intervals over sequences.

    Args:
        right_BT: bool, as `recall.hits` gives it, or of a decoding of the turns.
    """
    right_BK = right_BT[:, task.context :].unflatten(1, (task.count, task.turn))[..., -1]
    return [ratio_interval(right_B, torch.ones_like(right_B, dtype=torch.long)) for right_B in right_BK.T]
