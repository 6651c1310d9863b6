"""Triton kernels: where they serve. With TRITON_INTERPRET=1 they run, slowly, on tensors of the CPU, so that the tests of the
CPU path are theirs too."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from .native import transformed

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def serves(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether Triton can work on these: plain tensors on one CUDA device, all of one dtype of `dtypes`, and triton there."""
    first = tensors[0]
    here = first.device.type == "cuda" or (first.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return here and first.dtype in dtypes and not torch.compiler.is_compiling() and not transformed() and _triton() and all(
        type(t) in (Tensor, nn.Parameter) and t.device == first.device and t.dtype == first.dtype and t.layout == torch.strided for t in tensors
    )
