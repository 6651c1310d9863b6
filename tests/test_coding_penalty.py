"""Proximal operators against brute force on a grid; penalties against their derivatives."""

import math

import pytest
import torch

from rarefy.latents.coding.penalty import PENALTIES, proximal

GRID = torch.arange(-6000, 6001, dtype=torch.float64) / 1000      # with 0 itself, where some penalties jump
POINTS = torch.cat((torch.linspace(-5, 5, 101, dtype=torch.float64), torch.tensor([0.0, 1e-9, 5.0], dtype=torch.float64)))


def plain(name, z, weight):
    """weight * phi(z), from the papers."""
    size = z.abs()
    if name == "cel0":                                      # Soubies et al. 2015, eq. 4, atoms of length 1
        knee = math.sqrt(2 * weight)
        return torch.where(size <= knee, weight - (size - knee) ** 2 / 2, weight)
    return weight * {"soft": size, "hard": (size > 0).double(), "half": size**0.5, "two_thirds": size ** (2 / 3)}[name]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("step", "weight"), [(1.0, 0.7), (0.3, 0.7), (0.3, 2.0), (0.05, 0.01), (2.0, 1.3)])
@pytest.mark.parametrize("name", PENALTIES)
def test_no_point_of_a_grid_is_better(name, step, weight, positive):
    grid = GRID[GRID >= 0] if positive else GRID
    got = proximal(name, POINTS, step, weight, positive)
    value = lambda u, z: (z - u).square() / 2 + step * plain(name, z, weight)
    best = value(POINTS[:, None], grid[None]).amin(1)
    own = value(POINTS, got)
    assert (own <= best + 1e-12).all()
    assert (best - own < 1e-5).all()                            # and it is a point whose neighbour the grid holds
    assert not positive or (got >= 0).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_values_slopes_and_bends(name):
    p, size = PENALTIES[name], torch.linspace(0.05, 3, 60, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(p.value(size, 0.7), plain(name, size, 0.7))
    if name == "hard":
        assert not p.slope(size, 0.7).any() and not p.bend(size, 0.7).any()
        return
    slope = torch.autograd.grad(p.value(size, 0.7).sum(), size, create_graph=True)[0]
    torch.testing.assert_close(p.slope(size, 0.7), slope)
    bend = torch.autograd.grad(slope.sum(), size)[0] if slope.requires_grad else torch.zeros_like(size)
    torch.testing.assert_close(p.bend(size, 0.7), bend)


@pytest.mark.parametrize("name", PENALTIES)
def test_no_weight_is_no_change_and_the_sign_is_kept(name):
    torch.testing.assert_close(proximal(name, POINTS, 0.5, 0.0), POINTS)
    torch.testing.assert_close(proximal(name, -POINTS, 0.5, 0.7), -proximal(name, POINTS, 0.5, 0.7))


def test_only_soft_shrinks_what_is_large():
    """The bias that the paper's comparison turns on: a code of 5 loses `weight` under l1 and next to nothing under the others."""
    left = {name: 5 - float(proximal(name, torch.tensor(5.0, dtype=torch.float64), 1.0, 0.5)) for name in PENALTIES}
    assert left["soft"] == pytest.approx(0.5) and left["hard"] == left["cel0"] == 0
    assert 0 < left["half"] < left["two_thirds"] < 0.25
