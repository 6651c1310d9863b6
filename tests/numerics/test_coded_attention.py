"""Attention over stored forms against dense attention over the vectors that they stand for, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.errors import BadInput
from rarefy.kernels import coded_attention as coded

SHAPES = [(2, 4, 2, 150, 64), (1, 6, 2, 65, 20), (3, 2, 2, 7, 33), (1, 8, 1, 130, 128), (2, 4, 4, 1, 8)]


def over(q: Tensor, k: Tensor, v: Tensor, counts: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Entry by entry; a row without keys gives 0 and -inf."""
    B, H, _, D = q.shape
    out, lse = torch.zeros(B, H, 1, D, dtype=torch.float64), torch.full((B, H, 1), -torch.inf, dtype=torch.float64)
    for b, n in enumerate(counts):
        for h in range(H if n else 0):
            g = h * k.shape[1] // H
            logit = k[b, g, :n].double() @ q[b, h, 0].double() * scale
            out[b, h, 0], lse[b, h, 0] = logit.softmax(-1) @ v[b, g, :n].double(), logit.logsumexp(-1)
    return out, lse


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    B, H, G, S, D = shape
    r = torch.Generator().manual_seed(sum(shape))
    k, v = torch.randn(2, B, G, S, D, generator=r).unbind()
    return 2 * torch.randn(B, H, 1, D, generator=r), k, v, [S, S // 2, 0][:B]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
def test_bitmaps_give_what_pruned_vectors_do(shape: tuple[int, ...], kept: float) -> None:
    q, k, v, counts = drawn(shape)
    S, D = shape[-2:]
    C = max(1, round(kept * D))
    dense = [torch.where(x.abs() >= x.abs().sort(-1, descending=True).values[..., C - 1 : C], x, 0.0) for x in (k, v)]
    (k_bits, k_values), (v_bits, v_values) = coded.prune_rows(k, C), coded.prune_rows(v, C)
    if S > 7:                                                     # as a cache holds them: with room behind, which must not be read
        k_values = torch.cat([k_values, torch.full_like(k_values[:, :, :5], torch.nan)], 2)[:, :, :S]
    there = torch.tensor(counts)
    want = over(q, dense[0], dense[1], counts, 0.3)
    for call in (coded.bitmap_attention, coded.bitmap_attention_reference):
        for got, wanted in zip(call(q, k_bits, k_values, v_bits, v_values, there, scale=0.3), want, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [torch.int16, torch.int32])
def test_codes_give_what_rebuilt_vectors_do(shape: tuple[int, ...], size: torch.dtype) -> None:
    q, _, _, counts = drawn(shape)
    B, _, G, S, D = shape
    r = torch.Generator().manual_seed(1)
    atoms = torch.randn(2, 40, D, generator=r)
    index = torch.randint(40, (2, B, G, S, 3), generator=r)
    weight = torch.randn(2, B, G, S, 3, generator=r)
    dense = [(w[..., None].double() * a.double()[i]).sum(-2) for w, a, i in zip(weight, atoms, index, strict=True)]
    given = (q, index[0].to(size), weight[0], index[1].to(size), weight[1], atoms[0], atoms[1], torch.tensor(counts))
    want = over(q, dense[0], dense[1], counts, 0.2)
    for call in (coded.code_attention, coded.code_attention_reference):
        for got, wanted in zip(call(*given, scale=0.2), want, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_an_empty_store_gives_nothing() -> None:
    q = torch.ones(2, 4, 1, 16)
    none = torch.zeros(2, 2, 0, 5)
    bits = torch.zeros(2, 2, 0, 2, dtype=torch.uint8)
    out, lse = coded.bitmap_attention(q, bits, none, bits, none, torch.zeros(2, dtype=torch.long), scale=1.0)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = drawn((1, 4, 2, 9, 16))
    (k_bits, k_values), (v_bits, v_values) = coded.prune_rows(k, 4), coded.prune_rows(v, 4)
    with pytest.raises(BadInput, match="counts 10"):
        coded.bitmap_attention(q, k_bits, k_values, v_bits, v_values, torch.tensor([10]), scale=1.0)
    with pytest.raises(BadInput, match="bitmaps must be uint8"):
        coded.bitmap_attention(q, k_bits[..., :1], k_values, v_bits, v_values, torch.tensor([9]), scale=1.0)
    atoms = torch.ones(7, 16)
    for number, wide in ((7, torch.float32), (7, torch.float64), (-1, torch.float64)):                      # compiled, and plain torch
        given = [x.to(wide) for x in (q, k_values, v_values, atoms)]
        index = torch.full((1, 2, 9, 4), number, dtype=torch.int16)
        with pytest.raises(BadInput, match="an atom that the dictionary has not"):
            coded.code_attention(given[0], index, given[1], index, given[2], given[3], given[3], torch.tensor([9]), scale=1.0)
        index[:, :, :5] = 3                                            # what lies behind the last row is nobody's
        assert coded.code_attention(given[0], index, given[1], index, given[2], given[3], given[3], torch.tensor([5]), scale=1.0)[0].isfinite().all()


def test_codes_of_many_atoms_and_of_none() -> None:
    """Numbers above 127 in a byte are no negative ones, and a row without atoms is zero."""
    q, _, _, counts = drawn((2, 4, 2, 70, 16))
    r = torch.Generator().manual_seed(2)
    atoms, weight = torch.randn(2, 250, 16, generator=r), torch.randn(2, 2, 2, 70, 3, generator=r)
    index = torch.randint(128, 250, (2, 2, 2, 70, 3), generator=r).to(torch.uint8)
    for atoms_a_row in (3, 0):
        few_w, few_i = weight[..., :atoms_a_row], index[..., :atoms_a_row]
        dense = [(w[..., None].double() * a.double()[i.long()]).sum(-2) for w, a, i in zip(few_w, atoms, few_i, strict=True)]
        got = coded.code_attention(q, few_i[0], few_w[0], few_i[1], few_w[1], atoms[0], atoms[1], torch.tensor(counts), scale=0.2)
        for one, wanted in zip(got, over(q, dense[0], dense[1], counts, 0.2), strict=True):
            torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)
