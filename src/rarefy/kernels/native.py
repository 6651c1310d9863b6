"""Loops compiled by numba: where they serve, and how they share the threads that torch was given.

A kernel takes (start, stop, arrays...) and works on that range of rows alone, so that what it writes does not depend on
how many threads take part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..compiled import available


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: what a tensor then carries along, its memory does not hold."""
    functions: Any = torch._C
    return functions._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def serves(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> bool:
    """Whether compiled loops can work on these: plain tensors on the CPU, all of one dtype of `dtypes`, and numba there."""
    first = tensors[0].dtype
    return first in dtypes and not torch.compiler.is_compiling() and not transformed() and all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == first and t.layout == torch.strided for t in tensors
    ) and available()


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, copied only if it is not contiguous."""
    return tensor.detach().contiguous().numpy()


@cache
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept a process: after a fork the parent's threads are not there."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rarefy-kernel")


def spread(kernel: Callable[..., object], count: int, *arrays: Any, least: int = 64) -> None:
    """Call kernel(start, stop, *arrays) over range(count), in at least `least` pieces a thread."""
    threads = max(1, min(torch.get_num_threads(), count // least))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        kernel(0, count, *arrays)
        return
    pool = _workers(os.getpid(), torch.get_num_threads())
    for done in [pool.submit(kernel, a, b, *arrays) for a, b in zip(edges, edges[1:], strict=False)]:
        done.result()
