"""Hostile, damaged and foreign files fail closed: one of our errors that names the file, fast, in little memory, nothing run."""

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bounds import Bounds
from rarefy.errors import BadInput, Damaged, RarefyError, Unsupported
from rarefy.formats import read_dictionary
from rarefy.formats.files import npz
from rarefy.formats.torch_zip import read
from rarefy.store.tensors import from_bytes, to_bytes

FIXTURES = Path(__file__).parent / "fixtures"
ONE_EACH = [
    "saelens-topk", "saelens_v5-gated", "saelens_training-matryoshka_batchtopk", "sparsify-topk", "dictionary_learning-MatryoshkaBatchTopKSAE",
    "dictionary_learning-AutoEncoderTopK", "gemma_scope-jumprelu", "circuit_tracer-jumprelu",
]


@pytest.fixture
def bounded():
    """Seconds and 50 MB for what is inside."""
    return Bounds(5, 50e6)


def copy(tmp_path, name):
    shutil.copytree(FIXTURES / name, tmp_path / "copy")
    return tmp_path / "copy", sorted(p for p in (tmp_path / "copy").rglob("*") if p.is_file())


def attempt(path):
    """True if the dictionary was read, False if refused by an error of ours; anything else is a failure."""
    try:
        method = read_dictionary(path).method
    except RarefyError as error:
        assert str(error) and "\n" not in str(error)
        return False
    assert all(bool(torch.isfinite(v).all()) for v in method.state_dict().values())
    return True


@pytest.mark.parametrize("name", ONE_EACH)
def test_truncated_anywhere(tmp_path, name):
    path, files = copy(tmp_path, name)
    for file in files:
        whole = file.read_bytes()
        for length in sorted({0, 1, 7, 8, 9, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 10)}):
            file.write_bytes(whole[:length])
            read_anyway = attempt(path)
            assert not read_anyway or file.suffix == ".yaml", (file.name, length)          # a shorter YAML may be YAML
        file.write_bytes(whole)
    assert attempt(path)


@pytest.mark.parametrize("name", ONE_EACH)
def test_bits_turned_anywhere(tmp_path, name):
    path, files = copy(tmp_path, name)
    turn, refused = random.Random(name), 0
    for file in files:
        whole = file.read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            for _ in range(turn.choice((1, 1, 4))):
                data[turn.randrange(len(data))] ^= 1 << turn.randrange(8)
            file.write_bytes(data)
            refused += not attempt(path)
        file.write_bytes(whole)
    assert refused > 0 and attempt(path)


@pytest.mark.parametrize("name", ONE_EACH)
def test_headers_of_archives_and_tensors_turned(tmp_path, name):
    """Where the structure is: the first and the last bytes of the weights."""
    path, files = copy(tmp_path, name)
    file = next(f for f in files if f.suffix in (".safetensors", ".pt", ".npz"))
    whole, turn = file.read_bytes(), random.Random(1)
    places = [*range(min(200, len(whole))), *range(max(200, len(whole) - 500), len(whole))]
    for at in turn.sample(places, 50):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ turn.randrange(1, 256)]) + whole[at + 1 :])
        attempt(path)
    file.write_bytes(whole)
    assert attempt(path)


@pytest.mark.parametrize("name", ONE_EACH)
def test_missing_and_additional_tensors_and_numbers_that_are_none(tmp_path, name):
    path, files = copy(tmp_path, name)
    file = next(f for f in files if f.suffix in (".safetensors", ".pt", ".npz"))
    state = {".pt": read, ".npz": npz, ".safetensors": lambda p: from_bytes(p.read_bytes(), p)}[file.suffix](file)

    def put(tensors):
        if file.suffix == ".pt":
            torch.save(tensors, file)
        elif file.suffix == ".npz":
            np.savez(file, **{k: v.numpy() for k, v in tensors.items()})
        else:
            file.write_bytes(to_bytes(tensors))

    optional = {"AutoEncoderTopK": {"threshold", "k"}, "MatryoshkaBatchTopKSAE": {"k"}}.get(name.split("-")[-1], set())
    optional = optional | ({"activation_function.threshold"} if name.startswith("circuit") else set())
    put(state)
    assert attempt(path)
    for key, value in state.items():
        put({k: v for k, v in state.items() if k != key})
        if key not in optional:
            with pytest.raises(Damaged, match=file.name):
                read_dictionary(path)
        if value.is_floating_point():
            for wrong in (torch.full_like(value, float("nan")), torch.full_like(value, float("inf")), torch.ones(value.shape, dtype=torch.int64),
                          torch.zeros(*value.shape, 1), value[..., :-1] if value.ndim else torch.zeros(2)):
                put({**state, key: wrong})
                with pytest.raises(Damaged, match=file.name):
                    read_dictionary(path)
    for extra in ("extra", "W_skip"):
        put({**state, extra: torch.zeros(3)})
        with pytest.raises(Damaged, match=file.name):
            read_dictionary(path)


# ------------------------------------------------------------------------------------------------------------- pickles


def archive(path, data_pkl, storages=(), compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", data_pkl)
        for key, value in storages:
            out.writestr(f"archive/data/{key}", value)
        for name, value in more.items():
            out.writestr(f"archive/{name}", value)


class Runs:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_run_nothing(tmp_path, protocol):
    touched = tmp_path / "touched"
    for n, payload in enumerate((Runs(str(touched)), {"a": Runs(str(touched))}, [print], {"a": torch.nn.Linear}, {1: 2}, b"x", 1.5, [[]])):
        archive(tmp_path / f"{n}.pt", pickle.dumps(payload, protocol=protocol))
        with pytest.raises(RarefyError):
            read(tmp_path / f"{n}.pt")
        (tmp_path / "old.pt").write_bytes(pickle.dumps(payload, protocol=protocol))
        with pytest.raises(Unsupported, match="torch.save"):
            read(tmp_path / "old.pt")
    assert not touched.exists()


def test_a_whole_module_and_a_nested_checkpoint_are_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "module.pt")
    with pytest.raises(Unsupported, match="torch.nn.modules.linear Linear.*nothing of it was run"):
        read(tmp_path / "module.pt")
    torch.save({"model": {"a": torch.zeros(2)}, "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(Unsupported, match="state_dict"):
        read(tmp_path / "nested.pt")


def rebuild(shape, stride, offset=0, count=4, storage="FloatStorage", key="0"):
    """The pickle of {"a": tensor} with the numbers given, whatever they are."""
    def number(n):
        return b"K" + bytes([n]) if 0 <= n < 256 else b"\x8a\x09" + struct.pack("<q", n) + (b"\xff" if n < 0 else b"\0")

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def several(numbers):
        return b"(" + b"".join(map(number, numbers)) + b"t"

    ident = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + ident + number(offset) + several(shape) + several(stride) + b"\x89}tR"
    return b"\x80\x02}" + text("a") + call + b"s."


@pytest.mark.parametrize("numbers", [
    {"shape": (5,), "stride": (1,)}, {"shape": (2**40, 2**20), "stride": (0, 0)}, {"shape": (8,), "stride": (0,)}, {"shape": (2,), "stride": (-1,)},
    {"shape": (2,), "stride": (1,), "offset": 3}, {"shape": (2,), "stride": (1,), "offset": -1}, {"shape": (-2,), "stride": (1,)},
    {"shape": (2, 2), "stride": (1,)}, {"shape": (1,) * 9, "stride": (1,) * 9}, {"shape": (4,), "stride": (1,), "count": 2**40},
    {"shape": (4,), "stride": (1,), "count": 3}, {"shape": (4,), "stride": (1,), "storage": "BoolStorage"},
    {"shape": (4,), "stride": (1,), "key": "../0"},
    {"shape": (4,), "stride": (1,), "key": "7"}, {"shape": (2,), "stride": (2**60,)},
])
def test_tensors_that_their_bytes_do_not_hold(tmp_path, bounded, numbers):
    archive(tmp_path / "good.pt", rebuild((2, 2), (2, 1)), [("0", struct.pack("<4f", 1, 2, 3, 4))])
    assert read(tmp_path / "good.pt")["a"].tolist() == [[1, 2], [3, 4]]
    archive(tmp_path / "bad.pt", rebuild(**numbers), [("0", struct.pack("<4f", 1, 2, 3, 4))])
    with bounded, pytest.raises(RarefyError, match="bad.pt"):
        read(tmp_path / "bad.pt")


def test_archives_made_to_cost(tmp_path, bounded):
    doubled = b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200)) + b"h\x00h\x00\x86."          # 2^200 leaves, in one tuple
    marks = b"\x80\x02" + b"(" * 100_000 + b"."
    for data in (doubled, b"\x80\x02}" + doubled[2:-1] + b"K\x01s.", marks, b"", b".", b"\x80\x02R.", b"\x80\x02h\x00."):
        archive(tmp_path / "a.pt", data)
        with bounded, pytest.raises(RarefyError, match=r"a\.pt"):
            read(tmp_path / "a.pt")
    archive(tmp_path / "a.pt", rebuild((4,), (1,), count=2**24), [("0", bytes(2**26))], compression=zipfile.ZIP_DEFLATED)
    with bounded, pytest.raises(Damaged, match="compressed"):
        read(tmp_path / "a.pt")
    archive(tmp_path / "a.pt", rebuild((4,), (1,)), [("0", bytes(16))], byteorder="big")
    with pytest.raises(Unsupported, match="big-endian"):
        read(tmp_path / "a.pt")


def test_the_reader_of_archives_agrees_with_torch(tmp_path):
    """Every dtype, views of one storage, transposed and empty tensors, parameters, the state dict of a module."""
    base = torch.arange(24.0).view(4, 6)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    cases = {
        "views": {"a": base, "b": base.T, "c": base[1:3, ::2], "d": base[0, 0], "e": torch.empty(0, 5), "p": torch.nn.Parameter(base.clone())},
        "types": {str(t): torch.arange(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)},
        "module": module.state_dict(),
    }
    for name, state in cases.items():
        torch.save(state, tmp_path / name)
        want, got = torch.load(tmp_path / name, weights_only=True), read(tmp_path / name)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key].dtype == value.dtype and torch.equal(got[key], value) and got[key].is_contiguous()


# ---------------------------------------------------------------------------------------------------------- npz, yaml, ...


def npy(shape, descr="<f4", data=b"", fortran=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize("member", [
    npy((2**40, 2**20)), npy((3,), data=bytes(16)), npy((-1,)), npy((2,), "|O", pickle.dumps([1])), npy((2,), "<U4", bytes(32)), b"", b"\x93NUMPY",
    b"\x93NUMPY\x09\x00" + bytes(100), b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 65535, npy((2,), data=bytes(8)).replace(b"'descr'", b"'de' + 'x'"),
])
def test_arrays_that_are_not_numbers(tmp_path, bounded, member):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as out:
        out.writestr("W_enc.npy", member)
    with bounded, pytest.raises(Damaged, match="params.npz"):
        read_dictionary(tmp_path)


def test_arrays_of_objects_and_bombs(tmp_path, bounded):
    touched = tmp_path / "touched"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Runs(str(touched))], dtype=object))
    with pytest.raises(Damaged, match="numbers"):
        read_dictionary(tmp_path)
    assert not touched.exists()
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("W_enc.npy", npy((2**24,), data=bytes(2**26)))
    with bounded, pytest.raises(Damaged, match="claims"):
        read_dictionary(tmp_path)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as out:
        out.writestr("../W_enc.npy", npy((2,), data=bytes(8)))
    with pytest.raises(Damaged, match="name"):
        read_dictionary(tmp_path)


def test_arrays_as_numpy_may_store_them(tmp_path):
    """Fortran order, big-endian, compressed."""
    a = np.arange(6, dtype=">f8").reshape(2, 3)
    np.savez_compressed(tmp_path / "a.npz", a=a, b=np.asfortranarray(a), c=np.float32(2))
    got = npz(tmp_path / "a.npz")
    assert torch.equal(got["a"], got["b"]) and got["a"].tolist() == a.tolist() and got["c"].shape == ()


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch {}']", "a: !!python/name:os.system ", "a: &x [1]\nb: *x", "- 1\n- 2", "a: [1", "a: b: c", "\x00", "5",
    "? [a, b]\n: 1", "a: 1\n" * 20_000, "model_kind: [", "{" * 3000, "a: 2020-99-99",
])
def test_yaml_that_is_no_config(tmp_path, bounded, text):
    path, _ = copy(tmp_path, "circuit_tracer-relu")
    touched = tmp_path / "touched"
    (path / "config.yaml").write_text(text.format(touched) if "{}" in text else text)
    with bounded, pytest.raises(Damaged, match="config.yaml"):
        read_dictionary(path)
    assert not touched.exists()


def test_a_config_never_says_where_to_read(tmp_path):
    path, _ = copy(tmp_path, "circuit_tracer-relu")
    config = path / "config.yaml"
    config.write_text(config.read_text() + "transcoders: [../../../etc/passwd, 'hf://a/b/c']\n")
    assert read_dictionary(path).made["layer"] == 3
    config.write_text(config.read_text().replace("transcoder_set", "cross_layer_transcoder"))
    with pytest.raises(Unsupported, match="cross_layer_transcoder"):
        read_dictionary(path)


def test_thresholds_below_zero(tmp_path):
    """With a ReLU before them they are zeros; circuit-tracer has none, and lets negative latents through."""
    path, files = copy(tmp_path, "circuit_tracer-jumprelu")
    file = next(f for f in files if f.suffix == ".safetensors")
    state = from_bytes(file.read_bytes(), file)
    file.write_bytes(to_bytes({**state, "activation_function.threshold": -state["activation_function.threshold"]}))
    with pytest.raises(Unsupported, match="negative"):
        read_dictionary(path)
    path = FIXTURES / "saelens-jumprelu"
    shutil.copytree(path, tmp_path / "sae")
    file = tmp_path / "sae" / "sae_weights.safetensors"
    state = from_bytes(file.read_bytes(), file)
    file.write_bytes(to_bytes({**state, "threshold": -state["threshold"]}))
    x = torch.randn(50, 6)
    want = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu() @ state["W_dec"] + state["b_dec"]
    with torch.no_grad():
        torch.testing.assert_close(read_dictionary(tmp_path / "sae").method(x), want, rtol=1e-5, atol=1e-5)


def test_huge_headers_and_configs(tmp_path, bounded):
    path, _ = copy(tmp_path, "saelens-topk")
    weights = path / "sae_weights.safetensors"
    for data in (struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2**26) + b" " * 2**22, json.dumps({"a": 1}).encode()):
        weights.write_bytes(data)
        with bounded, pytest.raises(Damaged, match="sae_weights"):
            read_dictionary(path)
    (path / "cfg.json").write_text(json.dumps({"a": "b" * (1 << 20)}))
    with bounded, pytest.raises(Damaged, match="cfg.json"):
        read_dictionary(path)
    for text in ("[" * 100_000, "{}", "[]", '{"d_in": NaN}', '{"d_in": 1, "d_in": 2}'):
        (path / "cfg.json").write_text(text)
        with bounded, pytest.raises(RarefyError):
            read_dictionary(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    path, _ = copy(tmp_path, "dictionary_learning-AutoEncoderTopK")
    os.remove(path / "trainer_0" / "config.json")
    os.mkfifo(path / "trainer_0" / "config.json")
    with pytest.raises(Damaged, match="regular"):
        read_dictionary(path)
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises((Damaged, BadInput)):
        read_dictionary(tmp_path / "x.npz")
