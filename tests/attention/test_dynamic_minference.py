"""MInference's choice of a pattern a head, and pooled blocks, against what was planted and against loops."""

import itertools

import pytest
import torch

import rarefy
from rarefy.attention.dynamic.minference import PATTERNS, MInference, a_shape
from rarefy.attention.dynamic.pooled import Pooled

S, D, SIDE = 96, 16, 8


def planted(seed=0):
    """One head of each kind: recent keys, two columns, and one block far back for each block of queries."""
    r = torch.Generator().manual_seed(seed)
    q, k = torch.zeros(2, 3, S, D), torch.zeros(2, 3, S, D)
    v = torch.randn(2, 3, S, D, generator=r)
    angle = torch.arange(S) * 0.1
    turned = torch.stack([angle.cos(), angle.sin()], -1)
    q[:, 0, :, :2], k[:, 0, :, :2] = 24 * turned, turned                       # logits fall with distance
    k[:, 0, :4, 2], q[:, 0, :, 2] = 1.0, 24.0
    q[:, 1, :, 0], k[:, 1, [13, 50], 0] = 8.0, 6.0                             # two columns
    key = torch.nn.functional.normalize(torch.randn(S // SIDE, D, generator=r), dim=-1)
    k[:, 2] = 6 * key.repeat_interleave(SIDE, 0)
    asked = torch.tensor([0, *(int(torch.randint(n, (1,), generator=r)) for n in range(1, S // SIDE))])
    q[:, 2] = 6 * key[asked].repeat_interleave(SIDE, 0)                        # one block each
    return q, k, v


def test_each_head_takes_the_pattern_planted_in_it():
    q, k, v = planted()
    method = MInference(budget=0.2, last=16, side=SIDE)
    method.observe(q[:1], k[:1], v[:1])
    method.observe(q[1:], k[1:], v[1:])
    method.finish()
    assert [PATTERNS[int(n)] for n in method.pattern_H] == list(PATTERNS)
    got = method(q, k, v)
    later = ~torch.ones(S, S, dtype=torch.bool).tril()
    dense = (q @ k.mT / D**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
    for other in range(3):
        if other:
            method.pattern_H.copy_(method.pattern_H.roll(1))
            assert (method(q, k, v) - dense).square().sum() > (got - dense).square().sum()
    with pytest.raises(rarefy.BadInput, match="fitted to"):
        method(q[:, :2], k[:, :2], v[:, :2])


@pytest.mark.parametrize("causal", [True, False])
def test_a_shape_is_the_widest_window_within_the_budget(causal):
    def naive(n):
        return torch.tensor([[(not causal or s <= t) and (s < 3 or abs(t - s) < n) for s in range(20)] for t in range(8, 20)])

    got, most = a_shape(12, 20, 0.5, 3, causal, torch.device("cpu")), 0.5 * naive(99).sum()
    widths = [n for n in range(1, 21) if naive(n).sum() <= most]
    assert torch.equal(got, naive(widths[-1])) and widths[-1] > 2
    for budget, n in ((0.01, 1), (1.0, 99)):
        assert torch.equal(a_shape(12, 20, budget, 3, causal, torch.device("cpu")), naive(n))


def test_decoding_is_dense():
    q, k, v = planted()
    method = MInference(budget=0.2, last=16, side=SIDE)
    method.observe(q, k, v)
    method.finish()
    dense = (q[:, :, -1:] @ k.mT / D**0.5).softmax(-1) @ v
    torch.testing.assert_close(method(q[:, :, -1:], k, v), dense)


@pytest.mark.parametrize(("T", "rows"), [(21, 1), (9, 4), (21, 4)])
def test_pooled_blocks_by_loops(T, rows):
    r = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, T, 6, generator=r), torch.randn(1, 1, 21, 6, generator=r)
    got = Pooled(0.4, 4, rows).choose(q, k, True)
    first = (21 - T) // rows
    for h, row in itertools.product(range(2), range(got.shape[2])):
        at = [p for p in range((first + row) * rows, (first + row + 1) * rows) if 21 - T <= p < 21]
        ask = q[0, h, [p - 21 + T for p in at]].mean(0)
        least, last = (first + row) * rows // 4, min((first + row + 1) * rows - 1, 20) // 4
        score = {n: (ask @ k[0, 0, 4 * n : 4 * n + 4].mean(0)).item() for n in range(least)}
        keep = max(1, round(0.4 * (last + 1)))
        own = set(range(least, last + 1))
        want = own | set(sorted(score, key=lambda n: -score[n])[: max(0, keep - len(own))])
        assert {n for n in range(6) if got[0, h, row, n]} == want
