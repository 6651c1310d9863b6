"""`calibrate` against two naive passes over whole activations: what each layer is shown, in which order, and how deep a pass goes."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rarefy.errors import BadInput
from rarefy.fit import calibrate
from rarefy.neurons.teal import Teal
from rarefy.neurons.wina import Wina
from rarefy.site import sites
from rarefy.weights.magnitude import Magnitude
from rarefy.weights.wanda import Wanda
from site_models import VOCAB, build

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Batch:
    input_ids: Tensor
    attention_mask: Tensor | None = None


def ids(n=6, t=9, seed=4):
    return torch.randint(3, VOCAB, (n, t), generator=torch.Generator().manual_seed(seed))


def module_of(model, name):
    return model.get_submodule(sites(model, name)[name].module_path)


def make(model, cls=Wanda, names=None, **kw):
    names = names or [f"layers.{n}.{leaf}" for n in range(2) for leaf in LINEAR]
    return {name: cls.for_module(module_of(model, name), **{"budget": 0.4, **kw}) for name in names}


@torch.no_grad()
def inputs_of(model, names, input_ids):
    """Input rows [N, I] of each named layer, by plain hooks over one whole pass."""
    got, handles = {}, []
    for name in names:
        handles.append(module_of(model, name).register_forward_hook(lambda m, a, o, name=name: got.update({name: a[0].flatten(0, 1)})))
    model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    return got


def wanda_mask(weight, x, keep):
    """Row by row: the keep largest |w| * ||x||_2, each row sorted on its own."""
    norms = [float(x[:, i].double().pow(2).sum()) ** 0.5 for i in range(x.shape[1])]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for o, row in enumerate(weight.tolist()):
        order = sorted(range(len(row)), key=lambda i: -abs(row[i]) * norms[i])
        mask[o, order[:keep]] = True
    return mask


@torch.no_grad()
def naive(model, names, input_ids, budget, sequential):
    """Masks by name. Sequential: a layer's weights are cut in place before the next layer's inputs are collected."""
    model, masks = copy.deepcopy(model), {}
    for layer in range(2) if sequential else [None]:
        group = [n for n in names if layer is None or n.startswith(f"layers.{layer}.")]
        x = inputs_of(model, group, input_ids)
        for name in group:
            weight = module_of(model, name).weight
            masks[name] = wanda_mask(weight, x[name], round(budget * weight.shape[1]))
        for name in group if sequential else []:
            module_of(model, name).weight.mul_(masks[name])
    return masks


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_sees_what_the_fitted_layers_before_it_give(model, sequential):
    plan = make(model)
    turned = dict(reversed(plan.items()))      # the order of the plan does not matter, that of the layers does
    assert calibrate(model, turned, [Batch(ids()[:2]), Batch(ids()[2:])], sequential=sequential) is turned
    want = naive(model, list(plan), ids(), 0.4, sequential)
    for name, method in plan.items():
        assert torch.equal(method.mask_OI, want[name]), name


def test_the_order_makes_a_difference_here(model):
    a, b = (naive(model, list(make(model)), ids(), 0.4, s) for s in (True, False))
    same = {name: torch.equal(a[name], b[name]) for name in a}
    assert all(same[f"layers.0.{leaf}"] for leaf in LINEAR) and not any(same[f"layers.1.{leaf}"] for leaf in LINEAR)


@pytest.mark.parametrize("sequential", [True, False])
@torch.no_grad()
def test_thresholds_are_quantiles_of_what_flows(model, sequential):
    names = ["layers.0.up_proj", "layers.1.q_proj", "layers.1.down_proj"]
    plan = make(model, Teal, names)
    calibrate(model, plan, [Batch(ids())], sequential=sequential)
    x = inputs_of(model, names, ids())
    first = plan[names[0]]
    cut = float(x[names[0]].abs().flatten().quantile(0.6))
    assert float(first.tau) == pytest.approx(cut, rel=1 / 128)
    if sequential:      # as the model runs with the first layer's small inputs set to zero
        other = copy.deepcopy(model)
        module_of(other, names[0]).register_forward_pre_hook(lambda m, a: (torch.where(a[0].abs() > first.tau, a[0], 0.0),))
        x = inputs_of(other, names, ids())
    for name in names[1:]:
        assert float(plan[name].tau) == pytest.approx(float(x[name].abs().flatten().quantile(0.6)), rel=1 / 128)


def test_calibrating_twice_is_once_and_split_batches_are_the_whole(model):
    """C12."""
    once, twice, split = make(model), make(model), make(model)
    calibrate(model, once, [Batch(ids())])
    for _ in range(2):
        calibrate(model, twice, [Batch(ids())])
    calibrate(model, split, (Batch(part) for part in ids().split(1)))      # a generator, read once and kept
    for name, method in once.items():
        assert torch.equal(method.mask_OI, twice[name].mask_OI) and torch.equal(method.mask_OI, split[name].mask_OI)
        assert int(twice[name].rows) == 2 * int(method.rows) == 2 * ids().numel()
        torch.testing.assert_close(split[name].square_I, method.square_I, rtol=1e-6, atol=0)
        torch.testing.assert_close(twice[name].square_I, 2 * method.square_I, rtol=1e-12, atol=0)
    for cls in (Teal, Wina):
        once, twice = make(model, cls), make(model, cls)
        calibrate(model, once, [Batch(ids())])
        for _ in range(2):
            calibrate(model, twice, [Batch(ids())])
        probe = {n: torch.randn(20, m.d_in) for n, m in once.items()}
        assert all(torch.equal(m.select(probe[n]).mask, twice[n].select(probe[n]).mask) for n, m in once.items())


def test_the_model_is_left_as_it_was(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    calibrate(model, make(model), [Batch(ids())])
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("sequential, want", [(True, {0: 6, 1: 3, "head": 0}), (False, {0: 3, 1: 3, "head": 0})])
def test_a_pass_goes_no_deeper_than_the_layer_looked_at(model, sequential, want):
    count = {0: 0, 1: 0, "head": 0}
    handles = [
        m.register_forward_pre_hook(lambda m, a, key=key: count.update({key: count[key] + 1}))
        for key, m in ((0, model.model.layers[0]), (1, model.model.layers[1]), ("head", model.lm_head))
    ]
    try:
        calibrate(model, make(model), [Batch(part) for part in ids().split(2)], sequential=sequential)
    finally:
        for handle in handles:
            handle.remove()
    assert count == want


def test_memory_is_bounded_by_a_batch(model, monkeypatch):
    """No method is ever shown more than a batch at once, and nothing is kept of what it was shown."""
    shown, alive = [], []
    observe = Wanda.observe
    def watched(self, x, y=None):
        alive.append(sum(ref() is not None for ref in shown))
        shown.append(weakref.ref(x))
        assert len(x) == len(y) == 9 and y.shape[1] == self.d_out
        observe(self, x, y)

    monkeypatch.setattr(Wanda, "observe", watched)
    calibrate(model, make(model), [Batch(part) for part in ids().split(1)])
    assert len(shown) == 14 * 6 and max(alive) <= 3      # q, k and v are shown the same rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_shown(model, side):
    plain, padded = make(model), make(model)
    calibrate(model, plain, [Batch(ids(4, 6))])
    junk = torch.full((4, 3), 5)
    input_ids = torch.cat([junk, ids(4, 6)] if side == "left" else [ids(4, 6), junk], 1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[:, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    calibrate(model, padded, [Batch(input_ids, mask), Batch(junk, torch.zeros_like(junk))])      # and one batch of nothing else
    for name, method in plain.items():
        assert int(padded[name].rows) == int(method.rows) == 24
        torch.testing.assert_close(padded[name].square_I, method.square_I, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel", "opt", "mistral", "qwen3", "gemma3"])
def test_other_families(family):
    model = build(family)
    names = [n for n, s in sites(model).items() if s.kind == "linear"]
    plan = make(model, names=names)
    calibrate(model, plan, [Batch(ids())])
    assert all(int(m.rows) == ids().numel() and bool(m.finished) for m in plan.values())
    x = inputs_of(model, [names[0]], ids())[names[0]] if family != "opt" else None
    if x is not None:
        torch.testing.assert_close(plan[names[0]].square_I, x.double().pow(2).sum(0), rtol=1e-6, atol=0)


def test_methods_that_need_no_data_are_left_alone(model):
    plan = make(model, Magnitude)
    before = {n: m.mask_OI.clone() for n, m in plan.items()}
    assert calibrate(model, plan, []) is plan
    assert all(torch.equal(m.mask_OI, before[n]) for n, m in plan.items())


def test_progress_is_told(model):
    said = []
    calibrate(model, make(model), [Batch(ids()[:3]), Batch(ids()[3:])], on_progress=lambda site, n: said.append((site, n)))
    assert said == [("layers.0.q_proj", 1), ("layers.0.q_proj", 2), ("layers.1.q_proj", 1), ("layers.1.q_proj", 2)]


def test_what_cannot_be_calibrated_is_named():
    model = build("llama")
    wanda = make(model, names=["layers.0.up_proj"])["layers.0.up_proj"]
    with pytest.raises(BadInput, match="calibration data is empty"):
        calibrate(model, {"layers.0.up_proj": wanda}, [])
    for name, says in (("layers.0.resid_post", "names a stream"), ("layers.*.up_proj", "names 2 sites"), ("layers.7.up_proj", "layers 0..1")):
        with pytest.raises(BadInput, match=says):
            calibrate(model, {name: wanda}, [Batch(ids())])
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(BadInput, match=r"input of layers\.0\.up_proj: .* first a NaN at \[0, 0, 3\]"):
        calibrate(model, {"layers.0.up_proj": wanda}, [Batch(ids())])
    assert int(wanda.rows) == 0 and not any(m._forward_hooks for m in model.modules())
