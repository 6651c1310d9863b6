"""Attention methods inside models: dense equality, cache, padding, nesting, refusals (S1, S4, S5, L8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import BadInput, Unsupported
from rarefy.site import capture, replaced, sites
from site_models import DECODERS, NAMES, build, inputs, run

SOME = ("llama", "qwen3", "gemma2", "gpt2", "neox_parallel", "opt", "phi", "mixtral")


class Dense(nn.Module):
    """Attention written out from its definition, one batch row and head at a time; keeps a log of its calls."""

    def __init__(self, newest: int | None = None) -> None:
        super().__init__()
        self.newest, self.calls = newest, []

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, padding_BS: Tensor | None, layer: int
    ) -> Tensor:
        B, H, T, D = q_BHTD.shape
        G, S = k_BGSD.shape[1:3]
        self.calls.append({"T": T, "S": S, "G": G, "H": H, "causal": causal, "layer": layer, "padded": padding_BS is not None})
        out = torch.zeros(B, H, T, v_BGSD.shape[-1], dtype=q_BHTD.dtype)
        for b in range(B):
            real_S = torch.ones(S, dtype=torch.bool) if padding_BS is None else padding_BS[b]
            for t in range(T):
                see_S = real_S & (torch.arange(S) <= S - T + t) if causal else real_S
                if self.newest is not None:
                    nth_S = real_S.cumsum(0)
                    see_S = see_S & (nth_S > nth_S[S - T + t] - self.newest)
                if not see_S.any():
                    continue
                for h in range(H):
                    g = h // (H // G)
                    p_S = (k_BGSD[b, g, see_S] @ q_BHTD[b, h, t] * scale).softmax(-1)
                    out[b, h, t] = p_S @ v_BGSD[b, g, see_S]
        return out


def registry() -> tuple[dict[str, Any], dict[str, Any]]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_dense_attention_by_definition_gives_the_models_logits(name: str) -> None:
    model, what = build(name), inputs(name)
    before, functions, implementation = run(model, **what), registry(), model.config._attn_implementation
    for plan in ("layers.0.attn", "layers.1.attn", "layers.*.attn"):
        method = Dense()
        with replaced(model, {plan: method}):
            torch.testing.assert_close(run(model, **what), before, rtol=1e-4, atol=1e-5)
        assert len(method.calls) == (2 if "*" in plan else 1)
        assert [c["causal"] for c in method.calls] == [name not in ("bert", "vit")] * len(method.calls)
    assert torch.equal(run(model, **what), before)
    assert registry() == functions and model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", SOME)
def test_z_is_what_the_method_returned(name: str) -> None:
    class Constant(Dense):
        def attend(self, q_BHTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            B, H, T, D = q_BHTD.shape
            return torch.arange(H, dtype=q_BHTD.dtype)[:, None, None].expand(B, H, T, D)

    model, what = build(name), inputs(name)
    with replaced(model, {"layers.1.attn": Constant()}):
        got = capture(model, ["layers.0.attn.z", "layers.1.attn.z"], **what)
    heads = model.config.num_attention_heads
    expected = torch.arange(heads).repeat_interleave(got["layers.1.attn.z"].shape[-1] // heads).float()
    assert torch.equal(got["layers.1.attn.z"], expected.expand_as(got["layers.1.attn.z"]))
    torch.testing.assert_close(got["layers.0.attn.z"], capture(model, ["layers.0.attn.z"], **what)["layers.0.attn.z"])


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("opt_post_norm", "opt_projected", "qwen3_moe", "qwen2_moe")])
@pytest.mark.parametrize("newest", [None, 3])
def test_generation_with_cache_is_generation_without(name: str, newest: int | None) -> None:
    model, what = build(name), inputs(name, 1, 6)
    how = {
        "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "attention_mask": torch.ones_like(what["input_ids"]), "return_dict_in_generate": True, "output_logits": True,
    }
    method = Dense(newest)
    dense = model.generate(**what, **how)
    with replaced(model, {"layers.*.attn": method}):
        cached = model.generate(**what, **how, use_cache=True)
        steps = {(c["T"], c["S"]) for c in method.calls}
        again = model.generate(**what, **how, use_cache=False)
    assert steps == {(6, 6), (1, 7), (1, 8), (1, 9), (1, 10)}
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), rtol=1e-4, atol=1e-5)
    if newest is None:
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(dense.logits), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, model.generate(**what, **how).logits, strict=True))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("newest", [None, 2])
def test_the_side_of_the_padding_is_without_effect(name: str, newest: int | None) -> None:
    model, ids = build(name), inputs(name, 1, 5)["input_ids"]
    pad = torch.zeros(1, 3, dtype=torch.long)
    other = inputs(name, 1, 8, seed=9)["input_ids"]
    with replaced(model, {"layers.*.attn": Dense(newest)}):
        alone = run(model, input_ids=ids)
        for left in (True, False):
            row = torch.cat([pad, ids] if left else [ids, pad], 1)
            mask = torch.cat([pad, torch.ones_like(ids)] if left else [torch.ones_like(ids), pad], 1)
            got = run(
                model, input_ids=torch.cat([row, other]), attention_mask=torch.cat([mask, torch.ones_like(other)]),
                **({} if name == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0).expand(2, -1) if left else None}),
            )
            real = got[:1, 3:] if left else got[:1, :5]
            torch.testing.assert_close(real, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_sequential", "opt"])
def test_left_padded_batches_generate_as_single_rows(name: str) -> None:
    model = build(name)
    short, long = inputs(name, 1, 4)["input_ids"], inputs(name, 1, 7, seed=5)["input_ids"]
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    with replaced(model, {"layers.*.attn": Dense(3)}):
        together = model.generate(input_ids=both, attention_mask=mask, **how)[:, -4:]
        alone = [model.generate(input_ids=x, attention_mask=torch.ones_like(x), **how)[:, -4:] for x in (short, long)]
    assert torch.equal(together, torch.cat(alone))


def test_chunked_prefill_through_the_cache() -> None:
    model, ids = build("llama"), inputs("llama", 2, 9)["input_ids"]
    with replaced(model, {"layers.*.attn": Dense(4)}), torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-5)


def test_nested_plans_hold_together_and_come_off_in_turn() -> None:
    model, what = build("llama"), inputs("llama")
    before, functions = run(model, **what), registry()
    outer, inner = Dense(1), Dense(2)
    with replaced(model, {"layers.0.attn": outer, "layers.1.attn": inner}):
        both = run(model, **what)
    with replaced(model, {"layers.0.attn": outer}):
        only = run(model, **what)
        with replaced(model, {"layers.1.attn": inner}):
            assert torch.equal(run(model, **what), both)
        assert torch.equal(run(model, **what), only)
        with replaced(model, {"layers.0.attn": Dense()}):                # the inner plan wins where both name a layer
            torch.testing.assert_close(run(model, **what), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(both, only) and registry() == functions and torch.equal(run(model, **what), before)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_exceptions_restore_config_and_registry(failure: type[BaseException]) -> None:
    class Explodes(Dense):
        def attend(self, *args: Any, **kwargs: Any) -> Tensor:
            raise failure("stop")

    model, what = build("gpt2"), inputs("gpt2")
    before, functions, implementation = run(model, **what), registry(), model.config._attn_implementation
    with pytest.raises(failure), replaced(model, {"layers.*.attn": Explodes(), "layers.0.mlp.out": torch.zeros_like}):
        run(model, **what)
    assert registry() == functions and model.config._attn_implementation == implementation
    assert torch.equal(run(model, **what), before)


@pytest.mark.parametrize(("name", "layer", "word"), [
    ("gemma2_capped", 0, "caps"), ("gemma3_sliding", 0, "sliding"), ("mistral_sliding", 1, "sliding"),
])
def test_attention_that_is_not_plain_is_refused_on_entry(name: str, layer: int, word: str) -> None:
    model, what = build(name), inputs(name)
    functions = registry()
    with pytest.raises(Unsupported, match=rf"layers\.{layer}\.attn.*{word}"), replaced(model, {f"layers.{layer}.attn": Dense()}):
        pytest.fail("entered")
    assert registry() == functions
    run(model, **what)


def test_a_full_layer_beside_a_sliding_one_is_served() -> None:
    model, what = build("gemma3_sliding"), inputs("gemma3_sliding", 2, 20)
    before = run(model, **what)
    with replaced(model, {"layers.1.attn": Dense()}):
        torch.testing.assert_close(run(model, **what), before, rtol=1e-4, atol=1e-5)


def test_dropout_and_odd_masks_are_refused() -> None:
    model, what = build("gpt2"), inputs("gpt2", 2, 6)
    model.train()
    with pytest.raises(Unsupported, match="dropout"), replaced(model, {"layers.0.attn": Dense()}):
        model(**what)
    model.eval()
    holes = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    holes[0, 0, 4, 1] = False
    with pytest.raises(Unsupported, match="mask"), replaced(model, {"layers.0.attn": Dense()}):
        run(model, **what, attention_mask=holes)


def test_linear_streams_and_attention_in_one_plan() -> None:
    model, what = build("llama"), inputs("llama")
    before = run(model, **what)
    plan = {"layers.*.attn": Dense(), "layers.0.q_proj": model.model.layers[0].self_attn.q_proj, "layers.1.attn.z": lambda x: x}
    with replaced(model, plan):
        torch.testing.assert_close(run(model, **what), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["quest", "window", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel", "bert"])
def test_catalogue_methods_at_full_budget(method: str, name: str) -> None:
    model, what = build(name), inputs(name, 2, 40)
    before = run(model, **what)
    with replaced(model, attention=method, budget=1.0):
        torch.testing.assert_close(run(model, **what), before, rtol=1e-4, atol=1e-5)
    with replaced(model, attention=method, budget=0.3):
        assert not torch.allclose(run(model, **what), before, atol=1e-4)
    assert torch.equal(run(model, **what), before)
    with pytest.raises(BadInput, match="budget"), replaced(model, attention=method, budget=1.5):
        pytest.fail("entered")


@pytest.mark.parametrize("method", ["quest", "window"])
def test_catalogue_methods_decode_as_they_prefill(method: str) -> None:
    model, what = build("llama"), inputs("llama", 1, 37)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones(1, 37).long()}
    with replaced(model, attention=method, budget=0.4, block=4):
        assert torch.equal(model.generate(**what, **how, use_cache=True), model.generate(**what, **how, use_cache=False))


def test_unknown_attention_method_lists_near_names() -> None:
    with pytest.raises(BadInput, match="attention/quest"), replaced(build("llama"), attention="qest"):
        pytest.fail("entered")
    assert len(sites(build("llama"), "layers.*.attn")) == 2
