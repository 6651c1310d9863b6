"""Memory that is used again.

Filling freshly mapped pages takes ten times as long as filling pages that were written before, so large results of
kernels (gradients of [F, D] tables, blocks of pre-activations) come from a pool. A buffer is free again when the last
tensor on it is gone; nobody has to give it back.
"""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 20
"""Smaller results are left to the allocator, which uses its memory again itself."""
KEEP = 64
"""A free buffer is let go when another one is made and this many were handed out since its last use."""

_NAMES = {torch.float32: "f4", torch.float64: "f8"}
"""numpy's, where it has the type; others are made from integers of their size."""


@dataclass
class _Buffer:
    bytes_: np.ndarray
    used_at: int


_first = _Buffer(np.empty(0, dtype=np.uint8), 0)
_FREE = sys.getrefcount(_first.bytes_)
_buffers: list[_Buffer] = []
_lock = threading.Lock()
_count = 0


def _is_free(buffer: _Buffer) -> bool:
    return sys.getrefcount(buffer.bytes_) == _FREE      # a tensor on it holds one more


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU: contents are whatever was there before."""
    global _count
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        _count += 1
        for buffer in _buffers:
            if buffer.bytes_.nbytes == size and _is_free(buffer):
                break
        else:
            _buffers[:] = [b for b in _buffers if not _is_free(b) or _count - b.used_at <= KEEP]
            buffer = _Buffer(np.empty(size, dtype=np.uint8), 0)         # numpy asks for huge pages, torch does not
            _buffers.append(buffer)
        buffer.used_at = _count
        # Shaped by numpy: autograd adds gradients in place only into tensors that are nobody's view.
        shaped = buffer.bytes_.view(_NAMES.get(dtype, f"i{dtype.itemsize}")).reshape(shape)
        return torch.from_numpy(shaped).view(dtype)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of `like`'s dtype and device, from the pool where that is the CPU."""
    return empty(shape, like.dtype).zero_() if like.device.type == "cpu" else like.new_zeros(shape)


def clear() -> None:
    """Let go of everything that is free."""
    with _lock:
        _buffers[:] = [b for b in _buffers if not _is_free(b)]


def held() -> int:
    """Bytes in the pool, free or not."""
    with _lock:
        return sum(b.bytes_.nbytes for b in _buffers)
