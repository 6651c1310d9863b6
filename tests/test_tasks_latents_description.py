"""Description length: entropies against counting and an adaptive coder, bins, the rest's rate, and its minimum on planted data."""

import math
from collections import Counter

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.tasks.codes import Codes
from rarefy.tasks.description import description_length, entropy
from rarefy.tasks.learned import Learned, perfect
from rarefy.tasks.planted_kinds import plant


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_bins(n=3000):
    g = seeded(1)
    rate = torch.tensor([0.5, 0.1, 0.02, 0.0, 1.0])
    return (torch.randint(1, 9, (n, 5), generator=g) * (torch.rand(n, 5, generator=g) < rate)).float()


def test_entropy_is_that_of_counting():
    dense = some_bins()
    codes = Codes.of(dense)
    naive = 0.0
    for column in dense.T.tolist():
        for count in Counter(column).values():
            naive -= count / len(column) * math.log2(count / len(column))
    assert entropy(codes, codes.by_row.value_M.long()) == pytest.approx(naive, rel=1e-12)
    closed = sum(p * 3 - sum(q * math.log2(q) for q in (p, 1 - p) if q) for p in (0.5, 0.1, 0.02, 0.0, 1.0))
    assert naive == pytest.approx(closed, rel=0.03)


def test_an_adaptive_coder_needs_about_the_entropy():
    """Ideal code length of an arithmetic coder that learns the frequencies as it goes (Krichevsky-Trofimov counts)."""
    dense = some_bins()
    codes, bits = Codes.of(dense), 0.0
    for column in dense.T.long().tolist():
        seen = [0.5] * 9
        for symbol in column:
            bits -= math.log2(seen[symbol] / sum(seen))
            seen[symbol] += 1
    assert bits / len(dense) == pytest.approx(entropy(codes, codes.by_row.value_M.long()), rel=0.05)
    assert bits / len(dense) > entropy(codes, codes.by_row.value_M.long())


def test_bins_are_the_coarsest_within_tolerance():
    t = plant("independent", 2000, 16, 32, 3.0, noise=0.05)
    learned = perfect(t.codes, t.dictionary)
    got = description_length(learned, t.x, tolerance=0.01)
    variance = float((t.x - t.x.mean(0)).double().pow(2).mean())

    def added(step):
        rebuilt = (t.codes.double() / step).round() * step @ t.dictionary.double()
        return float((t.x - rebuilt).pow(2).mean() - (t.x - t.signal).double().pow(2).mean())

    assert added(got.step) <= 0.01 * variance < added(got.step * 1.2)
    finer = description_length(learned, t.x, tolerance=0.001)
    assert finer.step < got.step and finer.codes > got.codes + 3                            # three codes a row, over a bit finer each


def test_lengths_of_decoder_rows_do_not_matter():
    t = plant("independent", 2000, 16, 32, 3.0)
    size = torch.linspace(0.2, 5, 32)
    a = description_length(perfect(t.codes, t.dictionary), t.x)
    b = description_length(perfect(t.codes / size, t.dictionary * size[:, None]), t.x)
    assert a.codes == pytest.approx(b.codes, rel=1e-3) and a.step == pytest.approx(b.step, rel=1e-3)


def test_what_is_left_costs_what_a_gaussian_costs():
    g = seeded(0)
    x = torch.randn(50_000, 3, generator=g) * torch.tensor([2.0, 1.0, 0.05])
    nothing = Learned(Codes.of(torch.zeros(50_000, 1)), torch.ones(1, 3), torch.ones(1, 3), torch.zeros_like(x))
    got = description_length(nothing, x, tolerance=0.01)
    allowed = 0.01 * (4 + 1 + 0.0025) / 3
    assert got.codes == 0
    assert got.rest == pytest.approx(0.5 * math.log2(4 / allowed) + 0.5 * math.log2(1 / allowed), abs=0.02)      # the third is below it
    assert got.total == got.codes + got.rest


def test_the_truth_is_shorter_than_less_and_more_than_the_truth():
    """Half of the features left to the rest, or every feature split into two that take turns: both cost more bits."""
    t = plant("independent", 8000, 16, 32, 3.0, noise=0.03)
    bits = description_length(perfect(t.codes, t.dictionary), t.x).total
    half = description_length(perfect(t.codes[:, :16], t.dictionary[:16]), t.x).total
    turn = torch.rand(t.codes.shape, generator=seeded(5)) < 0.5
    split = perfect(torch.cat([t.codes * turn, t.codes * ~turn], 1), t.dictionary.repeat(2, 1))
    twice = description_length(split, t.x).total
    assert bits < half - 1 and twice - bits == pytest.approx(3.0, abs=0.3)                  # a coin toss for each of the 3 codes a row


@pytest.mark.parametrize(("more", "named"), [({"tolerance": 0.0}, "tolerance"), ({"tolerance": 1.0}, "tolerance")])
def test_tolerance_out_of_range(more, named):
    t = plant("independent", 100, 8, 16, 2.0)
    with pytest.raises(BadInput, match=named):
        description_length(perfect(t.codes, t.dictionary), t.x, **more)
    with pytest.raises(BadInput, match="rows that were read"):
        description_length(perfect(t.codes, t.dictionary), t.x[:50])
    with pytest.raises(BadInput, match="does not vary"):
        description_length(perfect(torch.zeros(9, 16), t.dictionary), torch.ones(9, 8))


@pytest.mark.slow
def test_trained_dictionaries_are_shortest_near_the_true_width_and_l0():
    """32 planted features, 3 on a row: half or four times the width, a third or thrice the latents a row all need more bits."""
    from rarefy.fit import Recipe, train
    from rarefy.latents.topk import TopK
    from rarefy.streams import TensorStream
    from rarefy.tasks.learned import read

    t = plant("independent", 28_000, 16, 32, 3.0)
    held = t.rows(20_000, 28_000)
    sizes = [(32, 3), (16, 3), (128, 3), (32, 1), (32, 9)]
    plan = {f"{width}-{k}": TopK(16, width, k=k, dead_after=10_000) for width, k in sizes}
    train(plan, TensorStream(t.x[:20_000], 256), Recipe(steps=1500, lr=0.01))
    true, *others = (description_length(read(method, held.x), held.x).total for method in plan.values())
    assert true < min(others), (true, others)
