"""Pruned linear layers against formulas written here, brute force, and the layers they replace."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rarefy.errors import BadInput, Unsupported
from rarefy.site import replaced, sites
from rarefy.weights.apply import apply
from rarefy.weights.linear import keep_highest
from rarefy.weights.magnitude import Magnitude
from rarefy.weights.random import RandomWeights
from rarefy.weights.wanda import Wanda

METHODS = [RandomWeights, Magnitude, Wanda]


def linear(d_in=63, d_out=5, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, bias)


def conv1d(d_in=63, d_out=5, seed=0):
    torch.manual_seed(seed)
    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def rows(n=40, d=63, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, d)


def fitted(cls, module, x=None, **arguments):
    method = cls.for_module(module, **arguments)
    if cls is Wanda:
        method.observe(rows(d=method.d_in) if x is None else x)
        method.finish()
    return method.eval()


def wanda_by_sorting(weight, x, keep):
    """The paper's algorithm 1: sort the metric within each output row, zero the lowest."""
    metric = weight.double().abs() * x.double().pow(2).sum(0).sqrt()
    pruned = weight.clone()
    for o in range(weight.shape[0]):
        order = sorted(range(weight.shape[1]), key=lambda i, o=o: float(metric[o, i]))
        for i in order[: weight.shape[1] - keep]:
            pruned[o, i] = 0
    return pruned


@pytest.mark.parametrize("budget", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_wanda_equals_sorting(budget):
    module, x = linear(), rows()
    got = fitted(Wanda, module, x, budget=budget).sparse_weight()
    assert torch.equal(got, wanda_by_sorting(module.weight.detach(), x, max(1, round(budget * 63))))


def test_wanda_is_the_best_mask_of_its_score_by_brute_force():
    module, x = linear(8, 4), rows(30, 8)
    method = fitted(Wanda, module, x, budget=3 / 8)
    score = module.weight.detach().abs() * x.pow(2).sum(0).sqrt()
    for o in range(4):
        best = max(itertools.combinations(range(8), 3), key=lambda kept, o=o: float(score[o, list(kept)].sum()))
        assert method.mask_OI[o].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("n,m", [(1, 4), (2, 4), (4, 8), (3, 3)])
@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_n_of_m_by_brute_force(cls, n, m):
    module, x = linear(24, 3), rows(30, 24)
    method = fitted(cls, module, x, n=n, m=m)
    score = module.weight.detach().abs() * (x.pow(2).sum(0).sqrt() if cls is Wanda else 1)
    for o, start in itertools.product(range(3), range(0, 24, m)):
        best = max(itertools.combinations(range(m), n), key=lambda kept, o=o, s=start: float(score[o, s : s + m][list(kept)].sum()))
        assert method.mask_OI[o, start : start + m].nonzero().flatten().tolist() == sorted(best)
    assert method.budget == n / m and method.select().density == pytest.approx(n / m)


def test_layer_group_is_the_global_threshold():
    module = linear(63, 7)
    method = fitted(Magnitude, module, budget=0.2, group="layer")
    size = module.weight.detach().abs()
    assert int(method.mask_OI.sum()) == round(0.2 * 63 * 7)
    assert size[method.mask_OI].min() > size[~method.mask_OI].max()
    assert method.mask_OI.sum(-1).unique().numel() > 1


def test_keep_highest_breaks_ties_low_and_is_nested():
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0]])
    wanted = [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    for k, kept in enumerate(wanted, 1):
        assert keep_highest(tied, k)[0].nonzero().flatten().tolist() == kept
    infinite = torch.tensor([-torch.inf, torch.inf, 0.0, torch.inf])
    assert keep_highest(infinite, 3).tolist() == [False, True, True, True]


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("d_in,d_out", [(1, 1), (63, 111), (111, 63)])
def test_laws(cls, make, d_in, d_out):
    module, x = make(d_in, d_out), rows(7, d_in)
    masks = []
    for budget in (0.1, 0.5, 0.9, 1.0):
        method = fitted(cls, module, budget=budget)
        keep = max(1, round(budget * d_in))
        assert (method.select().mask.sum(-1) == keep).all()
        torch.testing.assert_close(method(x), method.reference(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(method(x)[:1], method(x[:1]), atol=1e-5, rtol=1e-5)
        masks.append(method.mask_OI)
        clone = cls(**method.arguments)
        clone.load_state_dict(method.state_dict())
        assert torch.equal(clone(x), method(x))
        assert method(torch.zeros(0, d_in)).shape == (0, d_out)
        assert method(x[None]).shape == (1, 7, d_out)
    assert all((low <= high).all() for low, high in itertools.pairwise(masks))
    torch.testing.assert_close(method(x), module(x), atol=2e-5, rtol=1e-5)
    if make is linear:
        assert torch.equal(method(x), module(x))


@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_permuting_inputs_permutes_the_mask(cls):
    module, x = linear(), rows()
    order = torch.randperm(63)
    moved = copy.deepcopy(module)
    moved.weight.data = module.weight.data[:, order]
    a, b = fitted(cls, module, x, budget=0.4), fitted(cls, moved, x[:, order], budget=0.4)
    assert torch.equal(a.mask_OI[:, order], b.mask_OI)


def test_wanda_calibration():
    module, x = linear(), rows()
    whole, split = Wanda.for_module(module), Wanda.for_module(module)
    with pytest.raises(BadInput, match="not calibrated"):
        whole(x)
    with pytest.raises(BadInput, match="no calibration rows"):
        whole.finish()
    whole.observe(x)
    for part in (x[:0], x[:1], x[1:30], torch.zeros(5, 63), x[30:]):
        split.observe(part)
    before = split.square_I.clone()
    bad = x.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(BadInput, match=r"NaN.*\[3, 4\]"):
        split.observe(bad)
    with pytest.raises(BadInput, match=r"\[\.\.\., 63\]"):
        split.observe(x[:, :5])
    assert torch.equal(before, split.square_I)
    torch.testing.assert_close(whole.square_I, x.double().pow(2).sum(0))
    whole.finish()
    split.finish()
    first = whole.mask_OI.clone()
    whole.finish()
    assert torch.equal(whole.mask_OI, split.mask_OI) and torch.equal(first, whole.mask_OI)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cls", METHODS)
def test_dtypes(cls, dtype):
    module = linear().to(dtype)
    method = fitted(cls, module, rows().to(dtype), budget=0.5)
    y = method(rows(4).to(dtype))
    assert y.dtype == dtype
    dense = nn.functional.linear(rows(4).to(dtype).double(), module.weight.double() * method.mask_OI, module.bias.double())
    torch.testing.assert_close(y.double(), dense, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("cls", METHODS)
def test_bake_writes_what_forward_computes(cls, make):
    module = make()
    method = fitted(cls, copy.deepcopy(module), budget=0.3)
    method.bake(module)
    assert int((module.weight != 0).sum()) == 5 * round(0.3 * 63)
    torch.testing.assert_close(module(rows()), method(rows()), atol=2e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="was fitted to"):
        method.bake(make(63, 6))


def test_the_module_is_left_alone():
    for module in (linear(), conv1d()):
        before = module.weight.detach().clone()
        method = fitted(Magnitude, module, budget=0.2)
        method(rows())
        with torch.no_grad():
            method.weight_OI.zero_()
        assert torch.equal(before, module.weight)


def test_gradients_reach_kept_weights_only():
    method = fitted(Magnitude, linear().double(), budget=0.3)
    x = rows(3).double().requires_grad_()
    assert torch.autograd.gradcheck(method, (x,))
    method(x).sum().backward()
    assert (method.weight_OI.grad[~method.mask_OI] == 0).all() and (method.weight_OI.grad[method.mask_OI] != 0).any()


def test_cost_equals_storage():
    method = fitted(Magnitude, linear(64, 32), budget=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # torch's sparse layouts are in beta
        csr = method.sparse_weight().detach().to_sparse_csr()
    stored = csr.values().numel() * 4 + csr.col_indices().numel() * 4
    assert method.cost().bytes == stored and method.cost().flops == 2 * csr.values().numel()
    assert method.dense_cost().bytes == 64 * 32 * 4
    assert fitted(Magnitude, linear(64, 32), budget=0.9).cost().bytes == method.dense_cost().bytes
    half = fitted(Magnitude, linear(64, 32, bias=False).bfloat16(), n=2, m=4)
    assert half.cost().bytes == 64 * 32 / 2 * (2 + 0.25)


def test_random_ignores_the_weight_and_leaves_the_generator_alone():
    one, two = linear(), linear(seed=1)
    state = torch.get_rng_state()
    a, b = RandomWeights.for_module(one, seed=3), RandomWeights.for_module(one, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.mask_OI, RandomWeights.for_module(two, seed=3).mask_OI) and not torch.equal(a.mask_OI, b.mask_OI)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"budget": 0.0}, "budget=0.0"), ({"budget": 1.5}, r"budget=1.5.*\(0, 1\]"), ({"budget": float("nan")}, "budget=nan"),
        ({"n": 2, "m": 5}, "m=5 does not divide d_in=8"), ({"n": 3, "m": 2}, "n=3, m=2"), ({"n": 2, "m": 0}, "n=2, m=0"),
        ({"n": 2, "m": 4, "budget": 0.3}, "budget=0.3 contradicts 2:4"), ({"group": "col"}, "group='col'"),
        ({"n": 2, "m": 4, "group": "layer"}, "group='layer'"), ({"d_in": 0}, "d_in=0"), ({"d_out": -1}, "d_out=-1"),
    ],
)
@pytest.mark.parametrize("cls", METHODS)
def test_bad_arguments(cls, arguments, words):
    with pytest.raises(BadInput, match=words):
        cls(**{"d_in": 8, "d_out": 4, **arguments})


def test_for_module_refuses():
    with pytest.raises(Unsupported, match="Embedding"):
        Magnitude.for_module(nn.Embedding(3, 4))
    with pytest.raises(Unsupported, match="meta"):
        Magnitude.for_module(nn.Linear(3, 4, device="meta"))
    broken = linear()
    broken.weight.data[0, 0] = float("inf")
    with pytest.raises(BadInput, match="NaN or inf"):
        Magnitude.for_module(broken)
    with pytest.raises(BadInput, match="seed=-1"):
        RandomWeights(8, 4, seed=-1)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_apply_bakes_the_model(make):
    model, ids = make(), torch.arange(20)[None]
    found = {k: s for k, s in sites(model, "layers.*.*").items() if s.kind == "linear"}
    assert len(found) >= 6
    plan = {k: fitted(Magnitude, model.get_submodule(s.module_path), budget=0.5) for k, s in found.items()}
    with replaced(model, plan):
        want = model(ids).logits
    assert apply(model, plan) is model
    torch.testing.assert_close(model(ids).logits, want, atol=2e-5, rtol=1e-5)
    for name, site in found.items():
        weight = model.get_submodule(site.module_path).weight
        assert int((weight != 0).sum()) == weight.numel() // 2, name


def test_apply_refuses_before_writing():
    model = llama()
    a, b = "layers.0.up_proj", "layers.1.up_proj"
    module = model.model.layers[0].mlp.up_proj
    good = fitted(Magnitude, module, budget=0.5)
    state = copy.deepcopy(model.state_dict())
    cases = [
        ({}, BadInput, "empty"),
        ({a: good, b: Wanda.for_module(module)}, BadInput, "not calibrated"),
        ({a: good, b: fitted(Magnitude, linear(8, 7))}, BadInput, "fitted to"),
        ({a: good, b: nn.Identity()}, Unsupported, "Identity"),
    ]
    for plan, error, words in cases:
        with pytest.raises(error, match=words):
            apply(model, plan)
    model.model.layers[1].mlp.up_proj.weight = module.weight
    for plan in ({a: good}, {b: good}):
        with pytest.raises(Unsupported, match="shared by .*layers.0.*layers.1"):
            apply(model, plan)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(state["model.layers.1.mlp.up_proj.weight"].clone())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
