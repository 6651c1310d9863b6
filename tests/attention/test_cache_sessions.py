"""Caches as they are used: conversations, chunks, sampling, speculation, copies and moves, in models of several families."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from caches import SMALL, small
from torch import Tensor
from transformers import DynamicCache

from rarefy.attention.cache import Cache, make
from rarefy.errors import BadInput, Unsupported
from site_models import build, inputs

EVERY = ("base", *SMALL)
HOW: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}


def fresh(name: str, model: Any, family: str = "llama", budget: float = 1.0) -> Any:
    return Cache() if name == "base" else small(name, budget, model, family)


def on(cache: Any, model: Any) -> Any:
    return cache.on(model) if hasattr(cache, "on") else contextlib.nullcontext()


def held(cache: Any) -> list[Tensor]:
    if isinstance(cache, Cache):
        return [grown.store for layer in cache.layers for grown in layer._growing() if grown.store is not None]  # type: ignore[union-attr]
    return [x for layer in cache.layers for x in layer.tensors().values()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox_parallel", "qwen3", "gemma"])
@pytest.mark.parametrize("name", ["base", "window", "h2o", "pages", "mustafar", "shadow"])
def test_a_conversation_goes_on_with_the_returned_cache(name: str, family: str) -> None:
    """A padded batch, its answers, a second turn of several tokens behind them; sampled, the same draws."""
    model, ids, more = build(family), inputs(family, 2, 17)["input_ids"], inputs(family, 2, 6, seed=3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def talk(cache: Any) -> Tensor:
        torch.manual_seed(0)
        with on(cache, model):
            first = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, do_sample=True, **HOW)
            both = torch.cat([first.sequences, more], 1)
            seen = torch.cat([mask, torch.ones(2, both.shape[1] - 17, dtype=mask.dtype)], 1)
            return model.generate(input_ids=both, attention_mask=seen, past_key_values=first.past_key_values, do_sample=True, **HOW)

    assert torch.equal(talk(fresh(name, model, family)), talk(DynamicCache()))


WAYS = [{"prefill_chunk_size": 5}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["base", "random", "window", "h2o", "pages", "csr", "shadow"])
def test_ways_to_generate(name: str, how: dict[str, Any]) -> None:
    model, ids = build("llama"), inputs("llama", 2, 17)["input_ids"]

    def run(cache: Any) -> Tensor:
        torch.manual_seed(0)
        with on(cache, model):
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **HOW, **how)

    assert torch.equal(run(fresh(name, model)), run(DynamicCache()))


@pytest.mark.parametrize("name", ["base", "pages"])
def test_tokens_that_were_guessed_wrong_are_dropped(name: str) -> None:
    """Prompt lookup reads guesses and crops those that do not hold; what is left is what it was, at any budget."""
    model, ids = build("llama"), inputs("llama", 1, 19)["input_ids"].repeat(1, 2)[:, :33]
    how = {**HOW, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "do_sample": False}
    cache = fresh(name, model)
    with on(cache, model):
        got = model.generate(input_ids=ids, past_key_values=cache, prompt_lookup_num_tokens=3, **how)
    assert torch.equal(got, model.generate(input_ids=ids, past_key_values=DynamicCache(), **how))
    one, other = fresh(name, model, budget=0.4), fresh(name, model, budget=0.4)
    with torch.no_grad():
        with on(one, model):
            model(input_ids=ids[:, :22], past_key_values=one)
            for t in range(22, 29):
                model(input_ids=ids[:, t : t + 1] + 1, past_key_values=one)
            one.crop(-7)
            a = [model(input_ids=ids[:, t : t + 1], past_key_values=one).logits for t in range(22, 30)]
        with on(other, model):
            model(input_ids=ids[:, :22], past_key_values=other)
            b = [model(input_ids=ids[:, t : t + 1], past_key_values=other).logits for t in range(22, 30)]
    torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=1e-5, atol=1e-6)


def test_pages_are_cropped_only_where_it_is_known_what_goes() -> None:
    model, ids = build("llama"), inputs("llama", 2, 9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = make("pages", budget=0.5, page=4)
    with cache.on(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(Unsupported, match="padding"):
            cache.crop(-2)
        cache.reset()
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises((BadInput, ValueError), match="4"):
            cache.crop(4)
        cache.crop(-20)
        assert cache.get_seq_length() == 0
        again = model(input_ids=ids, past_key_values=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(again, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_moves_change_nothing(name: str) -> None:
    model, ids = build("llama"), inputs("llama", 2, 24)["input_ids"]
    cache, got = fresh(name, model, budget=0.4), []
    with torch.no_grad():
        with on(cache, model):
            for part in ids[:, :22].split([18, 1, 3], 1):
                model(input_ids=part, past_key_values=cache)
            twin = copy.deepcopy(cache)
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
            got.append(model(input_ids=ids[:, 22:23], past_key_values=cache).logits)
        with on(twin, model):
            got.append(model(input_ids=ids[:, 22:23], past_key_values=twin).logits)
    assert torch.equal(*got) and twin.get_seq_length() == 23
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
    assert held(cache) and all(x.device.type == "meta" for x in held(cache))


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode_may_be_entered_and_left(name: str) -> None:
    model, ids, out = build("llama"), inputs("llama", 1, 30)["input_ids"], []
    cache = fresh(name, model)
    modes = (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)
    with on(cache, model):
        for mode, part in zip(modes, ids.split([20, 1, 1, 8], 1), strict=True):
            with mode():
                out.append(model(input_ids=part, past_key_values=cache).logits)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([x.clone() for x in out], 1), model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
