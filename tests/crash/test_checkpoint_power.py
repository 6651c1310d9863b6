"""Every legal disk state after a power cut keeps the last acknowledged checkpoint (T2), and dropping any sync is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rarefy.errors import Damaged
from rarefy.store.checkpoint import load_checkpoint, save_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from powerloss import MemoryFS, states  # noqa: E402

ROOT = Path("/run/checkpoints")


def value(step):
    return {"w": torch.full((6,), float(step)), "n": torch.tensor(step)}


def failures(fs, save=save_checkpoint):
    """(states, states that lost or bent an acknowledged checkpoint) over all cuts."""
    acked = []
    for step in (10, 20, 30):
        save(ROOT, step, value(step), {"s": step}, keep=2, fs=fs)
        acked.append((len(fs.ops), step))
    count = bad = 0
    for cut in range(1, len(fs.ops) + 1):
        must = max((step for ops, step in acked if ops <= cut), default=None)
        for state in states(fs.ops[:cut]):
            count += 1
            try:
                got = load_checkpoint(ROOT, fs=state)
            except Damaged:
                bad += must is not None
                continue
            if got is None:
                bad += must is not None
            else:
                whole = got.meta == {"s": got.step} and all(
                    torch.equal(v, got.tensors[k]) for k, v in value(got.step).items()
                )
                bad += not whole or (must is not None and got.step < must)
    return count, bad


def test_no_acknowledged_checkpoint_is_lost():
    count, bad = failures(MemoryFS())
    assert bad == 0
    assert count > 120  # distinct states


class NoDataSync(MemoryFS):
    def sync(self, path):
        if path.name != "tensors.safetensors":
            super().sync(path)


class NoManifestSync(MemoryFS):
    def sync(self, path):
        if path.name != "manifest.json":
            super().sync(path)


class NoParentSync(MemoryFS):
    def sync_dir(self, path):
        if path != ROOT:
            super().sync_dir(path)


class NoInnerSync(MemoryFS):
    def sync_dir(self, path):
        if not path.name.startswith(".tmp-"):
            super().sync_dir(path)


class NoRootParentSync(MemoryFS):
    def sync_dir(self, path):
        if path != ROOT.parent:
            super().sync_dir(path)


@pytest.mark.parametrize("broken", [NoDataSync, NoManifestSync, NoParentSync, NoInnerSync, NoRootParentSync])
def test_the_harness_notices_a_missing_sync(broken):
    assert failures(broken())[1] > 0


def test_the_harness_notices_overwriting_in_place():
    def in_place(root, step, tensors, meta, keep, fs):
        save_checkpoint(root, step, tensors, meta, keep, fs=fs) if not fs.exists(root) else None
        folder = root / "step-000000000010"
        for name in ("tensors.safetensors", "manifest.json"):
            fs.write(folder / name, fs.read(folder / name))

    assert failures(MemoryFS(), in_place)[1] > 0
