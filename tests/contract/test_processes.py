"""C8 across processes: every catalogue entry and variant, made, fitted and used in two fresh processes with 1 and 2 threads, has the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy

PROGRAM = """
import hashlib, json, sys, torch
from rarefy import catalogue
from rarefy._contract.spec import Case, state_of
from rarefy._contract.specs import specs_of, variants
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(int(sys.argv[1]) + 17)                # what the global generator says is not to matter
said = {}
for entry in catalogue.ENTRIES:
    for name, spec in zip(variants(entry.name), specs_of(entry.name), strict=True):
        case = Case(spec)
        method, inputs = case.ready(), case.inputs(64)
        with torch.no_grad():
            out = method(*inputs)
        digest = hashlib.sha256()
        for key, value in sorted({**state_of(method), "out": out}.items()):
            digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value).encode())
        said[name] = digest.hexdigest(), out.double().norm().item()
print(json.dumps(said))
"""


BY_THREADS = {"attention/moba", "attention/fsa"}
"""Their loop over key blocks multiplies as many rows as chose a block, and MKL splits a product of few rows by its threads: the last bit moves."""


@pytest.mark.slow
def test_processes_and_thread_counts_agree():
    env = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    said = []
    for threads in (1, 2):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], env=env, capture_output=True, text=True, timeout=480)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(json.loads(done.stdout))
    differ = {name for name in said[0] if said[0][name] != said[1][name]}
    assert len(said[0]) >= 20 and {name.partition("[")[0] for name in differ} <= BY_THREADS
    for name in differ:
        assert said[0][name][1] == pytest.approx(said[1][name][1], rel=1e-6)
