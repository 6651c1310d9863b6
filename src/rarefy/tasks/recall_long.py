"""The recall model at 8,192 tokens: the weights of 512 with their slow rotations slowed down, and a short schooling at every length.

Rotary angles of the model of 512 tokens are of three kinds. Fast ones say "the token before"; they mean the same at any length. Slow
ones hardly turn in 512 tokens, and the model uses them as if they did not turn at all: beyond, they turn to where no training has
been, and recall is lost. Llama 3.1's rule for longer contexts tells them apart by wavelength and divides the speed of the slow ones
alone, which brings the answers back at once; what is then left to learn is that sixteen times as many keys share a softmax.

Shape letters: B = sequences, T = tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from ..method import positive
from .recall import CONTEXT
from .recall_training import any_task, learn

LONG_CONTEXT = 8192
"""Longest sequence of the long model's training, and tokens of a step."""


def stretched(model: Any, longest: int) -> Any:
    """A copy of a Llama whose rotations that take longer than its CONTEXT tokens are slowed by longest / CONTEXT.

    Those shorter than a quarter of CONTEXT keep their speed, those between are interpolated (Grattafiori et al. 2024, The Llama 3 Herd of
    Models, sec. 3.4.2; rope_type "llama3" of transformers). The copy is in evaluation mode.

    Raises:
        BadInput: longest below CONTEXT.
    """
    if longest < CONTEXT:
        raise BadInput(f"longest={longest} must be at least the {CONTEXT} tokens of the model's training")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 2 * longest
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": config.rope_parameters["rope_theta"], "factor": longest / CONTEXT, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT,
    }
    with torch.random.fork_rng(devices=[]):                    # drawing the weights that are about to be replaced
        made = type(model)(config)
    made.load_state_dict(model.state_dict())
    return made.eval()


def train_long_recall_model(
    model: Any, seed: int = 0, steps: tuple[int, int] = (240, 120), longest: int = LONG_CONTEXT, on_step: Callable[[int, float], None] | None = None
) -> nn.Module:
    """The stretched copy of `model`, trained on: first at lengths from 128 tokens, then from half of `longest`, even on a logarithmic scale.

    Each part has AdamW at 5e-4 after a warm-up of 20 steps, cosine decay to nothing, and about `longest` tokens a step. A pure function of its
    arguments on one machine.

    Args:
        model: the recall model of CONTEXT tokens; left as it is.
        steps: of the first part and of the second.
        on_step: called with the step and its loss, in nats an answer.
    """
    made, first = stretched(model, longest).train(), 0
    with torch.enable_grad():
        for count, least in zip(steps, (128, longest // 2), strict=True):
            optimiser = torch.optim.AdamW(made.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
            for step in range(positive("steps", count)):
                optimiser.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / count))
                number = seed * 1_000_003 + first + step + 500_009          # none of the sequences of the first training
                share = float(torch.rand((), generator=torch.Generator().manual_seed(number)))
                length = round(least * (longest / least) ** share)
                loss = learn(made, optimiser, any_task(step, length, longest // length, number))
                if on_step is not None:
                    on_step(first + step, loss)
            first += count
    return made.eval()
