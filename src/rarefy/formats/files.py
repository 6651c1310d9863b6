"""Reading files that others wrote: bounded, checked against what they claim before memory is taken, never executed.

Shape letters stand for sizes that must agree: "FD" is a matrix whose first size is F wherever F stands.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, Damaged, RarefyError
from ..store.fs import open_regular, read_bounded
from ..store.sealed import parse
from ..store.tensors import from_bytes

MOST_CONFIG = 1 << 20
MOST_WEIGHTS = 1 << 40
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NPY = re.compile(r"(?P<name>\w+)\.npy", re.ASCII)


def config(path: Path) -> dict[str, Any]:
    """A JSON object; Damaged otherwise."""
    return parse(read_bounded(path, MOST_CONFIG), path)


def safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; Damaged unless header and bytes account for each other."""
    return from_bytes(read_bounded(path, MOST_WEIGHTS), path)


def npz(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file. Damaged for arrays of objects, for sizes that do not fit, and for what is compressed a hundredfold."""
    import numpy as np

    try:
        with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            packed, whole = sum(m.compress_size for m in members), sum(m.file_size for m in members)
            if len(members) > 64 or whole > min(MOST_WEIGHTS, 100 * packed + (1 << 20)):
                raise Damaged(f"{path} claims {len(members)} arrays of {whole} bytes in {packed}; no dictionary is like that")
            out = {}
            for member in members:
                match = _NPY.fullmatch(member.filename)
                if match is None or match["name"] in out:
                    raise Damaged(f"{path} holds {member.filename[:80]!r}; an array's name, once, was expected")
                out[match["name"]] = torch.from_numpy(_array(archive, member, path, np))
            return out
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except RarefyError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, SyntaxError, TypeError, struct.error, zlib.error) as error:
        raise Damaged(f"{path} is no readable .npz file: {str(error)[:200]}") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, np: Any) -> Any:
    """One .npy member; its header is compared with its size before the elements are read."""
    form = np.lib.format
    with archive.open(member) as file:
        read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}.get(form.read_magic(file))
        if read is None:
            raise Damaged(f"{path}: {member.filename} is of another version of the .npy format than 1 and 2")
        shape, fortran, dtype = read(file, max_header_size=4096)
        if dtype.kind not in "fi" or dtype.hasobject:
            raise Damaged(f"{path}: {member.filename} holds {str(dtype)[:40]!r} elements; only numbers are read")
        if any(n < 0 for n in shape) or file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise Damaged(f"{path}: {member.filename} of shape {list(shape)} does not fit its {member.file_size} bytes")
        array = np.frombuffer(file.read(), dtype=dtype).astype(dtype.newbyteorder("="))
    return array.reshape(shape[::-1]).T.copy() if fortran else array.reshape(shape)


def take(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, str], sizes: Mapping[str, int], optional: str = "") -> dict[str, Tensor]:
    """The tensors a layout consists of, as float32.

    Args:
        shapes: name -> letters, "" for a scalar. sizes: letters whose size the config says.
        optional: names, separated by blanks, that may be missing.

    Raises:
        Damaged: names the file and the tensor that is missing, not expected, of another shape or kind of number, NaN or infinite.
    """
    found = dict(sizes)
    for name in tensors:
        if name not in shapes:
            raise Damaged(f"{path} holds a tensor {name[:80]!r} that has no place in this layout; expected {', '.join(shapes)}")
    out = {}
    for name, letters in shapes.items():
        if name not in tensors:
            if name in optional.split():
                continue
            raise Damaged(f"{path} lacks the tensor {name}; it holds {', '.join(sorted(tensors)[:12]) or 'none'}")
        tensor = tensors[name]
        if tensor.ndim != len(letters) or any(found.setdefault(c, n) != n or n < 1 for c, n in zip(letters, tensor.shape, strict=True)):
            want = [found.get(c, c) for c in letters]
            raise Damaged(f"{path}: {name} has shape {list(tensor.shape)}; {want} belongs there")
        if tensor.dtype not in _FLOATS:
            raise Damaged(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}; a float was expected")
        out[name] = tensor.float().contiguous()
        if not bool(torch.isfinite(out[name]).all()):
            raise Damaged(f"{path}: {name} holds NaN or inf")
    return out


def whole(path: Path, what: str, value: Any, most: int = 1 << 32) -> int:
    """A whole number in 1..most, also where it was written as 32.0; Damaged otherwise."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(number) is not int or not 1 <= number <= most:
        raise Damaged(f"{path}: {what} is {str(value)[:40]!r}; a whole number in 1..{most} belongs there")
    return number


def only(folder: Path, pattern: str, layout: str) -> Path:
    """The one file or folder below `folder` that matches; BadInput, listing them, where there are several."""
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(p.relative_to(folder)) for p in found[:6])
    raise BadInput(f"{folder} holds {len(found)} dictionaries in the {layout} layout ({names}{', ...' if len(found) > 6 else ''}); name one of them")
