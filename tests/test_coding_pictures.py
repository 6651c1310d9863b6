"""Whitening, patches, and what Gabor fits say of atoms that are Gabors.

Shape letters: F = atoms, S = pixels a side, N = patches.
"""

import math

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.gabor import fit_gabors
from rarefy.latents.coding.patches import patches, whitened


def pink(size, seed):
    """A picture whose amplitudes fall as 1 / f."""
    g = torch.Generator().manual_seed(seed)
    f = torch.hypot(torch.fft.fftfreq(size, dtype=torch.float64)[:, None], torch.fft.rfftfreq(size, dtype=torch.float64))
    noise = torch.fft.rfft2(torch.randn(size, size, generator=g, dtype=torch.float64))
    return torch.fft.irfft2(noise / f.clamp_min(1 / size), s=(size, size)) * 40 + 100


def test_whitening_flattens_the_spectrum_of_natural_pictures():
    f = torch.hypot(torch.fft.fftfreq(128)[:, None], torch.fft.rfftfreq(128))
    power = [torch.fft.rfft2(v).abs().square() for v in (pink(128, 0) - 100, whitened(pink(128, 0)))]
    low, high = (f > 0.02) & (f < 0.06), (f > 0.18) & (f < 0.22)
    ratio = [float(p[low].mean() / p[high].mean()) for p in power]
    assert ratio[0] > 15 and 0.8 < ratio[1] < 1.4
    assert power[1][f > 0.6].mean() < 0.05 * power[1][low].mean()               # noise in the corners is out
    assert float(whitened(pink(128, 0)).std()) == pytest.approx(1, abs=1e-3) and abs(float(whitened(pink(128, 0)).mean())) < 1e-6


def test_patches_are_cut_from_the_pictures_and_repeat_with_the_seed():
    one, two = torch.arange(70.0).view(7, 10).square(), -torch.arange(120.0).view(10, 12).square()
    rows = patches([one, two], 3, 50, seed=3)
    every = torch.cat([p.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9) for p in (one, two)])
    every = every - every.mean(-1, keepdim=True)
    assert rows.shape == (50, 9) and all((every - row).abs().amax(-1).min() < 1e-4 for row in rows)
    assert torch.equal(rows, patches([one, two], 3, 50, seed=3)) and not torch.equal(rows, patches([one, two], 3, 50, seed=4))
    assert len({tuple(row.tolist()) for row in rows}) > 20


def test_planted_gabors_are_found():
    """Orientation of the stripes, frequency, bandwidth and aspect, over noise of a tenth of the signal."""
    side, g = 14, torch.Generator().manual_seed(6)
    down, across = torch.meshgrid(torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64), indexing="ij")
    atoms, want = [], []
    for i in range(24):
        theta, f, along, wide = math.pi * i / 24, 0.12 + 0.012 * (i % 12), 1.8 + 0.1 * (i % 5), 2.2 + 0.2 * (i % 4)
        x, y = across - 6 - i % 2, down - 6 - i % 3
        a, b = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
        atom = torch.exp(-a**2 / 2 / along**2 - b**2 / 2 / wide**2) * torch.cos(2 * math.pi * f * a + 0.3 * i)
        atoms.append((atom + 0.1 * atom.std() * torch.randn(side, side, generator=g, dtype=torch.float64)).flatten())
        half = math.sqrt(2 * math.log(2)) / 2 / math.pi / along
        octaves = math.log2((f + half) / (f - half)) if f > half else math.inf
        want.append((math.degrees(math.pi / 2 - theta) % 180, f, octaves, wide / along))
    fit = fit_gabors(torch.stack(atoms), steps=200)
    angle, f, octaves, aspect = torch.tensor(want, dtype=torch.float64).T
    assert (fit.r2 > 0.97).all()
    off = (fit.orientation - angle).abs() % 180
    assert torch.minimum(off, 180 - off).max() < 4
    assert (fit.frequency - f).abs().max() < 0.01
    narrow = octaves < 2
    assert narrow.sum() > 10 and (fit.octaves - octaves)[narrow].abs().max() < 0.4
    assert (fit.aspect / aspect - 1).abs().max() < 0.2


def test_vertical_stripes_are_at_90_degrees_and_noise_is_no_gabor():
    stripes = torch.cos(2 * math.pi * 0.2 * torch.arange(12.0)).expand(12, 12)
    noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(7))
    fit = fit_gabors(torch.stack((stripes.flatten(), stripes.T.flatten(), noise.flatten())), steps=150)
    assert float(fit.orientation[0]) == pytest.approx(90, abs=1)
    assert min(float(fit.orientation[1]), 180 - float(fit.orientation[1])) < 1
    assert fit.r2[2] < 0.4 < 0.8 < fit.r2[0]


def test_refusals():
    for call, word in [
        (lambda: fit_gabors(torch.ones(2, 10)), "side"), (lambda: fit_gabors(torch.zeros(1, 9)), "zero"), (lambda: whitened(torch.ones(4)), "rows"),
        (lambda: whitened(torch.ones(4, 4)), "shade"), (lambda: patches([], 3, 5), "at least one"),
        (lambda: patches([torch.ones(2, 9)], 3, 5), "3 x 3"),
        (lambda: fit_gabors(torch.full((1, 9), torch.nan)), "NaN"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
