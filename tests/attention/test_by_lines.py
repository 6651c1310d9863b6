"""Columns and diagonals without the matrix of pairs: the kernel against masked softmax in float64, the methods against their own pairs."""

import itertools

import pytest
import torch

import rarefy
from rarefy.attention.dynamic import by_lines
from rarefy.attention.dynamic.minference import MInference, a_reach, a_shape
from rarefy.attention.dynamic.sample import SampleAttention
from rarefy.attention.dynamic.vertical_slash import VerticalSlash
from rarefy.attention.dynamic.zipvl import ZipVL
from rarefy.kernels.block_attention import available
from rarefy.kernels.block_attention.lines import line_attention, line_pairs


def qkv(B, H, G, T, S, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, s, D, generator=generator).to(dtype) for n, s in ((H, T), (G, S), (G, S)))
    return q, k, v, generator


def masked(q, k, v, keep, scale):
    """float64 softmax over kept pairs; zeros where there is none."""
    share = q.shape[1] // k.shape[1]
    score = (q.double() @ k.double().repeat_interleave(share, 1).mT * scale).masked_fill(~keep, -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v.double().repeat_interleave(share, 1)


def pairs(column, back, T):
    S = column.shape[-1]
    keep = torch.zeros(*column.shape[:2], T, S, dtype=torch.bool)
    for t, s in itertools.product(range(T), range(S)):
        at = S - T + t
        if s <= at:
            keep[:, :, t, s] = column[..., s] | back[..., at - s]
    return keep


@pytest.mark.parametrize(("B", "H", "G", "T", "S", "D", "columns", "single", "run"), [
    (1, 2, 1, 70, 70, 16, 0.1, 0.1, 0),                     # a ragged last tile, few of everything
    (2, 4, 2, 100, 203, 24, 0.1, 0.05, 60),                 # a band across two groups beside single diagonals; queries behind a prefix
    (1, 2, 2, 64, 64, 40, 0.0, 0.05, 0),                    # no column
    (1, 2, 2, 129, 200, 64, 0.5, 0.0, 0),                   # no diagonal: some queries see nothing
    (1, 1, 1, 5, 5, 8, 0.5, 0.5, 0),                        # less than a tile
    (1, 2, 1, 150, 150, 64, 0.02, 1.0, 0),                  # everything
])
def test_lines_are_masked_softmax(B, H, G, T, S, D, columns, single, run):
    q, k, v, generator = qkv(B, H, G, T, S, D)
    column, back = (torch.rand(B, H, S, generator=generator) < p for p in (columns, single))
    back[:, ::2, 40 : 40 + run] = True
    keep = pairs(column, back, T)
    got = line_attention(q, k, v, column, back, scale=0.2)
    torch.testing.assert_close(got.double(), masked(q, k, v, keep, 0.2), atol=1e-5, rtol=0)
    assert torch.equal(line_pairs(column, back, T), keep.sum((2, 3)))


def test_lines_in_half_precision_and_out_of_place_memory():
    q, k, v, generator = qkv(2, 4, 2, 90, 90, 32, dtype=torch.bfloat16)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))               # heads side by side, as a model has them
    column, back = (torch.rand(2, 4, 90, generator=generator) < 0.15 for _ in range(2))
    got = line_attention(q, k, v, column, back, scale=0.2)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), masked(q, k, v, pairs(column, back, 90), 0.2), atol=2e-2, rtol=0)


def test_lines_with_gradients_or_in_float64_are_the_same():
    q, k, v, generator = qkv(1, 2, 1, 40, 60, 16)
    column, back = (torch.rand(1, 2, 60, generator=generator) < 0.2 for _ in range(2))
    fast, wanted = line_attention(q, k, v, column, back, scale=0.2), q.clone().requires_grad_()
    slow = line_attention(wanted, k, v, column, back, scale=0.2)
    torch.testing.assert_close(fast, slow.detach(), atol=1e-5, rtol=0)
    slow.sum().backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0
    exact = line_attention(q.double(), k.double(), v.double(), column, back, scale=0.2)
    torch.testing.assert_close(exact, masked(q, k, v, pairs(column, back, 40), 0.2), atol=1e-12, rtol=0)


def test_lines_refuse_other_shapes():
    q, k, v, _ = qkv(1, 2, 1, 8, 8, 8)
    fits = torch.zeros(1, 2, 8, dtype=torch.bool)
    for column, back in ((fits[..., 1:], fits), (fits, fits.float()), (fits[:, 0], fits)):
        with pytest.raises(rarefy.BadInput, match="must be bool"):
            line_attention(q, k, v, column, back, scale=1.0)
    with pytest.raises(rarefy.BadInput, match="9 queries"):
        line_attention(torch.zeros(1, 2, 9, 8), k, v, fits, fits, scale=1.0)


def minference():
    made = MInference(0.2, last=16, side=16)
    made.pattern_H, made.heads_3 = torch.tensor([0, 1, 2, 1]), torch.tensor([4, 2, 16])
    return made


METHODS = {
    "lines": lambda: VerticalSlash(0.2), "columns alone": lambda: VerticalSlash(0.1, share=1.0), "own keys": lambda: VerticalSlash(0.001),
    "everything": lambda: VerticalSlash(1.0), "sample": lambda: SampleAttention(dial=0.5), "zipvl": lambda: ZipVL(dial=0.5), "minference": minference,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("T", "S"), [(130, 130), (50, 200), (2, 70)])
def test_methods_attend_to_the_pairs_that_they_choose(name, T, S, monkeypatch):
    q, k, v, _ = qkv(2, 4, 2, T, S, 16, seed=T)
    q, method = 2 * q, METHODS[name]()
    keep = method.choose(q, k, True)
    monkeypatch.setattr(method, "choose", None)                                           # the pairs are not formed
    got = method.attend(q, k, v, scale=16**-0.5)
    torch.testing.assert_close(got.double(), masked(q, k, v, keep, 16**-0.5), atol=2e-5, rtol=0)
    seen = T * S - T * (T - 1) // 2
    assert method.measured_density() == pytest.approx(float(keep.sum()) / (8 * seen), abs=1e-12)


@pytest.mark.parametrize("name", ["lines", "sample", "zipvl", "minference"])
def test_padding_is_left_out(name):
    q, k, v, _ = qkv(2, 4, 2, 90, 90, 16)
    real = torch.ones(2, 90, dtype=torch.bool)
    real[0, :20], real[1, 70:] = False, False
    method = METHODS[name]()
    got = method.attend(q, k, v, scale=0.3, padding_BS=real)
    for b, cut in ((0, slice(20, 90)), (1, slice(0, 70))):
        alone = method.attend(q[b : b + 1, :, cut], k[b : b + 1, :, cut], v[b : b + 1, :, cut], scale=0.3)
        assert torch.equal(got[b, :, cut], alone[0])
    assert not got[0, :, :20].any() and not got[1, :, 70:].any()


def test_who_is_served_by_lines():
    q, k, v, _ = qkv(1, 2, 1, 8, 8, 8)
    method = VerticalSlash(0.5)
    assert method.by_lines(q, k, v, True) and available(q, k, v)
    assert not method.by_lines(q, k, v, False) and not method.by_lines(q[:, :, -1:], k, v, True)
    assert not method.by_lines(q.double(), k.double(), v.double(), True) and not method.by_lines(q.requires_grad_(), k, v, True)
    assert not SampleAttention(dial=0.5, query_block=4).by_lines(q.detach(), k, v, True)  # whose window has an edge a block


def test_lowest_lines_are_the_fewest():
    generator = torch.Generator().manual_seed(0)
    column, back = (torch.randint(0, 9, (1, 3, 30), generator=generator).double() for _ in range(2))
    for keep in (1, 100, 300, 345):
        got = by_lines.lowest_lines(column, back, 20, keep)
        for h in range(3):
            sizes = {x: int(pairs(column[:, h : h + 1] <= x, back[:, h : h + 1] <= x, 20).sum()) for x in range(9)}
            want = min(x for x, n in sizes.items() if n >= min(keep, max(sizes.values())))
            assert torch.equal(got[0][0, h], column[0, h] <= want) and torch.equal(got[1][0, h], back[0, h] <= want)


@pytest.mark.parametrize(("T", "S"), [(130, 130), (50, 200), (2, 70), (3, 3)])
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 1.0])
def test_a_shape_counted_is_the_a_shape(T, S, budget):
    back, reach = torch.arange(S - T, S)[:, None] - torch.arange(S), a_reach(T, S, budget, 4)
    want = a_shape(T, S, budget, 4, True, torch.device("cpu"))
    assert torch.equal(want, (back >= 0) & ((back <= reach) | (torch.arange(S) < 4)))
