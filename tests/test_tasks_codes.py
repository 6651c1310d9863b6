"""Codes in both forms and both orders against the matrix they are of.

Shape letters: N = rows, F = latents, M = activations, D = width.
"""

import pytest
import torch

from rarefy.tasks.codes import Codes

N, F = 40, 12


def matrix():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, F, generator=g) * (torch.rand(N, F, generator=g) < 0.2)
    z[7], z[:, 5] = 0, 0                                        # a row and a latent without any
    return z


def shuffled(z):
    """Index form in no order."""
    row, latent = z.nonzero(as_tuple=True)
    mixed = torch.randperm(len(row), generator=torch.Generator().manual_seed(1))
    return Codes.sparse(latent[mixed], z[row, latent][mixed], row[mixed], *z.shape)


@pytest.mark.parametrize("made", [shuffled, Codes.of, Codes.dense])
def test_both_orders_and_all_sums_are_the_matrix(made):
    z = matrix()
    codes, decoder = made(z), torch.randn(F, 3, generator=torch.Generator().manual_seed(2))
    for view, by, most in ((codes.by_row, "row_M", N), (codes.by_latent, "latent_M", F)):
        key = getattr(view, by)
        assert bool((key[1:] >= key[:-1]).all())
        assert torch.equal(torch.zeros(N, F).index_put((view.row_M, view.latent_M), view.value_M), z)
        assert view.begin.tolist() == [int((key < i).sum()) for i in range(most + 1)]
    assert torch.equal(codes.matrix, z) and codes.l0 == pytest.approx(float((z != 0).sum()) / N)
    assert torch.equal(codes.fired, (z != 0).sum(0)) and torch.equal(codes.fires.matrix, (z > 0).float())
    assert torch.equal(codes.over(torch.full((F,), 0.5)).matrix, (z > 0.5).float())
    torch.testing.assert_close(codes.times(decoder.double()), z.double() @ decoder.double())
    torch.testing.assert_close(codes.sums(torch.ones(N, 2)), z.sum(0)[:, None].expand(F, 2))
    assert torch.equal(codes.columns(torch.tensor([3, -1, 3])), torch.stack([z[:, 3], torch.zeros(N), z[:, 3]], 1))
    some = torch.tensor([9, 2, 7])
    assert torch.equal(codes.take(some).matrix, z[some]) and torch.equal(codes.rows(some), z[some])


def test_codes_of_nothing():
    codes = Codes.of(torch.zeros(3, 4))
    assert codes.l0 == 0 and codes.times(torch.ones(4, 2)).tolist() == [[0, 0]] * 3 and codes.sums(torch.ones(3, 1)).tolist() == [[0]] * 4
    assert codes.by_row.begin.tolist() == [0] * 4 and codes.columns(torch.tensor([1])).tolist() == [[0]] * 3
