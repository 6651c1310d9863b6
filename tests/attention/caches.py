"""What tests of cache policies share: small policies, and driving one layer by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.attention.cache import Policy, make
from rarefy.attention.cache.controller import Controller
from rarefy.attention.cache.policy import _Served
from site_models import inputs

SMALL: dict[str, dict[str, Any]] = {
    "random": {}, "window": {"sinks": 2}, "h2o": {}, "snapkv": {"window": 4, "kernel": 3}, "pages": {"page": 4},
    "mustafar": {"recent": 4}, "csr": {"recent": 4, "atoms": 40, "rounds": 2}, "shadow": {"chunk": 4, "outliers": 1, "local": 1},
    "shared": {}, "alisa": {"local": 3}, "probe": {"block": 4}, "sentinel": {"opening": 61, "closing": 62},
    "adore": {"states": 4, "steps": 4}, "attamba": {"recent": 4, "sinks": 2, "steps": 3},
}


def small(name: str, budget: float | list[float], model: Any = None, family: str = "llama") -> Policy:
    """A policy with settings for short texts; fitted to the model where it must be."""
    budget = 1.0 if name == "sentinel" else budget
    policy = make(name, budget=budget, **SMALL[name])
    if model is not None and hasattr(policy, "fit"):
        policy.fit(model, inputs(family, 4, 24, seed=11)["input_ids"])  # type: ignore[attr-defined]
    return policy


def qkv(batch: int, heads: int, key_heads: int, tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, width, generator=random)
    k, v = torch.randn(2, batch, key_heads, tokens, width, generator=random).unbind()
    return q * 1.5, k, v


def drive(
    policy: Policy, q: Tensor, k: Tensor, v: Tensor, cuts: Sequence[int], padding: Tensor | None = None,
    after: Callable[[Any], None] = lambda layer: None,
) -> Tensor:
    """Feed chunks that end at `cuts` through one layer of a policy; `after` sees the layer behind each. Gives all outputs."""
    layer, served, out, start = policy.layer(policy, 0), _Served(policy), [], 0
    policy.layers, policy.is_on = [layer], True
    for stop in cuts:
        part = [x[:, :, start:stop] for x in (q, k, v)]
        layer.update(*part[1:])
        out.append(served.attend(
            *part, scale=q.shape[-1] ** -0.5, causal=True, padding_BS=None if padding is None else padding[:, :stop], layer=0, cache=layer,
            rotary=None, hidden_BTD=part[0][:, 0],
        ))
        after(layer)
        start = stop
    return torch.cat(out, 2)


def controller(width: int, key_heads: int, states: int) -> Controller:
    """An unfitted controller, the same each time, whose scores differ much."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Controller(width, key_heads, states).requires_grad_(False)
        for parameter in made.parameters():
            parameter.normal_()
    return made


def over(q_D: Tensor, k_MD: Tensor, v_MD: Tensor) -> Tensor:
    """softmax(q . k / sqrt(D)) v of one query, in float64."""
    p = (k_MD.double() @ q_D.double() / q_D.shape[-1] ** 0.5).softmax(-1)
    return p @ v_MD.double()
