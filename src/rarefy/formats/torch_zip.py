"""Tensors of a file written by torch.save, without unpickling it.

The pickle in such a file is read as a list of instructions, of which a state dict needs fewer than thirty: texts, numbers,
tuples, dicts, and two calls, of which one names a run of bytes and the other its shape. Those are followed here; anything
else, above all any other function, ends the reading. Nothing is imported or called by name.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Damaged, RarefyError, Unsupported
from ..store.fs import open_regular

_STORAGES = {
    "torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
}
_DICT, _REBUILD, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_MOST_PICKLE = 1 << 20
_MARK = object()


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """A run of bytes in the archive."""

    dtype: torch.dtype
    key: str
    count: int


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a state dict, each with its own memory.

    Raises:
        Damaged: truncated, compressed, or of shapes that its bytes do not hold.
        Unsupported: not a zip archive as torch.save has made since 1.6, or a pickle of anything but plain tensors by name.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise Unsupported(f"{path} is not an archive as torch.save writes it since version 1.6; load and save it again with its own library")
            with zipfile.ZipFile(file) as archive:
                return _Reader(path, archive).state()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except RarefyError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise Damaged(f"{path} is truncated or altered: {str(error)[:200]}") from error


class _Reader:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.members = {m.filename: m for m in archive.infolist()}
        if len(self.members) > 4096 or any(m.compress_type != zipfile.ZIP_STORED for m in self.members.values()):
            raise Damaged(f"{path} holds compressed or thousands of members; torch.save writes neither")
        pickles = [name for name in self.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or self.members[pickles[0]].file_size > _MOST_PICKLE:
            raise Damaged(f"{path} holds {len(pickles)} data.pkl; one of at most {_MOST_PICKLE} bytes belongs there")
        self.top = pickles[0].removesuffix("data.pkl")
        order = f"{self.top}byteorder"
        if order in self.members and self._bytes(order, 16) != b"little":
            raise Unsupported(f"{path} was written on a big-endian machine; save it again on a little-endian one")
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def _bytes(self, name: str, most: int) -> bytes:
        member = self.members.get(name)
        if member is None or member.file_size > most:
            raise Damaged(f"{self.path} lacks {name[:80]!r}, or it is too long")
        return self.archive.read(member)

    def state(self) -> dict[str, Tensor]:
        """The state dict."""
        try:
            for code, argument, _ in pickletools.genops(self._bytes(f"{self.top}data.pkl", _MOST_PICKLE)):
                self._follow(code.name, argument)
                if code.name == "STOP":
                    break
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            if isinstance(error, RarefyError):
                raise
            raise Damaged(f"{self.path}: its data.pkl is no well-formed state dict ({type(error).__name__})") from error
        found = self.stack.pop() if len(self.stack) == 1 else None
        if not isinstance(found, dict) or not all(type(k) is str and isinstance(v, Tensor) for k, v in found.items()):
            raise Unsupported(f"{self.path} does not hold tensors by name, and nothing else is read from a pickle; save the state_dict()")
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}

    def _follow(self, code: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if code in ("PROTO", "STOP", "FRAME"):
            pass
        elif code in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif code in ("NEWTRUE", "NEWFALSE", "NONE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[code])
        elif code in ("EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_LIST", "MARK"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "MARK": lambda: _MARK}[code]())
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif code == "TUPLE":
            stack.append(tuple(self._above()))
        elif code in ("SETITEM", "SETITEMS"):
            items = self._above() if code == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            self._into(stack[-1], items)
        elif code == "GLOBAL":
            if argument not in (_DICT, _REBUILD, _PARAMETER, *_STORAGES):
                raise Unsupported(f"{self.path} names {str(argument)[:80]!r}, which a file of tensors does not need; nothing of it was run")
            stack.append(_Name(argument))
        elif code == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif code == "BUILD":
            stack.pop()                                        # _metadata of a state dict: versions of modules
        else:
            raise Unsupported(f"{self.path}: its pickle has an instruction {code}, which a file of tensors does not need; nothing of it was run")

    def _above(self) -> list[Any]:
        """Takes what lies above the last mark."""
        at = max(i for i, one in enumerate(self.stack) if one is _MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def _into(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise Damaged(f"{self.path}: its pickle puts entries into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:          # a tuple of tuples of ... would take for ever to hash or to show
                raise Damaged(f"{self.path}: an entry of its pickle has no name, or a name stands twice")
            target[key] = value

    def _storage(self, ident: Any) -> _Storage:
        kind, name, key, _, count = ident
        plain = kind == "storage" and isinstance(name, _Name) and name.text in _STORAGES and type(count) is int and type(key) is str
        if not plain or not (key.isascii() and key.isdecimal()):
            raise Unsupported(f"{self.path} holds a storage of another kind than plain numbers; only those are read")
        return _Storage(_STORAGES[name.text], key, count)

    def _call(self, function: Any, arguments: Any) -> Any:
        if function == _Name(_DICT) and arguments == ():
            return {}
        if function == _Name(_REBUILD):
            return self._tensor(*arguments[:4])
        if function == _Name(_PARAMETER):
            return arguments[0]
        raise Unsupported(f"{self.path}: its pickle calls something that a file of tensors does not need; nothing of it was run")

    def _tensor(self, storage: _Storage, offset: Any, shape: Any, stride: Any) -> Tensor:
        """A view of a storage, refused where it repeats elements or reaches beyond them."""
        if storage.key not in self.storages:
            data = self._bytes(f"{self.top}data/{storage.key}", storage.count * storage.dtype.itemsize)
            if len(data) != storage.count * storage.dtype.itemsize:
                raise Damaged(f"{self.path}: storage {storage.key} has {len(data)} bytes, not {storage.count * storage.dtype.itemsize}")
            flat = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            self.storages[storage.key] = flat
        flat = self.storages[storage.key]
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) and len(shape) == len(stride) <= 4
        reach = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if whole and all(shape) else 0
        if not whole or reach > len(flat) or math.prod(shape) > len(flat) or flat.dtype != storage.dtype:
            raise Damaged(f"{self.path}: a tensor of shape {list(shape) if whole else '?'} does not fit its storage of {len(flat)} elements")
        return flat.as_strided(shape, stride, offset)
