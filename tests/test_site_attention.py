"""Attention methods inside models: dense equality, cache, padding, nesting, refusals (S1, S4, S5, L8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.attention.cache import Cache
from rarefy.attention.per_head import PerHead
from rarefy.attention.quest import Quest
from rarefy.attention.random import RandomBlocks
from rarefy.attention.window import WindowSinks
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


class Nosy(Dense):
    """Notes every extra that the router has."""

    wants = ("hidden", "cache", "positions", "rotary")

    def attend(self, *args: Any, hidden_BTD: Any, cache: Any, position_ids: Any, rotary: Any, **rest: Any) -> Tensor:  # type: ignore[override]
        out = super().attend(*args, **rest)
        self.calls[-1] |= {"hidden": hidden_BTD, "cache": cache, "positions": position_ids, "rotary": rotary}
        return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel", "qwen3", "gemma", "mistral", "bert", "vit"])
def test_a_method_gets_what_it_wants(name: str) -> None:
    model, what, method = build(name), inputs(name), Nosy()
    seen = capture(model, "layers.1.attn.in", **what)["layers.1.attn.in"]
    with replaced(model, {"layers.1.attn": method}):
        run(model, **what)
        (call,) = method.calls
        assert torch.equal(call["hidden"], seen) and call["cache"] is None
        assert torch.equal(call["positions"].expand(1, -1)[0], torch.arange(seen.shape[1]))
        assert (call["rotary"] is None) == (name in ("gpt2", "bert", "vit"))
        if name in ("bert", "vit"):
            return
        cache, method.calls = Cache(), []
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        model.generate(**what, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None, past_key_values=cache)
    assert [c["cache"] is cache.layers[1] for c in method.calls] == [True] * 3
    assert [c["hidden"].shape[1] for c in method.calls] == [7, 1, 1]
    assert method.calls[-1]["positions"].tolist() == [[6], [8]]
    if method.calls[0]["rotary"] is not None:
        assert [c["rotary"][0].shape[1] for c in method.calls] == [7, 1, 1]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_unknown_wants_are_refused_on_entry() -> None:
    class Greedy(Dense):
        wants = ("weights",)

    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*weights"), replaced(build("llama"), {"layers.*.attn": Greedy()}):
        pytest.fail("entered")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_may_have_methods_of_their_own(name: str) -> None:
    model, what = build(name), inputs(name, 2, 33)
    mask = torch.ones_like(what["input_ids"])
    mask[0, :6] = 0
    first, second, both, z = WindowSinks(0.3, block=4), Quest(0.3, block=4), {}, "layers.0.attn.z"
    for key, method in (("first", first), ("second", second), ("both", PerHead([first, second]))):
        with replaced(model, {"layers.0.attn": method}):
            both[key] = capture(model, z, **what, attention_mask=mask)[z]
    half = both["both"].shape[-1] // 2
    assert torch.equal(both["both"][..., :half], both["first"][..., :half]) and torch.equal(both["both"][..., half:], both["second"][..., half:])
    assert not torch.equal(both["first"], both["second"])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    with replaced(model, {"layers.0.attn": PerHead([first, second, second, RandomBlocks(0.5, block=4)]), "layers.1.attn": PerHead([second])}):
        assert torch.equal(model.generate(**what, **how, use_cache=True), model.generate(**what, **how, use_cache=False))
        assert torch.equal(model.generate(**what, **how, past_key_values=Cache()), model.generate(**what, **how, use_cache=False))


def test_groups_of_heads_that_cut_through_key_heads() -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 12, 9, 4, generator=random)
    k, v = torch.randn(2, 2, 6, 9, 4, generator=random).unbind()
    wanted = Dense().attend(q, k, v, scale=0.5, causal=True, padding_BS=None, layer=0)
    for groups in (1, 2, 3, 4, 6, 12):                             # 12 heads over 6 key heads: 3 heads meet one and a half
        assert torch.allclose(PerHead([Dense() for _ in range(groups)]).attend(q, k, v, scale=0.5), wanted, atol=1e-6)
    with pytest.raises(BadInput, match="5 methods.*12 query heads"):
        PerHead([Dense() for _ in range(5)]).attend(q, k, v, scale=0.5)
    with pytest.raises(BadInput, match="no methods"):
        PerHead([])
    with pytest.raises(BadInput, match="Linear"):
        PerHead([nn.Linear(2, 2)])
    with pytest.raises(Unsupported, match="every head"):
        PerHead([Nosy()])
    method = PerHead([WindowSinks(0.5, block=2), WindowSinks(1.0, block=2)])
    method(q, k, v)
    full = sum(max(1, round(0.5 * n)) for n in range(1, 10)) / 45
    assert method.measured_density() == pytest.approx((full + 1) / 2)


@pytest.mark.parametrize("method", ["quest", "window", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_catalogue_methods_read_in_pieces_as_whole_and_with_any_cache(method: str, name: str) -> None:
    model, ids = build(name), inputs(name, 2, 37)["input_ids"]
    with replaced(model, attention=method, budget=0.4, block=4), torch.no_grad():
        whole = model(input_ids=ids).logits
        for cache in (None, Cache()):
            got = []
            for part in ids.split([11, 1, 17, 8], 1):
                step = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                got.append(step.logits)
            torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["quest", "window", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_nothing_but_padding_harm_nobody(method: str, side: str) -> None:
    model, ids = build("llama"), inputs("llama", 3, 13)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[2, :4] = mask[2, :4] if side == "right" else 0
    mask[2, 9:] = mask[2, 9:] if side == "left" else 0
    with replaced(model, attention=method, budget=0.5, block=4):
        got, alone = run(model, input_ids=ids, attention_mask=mask), run(model, input_ids=ids[:1])
    assert got.isfinite().all()
    torch.testing.assert_close(got[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["quest", "window", "random"])
def test_sequences_shorter_than_a_block_are_dense(method: str) -> None:
    model, what = build("llama"), inputs("llama", 2, 1)
    with replaced(model, attention=method, budget=0.01, block=64):
        torch.testing.assert_close(run(model, **what), run(build("llama"), **what), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel"])
def test_static_caches_are_refused_by_name(name: str) -> None:
    model, what = build(name), inputs(name, 1, 6)
    how = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones(1, 6).long()}
    with replaced(model, {"layers.1.attn": Dense()}), pytest.raises(Unsupported, match=r"layers\.1\.attn.*static cache"):
        model.generate(**what, **how, cache_implementation="static", disable_compile=True)


def test_learned_sinks_are_refused_by_name() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*learned sink"), replaced(model, {"layers.*.attn": Dense()}):
        pytest.fail("entered")
