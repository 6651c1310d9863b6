"""Sites of every family: names, what is captured there, replacement that leaves no trace (S1 to S3, S6, L8)."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import BadInput, Unsupported
from rarefy.site import capture, replaced, sites
from site_models import DECODERS, NAMES, build, inputs, run

PARALLEL = ("neox_parallel", "phi")
NO_MIDDLE = (*PARALLEL, "opt_post_norm")
MOE = ("mixtral", "qwen3_moe")


def identity(x: Tensor) -> Tensor:
    return x


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_family(name: str) -> None:
    found = sites(build(name))
    common = {f"layers.{n}.{s}" for n in (0, 1) for s in
              ("resid_pre", "resid_post", "attn", "attn.in", "attn.q", "attn.k", "attn.v", "attn.z", "attn.out", "mlp.in", "mlp.out", "o_proj")}
    assert common <= found.keys()
    assert {"embed", "logits"} <= found.keys()
    assert ("layers.0.resid_mid" in found) == (name not in NO_MIDDLE)
    fused = name.startswith(("gpt2", "neox"))
    assert ("layers.0.qkv_proj" in found) == fused
    assert ("layers.0.q_proj" in found) == (not fused)
    assert ("layers.0.down_proj" in found) == (name not in (*MOE, "qwen2_moe"))
    assert ("layers.1.down_proj" in found) == (name not in MOE)
    assert all(s.kind in ("stream", "linear", "attention") and s.where in ("input", "output") for s in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_captured_width_is_the_sites_width(name: str) -> None:
    model, what = build(name), inputs(name)
    streams = [s for s in sites(model).values() if s.kind == "stream"]
    got = capture(model, [s.name for s in streams], **what)
    for s in streams:
        assert got[s.name].shape[-1] == s.d, s
        if s.name != "logits" or name != "vit":
            assert got[s.name].ndim == 3, s


def test_aliases_globs_and_raw_paths() -> None:
    model, what = build("llama"), inputs("llama")
    pairs = {
        "blocks.1.hook_resid_pre": "layers.1.resid_pre", "blocks.1.hook_resid_mid": "layers.1.resid_mid",
        "blocks.1.hook_resid_post": "layers.1.resid_post", "blocks.0.attn.hook_z": "layers.0.attn.z",
        "blocks.0.attn.hook_q": "layers.0.attn.q", "blocks.0.mlp.hook_post": "layers.0.mlp.hidden",
        "blocks.0.hook_attn_out": "layers.0.attn.out", "blocks.0.hook_mlp_out": "layers.0.mlp.out",
        "hook_embed": "embed", "ln_final.hook_normalized": "final_norm",
    }
    for alias, name in pairs.items():
        assert list(sites(model, alias)) == [name]
    assert list(sites(model, "blocks.*.hook_resid_post")) == ["layers.0.resid_post", "layers.1.resid_post"]
    assert list(sites(model, "layers.*.mlp.out")) == ["layers.0.mlp.out", "layers.1.mlp.out"]
    assert len(sites(model, "layers.*.*_proj")) == 14
    raw = "model.layers.1.post_attention_layernorm"
    assert torch.equal(capture(model, [raw], **what)[raw], capture(model, ["layers.1.mlp.in"], **what)["layers.1.mlp.in"])
    assert sites(build("gpt2"), "transformer.h.0.mlp.c_fc")["transformer.h.0.mlp.c_fc"].d == 128
    assert sites(model, "model.layers.0.mlp.down_proj")["model.layers.0.mlp.down_proj"].kind == "stream"


def test_names_that_do_not_exist() -> None:
    model = build("llama")
    with pytest.raises(BadInput, match=r"layers\.0\.resid_post"):
        sites(model, "layers.0.resid_pots")
    with pytest.raises(BadInput, match=r"layers 0\.\.1"):
        sites(model, "layers.2.mlp.out")
    with pytest.raises(BadInput, match=r"layers 0\.\.1"):
        sites(model, "blocks.17.hook_resid_pre")
    for nothing in ("", "layers.*.nothing", "zzz"):
        with pytest.raises(BadInput, match="no site"):
            sites(model, nothing)
    with pytest.raises(BadInput):
        capture(model, [], **inputs("llama"))


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_layers_have_no_middle(name: str) -> None:
    with pytest.raises(Unsupported, match=r"layers\.0\.resid_mid.*parallel"):
        sites(build(name), "layers.0.resid_mid")
    with pytest.raises(Unsupported, match="parallel"):
        sites(build(name), "blocks.0.hook_resid_mid")


@pytest.mark.parametrize("name", [*MOE, "qwen2_moe"])
def test_fused_experts_are_refused_by_name(name: str) -> None:
    model = build(name)
    for site in ("layers.0.down_proj", "layers.0.gate_proj", "layers.0.up_proj", "layers.0.mlp.hidden"):
        with pytest.raises(Unsupported, match=f"{site}.*experts"):
            sites(model, site)


def test_a_dense_layer_among_experts_keeps_its_sites() -> None:
    model = build("qwen2_moe")
    assert {"layers.1.down_proj", "layers.1.mlp.hidden"} <= sites(model).keys()
    with pytest.raises(Unsupported, match="experts"):
        sites(model, "layers.*.down_proj")


def test_unknown_type_allows_raw_paths_only() -> None:
    class Config:
        model_type, hidden_size, use_cache = "abacus", 4, False

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    model.config = Config()  # type: ignore[assignment]
    with pytest.raises(Unsupported, match="abacus"):
        sites(model)
    assert sites(model, "0")["0"].d == 3


def test_base_model_without_head() -> None:
    model, what = build("llama"), inputs("llama")
    inner = capture(model.model, ["layers.1.mlp.out"], **what)["layers.1.mlp.out"]
    assert torch.equal(inner, capture(model, ["layers.1.mlp.out"], **what)["layers.1.mlp.out"])
    with pytest.raises(BadInput, match="logits"):
        sites(model.model, "logits")


# -------------------------------------------------------------------------------------- what is captured


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("bert", "vit", "opt_projected")])
def test_captures_agree_with_transformers_own_hidden_states(name: str) -> None:
    model, what = build(name), inputs(name)
    with torch.no_grad():
        output = model(**what, output_hidden_states=True)
    got = capture(model, ["layers.0.resid_pre", "layers.0.resid_post", "layers.1.resid_pre", "logits"], **what)
    assert torch.equal(got["layers.0.resid_pre"], output.hidden_states[0])
    assert torch.equal(got["layers.0.resid_post"], output.hidden_states[1])
    assert torch.equal(got["layers.1.resid_pre"], output.hidden_states[1])
    logits = torch.tanh(got["logits"] / 30) * 30 if name == "gemma2" else got["logits"]      # capped after the head
    torch.testing.assert_close(logits, output.logits, rtol=0, atol=0 if name != "gemma2" else 1e-6)
    if name != "opt_post_norm":                                    # whose last state has no final norm after it
        assert torch.equal(capture(model, ["final_norm"], **what)["final_norm"], output.hidden_states[2])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("bert", "opt_post_norm")])
def test_the_residual_stream_adds_up(name: str) -> None:
    model, what = build(name), inputs(name)
    for n in range(2):
        streams = [s.name for s in sites(model, f"layers.{n}.*").values() if s.kind == "stream"]
        got = {k.split(".", 2)[2]: v for k, v in capture(model, streams, **what).items()}
        attention, mlp = got["attn.out"], got["mlp.out"]
        if name.startswith("gemma") and name != "gemma":
            layer = model.model.layers[n]
            attention, mlp = layer.post_attention_layernorm(attention), layer.post_feedforward_layernorm(mlp)
        if name in PARALLEL:
            middle = got["resid_pre"] + attention
        else:
            middle = got["resid_mid"]
            torch.testing.assert_close(middle, got["resid_pre"] + attention)
        torch.testing.assert_close(got["resid_post"], middle + mlp)


def test_bert_is_post_norm() -> None:
    model, what = build("bert"), inputs("bert")
    layer = model.bert.encoder.layer[0]
    got = capture(model, [f"layers.0.{s}" for s in ("resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out", "attn.z")], **what)
    middle = layer.attention.output.LayerNorm(got["layers.0.resid_pre"] + got["layers.0.attn.out"])
    torch.testing.assert_close(got["layers.0.resid_mid"], middle)
    torch.testing.assert_close(got["layers.0.resid_post"], layer.output.LayerNorm(middle + got["layers.0.mlp.out"]))
    torch.testing.assert_close(got["layers.0.attn.out"], layer.attention.output.dense(got["layers.0.attn.z"]))


@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "neox_sequential"])
def test_fused_projections_split_as_the_attention_splits_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is what transformers' own attention function receives (values and GPT-2's queries are not rotated)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, what, seen = build(name), inputs(name), []
    dense = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((q, k, v))
        return dense(module, q, k, v, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", spy)
        run(model, **what)
    got = capture(model, ["layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"], **what)
    q, k, v = (x.transpose(1, 2).flatten(-2) for x in seen[0])
    assert torch.equal(got["layers.0.attn.v"], v)
    at = slice(None) if name == "gpt2" else 0                      # position 0 is not turned by a rotary embedding
    torch.testing.assert_close(got["layers.0.attn.q"][:, at], q[:, at])
    torch.testing.assert_close(got["layers.0.attn.k"][:, at], k[:, at])


def test_the_rest_of_the_model_is_not_run() -> None:
    model, what = build("llama"), inputs("llama")
    ran: list[str] = []
    for path in ("model.layers.0.mlp", "model.layers.1", "model.norm", "lm_head"):
        model.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: ran.append(path))
    capture(model, ["layers.0.resid_mid", "layers.0.attn.z"], **what)
    assert ran == []
    capture(model, ["layers.0.resid_post", "embed"], **what)
    assert ran == ["model.layers.0.mlp"]


@pytest.mark.parametrize("name", NAMES)
def test_capture_leaves_no_trace(name: str) -> None:
    model, what = build(name), inputs(name)
    before, bits, hooks = run(model, **what), state_bits(model), hooks_of(model)
    rng = torch.get_rng_state()
    got = capture(model, ["layers.0.resid_post"], **what)["layers.0.resid_post"]
    assert not got.requires_grad
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert hooks_of(model) == hooks and torch.equal(run(model, **what), before)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        states = model(**what, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[1], got)


def test_capture_with_gradients_and_errors() -> None:
    model, what = build("llama"), inputs("llama")
    got = capture(model, "layers.0.resid_post", grad=True, **what)["layers.0.resid_post"]
    got.square().sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[1].mlp.down_proj.weight.grad is None
    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*attn\.z"):
        capture(model, ["layers.0.attn"], **what)
    hooks = hooks_of(model)
    with pytest.raises(Exception, match="index out of range"):
        capture(model, ["layers.1.resid_post"], input_ids=torch.tensor([[10_000]]))
    assert hooks_of(model) == hooks


# -------------------------------------------------------------------------------------- replacement


@pytest.mark.parametrize("name", NAMES)
def test_identity_at_every_site_changes_nothing(name: str) -> None:
    model, what = build(name), inputs(name)
    before, bits, modules = run(model, **what), state_bits(model), dict(model.named_modules())
    for site in sites(model).values():
        if site.kind == "attention":
            continue
        new = identity if site.kind == "stream" else copy.deepcopy(model.get_submodule(site.module_path))
        with replaced(model, {site.name: new}):
            assert torch.equal(run(model, **what), before), site
    streams = [s.name for s in sites(model).values() if s.kind == "stream"]
    with replaced(model, dict.fromkeys(streams, identity)):
        assert torch.equal(run(model, **what), before)
    assert torch.equal(run(model, **what), before) and hooks_of(model) == 0
    assert list(model.state_dict()) == list(bits) and all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[k] is modules[k] for k in modules)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_put_at_a_site_is_what_is_read_there(name: str) -> None:
    model, what = build(name), inputs(name)
    for site in [s for s in sites(model).values() if s.kind == "stream"]:
        value = capture(model, [site.name], **what)[site.name]
        other = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        with replaced(model, {site.name: lambda x, other=other: other}):
            got = capture(model, [site.name], **what)[site.name]
            torch.testing.assert_close(got, other, msg=lambda m, site=site: f"{site.name}: {m}")


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel", "neox_sequential", "gemma2", "opt", "bert", "phi"])
def test_two_sites_at_one_module_both_act_in_either_order(name: str) -> None:
    """Linear layers and the streams through them share a module; resid_mid and attn.out share a sum."""
    model, what = build(name), inputs(name)
    marks: list[str] = []

    def mark(label: str) -> Callable[[Tensor], Tensor]:
        return lambda x: marks.append(label) or x

    qkv = "qkv_proj" if "layers.0.qkv_proj" in sites(model) else "q_proj"
    plan: dict[str, Any] = {f"layers.0.{s}": mark(s) for s in ("resid_pre", "attn.q", "attn.z", "attn.out", "mlp.hidden", "mlp.out")}
    plan |= {f"layers.0.{s}": copy.deepcopy(model.get_submodule(sites(model)[f"layers.0.{s}"].module_path)) for s in (qkv, "o_proj", "down_proj")}
    for order in (list(plan), list(reversed(plan))):
        marks.clear()
        with replaced(model, {k: plan[k] for k in order}):
            run(model, **what)
        assert sorted(marks) == sorted(("resid_pre", "attn.q", "attn.z", "attn.out", "mlp.hidden", "mlp.out")), order
    if "layers.0.resid_mid" in sites(model):
        for order in (("attn.out", "resid_mid"), ("resid_mid", "attn.out")):
            zero = {"resid_mid": lambda x: x * 0 + 2, "attn.out": lambda x: x + 1}
            with replaced(model, {f"layers.0.{k}": zero[k] for k in order}):
                got = capture(model, ["layers.0.resid_mid"], **what)["layers.0.resid_mid"]
            torch.testing.assert_close(got, torch.full_like(got, 2))


def test_linear_layers_are_swapped_for_the_right_one() -> None:
    """Zero the projection by hand in a copy: the same logits as replacing it by a module that gives zeros."""
    for name in ("llama", "gpt2", "neox_parallel", "opt", "bert", "vit"):
        model, what = build(name), inputs(name)
        for site in [s for s in sites(model, "layers.1.*").values() if s.kind == "linear"]:
            by_hand = copy.deepcopy(model)
            zeroed = by_hand.get_submodule(site.module_path)
            with torch.no_grad():
                zeroed.weight.zero_()
                if zeroed.bias is not None:
                    zeroed.bias.zero_()
            old = model.get_submodule(site.module_path)
            with replaced(model, {site.name: copy.deepcopy(zeroed)}):
                torch.testing.assert_close(run(model, **what), run(by_hand, **what))
            assert model.get_submodule(site.module_path) is old


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_restore(failure: type[BaseException]) -> None:
    model, what = build("llama"), inputs("llama")
    before, modules = run(model, **what), dict(model.named_modules())

    def explode(x: Tensor) -> Tensor:
        raise failure("stop")

    plan = {"layers.*.resid_mid": explode, "layers.0.q_proj": nn.Linear(32, 32)}
    with pytest.raises(failure), replaced(model, plan):
        run(model, **what)
    assert hooks_of(model) == 0 and torch.equal(run(model, **what), before)
    assert all(m is modules[k] for k, m in model.named_modules())


def test_nested_and_capture_within() -> None:
    class Stand(nn.Module):
        """A stand-in that has none of a Linear's attributes."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.full((*x.shape[:-1], 32), 0.5)

    model, what = build("llama"), inputs("llama")
    before, old = run(model, **what), model.model.layers[0].self_attn.q_proj
    with replaced(model, {"layers.0.q_proj": Stand(), "layers.0.down_proj": Stand()}):
        first = run(model, **what)
        assert not torch.equal(first, before)
        assert sites(model)["layers.0.q_proj"].d == 32 and sites(model)["layers.0.mlp.hidden"].d == 48
        assert (capture(model, ["layers.0.attn.q"], **what)["layers.0.attn.q"] == 0.5).all()
        with replaced(model, {"layers.0.q_proj": old, "layers.1.mlp.out": torch.zeros_like}):
            assert model.model.layers[0].self_attn.q_proj is old
        assert torch.equal(run(model, **what), first)
    assert model.model.layers[0].self_attn.q_proj is old and torch.equal(run(model, **what), before)


def test_resid_mid_sees_an_inner_contexts_resid_pre() -> None:
    model, what = build("llama"), inputs("llama")
    seen: list[Tensor] = []
    for nested in (True, False):
        keep = {"layers.0.resid_mid": lambda x: seen.append(x) or x}
        halve = {"layers.0.resid_pre": lambda x: x / 2}
        with replaced(model, keep if nested else {**keep, **halve}), replaced(model, halve if nested else {}):
            run(model, **what)
    assert len(seen) == 2 and torch.equal(*seen)


def test_bad_plans_change_nothing() -> None:
    model, what = build("llama"), inputs("llama")
    modules = dict(model.named_modules())
    bad: list[dict[str, Any]] = [
        {"layers.0.q_proj": nn.Linear(32, 32), "layers.9.q_proj": nn.Linear(32, 32)},
        {"layers.0.q_proj": lambda x: x}, {"layers.0.mlp.out": 3}, {"layers.0.attn": nn.Identity()},
    ]
    for plan in bad:
        with pytest.raises(BadInput, match=r"layers\."), replaced(model, plan):
            pytest.fail("entered")
        assert all(m is modules[k] for k, m in model.named_modules()) and hooks_of(model) == 0
    with pytest.raises(BadInput, match="budget"), replaced(model, {}, budget=0.5):
        pytest.fail("entered")
    for wrong in (lambda x: x[:, :1], lambda x: x.double(), lambda x: (x,), lambda x: None):
        with pytest.raises(BadInput, match=r"layers\.0\.mlp\.out"), replaced(model, {"layers.0.mlp.out": wrong}):
            run(model, **what)
    assert hooks_of(model) == 0


def test_one_method_cannot_stand_in_for_several_layers() -> None:
    from rarefy.catalogue import entry

    model = build("llama")
    method = entry("weights/magnitude").load().for_module(model.model.layers[0].self_attn.q_proj, budget=0.5)
    with pytest.raises(BadInput, match=r"layers\.\*\.q_proj"), replaced(model, {"layers.*.q_proj": method}):
        pytest.fail("entered")


def test_shared_modules_are_refused_and_tied_weights_are_not() -> None:
    model, what = build("llama"), inputs("llama")
    model.model.layers[1] = model.model.layers[0]
    for plan in ({"layers.0.q_proj": nn.Linear(32, 32)}, {"layers.1.mlp.out": identity}):
        with pytest.raises(Unsupported, match="same module"), replaced(model, plan):
            pytest.fail("entered")
    with pytest.raises(Unsupported, match="same module"):
        capture(model, ["layers.1.mlp.out"], **what)

    tied = build("llama_tied")
    before = run(tied, **what)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with replaced(tied, {"embed": lambda x: x * 0, "logits": identity}):
        run(tied, **what)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and torch.equal(run(tied, **what), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("llama", "neox_sequential"):
        model, what = build(name).to(dtype), inputs(name)
        before = run(model, **what)
        names = [s.name for s in sites(model).values() if s.kind == "stream"]
        assert {v.dtype for v in capture(model, names, **what).values()} == {dtype}
        with replaced(model, dict.fromkeys(names, identity)):
            assert torch.equal(run(model, **what), before)


def test_inference_mode_and_autocast() -> None:
    model, what = build("llama"), inputs("llama")
    with torch.inference_mode(), replaced(model, {"layers.*.resid_mid": identity}):
        assert torch.equal(model(**what).logits, run(model, **what))
    linear = nn.Linear(32, 32)
    with torch.autocast("cpu", torch.bfloat16), replaced(model, {"layers.0.resid_post": linear}):
        got = capture(model, ["layers.1.resid_pre"], **what)["layers.1.resid_pre"]
        assert got.dtype == capture(model, ["layers.0.resid_pre"], **what)["layers.0.resid_pre"].dtype


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 63)])
def test_awkward_shapes(shape: tuple[int, int]) -> None:
    for name in ("llama", "gpt2", "opt"):
        model, what = build(name), inputs(name, *shape)
        names = [s.name for s in sites(model).values() if s.kind == "stream"]
        before = run(model, **what)
        with replaced(model, dict.fromkeys(names, identity)):
            assert torch.equal(run(model, **what), before)
        got = capture(model, names, **what)
        assert all(v.shape[:2] == shape for v in got.values())


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_cache_under_replacement(name: str) -> None:
    """Row-wise replacements give the same tokens with and without the cache."""
    model, what = build(name), inputs(name, 1, 5)
    mask = torch.ones_like(what["input_ids"])
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    with replaced(model, {"layers.0.mlp.out": lambda x: x * 0.5, "layers.1.resid_post": lambda x: x.relu()}):
        with_cache = model.generate(**what, **how, use_cache=True)
        without = model.generate(**what, **how, use_cache=False)
    assert torch.equal(with_cache, without) and with_cache.shape == (1, 11)


def test_import_patches_nothing() -> None:
    program = (
        "import transformers.modeling_utils as u, transformers.masking_utils as m, torch, torch.nn.functional as F\n"
        "from transformers.models.llama import modeling_llama as l\n"
        "def look(): return {**{('u', k): id(v) for k, v in vars(u).items()}, **{('m', k): id(v) for k, v in vars(m).items()},"
        " **{('l', k): id(v) for k, v in vars(l).items()}, **{('a', k): id(v) for k, v in u.ALL_ATTENTION_FUNCTIONS.items()},"
        " **{('k', k): id(v) for k, v in m.ALL_MASK_ATTENTION_FUNCTIONS.items()}, **{('F', k): id(v) for k, v in vars(F).items()},"
        " ('call', 0): id(torch.nn.Module.__call__), ('set', 0): id(torch.nn.Module.__setattr__)}\n"
        "before = look()\n"
        "import rarefy.site, rarefy.attach, rarefy.hub, rarefy.fit\n"
        "from rarefy.catalogue import ENTRIES\n"
        "[e.load() for e in ENTRIES if e.name.startswith('attention/')]\n"
        "assert look() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
