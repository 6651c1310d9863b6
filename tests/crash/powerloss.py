"""A disk in memory that records operations and can show every state that a power cut may legally leave.

Bytes written count as durable once their file was synced, names once their directory was. Until then bytes may be
whole, half there, zeros or absent, each write on its own, and each change of a name may be lost, in any combination.
Bytes that are absent below others that are there read as zeros, as in a file whose size reached the disk before its data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from rarefy.store.fs import FS

LOST = ("half", "zeros", "empty")


class Node:
    """A file (data) or a directory (names), by identity, so that a rename moves what is below it."""

    def __init__(self, data: bytes | None) -> None:
        self.data, self.names = data, {}


class MemoryFS(FS):
    """The volatile view, as a running process sees it; `ops` is what the disk has been asked for."""

    def __init__(self) -> None:
        self.root, self.ops = Node(None), []

    def _at(self, path: Path) -> Node:
        node = self.root
        for part in Path(path).parts[1:]:
            if part not in node.names:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            node = node.names[part]
        return node

    def _link(self, changes: list[tuple[Node, str, Node | None]]) -> None:
        self.ops.append(("names", changes))
        _apply(changes)

    def _bytes(self, node: Node, at: int, data: bytes) -> None:
        node.data = node.data[:at] + data
        self.ops.append(("bytes", node, at, data))

    def write(self, path, data):
        node = Node(b"")
        self._link([(self._at(path.parent), path.name, node)])
        self._bytes(node, 0, bytes(data))

    def append(self, path, data):
        if not self.exists(path):
            self._link([(self._at(path.parent), path.name, Node(b""))])
        node = self._at(path)
        self._bytes(node, len(node.data), bytes(data))

    def truncate(self, path, size):
        node = self._at(path)
        node.data = node.data[:size]
        self.ops.append(("cut", node, size))

    def sync(self, path):
        self.ops.append(("sync", self._at(path)))

    def sync_dir(self, path):
        self.ops.append(("sync_dir", self._at(path)))

    def mkdir(self, path):
        self._link([(self._at(path.parent), path.name, Node(None))])

    def rename(self, old, new):
        a, b = self._at(old.parent), self._at(new.parent)
        self._link([(a, old.name, None), (b, new.name, a.names[old.name])])

    def remove(self, path):
        self._link([(self._at(path.parent), path.name, None)])

    def rmtree(self, path):
        node = self._at(path)
        for name in list(node.names):
            self._link([(node, name, None)])
        self._link([(self._at(path.parent), path.name, None)])

    def exists(self, path):
        try:
            self._at(path)
        except FileNotFoundError:
            return False
        return True

    def names(self, path):
        return sorted(self._at(path).names) if self.exists(path) else []

    def size(self, path):
        return len(self.read(path))

    def read(self, path):
        node = self._at(path)
        if node.data is None:
            raise IsADirectoryError(21, "Is a directory", str(path))
        return node.data

    def dump(self, folder: Path) -> None:
        """The same tree on the real disk, in a new folder."""

        def put(node: Node, path: Path) -> None:
            if node.data is not None:
                path.write_bytes(node.data)
                return
            path.mkdir()
            for name, below in node.names.items():
                put(below, path / name)

        put(self.root, folder)


class Recorder(FS):
    """The real disk below `base`, with a MemoryFS beside it that records what was asked, `base` being its root."""

    def __init__(self, base: Path) -> None:
        self.base, self.model = base, MemoryFS()

    @property
    def ops(self) -> list[tuple]:
        return self.model.ops


def _recorded(name):
    def operation(self, path, *rest):
        getattr(FS, name)(self, path, *rest)
        inside = [Path("/") / a.relative_to(self.base) if isinstance(a, Path) else a for a in (path, *rest)]
        getattr(self.model, name)(*inside)

    return operation


for _name in ("write", "append", "truncate", "sync", "sync_dir", "mkdir", "rename", "remove", "rmtree"):
    setattr(Recorder, _name, _recorded(_name))


def _apply(changes: list[tuple[Node, str, Node | None]]) -> None:
    for directory, name, node in changes:
        if node is None:
            directory.names.pop(name, None)
        else:
            directory.names[name] = node


def states(ops: list[tuple], most: int = 6, root: Node | None = None) -> Iterator[MemoryFS]:
    """Every state after a cut that follows `ops`, without repeats.

    Bytes not synced: all alike in each of four ways, each lost alone in each way, each the only one kept. With over
    `most` pending changes of names: each lost alone, and each suffix lost; all combinations otherwise.
    """
    root = root or root_of(ops)
    pending = [i for i, op in enumerate(ops) if op[0] == "names" and not _named(ops, i)]
    if len(pending) <= most:
        lost_sets = itertools.chain.from_iterable(itertools.combinations(pending, r) for r in range(len(pending) + 1))
    else:
        lost_sets = [(), *((i,) for i in pending), *(tuple(pending[k:]) for k in range(len(pending)))]
    loose = [i for i, op in enumerate(ops) if op[0] in ("bytes", "cut") and not _written(ops, i)]
    fates = [dict.fromkeys(loose, way) for way in ("whole", *LOST)]
    fates += [{**dict.fromkeys(loose, "whole"), i: way} for i in loose for way in LOST]
    fates += [{**dict.fromkeys(loose, "empty"), i: "whole"} for i in loose]
    seen = set()
    for lost in lost_sets:
        for fate in fates:
            state = _replay(ops, set(lost), fate, root)
            key = _tree(state.root)
            if key not in seen:
                seen.add(key)
                yield state


def _named(ops: list[tuple], i: int) -> bool:
    """Whether the change of names is safe: every directory that it touched was synced after it."""
    return all(any(op[0] == "sync_dir" and op[1] is directory for op in ops[i + 1 :]) for directory, _, _ in ops[i][1])


def _written(ops: list[tuple], i: int) -> bool:
    return any(op[0] == "sync" and op[1] is ops[i][1] for op in ops[i + 1 :])


def _tree(node: Node):
    return node.data if node.data is not None else tuple((name, _tree(below)) for name, below in sorted(node.names.items()))


def _replay(ops: list[tuple], lost: set[int], fate: dict[int, str], root: Node) -> MemoryFS:
    out, twin = MemoryFS(), {}

    def copy(node: Node) -> Node:
        return twin.setdefault(id(node), Node(None if node.data is None else b""))

    for i, op in enumerate(ops):
        if op[0] == "names" and i not in lost:
            _apply([(copy(d), name, None if node is None else copy(node)) for d, name, node in op[1]])
        elif op[0] == "bytes" and fate.get(i) != "empty":
            _, node, at, data = op
            kept = {"half": data[: len(data) // 2], "zeros": bytes(len(data))}.get(fate.get(i, "whole"), data)
            was = copy(node).data.ljust(at, b"\0")
            copy(node).data = was[:at] + kept + was[at + len(kept) :]
        elif op[0] == "cut" and fate.get(i, "whole") == "whole":
            copy(op[1]).data = copy(op[1]).data[: op[2]]
    out.root = twin.get(id(root), out.root)
    return out


def root_of(ops: list[tuple]) -> Node:
    """The first directory that was changed: the test's only root."""
    return ops[0][1][0][0] if ops else Node(None)
