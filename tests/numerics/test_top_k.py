"""top_k against sorting, every dtype, ties, infinities and NaN; encode_top_k's screened path against a float64 product.

Shape letters: N = rows, F = units, K = kept, D = width.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.kernels import pool
from rarefy.kernels.sparse_encode import encode_batch_top_k, encode_top_k
from rarefy.kernels.sparse_encode.screen import pays
from rarefy.kernels.top_k import top_k

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def chosen(scores_NF: Tensor, k: int) -> list[set[int]]:
    """By Python's own sort: largest first, of equals the lower unit."""
    return [set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]) for row in scores_NF.double().tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f", "k"), [(1, 1), (5, 2), (63, 63), (100, 7), (111, 32), (4096, 32), (1000, 999), (70, 1)])
def test_equals_sorting(dtype: torch.dtype, f: int, k: int) -> None:
    scores = torch.randn(9, f).to(dtype)
    scores[3] = scores[3].round()                       # many equals
    scores[4] = 0.5
    scores[5, ::2], scores[5, 1::2] = 0.0, -0.0
    scores[6, 0], scores[6, -1] = torch.inf, -torch.inf
    scores[7] = -torch.inf
    got = top_k(scores, k)
    assert got.dtype == torch.long and [set(row) for row in got.tolist()] == chosen(scores, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=90), st.data())
def test_equals_sorting_of_anything(row: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    scores = torch.tensor([row], dtype=torch.float32)
    assert set(top_k(scores, k)[0].tolist()) == chosen(scores, k)[0]


def test_nan_counts_as_the_largest() -> None:
    scores = torch.tensor([[1.0, torch.nan, torch.inf, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert [set(row) for row in top_k(scores, 2).tolist()] == [{1, 2}, {2, 3}]


def test_strided_scores_and_no_rows() -> None:
    scores = torch.randn(40, 7).T
    assert [set(row) for row in top_k(scores, 3).tolist()] == chosen(scores, 3)
    assert top_k(scores[:0], 3).shape == (0, 3)


def table(seed: int, n: int = 200, f: int = 2048, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((n, d), (f, d), (f,)))  # type: ignore[return-value]


def same_choice(x: Tensor, w: Tensor, b: Tensor, k: int) -> None:
    """Units and values are those of a float64 product, but for units whose float64 values float32 cannot tell apart."""
    value, index = encode_top_k(x, w, b, k)
    exact = x.double() @ w.double().T + b.double()
    size = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1).max() + b.double().abs().max()
    assert ((value.double() - exact.gather(1, index)).abs() <= 1e-6 * size).all()
    assert all(len(set(row)) == k for row in index.tolist())
    left = exact.scatter(1, index, -torch.inf)
    assert (exact.gather(1, index).amin(1) >= left.amax(1) - 1e-6 * size[:, 0]).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_screened_product_chooses_as_float32_does(seed: int) -> None:
    x, w, b = table(seed)
    same_choice(x, w, b, 32)
    same_choice(x * torch.logspace(-3, 3, len(x))[:, None], w * torch.logspace(-2, 2, len(w))[:, None], b, 32)
    same_choice(x, w, b - 40, 32)                                       # hardly anything positive: the plain way
    same_choice(x, w.repeat_interleave(2, 0)[: len(w)], b.repeat_interleave(2)[: len(b)], 31)     # pairs of equal units
    same_choice(x + 30, w, b, 32)                                       # rounding of x' is large beside the differences
    same_choice(x * 1e25, w * 1e6, b, 32)                               # products near the end of the range


def test_the_screen_is_what_runs_here() -> None:
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    assert pays(2048, 4096, 256, 32) == bool(fast and torch.backends.mkldnn.is_available())
    assert not pays(1, 4096, 256, 32) and not pays(2048, 64, 256, 32)


def test_values_under_autocast_stay_exact() -> None:
    x, w, b = table(9)
    with torch.autocast("cpu", torch.bfloat16):
        value, index = encode_top_k(x, w, b, 32)
    exact = x.double() @ w.double().T + b.double()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact.gather(1, index), rtol=1e-5, atol=1e-4)
    best = exact.topk(32).values.sum(1)
    assert (exact.gather(1, index).sum(1) > 0.99 * best).all()


@pytest.mark.parametrize("n", [1, 40, 600])
def test_gradients_of_the_screened_path(n: int) -> None:
    x, w, b = (t.requires_grad_() for t in table(3, n=n))
    centre = torch.randn(64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value, index = encode_top_k(x, w, b, 8, centre)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((value * weight).sum(), (x, w, b, centre))
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b, centre)]
    dense = (leaves[0] - leaves[3]) @ leaves[1].T + leaves[2]
    want = torch.autograd.grad((dense.gather(1, index) * weight).sum(), leaves)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "keep"), [(3, 0), (3, 5), (40, 400), (600, 3000)])
def test_the_largest_of_a_batch(n: int, keep: int) -> None:
    x, w, b = (t.double().requires_grad_() for t in table(6, n=n, f=50, d=9))
    value, unit, edges = encode_batch_top_k(x, w, b, keep)
    dense = x @ w.T + b
    numbers = dense.flatten().tolist()
    want = sorted(i for i in sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:keep] if numbers[i] > 0)
    row = torch.repeat_interleave(torch.arange(n), edges.diff())
    assert (row * 50 + unit).tolist() == want
    torch.testing.assert_close(value, dense.flatten()[want])
    if keep:
        got = torch.autograd.grad(value.square().sum(), (x, w, b))
        for a, c in zip(got, torch.autograd.grad(dense.flatten()[want].square().sum(), (x, w, b)), strict=True):
            torch.testing.assert_close(a, c)


def test_pooled_memory_is_not_shared_while_somebody_holds_it() -> None:
    pool.clear()
    first = pool.empty((1 << 19,), torch.float32)
    first.fill_(1.0)
    view = first[:10]
    del first
    second = pool.empty((1 << 19,), torch.float32)
    second.fill_(2.0)
    assert view.tolist() == [1.0] * 10 and pool.held() == 2 * (1 << 21)
    del view, second
    pool.clear()
    assert pool.held() == 0
