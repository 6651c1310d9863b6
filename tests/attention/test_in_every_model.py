"""Every attention method can be planned by name, fitted and run in a small model, or says in its own words why not."""

import pytest
import torch

import rarefy
from rarefy.catalogue import ENTRIES
from rarefy.errors import BadInput, Unsupported
from site_models import build

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
