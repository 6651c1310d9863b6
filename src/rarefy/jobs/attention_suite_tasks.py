"""What the attention suite asks: each task at one length as tokens, the places judged, and groups to tell places apart.

The recall model sits the recall tasks; the model under test sits text and induction; averaging needs no model at all.

Shape letters: B = sequences, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..builtin.corpus import Batch
from ..builtin.model import RECALL_LENGTHS
from ..errors import BadInput
from ..tasks.averaging import Averaging, averaging
from ..tasks.distance import EDGES, reach
from ..tasks.needles import needles
from ..tasks.recall import FILLER, KEYS, VALUES, Recall, asked_again, distances, mqar, needle, repeated
from ..tasks.turns import turns
from ..tasks.variables import variables

SEED = 20_011
LEAST_LENGTH = 96
"""Tokens that every task needs to hold its pairs."""
DECODED = 64
"""Most tokens of a sequence that are decoded one at a time."""
AT_ONCE = 4096
"""Tokens of a batch, about; at least one sequence, at most eight."""
TASKS = ("mqar", "needle", "needles", "variables", "turns", "averaging", "induction", "text")
RECALL = TASKS[:5]
"""Sat by the recall model."""
QUESTIONS = {
    "mqar": "Keys with values, each key asked for again at a gap drawn from a power law.",
    "needle": "One key with its value, anywhere in filler, asked for at the end.",
    "needles": "Sixteen keys with values in filler, eight of them asked for.",
    "variables": "Four chains of four definitions, interleaved in filler; one is traced back to its value.",
    "turns": "One context, six questions one after another with the cache kept between them; the context ends with the first one's key.",
    "averaging": "Exact attention that averages 8 named positions; what is left of the answer's variance.",
    "induction": "Random tokens of the model's own vocabulary twice; the second time all can be looked up.",
    "text": "The text under test; scored by the share of dense perplexity's inverse that is kept.",
}


@dataclass(frozen=True)
class Sitting:
    """A task at one length, for a model."""

    task: str
    length: int
    model: Any
    ids_BT: Tensor
    answer_BT: Tensor
    """bool: tokens judged, from the position before each."""
    doc_BT: Tensor
    """What intervals are over: the number of the sequence or document that each token is of."""
    start: int
    """Decoding takes tokens from here on one at a time."""
    by: dict[str, Tensor] = field(default_factory=dict)
    """Name of a group -> [B, T] bool, for scores by gap, turn or distance."""
    at_once: int = 8
    prefixes: dict[int, Any] = field(default_factory=dict)
    """First sequence of a batch -> cache of the tokens before `start`, read densely: the same for all that decode from there."""

    @property
    def is_text(self) -> bool:
        """Whether loss, not right answers, is the score."""
        return self.task == "text"


def _of(task: str, model: Any, made: Recall, by: dict[str, Tensor], start: int | None = None) -> Sitting:
    B, T = made.input_ids.shape
    first = int(made.answer.nonzero()[:, 1].min()) - 1 if start is None else start
    doc = torch.arange(B)[:, None].expand(B, T)
    return Sitting(task, T, model, made.input_ids, made.answer, doc, max(first, T - DECODED, 1), by, min(8, max(1, AT_ONCE // T)))


def _gaps(made: Recall, edges: Sequence[int]) -> dict[str, Tensor]:
    away = distances(made)
    ends = [*edges[1:], 1 << 40]
    names = [f"gap {low}-{high - 1}" if high < 1 << 40 else f"gap {low}+" for low, high in zip(edges, ends, strict=True)]
    return {n: made.answer & (away >= low) & (away < high) for n, low, high in zip(names, edges, ends, strict=True)}


def _mqar(length: int, sequences: int, model: Any) -> Sitting:
    """Most questions of the power law stand near the table, and of a long sequence's none in the part that is decoded: eight are put again there."""
    again = 8 if length > RECALL_LENGTHS[0] else 0
    made = mqar(KEYS, VALUES, FILLER, length - 2 * again, min(48, length // 8), sequences, power=0.2, seed=SEED)
    made = asked_again(made, again, seed=SEED) if again else made
    edges = (1, 64, 128, 256, 512, 1024, 2048, 4096)
    return _of("mqar", model, made, _gaps(made, edges), start=1)


def recall_sitting(task: str, length: int, sequences: int, model: Any) -> Sitting:
    """A recall task for the recall model. BadInput for a length that does not hold it."""
    room = KEYS, VALUES, FILLER, length
    if task == "mqar":
        return _mqar(length, sequences, model)
    if task == "needle":
        made = needle(*room, sequences, seed=SEED)
        return _of(task, model, made, _gaps(made, (1, length // 2)))
    if task == "needles":
        return _of(task, model, needles(*room, 16, sequences, asked=8, seed=SEED), {})
    if task == "variables":
        return _of(task, model, variables(*room, sequences, seed=SEED), {})
    made = turns(*room, 16, sequences, questions=6, between=4, announced=True, seed=SEED)
    B, T = made.recall.input_ids.shape
    turn = (torch.arange(T) - made.context).div(made.turn, rounding_mode="floor").expand(B, T)
    by = {f"turn {k + 1}": made.recall.answer & (turn == k) for k in (0, 1, made.count - 1)}
    return _of(task, model, made.recall, by, start=made.context)


def induction_sitting(length: int, sequences: int, model: Any, vocabulary: int) -> Sitting:
    """Random tokens twice, for any model; a sixteenth of the vocabulary's ends is left out, where special tokens are."""
    edge = vocabulary // 16
    made = repeated(range(edge, vocabulary - edge), length // 2, sequences, seed=SEED)
    return _of("induction", model, made, {}, start=length // 2 + 1)


def text_sitting(batches: Sequence[Batch], model: Any) -> Sitting:
    """Held-out text in windows of one length; places by the distance of what they repeat."""
    ids, doc = torch.cat([b.input_ids for b in batches]), torch.cat([b.doc for b in batches])
    inside = torch.zeros_like(doc, dtype=torch.bool)
    inside[:, 1:] = doc[:, 1:] == doc[:, :-1]
    away, ends = reach(ids, doc), [*EDGES[1:], 1 << 40]
    by = {"not seen before": inside & (away == 0)}
    by |= {f"{low}+ back" if high == 1 << 40 else f"{low}-{high - 1} back": inside & (away >= low) & (away < high)
           for low, high in zip(EDGES, ends, strict=True)}
    T = ids.shape[1]
    if not (doc != doc[0, 0]).any():                           # one document has no interval over documents; its windows stand in for them
        doc = torch.arange(len(doc))[:, None].expand_as(doc)
    return Sitting("text", T, model, ids, inside, doc, max(1, T - DECODED), {k: v for k, v in by.items() if v.any()}, at_once=2)


def averaging_instance(length: int, sequences: int) -> Averaging:
    """q-sparse averaging with 8 named positions and 16 questions in `length` keys."""
    return averaging(length - 16, 8, sequences, questions=16, seed=SEED)


def check_tasks(tasks: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise BadInput for an unknown task or a length that some task does not hold."""
    for task in tasks:
        if task not in TASKS:
            raise BadInput(f"no task {task!r}; there are {', '.join(TASKS)}")
    if not tasks or not lengths:
        raise BadInput("no task or no length named")
    for length in lengths:
        if length < LEAST_LENGTH:
            raise BadInput(f"length={length} is below {LEAST_LENGTH} tokens, which the tasks need to hold their pairs")
        if length > RECALL_LENGTHS[-1] and (own := [task for task in tasks if task in RECALL]):
            raise BadInput(f"length={length} is more than the {RECALL_LENGTHS[-1]} tokens of the recall models; leave it or {own[0]} out")


Maker = Callable[[str, int], Sitting]
