"""Files that other libraries wrote give the output and the latents that those libraries give (tests/formats/make_fixtures.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rarefy.errors import BadInput, Damaged, Unsupported
from rarefy.formats import layout_of, read_dictionary, torch_zip
from rarefy.store.tensors import from_bytes, to_bytes

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())


def expected(name):
    path = FIXTURES / f"{name}.safetensors"
    return from_bytes(path.read_bytes(), path)


def close(got, want):
    """A few roundings of float32 apart: products of six to twelve terms, summed in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_layout_has_fixtures():
    assert {name.split("-")[0] for name in CASES} == {
        "saelens", "saelens_training", "saelens_v5", "sparsify", "dictionary_learning", "gemma_scope", "circuit_tracer",
    }
    assert len(CASES) == 37


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_latents_as_the_library_that_wrote_it(name):
    want = expected(name)
    found = read_dictionary(FIXTURES / name)
    family = name.split("-")[0].removesuffix("_v5").removesuffix("_training")
    assert found.layout == layout_of(FIXTURES / name) == {"circuit_tracer": "circuit-tracer"}.get(family, family)
    method = found.method
    assert not method.training and (method.W_skip_ED is not None) == ("skip" in name)
    with torch.no_grad():
        close(method(want["x_BD"]), want["y_BE"])
        close(method.select(want["x_BD"]).dense, want["f_BF"])
    assert 0 < int((want["f_BF"] != 0).sum()) < want["f_BF"].numel()          # else the case tests nothing
    json.dumps(found.made, allow_nan=False)


@pytest.mark.parametrize("name", ["saelens-jumprelu", "sparsify-topk", "circuit_tracer-relu", "dictionary_learning-BatchTopKSAE"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path, name, dtype):
    """The same function as of the weights rounded first."""
    made = []
    for folder, cast in (("a", lambda v: v.to(dtype)), ("b", lambda v: v.to(dtype).float())):
        shutil.copytree(FIXTURES / name, tmp_path / folder)
        path = next(p for p in (tmp_path / folder).rglob("*") if p.suffix in (".safetensors", ".pt"))
        state = torch_zip.read(path) if path.suffix == ".pt" else from_bytes(path.read_bytes(), path)
        state = {k: cast(v) if v.is_floating_point() else v for k, v in state.items()}
        torch.save(state, path) if path.suffix == ".pt" else path.write_bytes(to_bytes(state))
        made.append(read_dictionary(tmp_path / folder).method.state_dict())
    assert all(torch.equal(v, made[1][k]) and v.dtype == made[1][k].dtype for k, v in made[0].items())
    assert made[0]["W_enc_FD"].dtype == torch.float32


def test_what_the_files_say_it_was_made_of():
    assert read_dictionary(FIXTURES / "saelens-topk").made["site"] == "blocks.3.hook_resid_post"
    assert read_dictionary(FIXTURES / "saelens_v5-topk").made["model"] == "gpt2-small"
    assert read_dictionary(FIXTURES / "sparsify-topk").made["site"] == "layers.3"
    assert read_dictionary(FIXTURES / "dictionary_learning-AutoEncoderTopK").made["model"] == "builtin"
    made = read_dictionary(FIXTURES / "circuit_tracer-relu").made
    assert (made["site"], made["target"], made["layer"]) == ("layers.3.mlp.in", "layers.3.mlp.out", 3)


@pytest.mark.parametrize("name", ["gemma_scope-jumprelu", "dictionary_learning-GatedAutoEncoder", "saelens-topk"])
def test_a_transcoder_that_does_not_say_so(name):
    want = expected(name)
    method = read_dictionary(FIXTURES / name, transcodes=True).method
    assert method.transcodes and method.centre_D is None
    with torch.no_grad():
        close(method(want["x_BD"]), want["y_BE"])
    assert not read_dictionary(FIXTURES / "circuit_tracer-relu", transcodes=False).method.transcodes
    with pytest.raises(BadInput, match="only be a transcoder"):
        read_dictionary(FIXTURES / "saelens-transcoder", transcodes=False)


def change(tmp_path, name, file="cfg.json", **changes):
    """A copy of a fixture with entries of its config changed; None takes one away."""
    shutil.copytree(FIXTURES / name, tmp_path / "copy")
    path = next((tmp_path / "copy").rglob(file))
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return tmp_path / "copy"


def test_constant_activation_scale_of_a_checkpoint_is_folded(tmp_path):
    """SAELens: z = scale x, x_hat = (f(z) W_dec + b_dec) / scale."""
    plain, x = read_dictionary(FIXTURES / "saelens-jumprelu").method, expected("saelens-jumprelu")["x_BD"]
    path = change(tmp_path, "saelens-jumprelu", normalize_activations="expected_average_only_in")
    with torch.no_grad():
        close(read_dictionary(path).method(x), plain(x))                        # without the file, the weights are folded already
        (path / "activation_scaler.json").write_text('{"scaling_factor": 1.7, "has_whitening": false}')
        close(read_dictionary(path).method(x), plain(1.7 * x) / 1.7)
    for wrong in ('{"scaling_factor": -1}', '{"scaling_factor": "1"}', '{"scaling_factor": 0}'):
        (path / "activation_scaler.json").write_text(wrong)
        with pytest.raises(Damaged, match="scaling_factor"):
            read_dictionary(path)
    (path / "activation_whitening.safetensors").write_bytes(b"")
    with pytest.raises(Unsupported, match="whiten"):
        read_dictionary(path)


def test_finetuned_scale_of_latents_before_version_6_is_folded(tmp_path):
    """SAELens 5: x_hat = (f * scaling_factor) W_dec + b_dec."""
    path = change(tmp_path, "saelens_v5-standard", finetuning_scaling_factor=True)
    weights = path / "sae_weights.safetensors"
    state = from_bytes(weights.read_bytes(), weights)
    factor = torch.linspace(0.5, 2, len(state["b_enc"]))
    weights.write_bytes(to_bytes({**state, "scaling_factor": factor}))
    want = expected("saelens_v5-standard")
    with torch.no_grad():
        close(read_dictionary(path).method(want["x_BD"]), (want["f_BF"] * factor) @ state["W_dec"] + state["b_dec"])
    change(tmp_path / "b", "saelens_v5-standard")
    (tmp_path / "b" / "copy" / "sae_weights.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(Damaged, match="scaling_factor"):
        read_dictionary(tmp_path / "b" / "copy")


@pytest.mark.parametrize("name, changes, message", [
    ("saelens-topk", {"normalize_activations": "layer_norm"}, "layer_norm"),
    ("saelens-topk", {"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
    ("saelens-topk", {"architecture": "temporal"}, "temporal"),
    ("saelens_v5-standard", {"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    ("sparsify-topk", {"signed": True}, "signed"),
    ("sparsify-topk", {"activation": "softmax"}, "softmax"),
])
def test_what_cannot_be_done_is_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(Unsupported, match=message):
        read_dictionary(change(tmp_path, name, **changes))


@pytest.mark.parametrize("name, changes", [
    ("saelens-topk", {"d_in": 7}), ("saelens-topk", {"d_sae": 2**40}), ("saelens-topk", {"d_in": -6}), ("saelens-topk", {"d_in": None}),
    ("saelens-topk", {"k": 13}), ("saelens-topk", {"k": 0}), ("saelens-topk", {"k": True}), ("saelens-topk", {"k": 2.5}),
    ("saelens-topk", {"k": None}),
    ("saelens-topk", {"metadata": []}), ("saelens-topk", {"apply_b_dec_to_input": "yes"}), ("saelens-transcoder", {"d_out": 6}),
    ("saelens-transcoder", {"apply_b_dec_to_input": True}), ("saelens_training-matryoshka_batchtopk", {"matryoshka_widths": [12, 3]}),
    ("saelens_training-matryoshka_batchtopk", {"matryoshka_widths": "3"}),
    ("sparsify-topk", {"expansion_factor": 3}), ("sparsify-topk", {"num_latents": 11}), ("sparsify-topk", {"d_in": 12}),
    ("sparsify-topk", {"skip_connection": True}), ("sparsify-topk", {"transcode": 1}), ("sparsify-topk", {"k": 40}), ("sparsify-groupmax", {"k": 5}),
])
def test_configs_that_do_not_fit_their_weights(tmp_path, name, changes):
    with pytest.raises(Damaged):
        read_dictionary(change(tmp_path, name, **changes))


def test_several_or_none(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_dictionary(tmp_path / "nothing")
    with pytest.raises(BadInput, match="no dictionary"):
        read_dictionary(tmp_path)
    for layer in (3, 4):
        shutil.copytree(FIXTURES / "sparsify-topk" / "layers.3", tmp_path / "run" / f"layers.{layer}")
    with pytest.raises(BadInput, match=r"2 dictionaries.*layers.3.*name one"):
        read_dictionary(tmp_path / "run")
    assert read_dictionary(tmp_path / "run" / "layers.4").made["site"] == "layers.4"
    shutil.copytree(FIXTURES / "circuit_tracer-relu", tmp_path / "set")
    shutil.copy(tmp_path / "set" / "layer_3.safetensors", tmp_path / "set" / "layer_0.safetensors")
    with pytest.raises(BadInput, match="2 dictionaries"):
        read_dictionary(tmp_path / "set")
    assert read_dictionary(tmp_path / "set" / "layer_0.safetensors").made["layer"] == 0
