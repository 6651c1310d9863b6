"""Laws about state: what a call may change, when fitting is finished, copies (C7, C8, C11, C12, C14, C15, L8)."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch

from ..errors import BadInput
from ..method import Sparse
from .spec import Broken, Case, Law, NotApplicable, chosen, require, same_bits, same_state, state_of


def nothing_changes(case: Case) -> None:
    """C7: using a method changes neither inputs, state, generators nor global settings of torch."""
    method, inputs = case.ready(), case.inputs(8)
    before, copies = state_of(method), [x.clone() for x in inputs]
    torch.manual_seed(11)
    random.seed(11)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    settings = _settings()
    with torch.no_grad():
        method.select(*inputs)
        method(*inputs)
        method.reference(*inputs)
        _ = method.cost(), method.dense_cost(), repr(method), method.arguments
    require(_settings() == settings, f"global settings went from {settings} to {_settings()}")
    require(torch.equal(torch.get_rng_state(), generators[0]), "torch's global generator moved")
    require(random.getstate() == generators[1], "Python's generator moved")
    require((np.random.get_state()[1] == generators[2]).all(), "numpy's generator moved")  # type: ignore[index]
    same_state(before, state_of(method), "use")
    for x, was in zip(inputs, copies, strict=True):
        same_bits(x, was, "an input")
    arguments = method.arguments
    arguments.clear()
    require(bool(method.arguments) or not method._arguments, "changing .arguments changes the method")


def _settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(), torch.is_inference_mode_enabled(),
    )


def same_seed_same_bits(case: Case) -> None:
    """C8: made, fitted and used twice, whatever the global generator says."""
    torch.manual_seed(1)
    first, inputs = case.ready(), case.inputs(8)
    torch.manual_seed(2)
    second = case.ready()
    same_state(state_of(first), state_of(second), "the same arguments twice")
    with torch.no_grad():
        same_bits(first(*inputs), second(*inputs), "output of two methods of the same seed")
        same_bits(first(*inputs), first(*inputs), "output of two calls")


def unfitted_raises(case: Case) -> None:
    """C11: a calibrated method that saw no data says so, in select, forward and finish."""
    if case.fresh().fitted != "calibrated":
        raise NotApplicable("it is not calibrated")
    inputs = case.inputs(4)
    for name in ("select", "forward", "reference", "finish"):
        method = case.fresh()
        try:
            getattr(method, name)(*(() if name == "finish" else inputs))
        except BadInput:
            continue
        raise Broken(f"{name} of a method that saw no data was accepted")


def finishing(case: Case) -> None:
    """C12: finish twice is once; batches give what the whole gives; observing alone changes no result."""
    if case.fresh().fitted != "calibrated":
        raise NotApplicable("it is not calibrated")
    xs = case.inputs(48, seed=4)
    whole, split, again = case.fresh(), case.fresh(), case.fresh()
    whole.observe(*xs)
    whole.finish()
    for part in (slice(1), slice(1, 1), slice(1, 20), slice(20, None)):
        split.observe(*(x[part] for x in xs))
    split.finish()
    again.observe(*xs)
    again.finish()
    once = state_of(again)
    again.finish()
    same_state(once, state_of(again), "finish twice")
    probe = case.inputs(8, seed=6)
    same_bits(chosen(whole, probe).mask, chosen(split, probe).mask, "calibrated whole against in batches")
    before = whole(*probe).detach()
    whole.observe(*(x * 3 for x in xs))
    same_bits(whole(*probe).detach(), before, "observe before finish")


def copies_are_alone(case: Case) -> None:
    """C14: deepcopy gives the same output and shares nothing."""
    method, inputs = case.ready(), case.inputs(6)
    twin = copy.deepcopy(method)
    with torch.no_grad():
        before = method(*inputs)
        same_bits(twin(*inputs), before, "a deep copy's output")
        require(twin.arguments == method.arguments, "a deep copy's arguments differ")
        for value in twin.parameters():
            value.add_(1.0)
        same_bits(method(*inputs), before, "output after its copy was changed")


def says_what_it_is(case: Case) -> None:
    """C15: repr shows the class and every argument; name, unit and budget are there."""
    method = case.ready()
    text = repr(method)
    missing = [k for k, v in method.arguments.items() if f"{k}={v!r}" not in text]
    require(type(method).__name__ in text and not missing, f"repr lacks {missing or type(method).__name__}: {text}")
    require(bool(method.name) and bool(method.unit), f"name={method.name!r}, unit={method.unit!r} must be given")
    require(method.fitted in ("none", "calibrated", "trained"), f"fitted={method.fitted!r}")
    require(0 < method.budget <= 1, f"budget is {method.budget}")


def _tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _for_site(method: Sparse, model: torch.nn.Module, case: Case) -> Sparse:
    site = case.spec.site
    if site.endswith("_proj"):
        linear = model.get_submodule("model.layers.0.mlp.down_proj")
        wanted = {k: v for k, v in method.arguments.items() if k not in ("d_in", "d_out", "bias")}
        placed = type(method).for_module(linear, **wanted)
        if placed.fitted == "calibrated":
            placed.observe(torch.randn(50, 64, generator=torch.Generator().manual_seed(3)))
            placed.finish()
        return placed
    if site.endswith(".attn") and "heads" in method.arguments and "d_head" in method.arguments:
        wanted = {k: v for k, v in method.arguments.items() if k not in ("hidden", "heads", "key_heads", "d_head", "layer")}
        return type(method).for_module(model.get_submodule("model.layers.0.self_attn"), **wanted)
    if site.endswith(".attn") and method.fitted == "calibrated":
        method.observe(*(x[..., :8] for x in case.inputs(50, seed=3)))      # the width of the small Llama's heads
        method.finish()
        return method
    if site.endswith("mlp.out"):
        return type(method)(**{**method.arguments, "d_in": 32, **({"d_out": 32} if method.arguments.get("d_out") else {})})
    return method


def taking_out(case: Case) -> None:
    """L8: put into a small Llama and taken out, also by an exception, the model has the same bits and outputs."""
    if not case.spec.site:
        raise NotApplicable("no site is given")
    from ..site import replaced

    model = _tiny_llama()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before, weights = model(tokens).logits, {k: v.clone() for k, v in model.state_dict().items()}
        modules = [(k, id(m)) for k, m in model.named_modules()]
        method = _for_site(case.fresh(), model, case).eval()
        with replaced(model, {case.spec.site: method}):
            inside = model(tokens).logits
        require(not torch.equal(inside, before), "the method was put in and changed nothing")
        same_bits(model(tokens).logits, before, "logits after it was taken out")
        try:
            with replaced(model, {case.spec.site: method}):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        same_bits(model(tokens).logits, before, "logits after an exception")
        require([(k, id(m)) for k, m in model.named_modules()] == modules, "modules are not the ones that were there")
        same_state(weights, dict(model.state_dict()), "the model's state")


LAWS: dict[str, Law] = {
    "L8 put in, take out": taking_out,
    "C7 using it changes nothing": nothing_changes,
    "C8 same seed, same bits": same_seed_same_bits,
    "C11 unfitted use raises": unfitted_raises,
    "C12 finish is idempotent and batches add up": finishing,
    "C14 deep copies": copies_are_alone,
    "C15 it says what it is": says_what_it_is,
}
