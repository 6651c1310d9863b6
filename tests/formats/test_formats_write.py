"""What is written is read back as the same function; what a layout cannot say is refused; nothing is overwritten."""

import json

import pytest
import torch
from ours import CAN, FORMS, MADE, METHODS, PAIRS, D, F, ours, rows

from rarefy.catalogue import ENTRIES, entry
from rarefy.errors import BadInput, Unsupported
from rarefy.formats import LAYOUTS, layout_of, read_dictionary, write_dictionary
from rarefy.formats.plain import KINDS, of_method
from rarefy.latents.topk import TopK


@pytest.mark.parametrize("layout, form, name", CAN)
def test_round_trip(tmp_path, layout, form, name):
    method, x = ours(name, form), rows()
    files = write_dictionary(method, tmp_path / "out", layout, made=MADE)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in files)
    transcodes = form != "autoencoder" if layout in ("gemma_scope",) else None
    found = read_dictionary(tmp_path / "out", transcodes=transcodes)
    assert found.layout == layout.removesuffix("-v5") == layout_of(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(found.method(x), method(x), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found.method(x), method.reference(x), rtol=2e-5, atol=2e-5)
        # latents are ours divided by the output's scale, in the same order
        mine = method.select(x).dense / method.scale_out
        if name == "latents/annealed_topk":
            mine = mine * method.W_dec_FD.norm(dim=-1)
        torch.testing.assert_close(found.method.select(x).dense, mine, rtol=2e-5, atol=2e-5)
    again = tmp_path / "again"
    write_dictionary(found.method, again, layout, made={**MADE})
    twice = read_dictionary(again, transcodes=transcodes).method
    for key, value in found.method.state_dict().items():
        if key != "log_theta_F":                               # kept as a logarithm: a rounding a trip
            torch.testing.assert_close(twice.state_dict()[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout, form, name", [pair for pair in PAIRS if pair not in CAN])
def test_what_a_layout_cannot_say_is_refused_before_anything_is_written(tmp_path, layout, form, name):
    with pytest.raises(Unsupported, match="use the|use another layout|convert|reproduce rows as wide"):          # each says the way out
        write_dictionary(ours(name, form), tmp_path / "out", layout, made=MADE)
    assert not (tmp_path / "out").exists()


def test_every_dictionary_is_written_or_refused_by_name():
    """A method added to the catalogue is either in the tables here or refused."""
    assert set(KINDS) == set(METHODS)
    for card in (c for c in ENTRIES if c.unit == "latent" and c.name not in KINDS):
        cls = card.load()
        method = cls.__new__(cls)
        torch.nn.Module.__init__(method)
        with pytest.raises(Unsupported, match=card.name):
            of_method(method)


def test_a_subclass_is_refused_as_it_may_select_otherwise():
    class Mine(TopK):
        pass

    with pytest.raises(Unsupported, match="latents/topk"):
        of_method(Mine(D, F, 3))


def test_scales_are_folded_without_touching_the_weights():
    """Encoder and decoder rows keep their bits; biases and thresholds are divided."""
    method = ours("latents/jumprelu")
    plain = of_method(method)
    assert torch.equal(plain.W_enc_FD, method.W_enc_FD) and torch.equal(plain.W_dec_FE, method.W_dec_FD)
    torch.testing.assert_close(plain.theta, method.log_theta_F.exp() / 1.7)
    torch.testing.assert_close(plain.b_dec_E, method.b_dec_D / 1.7)


def test_scales_of_input_and_output_that_differ(tmp_path):
    method, x = ours("latents/gated", scale=1.7, scale_out=0.4), rows()
    write_dictionary(method, tmp_path / "out", "saelens")
    with torch.no_grad():
        torch.testing.assert_close(read_dictionary(tmp_path / "out").method(x), method(x), rtol=2e-5, atol=2e-5)


def test_nothing_is_overwritten(tmp_path):
    method = ours("latents/topk")
    with pytest.raises(BadInput, match="must be one of"):
        write_dictionary(method, tmp_path / "a", "numpy")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        write_dictionary(method, tmp_path / "file", "saelens")
    write_dictionary(method, tmp_path / "a", "saelens")
    with pytest.raises(BadInput, match="already"):
        write_dictionary(method, tmp_path / "a", "saelens")


def test_layers_of_one_set_of_transcoders_go_into_one_folder(tmp_path):
    method, out = ours("latents/jumprelu", "transcoder"), tmp_path / "set"
    at = lambda n: {"model": "builtin", "site": f"layers.{n}.mlp.in", "target": f"layers.{n}.mlp.out"}
    for n in (0, 1):
        write_dictionary(method, out, "circuit-tracer", made=at(n))
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    assert read_dictionary(out / "layer_1.safetensors").made["target"] == "layers.1.mlp.out"
    with pytest.raises(BadInput, match="layer_1.safetensors already"):
        write_dictionary(method, out, "circuit-tracer", made=at(1))
    with pytest.raises(BadInput, match="not transcoders of the same"):
        write_dictionary(method, out, "circuit-tracer", made={**at(2), "model": "gpt2"})
    with pytest.raises(BadInput, match="names no layer"):
        write_dictionary(method, tmp_path / "b", "circuit-tracer", made={"site": "embed"})


def test_places_in_the_words_of_others(tmp_path):
    write_dictionary(ours("latents/topk"), tmp_path / "a", "saelens", made={"model": "m", "site": "layers.3.resid_post"})
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert read_dictionary(tmp_path / "a").made["model"] == "m"
    write_dictionary(ours("latents/topk"), tmp_path / "z", "saelens", made={"site": "layers.3.attn.z"})
    cfg = json.loads((tmp_path / "z" / "cfg.json").read_text())
    assert (cfg["metadata"]["hook_name"], cfg["reshape_activations"]) == ("blocks.3.attn.hook_z", "hook_z")


def test_penalties_stand_at_their_height_after_reading(tmp_path):
    write_dictionary(ours("latents/relu"), tmp_path / "a", "saelens")
    assert read_dictionary(tmp_path / "a").method.rise == 1.0


def test_layouts_and_forms():
    assert len(CAN) == len(set(CAN)) and {layout for layout, _, _ in CAN} == set(LAYOUTS) and {form for _, form, _ in CAN} == set(FORMS)
    assert all(entry(name).unit == "latent" for name in METHODS)
