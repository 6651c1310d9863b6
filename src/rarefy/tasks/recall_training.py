"""Making the recall model: a Llama of two layers that solves key-value recall, MQAR, needles and variable tracking.

Shape letters: B = sequences, T = tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..method import positive
from .needles import needles
from .recall import CONTEXT, FILLER, KEYS, VALUES, Recall, key_value, mqar
from .variables import variables

TOKENS = 2048
"""Tokens of a step, about."""


def _lesson(progress: float, step: int, seed: int) -> Recall:
    """Few pairs first, from which the two-layer lookup is learned; then all tasks, at any length that fits the context."""
    seed = seed * 1_000_003 + step
    if progress < 0.07 or (progress < 0.35 and step % 2 == 0):
        pairs, most = (4, 0) if progress < 0.07 else (16, 64)
        gap = step % (most + 1)
        return key_value(KEYS, VALUES, pairs, TOKENS // (4 * pairs + gap), filler=FILLER, gap=gap, seed=seed)
    if progress < 0.35:
        hops = 2 + step // 2 % 3
        return variables(KEYS, VALUES, FILLER, 16 * hops, TOKENS // (16 * hops), chains=2, hops=hops, seed=seed)
    longest = 256 if progress < 0.45 else CONTEXT
    length = int(torch.randint(128, longest + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    return any_task(step, length, max(2, TOKENS // length), seed)


def any_task(step: int, length: int, batch: int, seed: int) -> Recall:
    """One of the tasks, by turns; variable tracking, the slowest to learn, twice in five."""
    which = step % 5
    if which == 0:
        return mqar(KEYS, VALUES, FILLER, length, min(64, length // 8), batch, power=(0.01, 1.0)[step // 5 % 2], seed=seed)
    if which in (1, 4):
        return variables(KEYS, VALUES, FILLER, length, batch, seed=seed)
    if which == 2:
        return needles(KEYS, VALUES, FILLER, length, 16, batch, asked=8, seed=seed)
    return key_value(KEYS, VALUES, 32, batch, filler=FILLER, gap=length - 128, seed=seed)


def learn(model: Any, optimiser: torch.optim.Optimizer, task: Recall) -> float:
    """One step on a task; its loss before, in nats an answer."""
    state = model.model(input_ids=task.input_ids, use_cache=False).last_hidden_state
    loss = cross_entropy(model.lm_head(state[:, :-1][task.answer[:, 1:]]), task.input_ids[task.answer])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def train_recall_model(seed: int = 0, steps: int = 3600, on_step: Callable[[int, float], None] | None = None) -> nn.Module:
    """A Llama of 2 layers, width 64 and 4 heads of 32 that recalls values by key in contexts of up to 512 tokens.

    AdamW at 2e-3, cosine decay over the second half. A pure function of its arguments on one machine; the caller's
    random state is left as it was.

    Args:
        on_step: called with the step and its loss, in nats an answer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    positive("steps", steps)
    config = LlamaConfig(
        vocab_size=len(KEYS) + len(VALUES) + len(FILLER), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2 * CONTEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
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
            loss = learn(model, optimiser, _lesson(progress, step, seed))
            if on_step is not None:
                on_step(step, loss)
    return model.eval()
