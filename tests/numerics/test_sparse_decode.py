"""sparse_decode and encode_top_k against their dense definitions, forward and gradients.

Shape letters: N = rows, K = kept, F = units, D = width, M = kept pairs.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from rarefy.kernels.routes import Routes
from rarefy.kernels.sparse_decode import sparse_decode
from rarefy.kernels.sparse_encode import encode_top_k

SHAPES = [(1, 1, 1, 1), (63, 5, 111, 17), (7, 111, 111, 63), (600, 3, 40, 5)]


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_decode_equals_dense_product_forward_and_backward(n: int, k: int, f: int, d: int) -> None:
    torch.manual_seed(0)
    index_NK = torch.rand(n, f).topk(k).indices
    value_NK = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
    table_FD = torch.randn(d, f, dtype=torch.float64).T.requires_grad_()          # non-contiguous
    grad_ND = torch.randn(n, 1, dtype=torch.float64).expand(n, d)                 # broadcast
    got = sparse_decode(value_NK.reshape(-1), Routes.from_index(index_NK, f), table_FD)
    want = torch.zeros(n, f, dtype=torch.float64).scatter(1, index_NK, value_NK) @ table_FD
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (value_NK, table_FD), grad_ND), torch.autograd.grad(want, (value_NK, table_FD), grad_ND), strict=True):
        torch.testing.assert_close(a, b)


def test_decode_of_ragged_mask_with_empty_rows() -> None:
    torch.manual_seed(1)
    mask_NF = torch.rand(9, 13) < 0.2
    mask_NF[[0, 4, 8]] = False
    value_NF, table_FD = torch.randn(9, 13, dtype=torch.float64), torch.randn(13, 6, dtype=torch.float64)
    got = sparse_decode(value_NF[mask_NF], Routes.from_mask(mask_NF), table_FD)
    torch.testing.assert_close(got, (value_NF * mask_NF) @ table_FD)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_encode_equals_dense_product_and_topk(n: int, k: int, f: int, d: int) -> None:
    torch.manual_seed(2)
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((n, d), (f, d), (f,)))
    value_NK, index_NK = encode_top_k(x, w, b, k)
    dense_NF = linear(x, w, b)
    torch.testing.assert_close(value_NK, dense_NF.gather(1, index_NK))
    lowest = dense_NF.sort(1, descending=True).values[:, k - 1]
    torch.testing.assert_close(value_NK.amin(1), lowest)
    weight_NK = torch.randn(n, k, dtype=torch.float64)
    got = torch.autograd.grad((value_NK * weight_NK).sum(), (x, w, b))
    want = torch.autograd.grad((dense_NF.gather(1, index_NK) * weight_NK).sum(), (x, w, b))
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c)


def test_where_products_do_not_fit_they_are_formed_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.kernels import sparse_encode

    torch.manual_seed(3)
    x, w, b = torch.randn(50, 9), torch.randn(31, 9), torch.randn(31)
    want, units = encode_top_k(x, w, b, 4)
    seen = []
    monkeypatch.setattr(sparse_encode, "BYTES_AT_ONCE", 4 * 31 * 7)
    monkeypatch.setattr(sparse_encode, "linear", lambda x, w, b: (seen.append(len(x)), linear(x, w, b))[1])
    got, again = encode_top_k(x, w, b, 4)
    assert seen == [7] * 7 + [1]
    torch.testing.assert_close(got.sort().values, want.sort().values)
    assert torch.equal(again.sort().values, units.sort().values)
