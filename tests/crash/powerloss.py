"""A disk in memory that records operations and can show every state that a power cut may legally leave.

Bytes written count as durable once their file was synced, names once their directory was. Until then bytes may be
whole, half there, zeros or absent, and each change of a name may be lost on its own, in any combination.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from rarefy.store.fs import FS


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

    def write(self, path, data):
        node = Node(b"")
        self._link([(self._at(path.parent), path.name, node)])
        node.data = bytes(data)
        self.ops.append(("bytes", node, node.data))

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


def _apply(changes: list[tuple[Node, str, Node | None]]) -> None:
    for directory, name, node in changes:
        if node is None:
            directory.names.pop(name, None)
        else:
            directory.names[name] = node


def states(ops: list[tuple], most: int = 6) -> Iterator[MemoryFS]:
    """Every state after a cut that follows `ops`. With over `most` pending name changes: each lost alone, each suffix lost."""
    synced = [op[1] for op in ops]
    names = [i for i, op in enumerate(ops) if op[0] == "names"]

    def durable(i: int) -> bool:
        return all(
            any(ops[j][0] == "sync_dir" and synced[j] is directory for j in range(i + 1, len(ops)))
            for directory, _, _ in ops[i][1]
        )

    pending = [i for i in names if not durable(i)]
    if len(pending) <= most:
        lost_sets = itertools.chain.from_iterable(itertools.combinations(pending, r) for r in range(len(pending) + 1))
    else:
        lost_sets = [(), *((i,) for i in pending), *(tuple(pending[k:]) for k in range(len(pending)))]
    for lost in lost_sets:
        for mode in ("whole", "half", "zeros", "empty"):
            yield _replay(ops, set(lost), mode)


def _replay(ops: list[tuple], lost: set[int], mode: str) -> MemoryFS:
    out, twin = MemoryFS(), {}

    def copy(node: Node) -> Node:
        return twin.setdefault(id(node), Node(None if node.data is None else b""))

    for i, op in enumerate(ops):
        if op[0] == "names" and i not in lost:
            _apply([(copy(d), name, None if node is None else copy(node)) for d, name, node in op[1]])
        elif op[0] == "bytes":
            safe = mode == "whole" or any(o[0] == "sync" and o[1] is op[1] for o in ops[i + 1 :])
            kept = {"half": op[2][: len(op[2]) // 2], "zeros": bytes(len(op[2])), "empty": b""}
            copy(op[1]).data = op[2] if safe else kept[mode]
    out.root = twin.get(id(root_of(ops)), out.root)
    return out


def root_of(ops: list[tuple]) -> Node:
    """The first directory that was changed: the test's only root."""
    return ops[0][1][0][0] if ops else Node(None)
