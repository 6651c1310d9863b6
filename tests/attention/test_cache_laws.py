"""What every policy of the key-value cache must keep, whatever it does with its entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from caches import SMALL, controller, drive, qkv, small
from torch import Tensor, nn

from rarefy import catalogue
from rarefy.attention.cache import Cache, kv_cache, make
from rarefy.errors import BadInput, Unsupported
from rarefy.site import replaced
from site_models import build, inputs, run

HOW: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def padded(name: str) -> dict[str, Tensor]:
    what = inputs(name, 2, 21)
    mask = torch.ones_like(what["input_ids"])
    mask[0, :5] = 0
    return {**what, "attention_mask": mask}


def tensors_in(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor reachable from an object through attributes, lists, tuples and dicts."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    for inner in list(x.values()) if isinstance(x, dict) else x if isinstance(x, list | tuple) else list(getattr(x, "__dict__", {}).values()):
        yield from tensors_in(inner, seen)


def test_every_card_is_tested_here() -> None:
    served = {c.name.removeprefix("cache/") for c in catalogue.CARDS if c.kind == "cache" and hasattr(c.object(), "on")}
    assert served == set(SMALL)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox_parallel", "qwen3", "gemma"])
@pytest.mark.parametrize("name", SMALL)
def test_full_budget_generates_what_the_dense_model_does(name: str, family: str) -> None:
    model, what = build(family), padded(family)
    dense = model.generate(**what, **HOW, return_dict_in_generate=True, output_logits=True)
    cache = small(name, 1.0, model, family)
    with cache.on(model):
        got = model.generate(**what, **HOW, return_dict_in_generate=True, output_logits=True, past_key_values=cache)
    assert torch.equal(got.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(dense.logits), rtol=1e-3, atol=1e-4)
    assert not model._forward_pre_hooks and all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", SMALL)
def test_full_budget_reads_in_pieces_as_whole(name: str) -> None:
    model, ids = build("llama"), inputs("llama", 2, 30)["input_ids"]
    whole, cache, got = run(model, input_ids=ids), small(name, 1.0, model), []
    with cache.on(model), torch.no_grad():
        for part in ids.split([13, 1, 9, 7], 1):
            got.append(model(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    q, k, v = qkv(2, 4, 2, 40, 8)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :9] = False                                       # left padding
    padding[1, 20:24] = False                                    # right padding of a prompt of 24
    cuts = [24, 31, *range(32, 41)]

    def fresh() -> Any:
        policy = small(name, 1.0 if name == "shared" else 0.4)
        if name == "csr":
            random = torch.Generator().manual_seed(3)
            atoms = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=random), dim=-1)
            policy.atoms_of = [(atoms[0], atoms[1])]             # type: ignore[attr-defined]
        if name == "adore":
            policy.controllers = [controller(8, 2, 4)]           # type: ignore[attr-defined]
        return policy

    both = drive(fresh(), q, k, v, cuts, padding)
    for row in range(2):
        real = padding[row]
        ends = [int(real[:c].sum()) for c in cuts]
        alone = drive(fresh(), *(x[row : row + 1, :, real] for x in (q, k, v)), ends)
        torch.testing.assert_close(both[row : row + 1, :, real], alone, rtol=1e-4, atol=1e-5)
        assert not both[row, :, ~real].abs().sum()


@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_those_of_every_tensor_held_and_fall_with_the_budget(name: str) -> None:
    model, ids = build("llama"), inputs("llama", 2, 48)["input_ids"]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = []
    for budget in (1.0, 0.6, 0.25):
        cache = small(name, budget, model)
        with cache.on(model), torch.no_grad():
            for part in ids.split([40, 1, 1, 1, 5], 1):
                model(input_ids=part, past_key_values=cache)
        held: list[Tensor] = []
        for layer in cache.layers:                               # a layer's _new keys are not held once they were answered
            seen = {id(cache)}
            held += list(tensors_in(layer, seen))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        assert cache.bytes() == sum(storages.values()) and not parameters & storages.keys()
        assert cache.bytes() == cache.bytes(True) + cache.bytes(False)
        assert all(kept.shape == (2, 2) and int(kept.max()) <= 48 for kept in cache.kept())
        sizes.append(cache.bytes())
    if name == "shared":                                          # of two layers at 1, 0.6 and 0.25: the other's keys are kept or not
        assert sizes[0] > sizes[1] == sizes[2]
    else:
        assert len(set(sizes)) == 1 if name in ("pages", "alisa", "sentinel", "probe") else sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("name", SMALL)
def test_beams_and_chosen_rows(name: str) -> None:
    model, what = build("llama"), inputs("llama", 2, 21)
    mask = torch.ones_like(what["input_ids"])
    cache = small(name, 1.0, model)
    dense = model.generate(**what, **HOW, attention_mask=mask, num_beams=3)
    with cache.on(model):
        assert torch.equal(model.generate(**what, **HOW, attention_mask=mask, num_beams=3, past_key_values=cache), dense)
    one, both = small(name, 0.4, model), small(name, 0.4, model)
    ids = inputs("llama", 2, 25)["input_ids"]
    with torch.no_grad():
        with one.on(model):
            model(input_ids=ids[1:, :20], past_key_values=one)
            alone = model(input_ids=ids[1:, 20:], past_key_values=one).logits
        with both.on(model):
            model(input_ids=ids[:, :20], past_key_values=both)
            both.batch_select_indices(torch.tensor([1]))
            torch.testing.assert_close(model(input_ids=ids[1:, 20:], past_key_values=both).logits, alone, rtol=1e-4, atol=1e-5)
    if name != "pages":                                           # which drops nothing: see test_cache_sessions.py
        with pytest.raises(Unsupported, match=f"cache/{name}.*layer 0.*cropped"):
            both.crop(-1)


@pytest.mark.parametrize("name", SMALL)
def test_reset_is_as_new(name: str) -> None:
    model, ids = build("llama"), inputs("llama", 1, 26)["input_ids"]
    cache = small(name, [0.3, 0.6], model)
    with cache.on(model):
        first = model.generate(input_ids=ids, **HOW, attention_mask=torch.ones_like(ids), past_key_values=cache)
        kept = cache.kept()
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model.generate(input_ids=ids, **HOW, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert torch.equal(first, again) and all(torch.equal(a, b) for a, b in zip(kept, cache.kept(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_what_cannot_be_right_is_refused(name: str) -> None:
    model, what = build("llama"), inputs("llama", 1, 9)
    cache = small(name, 0.5, model)
    with torch.no_grad(), pytest.raises(Unsupported, match=f"cache/{name}.*cache.on"):
        model(**what, past_key_values=cache)
    with cache.on(model):
        with torch.no_grad(), pytest.raises(Unsupported, match="past_key_values=cache"):
            model(**what)                                         # transformers' own cache
        with pytest.raises(Unsupported, match="no_grad"):
            model(**what, past_key_values=cache)
        cache.reset()
        other = make("random")
        with torch.no_grad(), pytest.raises(Unsupported, match="cache/random|past_key_values"):
            model(**what, past_key_values=other)
    with cache.on(model), replaced(model, attention="window"), torch.no_grad(), pytest.raises(Unsupported, match="layers.0.attn.*attends for itself"):
        cache.reset()
        model(**what, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
        with cache.on(model), pytest.raises(BadInput, match=f"keys of cache/{name}.*layer 1"):
            model(**what, past_key_values=cache)


def test_budgets_and_names() -> None:
    model, what = build("llama"), inputs("llama", 1, 9)
    for wrong in (0.0, 1.5, float("nan"), True, [0.5, 0.0], []):
        with pytest.raises(BadInput, match="budget"):
            make("h2o", budget=wrong)
    with pytest.raises(BadInput, match="cache/snapkv"):
        make("snapkw")
    with kv_cache(model, "h2o", budget=[0.5]) as cache, torch.no_grad():
        model(**what, past_key_values=cache)
    with kv_cache(model, "h2o", budget=[0.5, 0.5, 0.5]) as cache, torch.no_grad():
        model(**what, past_key_values=cache)
    with pytest.raises(Unsupported, match=r"layers\.0\.attn.*sliding"), make("h2o").on(build("mistral_sliding")):
        pytest.fail("entered")
    for arguments in ({"name": "snapkv", "kernel": 4}, {"name": "snapkv", "window": 0}, {"name": "window", "sinks": 0}, {"name": "pages", "page": 0},
                      {"name": "mustafar", "recent": 0}, {"name": "csr", "atoms": 0}, {"name": "shadow", "chunk": 0}, {"name": "shadow", "rank": -1}):
        wrong = next(a for a in arguments if a != "name")
        with pytest.raises(BadInput, match=wrong):
            make(**arguments)  # type: ignore[arg-type]


class Grows(nn.Module):
    """Attends densely and notes what the base cache has of the keys' norms."""

    wants = ("cache",)

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.made = every, 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, cache: Any, **rest: Any) -> Tensor:
        def make(keys: Tensor) -> Tensor:
            self.made += keys.shape[2]
            return torch.stack([part.amax(2) for part in keys.split(self.every, 2)], 2)

        if cache is not None:
            got = cache.summary("largest", make, self.every)
            assert torch.equal(got, torch.stack([part.amax(2) for part in k.split(self.every, 2)], 2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=q.shape[2] > 1)


@pytest.mark.parametrize("every", [1, 4])
def test_the_base_cache_derives_from_new_keys_alone_and_is_dense(every: int) -> None:
    model, ids = build("llama"), inputs("llama", 2, 21)["input_ids"]
    mask = torch.ones_like(ids)
    dense = model.generate(input_ids=ids, **HOW, attention_mask=mask)
    assert torch.equal(model.generate(input_ids=ids, **HOW, attention_mask=mask, past_key_values=Cache()), dense)
    beams = model.generate(input_ids=ids, **HOW, attention_mask=mask, num_beams=3)
    assert torch.equal(model.generate(input_ids=ids, **HOW, attention_mask=mask, num_beams=3, past_key_values=Cache()), beams)
    method, cache = Grows(every), Cache()
    with replaced(model, {"layers.0.attn": method}):
        assert torch.equal(model.generate(input_ids=ids, **HOW, attention_mask=mask, past_key_values=cache), dense)
    steps = range(21, 28)
    assert method.made == 21 + sum(1 if every == 1 else s % every + 1 for s in steps)
    held = cache.layers[0].keys.clone()  # type: ignore[union-attr]
    cache.crop(-9)
    with replaced(model, {"layers.0.attn": method}), torch.no_grad():
        model(input_ids=dense[:, 19:20], past_key_values=cache)
    torch.testing.assert_close(cache.layers[0].keys, held[:, :, :20], rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_the_base_cache_lets_gradients_through() -> None:
    model, ids = build("llama"), inputs("llama", 1, 9)["input_ids"]
    wanted = torch.autograd.grad(model(input_ids=ids).logits[:, 6:].square().sum(), model.model.embed_tokens.weight)[0]
    cache = Cache()
    model(input_ids=ids[:, :6], past_key_values=cache)
    got = torch.autograd.grad(model(input_ids=ids[:, 6:], past_key_values=cache).logits.square().sum(), model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
