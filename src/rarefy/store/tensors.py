"""Named tensors as one file in the safetensors layout, parsed strictly.

Written here rather than with the safetensors package because tensors that share memory must be accepted, and because
a hostile header must cost little: at most 4 MiB of JSON, every byte of the file accounted for, no two tensors overlapping.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BadInput, Damaged, Unsupported
from .sealed import MOST, parse

if TYPE_CHECKING:
    from torch import Tensor

TORCH_NAME = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element of each dtype that can be kept, by its name in torch."""
_CODE = {name: code for code, name in TORCH_NAME.items()}


class Held(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str
    """Name in torch."""
    shape: list[int]
    start: int
    end: int


def dtype_name(dtype: Any) -> str:
    """ "float32" for torch.float32 or "float32"; Unsupported for a dtype that cannot be kept."""
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise Unsupported(f"dtype {name!r} cannot be kept; one of {', '.join(ITEM_BYTES)}")
    return name


def raw_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor in row order, little-endian, without a copy where it is contiguous on the CPU."""
    import torch

    if sys.byteorder != "little":
        raise Unsupported("this machine is big-endian; rarefy's files are little-endian")
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A file's bytes: largest elements first, so that each tensor is aligned, then by name."""
    kept = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise BadInput(f"tensor name {name!r} cannot be kept; use another text")
        if not hasattr(tensor, "detach"):
            raise BadInput(f"{name} is a {type(tensor).__name__}, not a tensor")
        kept[name] = (dtype_name(tensor.dtype), tensor)
    header: dict[str, Any] = {}
    pieces, at = [], 0
    for name, (dtype, tensor) in sorted(kept.items(), key=lambda kv: (-ITEM_BYTES[kv[1][0]], kv[0])):
        piece = raw_bytes(tensor)
        header[name] = {"dtype": _CODE[dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(piece)]}
        pieces.append(piece)
        at += len(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST:
        raise Unsupported(f"{len(kept)} tensors need a header of {len(text)} bytes; at most {MOST}")
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def read_header(data: bytes | memoryview, size: int, path: str | Path) -> tuple[dict[str, Held], int]:
    """Names, dtypes, shapes and places, and where the elements begin.

    Args:
        data: the file's first bytes, at least its header.
        size: bytes of the whole file.

    Raises:
        Damaged: anything but a file whose tensors follow one another without gap or overlap to its very end.
    """
    length = int.from_bytes(data[:8], "little")
    if size < 10 or length > min(size - 8, MOST) or len(data) < 8 + length:
        raise Damaged(f"{path} is truncated or its header of {length} bytes is too long (at most {MOST})")
    held: dict[str, Held] = {}
    for name, entry in parse(bytes(data[8 : 8 + length]), path).items():
        if name != "__metadata__":
            held[name] = _entry(name, entry, path)
    at = 0
    for name, one in sorted(held.items(), key=lambda kv: (kv[1].start, kv[1].end)):
        if one.start != at:
            raise Damaged(f"{path}: tensor {name!r} begins at byte {one.start}, not at {at}: overlap or gap")
        at = one.end
    if 8 + length + at != size:
        raise Damaged(f"{path} has {size} bytes; its header accounts for {8 + length + at}")
    return held, 8 + length


def _entry(name: str, entry: Any, path: str | Path) -> Held:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"{path}: tensor {name!r} must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in TORCH_NAME:
        raise Damaged(f"{path}: tensor {name!r} has dtype {str(code)[:20]!r}; one of {', '.join(TORCH_NAME)}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        good = (
            isinstance(values, list) and len(values) <= 16 and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
        )
        if not good:
            raise Damaged(f"{path}: tensor {name!r} has an impossible {what}")
    dtype = TORCH_NAME[code]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise Damaged(f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} does not fit its offsets {offsets}")
    return Held(dtype, shape, offsets[0], offsets[1])


def from_bytes(data: bytes, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, each with its own memory."""
    import torch

    held, begin = read_header(data, len(data), path)
    view = memoryview(data)
    out = {}
    for name, one in held.items():
        dtype = getattr(torch, one.dtype)
        tensor = torch.empty(one.shape, dtype=dtype)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).numpy()[:] = view[begin + one.start : begin + one.end]
        out[name] = tensor
    return out
