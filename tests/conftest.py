"""One thread, fixed seeds, and memory that is full of NaN until it is written."""

import random
import signal
import threading

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, and Python then leaves it so: tests of Ctrl-C would never see it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(make):
    def call(*args, **kwargs):
        out = make(*args, **kwargs)
        if out.is_floating_point() and not out.is_meta:
            out.fill_(float("nan"))
        return out

    return call


@pytest.fixture
def nan_empty(monkeypatch):
    """torch.empty and its relatives give NaN, so that reading what was never written shows."""
    for home, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(home, name, _poisoned(getattr(home, name)))


@pytest.fixture(autouse=True)
def _poison_numerics(request):
    """Always on in tests/numerics and tests/contract."""
    if {"numerics", "contract"} & set(request.path.parts):
        request.getfixturevalue("nan_empty")
