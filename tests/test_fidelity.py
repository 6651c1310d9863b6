import math

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.fidelity import Interval, Reconstruction, cosine, explained_variance, fvu, ratio_interval


def rows(n=111, d=7, seed=0, offset=3.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def test_closed_forms():
    x = rows()
    mean = x.mean(0).expand_as(x)
    assert fvu(x, x) == 0 and explained_variance(x, x) == 1 and cosine(x, x) == pytest.approx(1)
    assert fvu(x, mean) == pytest.approx(1) and explained_variance(x, mean) == pytest.approx(0, abs=1e-12)
    half = mean + 0.5 * (x - mean)
    assert fvu(x, half) == pytest.approx(0.25) and explained_variance(x, half) == pytest.approx(0.75)
    assert cosine(x, -x) == pytest.approx(-1)
    zero = fvu(x, torch.zeros_like(x))
    assert zero == pytest.approx(1 + len(x) * float(mean[0].square().sum()) / float((x - mean).square().sum()))


def test_explained_variance_forgives_an_offset_and_fvu_does_not():
    x = rows()
    assert explained_variance(x, x + 5) == pytest.approx(1)
    assert fvu(x, x + 5) == pytest.approx(25 * x.numel() / float((x - x.mean(0)).square().sum()))


def streamed(split, x, hat, fired, l0, doc, width=9, documents=4):
    total = Reconstruction(x.shape[1], width, documents)
    for i in range(0, len(x), split):
        some = slice(i, i + split)
        total.add(x[some], hat[some], fired[some], l0[some], doc[some])
    return total


@pytest.mark.parametrize("split", [1, 63, 111])
def test_streams_equal_whole_arrays_however_split(split):
    x, hat = rows(), rows(seed=0) + 0.3 * rows(seed=1, offset=0.2)
    fired = torch.randint(0, 7, (111, 3), generator=torch.Generator().manual_seed(2))
    l0, doc = torch.arange(111) % 5, torch.arange(111) % 3           # document 3 stays empty
    total = streamed(split, x, hat, fired, l0, doc)
    assert total.fvu().mean == pytest.approx(fvu(x, hat), rel=1e-10)
    assert total.explained_variance() == pytest.approx(explained_variance(x, hat), rel=1e-10)
    assert total.cosine() == pytest.approx(cosine(x, hat), rel=1e-10)
    assert total.l0().mean == pytest.approx(float(l0.double().mean()))
    assert total.dead_fraction() == pytest.approx(1 - len(set(fired.flatten().tolist())) / 9)
    whole = streamed(111, x, hat, fired, l0, doc)
    assert total.fvu().low == pytest.approx(whole.fvu().low, rel=1e-9) and total.fvu().high == pytest.approx(whole.fvu().high, rel=1e-9)


def test_sums_are_kept_in_float64():
    x = torch.full((2000, 1), 1e4) + torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    total = Reconstruction(1, 1)
    for some in x.split(100):
        total.add(some, some + 0.5, torch.zeros(0, dtype=torch.long), torch.zeros(len(some)))
    spread = float((x.double() - x.double().mean(0)).square().sum())
    assert total.fvu().mean == pytest.approx(0.25 * 2000 / spread, rel=1e-3)


def test_interval_by_hand():
    got = ratio_interval(torch.tensor([2.0, 6.0, 0.0]), torch.tensor([1.0, 3.0, 0.0]))       # the empty document is left out
    assert got == Interval(2.0, 2.0, 2.0)
    got = ratio_interval(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    half = 1.96 * math.sqrt(((1 - 2) ** 2 + (3 - 2) ** 2) * 2) / 2
    assert (got.mean, got.low, got.high) == pytest.approx((2.0, 2 - half, 2 + half))
    equal = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = ratio_interval(equal, torch.ones(40))                       # equal sizes: the textbook interval of a mean
    assert got.high - got.mean == pytest.approx(1.96 * float(equal.std()) / math.sqrt(40))


def test_interval_covers_the_truth_about_19_times_in_20():
    g, covered = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        size = torch.randint(20, 200, (60,), generator=g).double()
        level = 1 + 0.5 * torch.randn(60, generator=g, dtype=torch.float64)       # documents differ: tokens are not independent
        got = ratio_interval(level * size, size)
        covered += got.low <= 1 <= got.high
    assert 920 <= covered <= 970


def test_one_document_has_no_bounds_and_none_is_an_error():
    got = ratio_interval(torch.tensor([3.0]), torch.tensor([2]))
    assert got.mean == 1.5 and got.low == -math.inf and got.high == math.inf
    with pytest.raises(BadInput, match="no tokens"):
        ratio_interval(torch.zeros(2), torch.zeros(2))
