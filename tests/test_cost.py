"""Counted and measured cost."""

import time

import pytest
import torch
from torch import nn

from rarefy.cost import Cost, counted_flops, timed


def test_costs_add_and_scale():
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
    assert Cost(3, 5) * 4 == Cost(12, 20)


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(1, 1, 1), (5, 63, 111), (0, 4, 4)])
def test_counted_flops_of_a_linear(rows, d_in, d_out):
    module, x = nn.Linear(d_in, d_out, bias=False), torch.randn(rows, d_in)
    assert counted_flops(lambda: module(x)) == 2 * rows * d_in * d_out


def test_counted_flops_leaves_no_counter_behind():
    x = torch.randn(3, 3)
    assert counted_flops(lambda: x @ x) == counted_flops(lambda: x @ x) == 54


def test_timed_gives_median_and_quartiles_after_warm_up():
    naps = iter([0.05, 0.05, *([0.001] * 4), 0.02])
    timing = timed(lambda: time.sleep(next(naps)), runs=5, warmup=2)
    assert timing.runs == 5
    assert 1 <= timing.low <= timing.ms <= timing.high < 20
    with pytest.raises(StopIteration):
        next(naps)


def test_timed_lets_errors_through():
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)
