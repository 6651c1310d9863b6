"""Our dictionaries, written, opened by the libraries themselves; and what these write today, read. Needs the packages.

`pytest -m peers tests/formats` in an environment with sae-lens, eai-sparsify, dictionary-learning or circuit-tracer; what is
not installed is skipped.
"""

import importlib
import json
import warnings

import make_fixtures
import pytest
import torch
from ours import CAN, MADE, ours, rows

from rarefy.formats import read_dictionary, write_dictionary

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
PACKAGES = {
    "saelens": "sae_lens", "saelens-v5": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning",
    "gemma_scope": "circuit_tracer", "circuit-tracer": "circuit_tracer",
}


def need(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(PACKAGES[layout])


def open_saelens(folder):
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(folder)
    return sae, sae.encode


def open_sparsify(folder):
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(folder)

    def encode(x_BD):
        got = coder.encode(x_BD)
        return torch.zeros(len(x_BD), coder.num_latents).scatter(-1, got.top_indices, got.top_acts)

    return lambda x: coder(x).sae_out, encode


def open_dictionary_learning(folder):
    loaded, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(folder), device=None)
    return loaded, loaded.encode


def open_circuit_tracer(folder):
    module = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    cpu = torch.device("cpu")
    if (folder / "params.npz").exists():
        loaded = module.load_gemma_scope_transcoder(str(folder / "params.npz"), 3, device=cpu)
    else:
        loaded = module.load_relu_transcoder(str(folder / "layer_3.safetensors"), 3, device=cpu)
    return loaded, loaded.encode


OPEN = {
    "saelens": open_saelens, "saelens-v5": open_saelens, "sparsify": open_sparsify, "dictionary_learning": open_dictionary_learning,
    "gemma_scope": open_circuit_tracer, "circuit-tracer": open_circuit_tracer,
}


@pytest.mark.parametrize("layout, form, name", [c for c in CAN if c[:2] != ("gemma_scope", "narrowing")])
def test_the_library_gives_our_output_on_raw_activations(tmp_path, layout, form, name):
    """Departures of a few roundings. circuit-tracer has no loader for Gemma Scope's layout with two widths."""
    need(layout)
    method, x = ours(name, form), rows()
    write_dictionary(method, tmp_path / "out", layout, made=MADE)
    run, encode = OPEN[layout](tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(run(x), method(x), rtol=2e-5, atol=2e-5)
        mine = method.select(x).dense / method.scale_out
        if name == "latents/annealed_topk":
            mine = mine * method.W_dec_FD.norm(dim=-1)
        torch.testing.assert_close(encode(x), mine, rtol=2e-5, atol=2e-5)


def test_saelens_merges_heads_of_z(tmp_path):
    need("saelens")
    method, x = ours("latents/topk"), rows()
    write_dictionary(method, tmp_path / "out", "saelens", made={"site": "layers.3.attn.z"})
    run, _ = open_saelens(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(run(x.view(16, 3, 2)).flatten(1), method(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", make_fixtures.CASES)
def test_what_the_library_writes_today(tmp_path, name):
    need(name.split("-")[0].removesuffix("_v5").removesuffix("_training").replace("circuit_tracer", "circuit-tracer"))
    want = make_fixtures.make(name, tmp_path / name)
    method = read_dictionary(tmp_path / name).method
    with torch.no_grad():
        torch.testing.assert_close(method(want["x_BD"]), want["y_BE"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.select(want["x_BD"]).dense, want["f_BF"], rtol=1e-5, atol=1e-5)


def test_a_trained_dictionary_of_sparsify(tmp_path):
    """Through its own training step, in case that leaves something that construction does not."""
    need("sparsify")
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    coder, x = SparseCoder(6, SparseCoderConfig(expansion_factor=2, k=3)), rows()
    optimiser = torch.optim.Adam(coder.parameters(), 1e-2)
    for _ in range(20):
        coder(x).fvu.backward()
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
    coder.save_to_disk(tmp_path / "layers.3")
    assert json.loads((tmp_path / "layers.3" / "cfg.json").read_text())["num_latents"] == 0
    with torch.no_grad():
        torch.testing.assert_close(read_dictionary(tmp_path).method(x), coder(x).sae_out, rtol=1e-5, atol=1e-5)
