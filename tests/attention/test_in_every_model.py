"""Every attention method can be planned by name, fitted and run in a small model, or says in its own words why not."""

import pytest
import torch
import transformers

import rarefy
from rarefy.attention.cache import Cache
from rarefy.catalogue import ENTRIES
from rarefy.errors import BadInput, Unsupported
from site_models import GQA, build

ATTENTION = [e.name for e in ENTRIES if e.name.startswith("attention/")]
NOT_ALONE = {
    "attention/swinbert": (Unsupported, "does not stand in for a LlamaAttention"),
    "attention/sparse_video": (BadInput, "frame"),
    "attention/span": (Unsupported, "does not stand in for a LlamaAttention"),
    "attention/biformer": (Unsupported, "causal"),
}
"""Methods that a causal language model cannot have by name alone, and what they say."""


def put_in(name, model, ids):
    plan = rarefy.plan(name, model, budget=0.3)
    if any(method.fitted == "calibrated" for method in plan.values()):
        rarefy.calibrate(model, plan, [ids])
    with rarefy.replaced(model, plan), torch.no_grad():
        return plan, model(ids).logits


@pytest.mark.parametrize("name", ATTENTION)
def test_by_name(name):
    model, ids = build("llama").eval(), torch.arange(2 * 40).view(2, 40) % 29
    if name in NOT_ALONE:
        error, said = NOT_ALONE[name]
        with pytest.raises(error, match=said):
            put_in(name, model, ids)
        return
    _, logits = put_in(name, model, ids)
    assert logits.shape[:2] == ids.shape and torch.isfinite(logits).all()


ONE_WAY = {
    "attention/star": "must be causal", "attention/combiner": "must be causal", "attention/forcing": "not causal",
    "attention/biformer": "no square map",
}
"""Methods without fitting that an encoder cannot have, and what they say; those that are calibrated are fitted to causal attention alone."""


def beside_padding(model, ids, left):
    """Logits of the first row's first 28 tokens beside padding and another row, and of those tokens alone."""
    here, pad = torch.ones(1, 28, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    row, mask = (torch.cat([pad, x] if left else [x, pad], 1) for x in (ids[:1, :28], here))
    at = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(
        torch.cat([row, ids[1:]]), attention_mask=torch.cat([mask, torch.ones_like(ids[1:])]), position_ids=torch.cat([at, torch.arange(33)[None]])
    ).logits
    return got[0, 5:] if left else got[0, :28], model(ids[:1, :28]).logits[0]


@pytest.mark.parametrize("name", [n for n in ATTENTION if n not in NOT_ALONE])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rows_beside_padding_are_as_alone(name, kind):
    model, ids = build(kind), torch.arange(5, 5 + 2 * 33).view(2, 33) * 7 % 61
    plan = rarefy.plan(name, model, budget=0.3)
    if any(method.fitted == "calibrated" for method in plan.values()):
        if kind == "bert":
            with pytest.raises(BadInput, match="both ways"):
                rarefy.calibrate(model, plan, [ids])
            return
        rarefy.calibrate(model, plan, [ids])
    with rarefy.replaced(model, plan), torch.no_grad():
        if kind == "bert" and name in ONE_WAY:
            with pytest.raises((BadInput, Unsupported), match=ONE_WAY[name]):
                model(ids)
            return
        for left in (True, False):
            torch.testing.assert_close(*beside_padding(model, ids, left), rtol=1e-4, atol=1e-4)


WHOLE = {f"attention/{name}" for name in ("vertical_slash", "minference", "sample", "zipvl", "chunked", "moa")}
"""Methods of a whole prompt: its last queries, or its length, say what earlier ones see. Pieces choose each for itself, and a step may be dense."""


@pytest.mark.parametrize("name", [n for n in ATTENTION if n not in NOT_ALONE])
def test_a_prompt_read_in_pieces_is_the_prompt(name):
    model, ids = build("llama"), torch.arange(5, 5 + 2 * 33).view(2, 33) * 7 % 61
    mask, plan = torch.ones_like(ids), rarefy.plan(name, model, budget=0.3)
    mask[0, :9] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)
    if any(method.fitted == "calibrated" for method in plan.values()):
        rarefy.calibrate(model, plan, [ids])
    with rarefy.replaced(model, plan), torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=at).logits
        cache, got, end = Cache(), [], 0
        for piece in (7, 13, 1, 1, 11):                            # the first is padding alone in one row, the second in part
            start, end = end, end + piece
            more = {"attention_mask": mask[:, :end], "position_ids": at[:, start:end], "past_key_values": cache}
            got.append(model(ids[:, start:end], **more).logits)
    same = torch.allclose(torch.cat(got, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)
    assert same != (name in WHOLE)


def test_a_method_that_serves_all_layers_is_one_object():
    plan, _ = put_in("attention/tidal", build("llama").eval(), torch.arange(20).view(1, 20))
    assert len(plan) > 1 and len({id(method) for method in plan.values()}) == 1


def test_arguments_that_a_method_does_not_have_are_named():
    with pytest.raises(BadInput, match="attention/pattern.*'expression'.*pattern, block"):
        rarefy.replaced(build("llama"), attention="pattern", expression="window(4)").__enter__()


def test_a_method_on_another_device_than_its_layer_is_refused():
    model, ids = build("llama").eval(), torch.arange(40).view(1, 40) % 29
    plan, _ = put_in("attention/loki", model, ids)
    plan["layers.1.attn"].to("meta")
    with pytest.raises(BadInput, match=r"layers\.1\.attn is on cpu and the method's .* on meta"):
        rarefy.replaced(model, plan).__enter__()
    with rarefy.replaced(model, {"layers.0.attn": plan["layers.0.attn"]}):
        pass


def test_batches_without_ids_are_refused():
    model = build("llama").eval()
    with pytest.raises(BadInput, match="input_ids"):
        rarefy.calibrate(model, rarefy.plan("attention/loki", model), ["some text"])


def test_a_method_made_for_another_model_is_refused_by_name():
    model, ids = build("llama"), torch.arange(40).view(1, 40) % 29
    other = rarefy.plan("attention/flux", build("gpt2"))               # 4 key heads; this model has 2
    with pytest.raises(BadInput, match="attention/flux was made for .* 4 key heads.* 2 key heads"), rarefy.replaced(model, other):
        model(ids)
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GQA, "hidden_size": 48, "head_dim": 8}))
    for name in ("nsa", "fsa", "flux"):
        plan = rarefy.plan(f"attention/{name}", model)
        with pytest.raises(BadInput, match=f"attention/{name} was made for a model 32 wide .* 48"), rarefy.replaced(wider, plan):
            wider(ids)


def test_models_without_token_ids_are_not_calibrated_in():
    model = build("vit")
    with pytest.raises(Unsupported, match="attention/loki.*ViTForImageClassification reads pixel_values"):
        rarefy.calibrate(model, rarefy.plan("attention/loki", model), [torch.arange(4).view(1, 4)])
