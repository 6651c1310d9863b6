"""Convolutional sparse coding against the matrix of all shifts, scikit-learn and planted codes.

Shape letters: B = pictures, K = kernels, S = pixels a side of a kernel, H, W = rows and columns.
"""

import math

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.convolutional import convolution, convolutional_codes, oriented_bank, reconstructed
from rarefy.latents.coding.gabor import fit_gabors
from rarefy.latents.coding.ista import lipschitz, relative_gap


def matrix(kernels, h, w):
    """[K * H * W, H * W]: every kernel, its middle at every place, cut at the border; by loops."""
    k, side, half = len(kernels), kernels.shape[1], kernels.shape[1] // 2
    out = torch.zeros(k, h, w, h, w, dtype=kernels.dtype)
    for i in range(h):
        for j in range(w):
            for a in range(side):
                for b in range(side):
                    y, x = i + a - half, j + b - half
                    if 0 <= y < h and 0 <= x < w:
                        out[:, i, j, y, x] = kernels[:, a, b]
    return out.view(k * h * w, h * w)


def test_the_operator_is_the_matrix_of_all_shifts():
    g = torch.Generator().manual_seed(0)
    kernels = torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    d, atoms = convolution(kernels, (5, 6)), matrix(kernels, 5, 6)
    z, r = torch.randn(2, 90, generator=g, dtype=torch.float64), torch.randn(2, 30, generator=g, dtype=torch.float64)
    torch.testing.assert_close(d.synthesis(z), z @ atoms)
    torch.testing.assert_close(d.pull(r), r @ atoms.T)
    assert lipschitz(atoms) <= d.lipschitz < 1.5 * lipschitz(atoms)


def test_codes_are_scikit_learns_lasso_on_that_matrix_and_meet_its_conditions():
    model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(1)
    kernels, pictures = torch.randn(2, 3, 3, generator=g, dtype=torch.float64), torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    got = convolutional_codes(pictures, kernels, 1.5, tolerance=1e-13, most=50_000)
    atoms = matrix(kernels, 6, 5)
    for picture, codes in zip(pictures.flatten(1), got.codes.flatten(1), strict=True):
        oracle = model.Lasso(alpha=1.5 / 30, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(atoms.T.numpy(), picture.numpy())
        torch.testing.assert_close(codes, torch.from_numpy(oracle.coef_), atol=1e-4, rtol=0)
    pull = (pictures - reconstructed(got.codes, kernels)).flatten(1) @ atoms.T
    z = got.codes.flatten(1)
    assert (pull[z != 0] - 1.5 * z[z != 0].sign()).abs().max() < 1e-4 and pull.abs().max() < 1.5 + 1e-4
    assert relative_gap(pictures.flatten(1), convolution(kernels, (6, 5)), z, 1.5).max() < 1e-12


def test_planted_codes_are_recovered():
    bank = oriented_bank(9, 4, [12.0]).double()
    g = torch.Generator().manual_seed(2)
    codes = torch.zeros(1, 8, 32, 32, dtype=torch.float64)
    places = [(k, 4 + 6 * (k // 2) + 2, 3 + int(torch.randint(26, (1,), generator=g))) for k in range(8)]
    for k, i, j in places:
        codes[0, k, i, j] = 2.0 + k % 2
    x = reconstructed(codes, bank)
    got = convolutional_codes(x, bank, 0.05, tolerance=1e-6, most=3000).codes
    on = (got.abs() > 0.5).nonzero()[:, 1:].tolist()
    assert sorted(map(tuple, on)) == sorted(places)
    assert max(abs(float((got - codes)[0, k, i, j])) for k, i, j in places) < 0.3


def test_the_bank_has_the_orientations_and_bandwidths_asked_for():
    narrow, wide = oriented_bank(21, 6, [8.0, 30.0]).view(2, 12, -1)
    torch.testing.assert_close(narrow.norm(dim=-1), torch.ones(12))
    assert torch.cat((narrow, wide)).sum(-1).abs().max() < 1e-4
    fit = fit_gabors(narrow, steps=150)
    want = (90 - torch.arange(6, dtype=torch.float64).repeat_interleave(2) * 30) % 180
    off = (fit.orientation - want).abs() % 180
    assert torch.minimum(off, 180 - off).max() < 3
    f = torch.fft.fftfreq(21, dtype=torch.float64)
    peak = torch.fft.fft2(narrow.view(12, 21, 21).double()).abs().flatten(1).argmax(-1)
    assert (torch.hypot(f[peak // 21], f[peak % 21]) - 0.2).abs().max() < 0.5 / 21          # within half a step of the grid
    f = torch.fft.fftfreq(63, dtype=torch.float64)
    phi = torch.atan2(f[:, None], f[None])
    ring = (torch.hypot(f[:, None], f[None]) - 0.2).abs() < 0.03
    off = torch.linspace(-math.pi / 2, math.pi / 2, 2001, dtype=torch.float64)
    for bank, width in ((narrow, 8.0), (wide, 30.0)):       # amplitude of the even kernel on a ring of frequencies, about axis 0
        amplitude = torch.fft.fft2(bank[0].view(21, 21).double(), s=(63, 63)).abs()[ring]
        axis = torch.remainder(phi[ring] + math.pi / 2, math.pi) - math.pi / 2
        density = torch.exp(torch.cos(2 * off) / (4 * math.radians(width) ** 2))
        want = float((density * off.cos().square()).sum() / density.sum())
        assert float((amplitude * axis.cos().square()).sum() / amplitude.sum()) == pytest.approx(want, abs=0.05)
    even, odd = narrow[0].view(21, 21), narrow[1].view(21, 21)
    torch.testing.assert_close(even, even.flip(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(odd, -odd.flip(0, 1), atol=1e-6, rtol=0)


def test_refusals():
    bank = oriented_bank(5, 2, [20.0])
    for call, word in [
        (lambda: oriented_bank(4, 2, [20.0]), "side=4"), (lambda: oriented_bank(5, 2, []), "bandwidths"),
        (lambda: oriented_bank(5, 0, [9.0]), "orientations"),
        (lambda: oriented_bank(5, 2, [9.0], frequency=0.6), "frequency"), (lambda: convolutional_codes(torch.ones(1, 4, 9), bank, 1.0), "at least 5"),
        (lambda: convolutional_codes(torch.ones(1, 9, 9), bank[:, :4], 1.0), "odd"),
        (lambda: convolutional_codes(torch.ones(1, 9, 9), bank, -1.0), "weight"),
        (lambda: convolutional_codes(torch.full((1, 9, 9), torch.inf), bank, 1.0), "inf"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
