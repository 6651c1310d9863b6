"""encode_top_k by absolute value, screened and plain, and encode_group_max, against sorting of a float64 product.

Shape letters: N = rows, F = units, K = kept, D = width, G = groups.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.kernels.sparse_encode import encode_group_max, encode_group_max_reference, encode_top_k, encode_top_k_reference
from rarefy.kernels.sparse_encode.screen import screened_top_k


def table(seed: int, n: int = 200, f: int = 2048, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((n, d), (f, d), (f,)))  # type: ignore[return-value]


def by_sorting(row: list[float], k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:k])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "f", "k"), [(3, 1, 1), (5, 40, 7), (300, 111, 16), (0, 9, 2)])
def test_plain_products(dtype: torch.dtype, n: int, f: int, k: int) -> None:
    x, w, b = (t.to(dtype) for t in table(1, n, f, 9))
    if f > 4:
        w[3], b[3] = -w[1], -b[1]                                   # equal sizes: the lower unit is chosen
    value, index = encode_top_k(x, w, b, k, absolute=True)
    dense = torch.nn.functional.linear(x, w, b)
    assert [set(row) for row in index.tolist()] == [by_sorting(row, k) for row in dense.tolist()]
    torch.testing.assert_close(value, dense.gather(1, index))
    other = encode_top_k_reference(x, w, b, k, absolute=True)[1]
    assert [set(row) for row in other.tolist()] == [set(row) for row in index.tolist()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("screened", [True, False])
def test_screened_products_choose_as_float32_does(seed: int, screened: bool) -> None:
    """Units and values are those of a float64 product, but for units whose float64 values float32 cannot tell apart."""
    plain = x, w, b = table(seed)
    spread = (x * torch.logspace(-3, 3, len(x))[:, None], w * torch.logspace(-2, 2, len(w))[:, None], b)
    shifted = (x + 30, w, b - 40)                                   # the largest are negative
    for case in (plain, spread, shifted):
        x, w, b = case
        if screened:
            value, index, done = screened_top_k(x, w, b, 32, False, True)
            assert done.float().mean() > 0.9
        else:
            value, index = encode_top_k(x, w, b, 32, absolute=True)
            done = torch.ones(len(x), dtype=torch.bool)
        exact = x.double() @ w.double().T + b.double()
        size = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1).max() + b.double().abs().max()
        x, exact, size, value, index = (t[done] for t in (x, exact, size, value, index))
        assert all(len(set(row)) == 32 for row in index.tolist())
        assert ((value.double() - exact.gather(1, index)).abs() <= 1e-6 * size).all()
        left = exact.abs().scatter(1, index, -torch.inf)
        assert (exact.abs().gather(1, index).amin(1) >= left.amax(1) - 1e-6 * size[:, 0]).all()
        assert (value < 0).any()


@pytest.mark.parametrize("n", [1, 40, 600])
def test_gradients_by_absolute_value(n: int) -> None:
    x, w, b = (t.double().requires_grad_() for t in table(3, n=n, f=96, d=11))
    value, index = encode_top_k(x, w, b, 8, absolute=True)
    dense = x @ w.T + b
    got = torch.autograd.grad(value.pow(3).sum(), (x, w, b))
    for a, c in zip(got, torch.autograd.grad(dense.gather(1, index).pow(3).sum(), (x, w, b)), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("n", [0, 1, 40, 600])
@pytest.mark.parametrize("groups", [1, 6, 96])
def test_largest_of_each_group(n: int, groups: int) -> None:
    x, w, b = (t.double().requires_grad_() for t in table(4, n=n, f=96, d=11))
    with torch.no_grad():
        w[5], b[5] = w[2], b[2]
    value, index = encode_group_max(x, w, b, groups)
    dense, size = x @ w.T + b, 96 // groups
    want = [[max(range(g * size, (g + 1) * size), key=lambda i: (row[i], -i)) for g in range(groups)] for row in dense.tolist()]
    assert index.tolist() == want
    assert encode_group_max_reference(x, w, b, groups)[1].tolist() == want
    torch.testing.assert_close(value, dense.gather(1, index))
    got = torch.autograd.grad(value.pow(3).sum(), (x, w, b))
    for a, c in zip(got, torch.autograd.grad(dense.gather(1, index).pow(3).sum(), (x, w, b)), strict=True):
        torch.testing.assert_close(a, c)
