"""What a hurried user does to a model with methods in it: odd masks, odd calls, odd plans. Right, or refused by name; never silently dense."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rarefy.attention.quest import Quest
from rarefy.attention.trained.in_model import _Watched
from rarefy.attention.window import WindowSinks
from rarefy.errors import BadInput, Unsupported
from rarefy.jobs.build import plan as plan_of
from rarefy.site import replaced, sites
from site_models import build, inputs, run

FULL = {"layers.*.attn": Quest(1.0, block=4)}
SPARSE = {"layers.*.attn": Quest(0.25, block=2)}
T = 12
IDS = inputs("llama", 2, T)["input_ids"]
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = torch.ones(2, T, dtype=torch.bool)
PADDED[0, :3] = False


def padded(mask_BS: Tensor, blind: bool = False) -> Tensor:
    """[B, 1, T, T] of real tokens; queries at padding see nothing if `blind`."""
    mask = CAUSAL & mask_BS[:, None, None, :]
    return mask & mask_BS[:, None, :, None] if blind else mask


def as_float(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


SERVED = {
    "one for all rows": CAUSAL[None, None],
    "one for all rows, keys hidden": (CAUSAL & PADDED[0])[None, None],
    "left padding": padded(PADDED),
    "right padding, its queries blind": padded(PADDED.flip(1), blind=True),
    "a hole": padded(torch.tensor([[1] * 4 + [0] + [1] * 7, [1] * T]).bool()),
    "floats": as_float(padded(PADDED), torch.finfo(torch.float32).min),
    "infinite floats": as_float(padded(PADDED.flip(1)), -1e9),
    "the same for each head": padded(PADDED).expand(2, 4, T, T),
}


@pytest.mark.parametrize("what", SERVED)
def test_masks_of_four_dimensions_are_what_they_say(what: str) -> None:
    model, mask = build("llama"), SERVED[what]
    wanted = run(model, input_ids=IDS, attention_mask=mask)
    with replaced(model, FULL):
        got = run(model, input_ids=IDS, attention_mask=mask)
    seen = mask if mask.dtype == torch.bool else mask == 0
    real = seen.expand(2, -1, T, T)[:, 0].any(1)                  # a query whose own key nobody sees is padding
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-5)


def with_hole() -> Tensor:
    mask = padded(PADDED)
    mask[1, :, 7, 2] = False
    return mask


REFUSED = {
    "of each head": (torch.stack([CAUSAL, CAUSAL, CAUSAL.roll(1, 1).tril(), CAUSAL])[None], "head to head"),
    "a bias on one key": (as_float(CAUSAL[None, None], -1e9) - (torch.arange(T) == 3) * 1.0, "bias"),
    "a slope of distance": (as_float(CAUSAL[None, None], -1e9) - 0.1 * (T - torch.arange(T)), "bias"),
    "whole numbers": (CAUSAL[None, None].long(), "int64"),
    "a key that one query misses": (with_hole(), "more than causal and padding"),
    "both ways": (torch.ones(1, 1, T, T, dtype=torch.bool), "more than causal and padding"),
    "too few keys": (CAUSAL[None, None, :, : T - 2], "10"),
    "of other rows": (CAUSAL.expand(3, 1, T, T), "3, 1, 12, 12.* 2 rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_masks_that_no_method_serves_are_refused(what: str) -> None:
    mask, word = REFUSED[what]
    with replaced(build("llama"), FULL) as model, pytest.raises(Unsupported, match=rf"layers\.0\.attn.*{word}"):
        run(model, input_ids=IDS, attention_mask=mask)


def test_packed_sequences_are_refused() -> None:
    at = torch.cat([torch.arange(5), torch.arange(T - 5)]).expand(2, -1)
    with replaced(build("llama"), FULL) as model, pytest.raises(Unsupported, match="packed"):
        run(model, input_ids=IDS, position_ids=at, use_cache=False)


def test_a_mask_written_to_between_calls_is_read_again() -> None:
    model, mask = build("llama"), padded(torch.ones(2, T, dtype=torch.bool))
    with replaced(model, FULL):
        run(model, input_ids=IDS, attention_mask=mask)
        mask[0, :, :, :3] = False
        got = run(model, input_ids=IDS, attention_mask=mask)
    torch.testing.assert_close(got[:, 3:], run(model, input_ids=IDS, attention_mask=mask)[:, 3:], rtol=1e-4, atol=1e-5)


def test_inference_mode() -> None:
    model = build("llama")
    wanted = run(model, input_ids=IDS, attention_mask=PADDED.long())
    with replaced(model, FULL), torch.inference_mode():
        got = model(input_ids=IDS, attention_mask=PADDED.long()).logits
    torch.testing.assert_close(got[PADDED], wanted[PADDED], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "word"), [
    ({"output_attentions": True}, "output_attentions"), ({"position_bias": torch.zeros(1)}, "bias"), ({"softcap": 30.0}, "caps"),
    ({"s_aux": torch.zeros(4)}, "sink"), ({"sliding_window": 4}, "sliding"), ({"head_mask": torch.ones(4)}, "heads"),
])
def test_what_a_call_asks_for_besides_is_refused(asked: dict[str, Any], word: str) -> None:
    with replaced(build("llama"), FULL) as model, pytest.raises(Unsupported, match=rf"layers\.0\.attn.*{word}"):
        run(model, input_ids=IDS, **asked)


@pytest.mark.slow
def test_export_is_refused_by_name() -> None:
    with replaced(build("llama"), SPARSE) as model, pytest.raises(Unsupported, match=r"layers\.0\.attn.*exported"):
        torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)


def test_attention_that_is_set_inside_does_not_leave_the_plan_out() -> None:
    model = build("llama")
    with replaced(model, SPARSE):
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match=r"layers\.0\.attn.*'eager' inside"):
            run(model, input_ids=IDS)
    assert model.config._attn_implementation == "sdpa"
    run(model, input_ids=IDS)


def test_a_copy_made_inside_says_so_there_and_later() -> None:
    model = build("llama")
    with replaced(model, SPARSE):
        inside = copy.deepcopy(model)
        with pytest.raises(Unsupported, match=r"layers\.0\.attn.*copy"):
            run(inside, input_ids=IDS)
    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*copy"):
        run(inside, input_ids=IDS)
    assert torch.equal(run(copy.deepcopy(model), input_ids=IDS), run(model, input_ids=IDS))


def test_plans_may_come_off_in_any_order() -> None:
    model, names = build("llama"), set(ALL_ATTENTION_FUNCTIONS)
    dense = run(model, input_ids=IDS)
    first, second, third = (replaced(model, {f"layers.{n}.attn": Quest(0.25, block=2)}) for n in (0, 1, 1))
    with replaced(model, {"layers.1.attn": Quest(0.25, block=2)}):
        only = run(model, input_ids=IDS)
    for one in (first, second, third):
        one.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run(model, input_ids=IDS), only)
    third.__exit__(None, None, None)
    assert torch.equal(run(model, input_ids=IDS), only)
    second.__exit__(None, None, None)
    assert torch.equal(run(model, input_ids=IDS), dense) and set(ALL_ATTENTION_FUNCTIONS) == names and not model._forward_hooks


def test_layers_may_come_off_in_any_order() -> None:
    model = build("llama")
    inside, first, second = model.model.layers[0].self_attn, nn.Linear(32, 32), nn.Linear(32, 32)
    dense, outer, inner = inside.q_proj, replaced(model, {"layers.0.q_proj": first}), replaced(model, {"layers.0.q_proj": second})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert inside.q_proj is second
    inner.__exit__(None, None, None)
    assert inside.q_proj is dense


@pytest.mark.parametrize(("stream", "linear"), [("attn.q", "q_proj"), ("mlp.hidden", "down_proj"), ("attn.z", "o_proj")])
def test_a_stream_is_replaced_also_where_another_layer_comes_to_stand(stream: str, linear: str) -> None:
    model = build("llama")
    path = sites(model, f"layers.0.{linear}")[f"layers.0.{linear}"].module_path
    other, plan = copy.deepcopy(model.get_submodule(path)), {f"layers.0.{stream}": torch.zeros_like}
    dense = run(model, input_ids=IDS)
    with replaced(model, plan):
        wanted = run(model, input_ids=IDS)
        with replaced(model, {f"layers.0.{linear}": other}):
            assert torch.equal(run(model, input_ids=IDS), wanted)
            assert other._forward_hooks or other._forward_pre_hooks
        assert torch.equal(run(model, input_ids=IDS), wanted) and not (other._forward_hooks or other._forward_pre_hooks)
    assert torch.equal(run(model, input_ids=IDS), dense) and not torch.equal(wanted, dense)


def gradient(model: Any, outside: bool, **how: Any) -> Tensor:
    model.train()
    if how:
        model.gradient_checkpointing_enable(how)
    with replaced(model, SPARSE):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    return model.model.layers[0].self_attn.q_proj.weight.grad


def test_checkpointed_layers_are_computed_again_with_their_methods_or_not_at_all() -> None:
    wanted = gradient(build("llama"), True)
    assert torch.equal(gradient(build("llama"), False, use_reentrant=False), wanted)
    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*use_reentrant=False"):
        gradient(build("llama"), True, use_reentrant=True)
    with pytest.raises(CheckpointError):
        gradient(build("llama"), True, use_reentrant=False)


class Waits(nn.Module):
    """Dense; a thread's first call waits a while for another thread to come in between."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[int] = []
        self.other = threading.Event()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        me = threading.get_ident()
        if self.by and self.by[0] != me:
            self.other.set()
        self.by.append(me)
        if len(self.by) == 1:
            self.other.wait(0.1)
        return v.repeat_interleave(2, 1)


def test_threads_take_turns_a_pass_each() -> None:
    model, method = build("llama"), Waits()
    with replaced(model, {"layers.*.attn": method}):
        both = [threading.Thread(target=run, args=(model,), kwargs={"input_ids": IDS}) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(20)
    assert len(method.by) == 4 and method.by[0] == method.by[1] and method.by[2] == method.by[3]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_gives_its_turn_back(failure: type[BaseException]) -> None:
    class Fails(Waits):
        def attend(self, *args: Any, **how: Any) -> Tensor:
            raise failure

    with replaced(build("llama"), FULL) as model:
        with pytest.raises(failure), replaced(model, {"layers.1.attn": Fails()}):
            run(model, input_ids=IDS)
        run(model, input_ids=IDS)                                  # torch runs no hooks after an interrupt: the next pass has the turn to give
        thread = threading.Thread(target=run, args=(model,), kwargs={"input_ids": IDS}, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_names_go_before_globs_and_plans_before_the_method_for_the_rest() -> None:
    model, one, other = build("llama"), Quest(1.0), WindowSinks(0.25)
    with replaced(model, {"layers.0.attn": one, "layers.1.attn": other}):
        wanted = run(model, input_ids=IDS)
    for plan in ({"layers.0.attn": one, "layers.*.attn": other}, {"layers.*.attn": one, "layers.[1-9].attn": other}):
        with replaced(model, plan):
            assert torch.equal(run(model, input_ids=IDS), wanted)
    with replaced(model, {"layers.0.attn": one}, attention="window", budget=0.25):
        assert torch.equal(run(model, input_ids=IDS), wanted)


@pytest.mark.parametrize(("given", "word"), [
    (((), {}), "nothing to put in"), (((), {"budget": 0.1}), "budget without attention"), ((("quest",), {}), r"attention='quest'"),
    ((([Quest()],), {}), "not a list"), ((({"layers.0.attn": Quest},), {}), r"Quest\(\.\.\.\)"),
    ((({"layers.*.attn": Quest()},), {"attention": "window"}), "the plan names the attention of every layer"),
    ((({"layers.0.mlp.out": nn.Identity(), "blocks.0.hook_mlp_out": nn.Identity()},), {}), r"two entries .*layers\.0\.mlp\.out"),
    (((), {"attention": Quest()}), "catalogue name"), (((), {"attention": "snapkv"}), r"cache/snapkv is a cache.*kv_cache"),
    (((), {"attention": "patterns/bigbird"}), "patterns/bigbird is a pattern"), (((), {"attention": "qest"}), "attention/quest"),
    (((), {"attention": "quest", "layers": [0]}), r"layers\.\[01\]\.attn"), (((), {"attention": "quest", "heads": [0]}), "PerHead"),
    (((), {"attention": "nsa"}), "trained first"), (((), {"attention": "quest", "bugdet": 0.1}), "'bugdet'; it takes budget"),
    *((((), {"attention": "quest", "budget": bad}), r"budget=.* must be in \(0, 1\]") for bad in (0, -0.1, 1.5, "0.1", float("nan"), True)),
])
def test_plans_that_say_nothing_or_too_much_are_refused_on_entry(given: tuple[tuple[Any, ...], dict[str, Any]], word: str) -> None:
    args, settings = given
    with pytest.raises(BadInput, match=word):
        replaced(build("llama"), *args, **settings).__enter__()


def test_names_are_read_in_any_case_and_heads_where_a_method_has_them() -> None:
    model, ids = build("llama"), torch.arange(40)[None] % 7
    said = []
    for name in ("quest", "Quest", "attention/quest"):
        with torch.no_grad(), replaced(model, attention=name, budget=0.2, block=4):
            said.append(model(ids).logits)
    with torch.no_grad():
        assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2]) and not torch.allclose(said[0], model(ids).logits, atol=1e-4)
    made: Any = plan_of("attention/entmax", model, heads=4)
    assert {len(method.logit_H) for method in made.values()} == {4}
    with torch.no_grad(), replaced(model, attention="entmax", heads=4):
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(("what", "error", "word"), [
    (None, BadInput, "NoneType"), (nn.Linear(2, 2), Unsupported, "Linear has no config"),
    (nn.DataParallel(nn.Linear(2, 2)), Unsupported, r"its \.module"),
])
def test_what_is_no_model_is_named(what: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        replaced(what, attention="quest").__enter__()


def test_training_a_method_in_a_model_refuses_padding() -> None:
    model = build("llama")
    watched = {name: _Watched(method, []) for name, method in plan_of("attention/seer", model).items()}
    with pytest.raises(BadInput, match=r"attention/seer in layer 0.*without padding"), replaced(model, watched):
        run(model, input_ids=IDS, attention_mask=PADDED.long())


@pytest.mark.slow
def test_a_compiled_model_runs_its_methods_and_is_dense_again_afterwards() -> None:
    torch._dynamo.reset()
    model = build("llama")
    compiled: Any = torch.compile(model, backend="eager")
    dense = run(model, input_ids=IDS)
    with replaced(model, SPARSE):
        wanted = run(model, input_ids=IDS)
    torch.testing.assert_close(run(compiled, input_ids=IDS), dense)
    with replaced(model, SPARSE):
        torch.testing.assert_close(run(compiled, input_ids=IDS), wanted)
    torch.testing.assert_close(run(compiled, input_ids=IDS), dense)
    assert not torch.allclose(wanted, dense, atol=1e-3)
    torch._dynamo.reset()
    with replaced(model, SPARSE), pytest.raises(Exception, match="compile without fullgraph=True"):
        whole: Any = torch.compile(model, backend="eager", fullgraph=True)
        run(whole, input_ids=IDS)
    torch._dynamo.reset()
