"""The Triton kernels: interpreted, under the tests of the CPU path; and compiled for a GPU, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install -e '.[gpu]'")
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_top_k.py", "test_sparse_decode.py", "test_block_attention_compiled.py", "test_fuzz_kernels.py"])
def test_interpreted_it_passes_the_tests_of_the_cpu_path(file: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(HERE / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=HERE.parent.parent,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_without_being_asked_for_it_leaves_the_cpu_alone() -> None:
    from rarefy.kernels import gpu

    assert gpu.serves(torch.ones(2, 2)) == (os.environ.get("TRITON_INTERPRET") == "1")


def _compile(kernel, types: dict[str, str], constants: dict[str, object]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted")
    signature = {**types, **{name: "constexpr" for name in constants}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_compiles_for_a_gpu(dtype: str) -> None:
    import triton.language as tl

    from rarefy.kernels.sparse_decode.triton import _products, _sums
    from rarefy.kernels.top_k.triton import _rows

    floats, ints = f"*{dtype}", "*i64"
    for one in (True, False):
        _compile(_rows, {"scores_NF": floats, "out_NK": ints, "units": "i32", "k": "i32"},
                 {"BITS": 64 if dtype == "fp64" else 32, "HALF": dtype == "bf16", "ONE": one, "C": 1024})
    wide = tl.float64 if dtype == "fp64" else tl.float32
    _compile(_sums, {"value_M": floats, "index_M": ints, "edges_N1": ints, "table_FD": floats, "begin_D": floats, "out_ND": floats, "width": "i32"},
             {"BEGIN": True, "WIDE": wide, "P": 8, "C": 128})
    _compile(_products, {"row_ND": floats, "unit_M": ints, "edges_N1": ints, "table_FD": floats, "out_M": floats, "width": "i32"},
             {"WIDE": wide, "P": 8, "C": 128})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_attention_compiles_for_a_gpu(dtype: str) -> None:
    from rarefy.kernels.block_attention.triton import _forward, _keys, _pages, _queries

    floats, one, ints, bytes_, size = f"*{dtype}", "*fp32", "*i32", "*u8", "i32"
    strides = dict.fromkeys(("kb", "kg", "ks", "vb", "vg", "vs", "mb", "mh", "H", "G", "T", "S", "Q", "N", "width"), size)
    inputs, lists = dict.fromkeys(("q", "k", "v"), floats), {"index": ints, "count": ints, "partial": ints, "tiles": bytes_}
    tile = {"CAUSAL": True, "PARTIAL": True, "UP": False, "R": 64, "M": 64, "C": 64}
    _compile(_forward, {**inputs, "out": floats, "lse": one, **lists, **strides, "scale2": "fp32"}, tile)
    scales = {"scale": "fp32", "scale2": "fp32"}
    _compile(_queries, {**inputs, "grad": floats, "lse": one, "delta": one, "dq": floats, **lists, **strides, **scales}, tile)
    _compile(_keys, {**inputs, "grad": floats, "lse": one, "delta": one, "dk": floats, "dv": floats, **lists, **strides, **scales}, tile)
    given = {name: kind for name, kind in strides.items() if name not in ("T", "Q", "width")}
    _compile(_pages, {**inputs, "out": one, "lse": one, "index": ints, "count": ints, **given, "block": size, "width": size, "scale2": "fp32"},
             {"PART": 32, "M": 16, "C": 64})
