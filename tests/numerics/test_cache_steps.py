"""Steps of a cache as one call against what they mean, written out entry by entry in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.cache import make
from rarefy.attention.cache.policy import _Served
from rarefy.errors import BadInput
from rarefy.kernels import cache_steps as steps
from rarefy.kernels.block_attention import page_meta

SHAPES = [(2, 4, 2, 37, 64), (1, 5, 1, 16, 20), (1, 2, 2, 1, 8), (2, 8, 1, 130, 80), (1, 3, 3, 63, 33)]


def drawn(shape: tuple[int, ...], room: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, new key, new value, room for keys, room for values): what is behind the held entries is not a number."""
    B, H, G, M, D = shape
    r = torch.Generator().manual_seed(sum(shape))
    stores = torch.randn(2, B, G, M + room, D, generator=r)
    stores[:, :, :, M:] = torch.nan
    new_k, new_v = torch.randn(2, B, G, 1, D, generator=r).unbind()
    return 2 * torch.randn(B, H, 1, D, generator=r), new_k, new_v, stores[0].contiguous(), stores[1].contiguous()


def over(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out [D], lse, probabilities) of one query, float64."""
    logit = k.double() @ q.double() * scale
    return logit.softmax(-1) @ v.double(), logit.logsumexp(-1), logit.softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("call", [steps.evicting_step, steps.evicting_reference])
def test_an_evicting_step_attends_to_all_and_drops_the_least(call: Any, summed: bool, shape: tuple[int, ...]) -> None:
    q, new_k, new_v, k, v = drawn(shape)
    B, H, G, M, _ = shape
    random = torch.Generator().manual_seed(3)
    at = torch.stack([torch.randperm(2 * M, generator=random)[: M + 5] if 2 * M >= M + 5 else torch.arange(M + 5) for _ in range(B * G)])
    at = at.int().view(B, G, -1).contiguous()
    sums = torch.rand(B, G, M + 5, generator=random).mul(4).round() / 4 if summed else None          # equal sums: the earliest goes
    before = {"k": k.clone(), "v": v.clone(), "at": at.clone(), "sum": torch.zeros(()) if sums is None else sums.clone()}
    first, recent, place = 2, int(1.5 * M), 9 * M
    out, lse = call(q, new_k, new_v, k, v, at, sums, held=M, place=place, first=first, recent=recent, drop=True, scale=0.2)
    for b in range(B):
        for g in range(G):
            keys, values = (torch.cat([before[n][b, g, :M], new[b, g]]) for n, new in (("k", new_k), ("v", new_v)))
            got = torch.zeros(M + 1, dtype=torch.float64)
            for h in range(g * H // G, (g + 1) * H // G):
                wanted, log, p = over(q[b, h, 0], keys, values, 0.2)
                torch.testing.assert_close(out[b, h, 0].double(), wanted, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(lse[b, h, 0].double(), log, rtol=1e-5, atol=1e-5)
                got += p
            places = before["at"][b, g, :M].tolist()
            worth = [places[j] if sums is None else float(before["sum"][b, g, j] + got[j]) for j in range(M)]
            worth = [x if first <= s <= recent else float("inf") for x, s in zip(worth, places, strict=True)]
            victim = min(range(M), key=lambda j: (worth[j], places[j]))
            stay = {places[j]: keys[j] for j in range(M) if j != victim} | {place: keys[M]}
            assert sorted(at[b, g, :M].tolist()) == sorted(stay) and int(at[b, g, M]) == places[victim]
            for j, s in enumerate(at[b, g, :M].tolist()):
                assert torch.equal(k[b, g, j], stay[s])
            assert torch.equal(k[b, g, M], keys[victim]) and torch.equal(v[b, g, M], values[victim])      # the caller may still pack it
            if sums is not None:
                assert float(sums[b, g, : M + 1].sum()) == pytest.approx(float(before["sum"][b, g, :M].sum()) + H // G, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_goes_unless_it_is_said(dtype: torch.dtype) -> None:
    q, new_k, new_v, k, v = (x.to(dtype) for x in drawn((1, 4, 2, 20, 32)))
    at = torch.arange(25, dtype=torch.int32).expand(1, 2, -1).contiguous()
    out, _ = steps.evicting_step(q, new_k, new_v, k, v, at, None, held=20, place=20, first=0, recent=0, drop=False, scale=0.2)
    wanted = over(q[0, 3, 0], k[0, 1, :21], v[0, 1, :21], 0.2)[0]
    torch.testing.assert_close(out[0, 3, 0].double(), wanted, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(k[0, :, 20], new_k[0, :, 0]) and at[0, 0, :21].tolist() == list(range(21))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("call", [steps.pages_step, steps.pages_reference])
def test_a_page_step_reads_the_pages_of_highest_bound(call: Any, keep: int, shape: tuple[int, ...]) -> None:
    q, new_k, new_v, k, v = drawn(shape)
    B, H, G, M, _ = shape
    page = 4
    N = M // page + 1
    keep = min(keep, N)
    meta = torch.full((B, G, N + 2, 2 * k.shape[-1]), torch.nan)
    held = page_meta(k[:, :, :M], page)
    meta[:, :, : held.shape[2]] = held
    out, lse = call(q, new_k, new_v, k, v, meta, held=M, page=page, keep=keep, scale=0.2)
    assert torch.equal(meta[:, :, :N], page_meta(k[:, :, : M + 1], page)) and torch.equal(k[:, :, M], new_k[:, :, 0])
    for b in range(B):
        for h in range(H):
            g = h * G // H
            pages = [range(n * page, min(M + 1, (n + 1) * page)) for n in range(N)]
            bound = [float((q[b, h, 0] * k[b, g, list(p)]).amax(0).double().sum()) for p in pages]
            bound[-1] = float("inf")
            read = [s for n in sorted(range(N), key=lambda n: -bound[n])[:keep] for s in pages[n]]
            wanted, log, _ = over(q[b, h, 0], k[b, g, read], v[b, g, read], 0.2)
            torch.testing.assert_close(out[b, h, 0].double(), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse[b, h, 0].double(), log, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("width", [16, 20])
def test_a_compiled_step_over_chunks_is_the_layers_own(width: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    r = torch.Generator().manual_seed(7)
    T, angle = 60, torch.rand(1, 90, 8, generator=torch.Generator().manual_seed(1)) * 6
    rotary = (torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()) if turned else None
    q, k, v = torch.randn(2, 6, 90, width, generator=r), *torch.randn(2, 2, 2, 90, width, generator=r).unbind()
    taken = []

    def run(compiled: bool) -> tuple[Tensor, int]:
        policy = make("shadow", budget=0.3, rank=12, chunk=4, outliers=2, local=1)
        layer: Any = policy.layer(policy, 0)
        policy.layers, policy.is_on, out = [layer], True, []
        own = layer.step
        layer.step = (lambda *a, **b: taken.append(1) or own(*a, **b)) if compiled else lambda *a, **b: None
        for start, stop in ((0, T), *((t, t + 1) for t in range(T, 90))):
            part = [x[:, :, start:stop] for x in (q, k, v)]
            layer.update(*part[1:])
            turn = None if rotary is None else (rotary[0][:, start:stop], rotary[1][:, start:stop])
            out.append(_Served(policy).attend(
                *part, scale=0.3, causal=True, padding_BS=None, layer=0, cache=layer, rotary=turn, hidden_BTD=None))
        return torch.cat(out, 2), policy.fetched_bytes()  # type: ignore[attr-defined]

    (fast, read), (slow, wanted) = run(True), run(False)
    assert len(taken) == 30 and read == wanted > 0
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    q, new_k, new_v, k, v = drawn((1, 4, 2, 20, 16))
    at, how = torch.zeros(1, 2, 25, dtype=torch.int32), {"place": 1, "first": 0, "recent": 9, "drop": False, "scale": 1.0}
    with pytest.raises(BadInput, match="room for one more"):
        steps.evicting_step(q, new_k, new_v, k, v, at, None, held=25, **how)
    with pytest.raises(BadInput, match="int32"):
        steps.evicting_step(q, new_k, new_v, k, v, at.long(), None, held=20, **how)
    with pytest.raises(BadInput, match="do not fit one another"):
        steps.evicting_step(q[:, :3], new_k, new_v, k, v, at, None, held=20, **how)
    meta = torch.zeros(1, 2, 5, 32)
    with pytest.raises(BadInput, match="keep=7"):
        steps.pages_step(q, new_k, new_v, k, v, meta, held=16, page=4, keep=7, scale=1.0)
    with pytest.raises(BadInput, match="chunks of 4"):
        steps.chunks_step(
            q, new_k, new_v, k, v, at, torch.zeros(1, 2, 9, 16), torch.ones(1, 2, 9, dtype=torch.bool), torch.zeros(1, 1, 36, 3),
            torch.zeros(1, 3, 32), torch.zeros(1, 2, 35, 16), None, held=20, place=20, keep=1, chunk=4, scale=1.0)
