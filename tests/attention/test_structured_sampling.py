"""Sampled points and row bands against sums written out cell by cell."""

import math

import pytest
import torch

from rarefy.attention.structured.sampling import Deformable, row_band, sample
from rarefy.errors import BadInput


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def between(plane, x, y):
    """Tents around the cells' centres: a cell counts by how near it is, none further than one cell."""
    rows, columns = plane.shape
    total = 0.0
    for i in range(rows):
        for j in range(columns):
            tent = max(0.0, 1 - abs(y * rows - 0.5 - i)) * max(0.0, 1 - abs(x * columns - 0.5 - j))
            total += tent * float(plane[i, j])
    return total


def test_samples_are_bilinear_and_zero_outside():
    planes = drawn(2, 3, 2, 4, 5)
    place = 1.4 * torch.rand(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.2
    place[0, 0, 0, 0] = torch.tensor([0.5 / 5, 0.5 / 4], dtype=torch.float64)                   # a cell's centre
    got = sample(planes, place)
    assert got.shape == (2, 6, 3, 2, 2) and float(got[0, 0, 0, 0, 1]) == pytest.approx(float(planes[0, 0, 1, 0, 0]), abs=1e-12)
    for b in range(2):
        for q in range(6):
            for h in range(3):
                for p in range(2):
                    for c in range(2):
                        assert float(got[b, q, h, p, c]) == pytest.approx(between(planes[b, h, c], *place[b, q, h, p].tolist()), abs=1e-12)


def test_gradients_reach_values_and_places():
    planes = drawn(1, 1, 2, 4, 5).requires_grad_(True)
    place = torch.tensor([[[[[0.31, 0.42], [0.77, 0.55]]]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sample, (planes, place))
    with pytest.raises(BadInput, match="1 pictures and 1 heads"):
        sample(planes, place.expand(1, 1, 2, 2, 2))
    with pytest.raises(BadInput, match="must be"):
        sample(planes[0], place)


def made(mix):
    torch.manual_seed(0)
    layer = Deformable(6, heads=2, points=3, mix=mix).double()
    torch.nn.init.normal_(layer.offset.weight, std=0.05)
    return layer, drawn(1, 4, 6), 0.2 + 0.6 * drawn(1, 4, 2, seed=3).sigmoid(), drawn(1, 6, 5, 7, seed=2)


@torch.no_grad()
def points_of(layer, q, at, picture):
    """[P][C] sampled features of a head."""
    value = torch.einsum("vw,wyx->vyx", layer.value.weight[:, :, 0, 0], picture[0]) + layer.value.bias[:, None, None]
    offset = (layer.offset.weight @ q + layer.offset.bias).view(2, 3, 2)
    return torch.tensor([[[between(value[h * 3 + c], *(at + offset[h, p]).tolist()) for c in range(3)] for p in range(3)] for h in range(2)],
                        dtype=torch.float64)


def test_deformable_attention_is_its_formula():
    layer, q, at, picture = made("weights")
    got = layer(q, at, picture)
    for n in range(4):
        f = points_of(layer, q[0, n], at[0, n], picture)
        weight = (layer.weigh.weight @ q[0, n] + layer.weigh.bias).view(2, 3).softmax(-1)
        mixed = torch.cat([sum(weight[h, p] * f[h, p] for p in range(3)) for h in range(2)])
        torch.testing.assert_close(got[0, n], layer.out.weight @ mixed + layer.out.bias)


def test_adaptive_mixing_is_its_formula():
    layer, q, at, picture = made("adaptive")
    got = layer(q, at, picture)

    def normed(x):
        return torch.relu((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt())

    for n in range(4):
        f = points_of(layer, q[0, n], at[0, n], picture)
        W_c = (layer.channels.weight @ q[0, n] + layer.channels.bias).view(2, 3, 3)
        W_p = (layer.places.weight @ q[0, n] + layer.places.bias).view(2, 3, 3)
        flat = torch.cat([normed(W_p[h] @ normed(f[h] @ W_c[h])).flatten() for h in range(2)])
        inner = layer.gather.weight @ flat + layer.gather.bias
        torch.testing.assert_close(got[0, n], layer.out.weight @ inner + layer.out.bias)


def test_first_points_stand_in_a_ring_and_errors_say_what():
    layer = Deformable(8, heads=4, points=2, reach=0.2)
    where = layer.where(torch.zeros(1, 1, 8), torch.full((1, 1, 2), 0.5))[0, 0]
    torch.testing.assert_close(where[:, 1] - 0.5, 0.2 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)
    assert layer.share(16, 16) == 8 / 256
    for wrong in ({"mix": "x"}, {"heads": 3}):
        with pytest.raises(BadInput):
            Deformable(**{"width": 8, **wrong})
    with pytest.raises(BadInput, match="reference points"):
        layer(torch.zeros(1, 2, 8), torch.zeros(1, 3, 2), torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("half", [1, 2, 9])
def test_a_row_band_is_dense_attention_with_the_other_rows_masked(half):
    q, k, v = drawn(2, 3, 5, 4), drawn(2, 3, 6, 7, 4, seed=1), drawn(2, 3, 6, 7, 4, seed=2)
    rows = torch.tensor([0, 5, 3, 3, 40])
    got = row_band(q, k, v, rows, half)
    for n, row in enumerate(rows.tolist()):
        near = [y for y in range(6) if abs(y - row) < half]
        if not near:
            assert not got[:, :, n].any()
            continue
        keys, values = k[:, :, near].flatten(2, 3), v[:, :, near].flatten(2, 3)
        weight = (torch.einsum("bhc,bhkc->bhk", q[:, :, n], keys) / math.sqrt(4)).softmax(-1)
        torch.testing.assert_close(got[:, :, n], torch.einsum("bhk,bhkc->bhc", weight, values))
    with pytest.raises(BadInput, match="rows"):
        row_band(q, k, v, rows[:2], half)
