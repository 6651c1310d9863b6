"""Quest's step beside rarefy's cache, which is one compiled call, against the same step over the keys alone."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention import quest
from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.quest_top_p import QuestTopP
from rarefy.attention.quest import Quest
from rarefy.kernels import native


@pytest.fixture
def fused(monkeypatch):
    """How many steps were one call."""
    calls: list[int] = []
    real = quest.pages_step
    monkeypatch.setattr(quest, "pages_step", lambda *args, **how: calls.append(how["held"]) or real(*args, **how))
    return calls


def steps(method, plain, B, H, G, D, S, count=9):
    """The last `count` steps beside a cache and without one, and what each counted."""
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(B, n, S, D, generator=generator) for n in (H, G, G))
    cache = Cache()
    cache.update(k[:, :, :-count], v[:, :, :-count], 0)
    for t in range(S - count, S):
        new = slice(t, t + 1)
        keys, values = cache.update(k[:, :, new], v[:, :, new], 0)
        with torch.no_grad():
            beside = method.attend(q[:, :, new], keys, values, scale=0.3, cache=cache.layers[0])
            alone = plain.attend(q[:, :, new], k[:, :, : t + 1], v[:, :, : t + 1], scale=0.3)
        yield beside, alone, method.measured_density(), plain.measured_density()
    assert torch.equal(cache.layers[0].keys, k) and torch.equal(cache.layers[0].values, v)


@pytest.mark.skipif(not native.serves(torch.zeros(1), dtypes=(torch.float32,)), reason="needs numba")
@pytest.mark.parametrize(("sizes", "block", "budget"), [
    ((2, 4, 2, 16, 67), 4, 0.3), ((1, 8, 8, 64, 300), 16, 0.1), ((1, 4, 2, 32, 33), 16, 1.0), ((3, 6, 3, 8, 16), 16, 0.5)])
def test_one_call_gives_what_the_parts_give(fused, sizes, block, budget):
    for beside, alone, kept, wanted in steps(Quest(budget, block).eval(), Quest(budget, block).eval(), *sizes):
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)
        assert kept == pytest.approx(wanted)
    assert len(fused) == 9


def test_what_it_does_not_serve_goes_by_parts(fused):
    for beside, alone, _, _ in steps(QuestTopP(0.3, 4, dial=0.8).eval(), QuestTopP(0.3, 4, dial=0.8).eval(), 1, 4, 2, 8, 40):
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)
    q, cache = torch.randn(1, 2, 1, 8, requires_grad=True), Cache()
    k, v = cache.update(torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), 0)
    Quest(0.3, 4).attend(q, k, v, scale=0.3, cache=cache.layers[0]).sum().backward()
    assert q.grad is not None and not fused
