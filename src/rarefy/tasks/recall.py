"""Recall from context: what a model can only know from tokens far back in its own window.

`repeated`: a random sequence twice; from the second time on every token but the first is known, by looking one period
back (the induction task of Olsson et al. 2022). `key_value`: multi-query associative recall (Arora et al. 2023,
Zoology): keys with values, then the keys again in any order. `needle`: one key with its value somewhere in filler, the
key again at the end. `train_recall_model` makes a small model that solves the last two, in about 90 s on one core.

Shape letters: B = sequences, T = tokens, P = pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive

KEYS, VALUES, FILLER = range(64), range(64, 128), range(128, 192)
"""The vocabulary of `train_recall_model`."""
CONTEXT = 256
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


def _lesson(progress: float, step: int, seed: int) -> Recall:
    """Few pairs first, from which the two-layer lookup is learned; then many, any gap that fits the context, and needles."""
    seed = seed * 1_000_003 + step
    generator = torch.Generator().manual_seed(seed)
    if progress > 0.4 and step % 4 == 3:
        return needle(KEYS, VALUES, FILLER, int(torch.randint(16, CONTEXT + 1, (1,), generator=generator)), 16, seed=seed)
    if progress < 0.28:
        pairs, most = (4, 0) if progress < 0.17 else (8, 0)
    else:
        pairs, most = (16, 32) if progress < 0.4 else ((16, 32)[step % 2], CONTEXT)
    gap = int(torch.randint(min(most, CONTEXT - 4 * pairs) + 1, (1,), generator=generator))
    return key_value(KEYS, VALUES, pairs, max(8, 2048 // (4 * pairs + gap)), filler=FILLER, gap=gap, seed=seed)


def train_recall_model(seed: int = 0, steps: int = 2400, on_step: Callable[[int, float], None] | None = None) -> nn.Module:
    """A Llama of 2 layers, width 64 and 4 heads that recalls values by key in contexts of up to 256 tokens.

    AdamW at 2e-3, cosine decay over the second half. A pure function of its arguments on one machine; the caller's
    random state is left as it was.

    Args:
        on_step: called with the step and its loss, in nats an answer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    positive("steps", steps)
    config = LlamaConfig(
        vocab_size=len(KEYS) + len(VALUES) + len(FILLER), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    with torch.enable_grad():
        for step in range(steps):
            progress = step / steps
            decay = 1.0 if progress < 0.5 else 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * (2 * progress - 1)))
            optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * decay
            task = _lesson(progress, step, seed)
            state = model.model(input_ids=task.input_ids, use_cache=False).last_hidden_state
            loss = cross_entropy(model.lm_head(state[:, :-1][task.answer[:, 1:]]), task.input_ids[task.answer])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if on_step is not None:
                on_step(step, loss.item())
    return model.eval()


@torch.no_grad()
def recall_accuracy(model: nn.Module, task: Recall, *, at_once: int = 8) -> Interval:
    """Share of answers that are the model's first choice, with an interval over sequences."""
    hits = []
    for ids, answer in zip(task.input_ids.split(at_once), task.answer.split(at_once), strict=True):
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        hits.append(((guess == ids[:, 1:]) & answer[:, 1:]).sum(-1))
    return ratio_interval(torch.cat(hits), task.answer.sum(-1))
