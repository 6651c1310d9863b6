"""Dictionaries as their own libraries write them, with rows and what the library's code makes of them.

`python tests/formats/make_fixtures.py` writes tests/formats/fixtures anew, in an environment where sae-lens, sparsify,
dictionary-learning and circuit-tracer are installed. tests/formats/test_formats_peers.py makes the same ones in a temporary folder.

Shape letters: B = rows, D = input width, E = output width, F = latents.
"""

import json
import math
import shutil
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "fixtures"
B, D, E, F, K = 7, 6, 4, 12, 3
CASES = {}


def case(**variants):
    """Registers make(folder, variant) -> (run, encode) under each variant's name."""
    def register(make):
        for name, variant in variants.items():
            CASES[f"{make.__name__}-{name}"] = lambda folder, make=make, variant=variant: make(folder, variant)
        return make

    return register


def stir(module, generator):
    """Weights that hide nothing: biases and thresholds that are not 0, decoder rows of any length."""
    with torch.no_grad():
        for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
            if value.is_floating_point():
                fresh = torch.randn(value.shape, generator=generator).to(value) / (math.sqrt(value.shape[-1]) if value.ndim > 1 else 2)
                value.copy_(fresh.abs() / 2 if "threshold" in name else fresh)
    return module.eval()


def rows(generator):
    return 2 * torch.randn(B, D, generator=generator) + 0.5


def seeded(text):
    return torch.Generator().manual_seed(sum(map(ord, text)))


# ------------------------------------------------------------------------------------------------------------- SAELens

_SAELENS = {
    "standard": {}, "standard_uncentred": {"apply_b_dec_to_input": False}, "topk": {"k": K},
    "topk_by_norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K, "rescale_acts_by_decoder_norm": True}, "jumprelu": {}, "jumprelu_uncentred": {"apply_b_dec_to_input": False}, "gated": {},
    "gated_uncentred": {"apply_b_dec_to_input": False}, "transcoder": {"d_out": E, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": E, "apply_b_dec_to_input": False}, "skip_transcoder": {"d_out": D, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": E, "apply_b_dec_to_input": False},
}


@case(**{name: (name, more) for name, more in _SAELENS.items()})
def saelens(folder, variant):
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    name, more = variant
    architecture = name.removesuffix("_uncentred").removesuffix("_by_norm")
    cls, cfg = get_sae_class(architecture)
    metadata = SAEMetadata(model_name="builtin", hook_name="blocks.3.hook_resid_post")
    sae = stir(cls(cfg(d_in=D, d_sae=F, metadata=metadata, **more)), seeded(name))
    sae.save_model(folder)
    return sae, sae.encode


@case(batchtopk={}, matryoshka_batchtopk={"matryoshka_widths": [3, F]}, batchtopk_by_norm={"rescale_acts_by_decoder_norm": True})
def saelens_training(folder, more):
    """As saved in mid-training; what it gives in use is what SAELens makes of it at the end."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAE

    name = "matryoshka_batchtopk" if more.get("matryoshka_widths") else "batchtopk"
    cls, cfg = get_sae_training_class(name)
    sae = stir(cls(cfg(d_in=D, d_sae=F, k=K, **{"rescale_acts_by_decoder_norm": False, **more})), seeded(name))
    sae.save_model(folder)
    done = folder.with_name(f"{folder.name}-done")
    sae.save_inference_model(done)
    loaded = SAE.load_from_disk(done)
    shutil.rmtree(done)
    return loaded, loaded.encode


@case(
    standard={}, topk={"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, jumprelu={"architecture": "jumprelu"},
    gated={"architecture": "gated"},
)
def saelens_v5(folder, more):
    """The flat config of version 5, opened by the loader that SAELens keeps for it."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAE

    name = "topk" if "activation_fn_str" in more else more.get("architecture", "standard")
    cls, cfg = get_sae_class(name)
    sae = stir(cls(cfg(d_in=D, d_sae=F, **({"k": K} if name == "topk" else {}))), seeded(name))
    sae.save_model(folder)
    flat = {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3, "hook_head_index": None, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "normalize_activations": "none", "context_size": 128, "prepend_bos": True,
        "dataset_path": "text", "sae_lens_training_version": None, "neuronpedia_id": None, **more,
    }
    (folder / "cfg.json").write_text(json.dumps(flat))
    loaded = SAE.load_from_disk(folder)
    return loaded, loaded.encode


# ------------------------------------------------------------------------------------------------------------ sparsify


@case(
    topk={}, groupmax={"activation": "groupmax", "k": 4}, free={"num_latents": F, "expansion_factor": 5, "normalize_decoder": False},
    transcoder={"transcode": True}, skip_transcoder={"transcode": True, "skip_connection": True},
)
def sparsify(folder, more):
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    coder = stir(SparseCoder(D, SparseCoderConfig(**{"expansion_factor": 2, "k": K, **more})), seeded(str(more)))
    folder = folder / "layers.3"
    coder.save_to_disk(folder)

    def encode(x_BD):
        got = coder.encode(x_BD)
        return torch.zeros(len(x_BD), coder.num_latents).scatter(-1, got.top_indices, got.top_acts)

    return lambda x: coder(x).sae_out, encode


# ------------------------------------------------------------------------------------------------- dictionary_learning

_CLASSES = {name: name for name in (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
)}


@case(**_CLASSES, BatchTopKSAE_untrained="BatchTopKSAE")
def dictionary_learning(folder, name):
    from dictionary_learning import dictionary as one
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    cls = next(getattr(m, name) for m in (one, top_k, batch_top_k, matryoshka_batch_top_k) if hasattr(m, name))
    more = {"k": K} if "TopK" in name else {}
    made = stir(cls(D, F, **more, **({"group_sizes": [4, F - 4]} if "Matryoshka" in name else {})), seeded(name))
    if folder.name.endswith("untrained"):
        made.threshold.fill_(-1.0)
    folder = folder / "trainer_0"
    folder.mkdir(parents=True)
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "builtin", **more}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}))
    return made, made.encode


# --------------------------------------------------------------------------------------------------------- the others


@case(jumprelu=D)
def gemma_scope(folder, d_out):
    import numpy as np
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    generator = seeded("gemma")
    held = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,), "threshold": (F,)}
    arrays = {name: torch.randn(shape, generator=generator).numpy() / 2 for name, shape in held.items()}
    arrays["threshold"] = abs(arrays["threshold"])
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays)
    loaded = load_gemma_scope_transcoder(str(folder / "params.npz"), 0, device=torch.device("cpu"))
    return loaded, loaded.encode


@case(relu={}, jumprelu={"threshold": True}, skip={"threshold": True, "skip_connection": True})
def circuit_tracer(folder, more):
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    activation = JumpReLU(torch.rand(F), 0.1) if more.get("threshold") else torch.nn.functional.relu
    made = SingleLayerTranscoder(
        D, F, activation, 3, more.get("skip_connection", False), device=torch.device("cpu"), dtype=torch.float32,
    )
    stir(made, seeded(str(more)))
    folder.mkdir(parents=True)
    made.to_safetensors(str(folder / "layer_3.safetensors"))
    (folder / "config.yaml").write_text(
        "model_name: builtin\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\nscan: null\n"
    )
    return made, made.encode


def make(name, folder):
    """Writes one case into `folder`; {x_BD, y_BE, f_BF}: rows, and the library's output and latents for them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run, encode = CASES[name](folder)
    x_BD = rows(seeded(name))
    with torch.no_grad():
        return {"x_BD": x_BD, "y_BE": run(x_BD).contiguous(), "f_BF": encode(x_BD).contiguous()}


if __name__ == "__main__":
    from safetensors.torch import save_file

    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in CASES:
        save_file({key: value.detach().clone() for key, value in make(name, FOLDER / name).items()}, FOLDER / f"{name}.safetensors")
