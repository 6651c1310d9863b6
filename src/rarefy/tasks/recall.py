"""Recall from context: what a model can only know from tokens far back in its own window.

`repeated`: a random sequence twice; from the second time on every token but the first is known, by looking one period
back (the induction task of Olsson et al. 2022). `key_value`: keys with values, then all keys again in any order.
`mqar`: the same with the questions spread by a power law of gaps (Arora et al. 2023, Zoology, sec. 3 and app. E). `needle`:
one key with its value somewhere in filler, the key again at the end; for several of them see needles.py, for chains of
them variables.py. recall_training.py makes the small model that solves them all.

Shape letters: B = sequences, T = tokens, P = pairs, M = places for a question, A = answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive

KEYS, VALUES, FILLER = range(64), range(64, 128), range(128, 192)
"""The vocabulary of the recall model."""
CONTEXT = 512
"""Longest sequence of its training."""


@dataclass(frozen=True)
class Recall:
    """Sequences and the places whose token can be recalled."""

    input_ids: Tensor
    """[B, T] int64."""
    answer: Tensor
    """[B, T] bool: tokens that context determines; the model must give them from the position before."""
    gap: int
    """Least distance from an answer to where it stood before."""


def repeated(tokens: Sequence[int], period: int, batch: int, *, start: int | None = None, seed: int = 0) -> Recall:
    """Random sequences of `period` different tokens, twice, after an optional start token."""
    positive("period", period, len(tokens))
    positive("batch", batch)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.as_tensor(tokens)
    once = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:period]] for _ in range(batch)])
    head = [] if start is None else [torch.full((batch, 1), start)]
    ids = torch.cat([*head, once, once], 1)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, len(head) + period + 1 :] = True
    return Recall(ids, answer, period)


def key_value(
    keys: Sequence[int], values: Sequence[int], pairs: int, batch: int, *, filler: Sequence[int] = (), gap: int = 0, seed: int = 0
) -> Recall:
    """`pairs` keys with their values, `gap` filler tokens, then every key again in random order, each with its value."""
    positive("pairs", pairs, len(keys))
    positive("batch", batch)
    if gap and not len(filler):
        raise BadInput(f"gap={gap} needs filler tokens")
    generator = torch.Generator().manual_seed(seed)
    rows, known = [], []
    for _ in range(batch):
        key = torch.as_tensor(keys)[torch.randperm(len(keys), generator=generator)[:pairs]]
        value = torch.as_tensor(values)[torch.randint(len(values), (pairs,), generator=generator)]
        again = torch.randperm(pairs, generator=generator)
        between = torch.as_tensor(filler)[torch.randint(len(filler), (gap,), generator=generator)] if gap else torch.empty(0, dtype=torch.long)
        told, asked = torch.stack([key, value], 1).flatten(), torch.stack([key[again], value[again]], 1).flatten()
        rows.append(torch.cat([told, between, asked]))
        mark = torch.zeros(len(rows[-1]), dtype=torch.bool)
        mark[2 * pairs + gap + 1 :: 2] = True
        known.append(mark)
    return Recall(torch.stack(rows), torch.stack(known), gap + 2)


def mqar(
    keys: Sequence[int], values: Sequence[int], filler: Sequence[int], length: int, pairs: int, batch: int, *, power: float = 0.01, seed: int = 0
) -> Recall:
    """`pairs` keys with their values first; then each key once more, with its value, at a gap drawn from a power law.

    The (length - 2 * pairs) // 2 places behind the table are numbered 1, 2, ...; place i is drawn with probability in
    proportion to i ** (power - 1), without replacement (Arora et al. 2023: most recalls of text are near, a few far). All
    other places hold filler.

    Args:
        power: the law's exponent, above 0; 0.01 in the paper, 1 spreads the questions evenly.

    Raises:
        BadInput: length below 4 * pairs, more pairs than keys, power not above 0, empty values or filler.
    """
    positive("pairs", pairs, len(keys))
    positive("batch", batch)
    if length < 4 * pairs:
        raise BadInput(f"length={length} must be at least 4 * pairs = {4 * pairs}: a table and a question a pair")
    if not power > 0:
        raise BadInput(f"power={power} must be above 0; 1 spreads the questions evenly")
    if not (len(values) and len(filler)):
        raise BadInput("mqar needs values and filler tokens")
    generator = torch.Generator().manual_seed(seed)
    key_BP = torch.as_tensor(keys)[torch.rand(batch, len(keys), generator=generator).argsort(1)[:, :pairs]]
    value_BP = torch.as_tensor(values)[torch.randint(len(values), (batch, pairs), generator=generator)]
    law_M = torch.arange(1, (length - 2 * pairs) // 2 + 1).double().log() * (power - 1)
    # The largest of log p + Gumbel noise, one after another, are draws without replacement in their order.
    noise_BM = -(-torch.rand(batch, len(law_M), generator=generator, dtype=torch.float64).clamp_min(1e-300).log()).log()
    at_BP = 2 * pairs + 2 * (law_M + noise_BM).topk(pairs, 1).indices
    ids = torch.as_tensor(filler)[torch.randint(len(filler), (batch, length), generator=generator)]
    ids[:, : 2 * pairs] = torch.stack([key_BP, value_BP], 2).flatten(1)
    ids.scatter_(1, at_BP, key_BP).scatter_(1, at_BP + 1, value_BP)
    answer = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, at_BP + 1, True)
    return Recall(ids, answer, int((at_BP - 2 * torch.arange(pairs)).min()))


def asked_again(task: Recall, count: int, *, seed: int = 0) -> Recall:
    """A task with `count` of each sequence's questions put once more behind its end, in any order, each with its answer.

    Raises:
        BadInput: more than the questions of a sequence.
    """
    positive("count", count, int(task.answer.sum(-1).min()))
    generator = torch.Generator().manual_seed(seed)
    lottery_BT = torch.rand(task.answer.shape, generator=generator).masked_fill(~task.answer, -1)
    at_BK = lottery_BT.topk(count, 1).indices
    more = torch.stack([task.input_ids.gather(1, at_BK - 1), task.input_ids.gather(1, at_BK)], 2).flatten(1)
    mark = torch.zeros_like(more, dtype=torch.bool)
    mark[:, 1::2] = True
    made = Recall(torch.cat([task.input_ids, more], 1), torch.cat([task.answer, mark], 1), 0)
    return Recall(made.input_ids, made.answer, int(distances(made)[made.answer].min()))


def needle(
    keys: Sequence[int], values: Sequence[int], filler: Sequence[int], length: int, batch: int, *, depth: float | None = None, seed: int = 0
) -> Recall:
    """Sequences of `length` tokens: filler with one key and its value in it, then the key and, last, the value again.

    Args:
        depth: where the pair stands, from 0 (first) to 1 (next to the question), or None for anywhere.

    Raises:
        BadInput: length below 4, depth outside [0, 1], empty keys, values or filler.
    """
    positive("batch", batch)
    if length < 4:
        raise BadInput(f"length={length} must be at least 4: a pair and a question")
    if depth is not None and not 0 <= depth <= 1:
        raise BadInput(f"depth={depth} must be in [0, 1]")
    if not (len(keys) and len(values) and len(filler)):
        raise BadInput("needle needs keys, values and filler tokens")
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.as_tensor(t)[torch.randint(len(t), (batch,), generator=generator)] for t in (keys, values))
    ids = torch.as_tensor(filler)[torch.randint(len(filler), (batch, length), generator=generator)]
    last = length - 4                                       # the pair's last place, next to the question
    at = torch.randint(last + 1, (batch,), generator=generator) if depth is None else torch.full((batch,), round(depth * last))
    row = torch.arange(batch)
    ids[row, at], ids[row, at + 1], ids[:, -2], ids[:, -1] = key, value, key, value
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -1] = True
    return Recall(ids, answer, int(length - 2 - at.max()))


def recall_accuracy(model: nn.Module, task: Recall, *, at_once: int = 8) -> Interval:
    """Share of answers that are the model's first choice, with an interval over sequences."""
    return ratio_interval(hits(model, task, at_once=at_once).sum(-1), task.answer.sum(-1))


def hits(model: nn.Module, task: Recall, *, at_once: int = 8) -> Tensor:
    """[B, T] bool: answers that are the model's first choice, given all tokens before them at once."""
    with torch.no_grad():
        device = next(model.parameters(), task.input_ids).device
        guess = [model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu() for ids in task.input_ids.split(at_once)]
    right = torch.zeros_like(task.answer)
    right[:, 1:] = (torch.cat(guess) == task.input_ids[:, 1:]) & task.answer[:, 1:]
    return right


def distances(task: Recall) -> Tensor:
    """[B, T] int64: at each answer, tokens back to the last earlier place of the same two tokens (its question and itself); 0 elsewhere.

    An answer that stands nowhere before its question has distance 0.
    """
    out = torch.zeros_like(task.input_ids)
    row_A, at_A = task.answer.nonzero(as_tuple=True)
    ids = task.input_ids
    same = (ids[row_A, 1:] == ids[row_A, at_A][:, None]) & (ids[row_A, :-1] == ids[row_A, at_A - 1][:, None])
    place = torch.arange(1, ids.shape[1])
    last_A = torch.where(same & (place < at_A[:, None]), place, 0).amax(1)
    out[row_A, at_A] = torch.where(last_A > 0, at_A - last_A, 0)
    return out


def accuracy_by_gap(right: Tensor, task: Recall, edges: Sequence[int]) -> dict[str, Interval]:
    """The gap law: accuracy of the answers whose distance lies in [edges[i], edges[i + 1]), with intervals over sequences.

    Args:
        right: [B, T] bool, as `hits` gives it. edges: at least two, rising; ranges without an answer are left out.
    """
    if len(edges) < 2 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise BadInput(f"edges={list(edges)} must be at least two rising distances")
    away = distances(task)
    out = {}
    for low, high in zip(edges, edges[1:], strict=False):
        here = task.answer & (away >= low) & (away < high)
        if here.any():
            out[f"{low}-{high - 1}"] = ratio_interval((right & here).sum(-1), here.sum(-1))
    return out
