"""Queries that choose for themselves: some at a time, over their own rows of a mask, by a compiled top-k."""

import pytest
import torch

from rarefy.attention import block
from rarefy.attention.dynamic.double_sparsity import DoubleSparsity
from rarefy.attention.dynamic.loki import Loki
from rarefy.attention.dynamic.lsh import LSH
from rarefy.attention.dynamic.twilight import Twilight
from rarefy.kernels.block_attention import block_attention, highest

METHODS = {"loki": lambda: Loki(0.2), "double sparsity": lambda: DoubleSparsity(0.2), "twilight": lambda: Twilight(0.2, dial=0.6),
           "lsh": lambda: LSH(dial=12)}


def qkv(B, H, G, T, S, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, s, D, generator=generator) for n, s in ((H, T), (G, S), (G, S)))


def masked(q, k, v, keep, scale):
    share = q.shape[1] // k.shape[1]
    score = (q.double() @ k.double().repeat_interleave(share, 1).mT * scale).masked_fill(~keep, -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v.double().repeat_interleave(share, 1)


class Cache:
    """Keeps what was described, of all keys."""

    def __init__(self, k):
        self.k, self.asked = k, 0

    def summary(self, name, make, every):
        self.asked += 1
        return make(self.k)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wants_gradients", [False, True])
def test_some_queries_at_a_time_choose_what_all_do(name, wants_gradients, monkeypatch):
    q, k, v = qkv(2, 4, 2, 70, 90, 16)
    method = METHODS[name]()
    if hasattr(method, "basis_GDD") or hasattr(method, "labels_GD"):
        method.observe(q, k, v)
        method.finish()
    keep = method.choose(q, k, True)
    monkeypatch.setattr(block, "AT_ONCE", 16)
    sizes, chosen = [], method.choose
    monkeypatch.setattr(method, "choose", lambda q, k, causal: sizes.append((q.shape[2], k.shape[2])) or chosen(q, k, causal))
    got = method.attend(q.requires_grad_(wants_gradients), k, v, scale=0.25, cache=Cache(k))
    assert sizes == [(16, 36), (16, 52), (16, 68), (16, 84), (6, 90)]                      # neither all queries nor keys that none sees
    torch.testing.assert_close(got.detach().double(), masked(q.detach(), k, v, keep, 0.25), atol=1e-5, rtol=0)
    assert method.measured_density() == pytest.approx(float(keep.sum()) / (8 * (70 * 90 - 70 * 69 // 2)), abs=1e-12)
    assert method._described is None and method.dims() == (4, 16, 90 - 69 / 2)
    if wants_gradients:
        got.sum().backward()
        assert q.grad is not None and q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_keys_are_described_once(monkeypatch):
    q, k, v = qkv(1, 2, 1, 40, 40, 16)
    method, calls = Twilight(0.2, dial=0.6), []
    monkeypatch.setattr(block, "AT_ONCE", 8)
    described = method.describe
    monkeypatch.setattr(Twilight, "describe", lambda self, k: calls.append(k.shape[2]) or described(k))
    method.attend(q, k, v, scale=0.25)
    assert calls == [40]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shares", [False, True])
def test_rows_of_a_mask(causal, dtype, shares):
    q, k, v = (x.to(dtype) for x in qkv(2, 4, 2, 37, 301, 24))
    keep = torch.rand(1 if shares else 2, 1 if shares else 4, 37, 301, generator=torch.Generator().manual_seed(1)) < 0.3
    keep[:, :, 3] = False
    seen = torch.arange(301) <= torch.arange(264, 301)[:, None] if causal else torch.ones(37, 301, dtype=torch.bool)
    got, lse = block_attention(q, k, v, keep, block=1, query_block=1, scale=0.3, causal=causal, return_lse=True)
    want = masked(q, k, v, keep & seen, 0.3)
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    score = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    torch.testing.assert_close(lse.double(), score.masked_fill(~(keep & seen), -torch.inf).logsumexp(-1), atol=1e-5, rtol=1e-6)
    assert not got[:, :, 3].any() and bool((lse[:, :, 3] == -torch.inf).all())


@pytest.mark.parametrize("N", [1, 7, 300, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "infinite", "zeros"])
def test_highest_by_sorting(N, kind):
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(20, N, generator=generator)
    if kind == "ties":
        x = x.round()
    if kind == "infinite":
        x[torch.rand(20, N, generator=generator) < 0.4], x[torch.rand(20, N, generator=generator) < 0.1] = -torch.inf, torch.inf
    if kind == "zeros":                                                                      # of both signs, which are equal, and below
        x = torch.where(x > 0, 0.0, -0.0) - (x.abs() < 0.1) * 1e-30
    keep = torch.randint(1, N + 1, (20, 1), generator=generator)
    want = torch.zeros(20, N, dtype=torch.bool)
    for row, order in enumerate((-x.double()).argsort(dim=-1, stable=True)):
        want[row, order[: int(keep[row])]] = True
    assert torch.equal(highest(x, keep), want)
    assert torch.equal(highest(x.double(), keep), want)
