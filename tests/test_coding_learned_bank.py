"""A bank learned from pictures that a known bank made.

Shape letters: B = pictures, K = kernels, H, W = rows and columns.
"""

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.coding.convolutional import Bank, convolutional_codes, even_bank, reconstructed
from rarefy.latents.coding.learned_bank import PARAMETERS, learn_bank, objective

SIDE, WEIGHT = 9, 0.02
TRUE = Bank(*(torch.tensor(v, dtype=torch.float64) for v in ([8.0, 68.0, 128.0], [8.0, 12.0, 18.0], [0.2, 0.24, 0.18], [1.2, 1.6, 1.4])))


def planted(pictures=2, size=24, active=20):
    """[B, H, W] pictures of `active` kernels of the true bank each, signed, of strengths in [1, 2)."""
    g = torch.Generator().manual_seed(0)
    codes = torch.zeros(pictures, 6 * size * size)
    for row in codes:
        row[torch.randperm(len(row), generator=g)[:active]] = (1 + torch.rand(active, generator=g)) * torch.randn(active, generator=g).sign()
    return reconstructed(codes.view(pictures, 6, size, size), TRUE.kernels(SIDE).float())


def test_planted_parameters_are_recovered():
    start = even_bank(3, [14.0], 0.21, 1.3)                     # one bandwidth for all, 8 degrees off
    got = learn_bank(planted(), start, SIDE, WEIGHT)
    assert min(got.losses) < 0.5 * got.losses[0]
    for name, most in (("orientation", 1.0), ("bandwidth", 1.0), ("frequency", 0.01), ("octaves", 0.3)):
        off = (getattr(got.bank, name) - getattr(TRUE, name)).abs().max()
        assert off < most, f"{name} is off by {off}"
        assert off < 0.6 * (getattr(start, name) - getattr(TRUE, name)).abs().max()


def test_only_what_is_asked_for_is_learned_and_the_best_bank_is_returned():
    x, start = planted(1), even_bank(3, [14.0], 0.21, 1.3)
    got = learn_bank(x, start, SIDE, WEIGHT, learned=["bandwidth"], rounds=4, lr=0.2, tolerance=1e-4, most=200)
    assert torch.equal(start.bandwidth, torch.full((3,), 14.0, dtype=torch.float64)) and not torch.equal(got.bank.bandwidth, start.bandwidth)
    for name in set(PARAMETERS) - {"bandwidth"}:
        torch.testing.assert_close(getattr(got.bank, name), getattr(start, name))
    assert len(got.losses) == 5 and all(not v.requires_grad for v in got.bank)
    kernels = got.bank.kernels(SIDE).float()
    by_hand = 0.5 * (x - reconstructed(got.codes, kernels)).square().sum() + WEIGHT * got.codes.abs().sum()
    assert float(by_hand) == pytest.approx(min(got.losses), rel=1e-5)
    far = learn_bank(x, start, SIDE, WEIGHT, rounds=2, lr=30.0)      # steps too long by far: the bank given was the best
    assert far.losses[0] == min(far.losses) and torch.allclose(far.bank.bandwidth, start.bandwidth)


def test_the_objective_has_the_right_derivative_in_the_parameters():
    g = torch.Generator().manual_seed(1)
    x, codes = torch.randn(1, 12, 12, generator=g, dtype=torch.float64), torch.randn(1, 6, 12, 12, generator=g, dtype=torch.float64)
    at = tuple(v.clone().requires_grad_() for v in TRUE)
    assert torch.autograd.gradcheck(lambda *p: objective(x, codes, Bank(*p).kernels(SIDE), 0.1), at)


def test_codes_begun_at_the_solution_are_done():
    x, kernels = planted(1), TRUE.kernels(SIDE)
    cold = convolutional_codes(x, kernels, 0.5, tolerance=1e-3)
    warm = convolutional_codes(x, kernels, 0.5, tolerance=1e-3, start=cold.codes)
    assert int(cold.steps) > 0 and int(warm.steps) == 0 and torch.equal(cold.codes, warm.codes)


def test_refusals():
    x, bank = torch.ones(1, 12, 12), even_bank(2, [20.0])
    for call, word in [
        (lambda: learn_bank(x, bank, 4, 1.0), "side=4"), (lambda: learn_bank(x, bank, 5, 0.0), "weight"),
        (lambda: learn_bank(x, bank, 5, 1.0, learned=["angle"]), "orientation"), (lambda: learn_bank(x, bank, 5, 1.0, learned=[]), "some of"),
        (lambda: learn_bank(x, bank._replace(octaves=torch.ones(3)), 5, 1.0), "shapes"),
        (lambda: learn_bank(x, bank._replace(octaves=-bank.octaves), 5, 1.0), "above 0"),
        (lambda: learn_bank(x, bank._replace(frequency=bank.frequency * torch.nan), 5, 1.0), "frequency"),
        (lambda: learn_bank(x, bank, 5, 1.0, rounds=0), "rounds"),
        (lambda: learn_bank(x[0], bank, 5, 1.0), "pictures"),
        (lambda: convolutional_codes(x, bank.kernels(5), 1.0, start=torch.zeros(1, 3, 12, 12)), "start"),
    ]:
        with pytest.raises(BadInput, match=word):
            call()
