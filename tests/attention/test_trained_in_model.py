"""Trained attention inside a small Llama: made for its layers, trained there, put in, refused by name."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import rarefy
from rarefy import BadInput, Recipe, TensorStream, Unsupported, replaced, train
from rarefy.attention.trained import Distilled, Trained
from site_models import build, inputs, run

OWN = {
    "seer": {"block": 4, "query_block": 4}, "moba": {"block": 4, "order": "queries"},
    "nsa": {"block": 4, "compress": 4, "stride": 2, "window": 3, "local": 1},
    "fsa": {"block": 4, "compress": 4, "stride": 2, "window": 3, "local": 1}, "diff": {}, "sparsek": {"window": 2},
    "purbo": {"d_index": 4, "retrieval": "0, 2", "window": 3}, "routing": {"clusters": 3}, "sma": {"window": 6}, "sea": {"cells": 8, "features": 8},
}
TRAINED_IN_PLACE = [name for name in OWN if name not in ("seer", "purbo", "sea")]


def planned(name, model, budget=0.5):
    return rarefy.plan(f"attention/{name}", model, budget, **OWN[name])


def windows(count=24, length=17, vocab=40):
    """Sequences that repeat with a period of 5: something to learn."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab, (count, 5), generator=draw).repeat(1, 4)[:, :length]


@pytest.mark.parametrize("name", OWN)
def test_made_for_each_layer_put_in_and_decoding_as_prefill(name):
    model, what = build("llama"), inputs("llama", 1, 13)
    before, plan = run(model, **what), planned(name, model)
    assert len(plan) == 2 and plan["layers.0.attn"] is not plan["layers.1.attn"]
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones(1, 13).long()}
    with replaced(model, plan):
        assert not torch.allclose(run(model, **what), before, atol=1e-4)
        if name != "seer":                                        # queries of a block share its choice in prefill
            said = [model.generate(**what, **how, use_cache=cache) for cache in (True, False)]
            assert torch.equal(*said)
    assert torch.equal(run(model, **what), before)


@pytest.mark.parametrize("name", OWN)
def test_the_side_of_the_padding_is_without_effect(name):
    model, ids, other = build("llama"), inputs("llama", 1, 11)["input_ids"], inputs("llama", 1, 14, seed=9)["input_ids"]
    pad = torch.zeros(1, 3, dtype=torch.long)
    with replaced(model, planned(name, model)):
        alone = run(model, input_ids=ids)
        for left in (True, False):
            row = torch.cat([pad, ids] if left else [ids, pad], 1)
            mask = torch.cat([pad, torch.ones_like(ids)] if left else [torch.ones_like(ids), pad], 1)
            at = (mask.cumsum(1) - 1).clamp_min(0).expand(2, -1) if left else None
            got = run(model, input_ids=torch.cat([row, other]), attention_mask=torch.cat([mask, torch.ones_like(other)]), position_ids=at)
            torch.testing.assert_close(got[:1, 3:] if left else got[:1, :11], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("seer", 0.5), ("purbo", 0.6), ("sea", 0.7)])
def test_layers_learn_their_maps_and_the_model_stays(name, part):
    model = build("llama")
    with torch.no_grad():                                         # random weights attend evenly, which is no map to learn
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    wrapper = Distilled(planned(name, model), model)
    ids = windows(vocab=model.config.vocab_size)
    before = wrapper.loss(ids, ids).total.item()
    train({name: wrapper}, TensorStream(ids, 8), Recipe(steps=40, lr=2e-2))
    assert wrapper.loss(ids, ids).total.item() < part * before
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(name.startswith("model") for name in wrapper.state_dict())


def test_distilled_loss_is_the_mean_of_the_layers_own():
    model, ids = build("llama"), windows(4)
    plan = planned("seer", model)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, method):
            super().__init__()
            self.method = method

        def attend(self, q, k, v, *, scale, causal, padding_BS, layer):
            seen.append(self.method.distil(q, k, v, scale=scale, causal=causal).total)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with replaced(model, {name: Spy(method) for name, method in plan.items()}):
        run(model, input_ids=ids)
    loss = Distilled(plan, model).loss(ids, ids)
    torch.testing.assert_close(loss.total, sum(seen) / 2)
    torch.testing.assert_close(loss.parts["kl"], loss.total)


@pytest.mark.parametrize("name", TRAINED_IN_PLACE)
def test_model_and_methods_learn_together(name):
    model = build("llama").train()
    plan = planned(name, model)
    wrapper, ids = Trained(plan, model), windows(8, vocab=model.config.vocab_size)
    with replaced(model, plan):
        logits = model(input_ids=ids, use_cache=False).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = wrapper.loss(ids, ids)
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    still = [n for n, p in wrapper.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []
    wrapper.zero_grad()
    train({name: wrapper}, TensorStream(ids, 8), Recipe(steps=10, lr=1e-2))
    assert wrapper.loss(ids, ids).total < 0.8 * expected


def test_a_frozen_model_is_left_alone_while_its_methods_learn():
    model, ids = build("llama"), windows()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    wrapper = Trained(planned("nsa", model), model, train_model=False)
    before = wrapper.loss(ids, ids).total
    train({"nsa": wrapper}, TensorStream(ids, 8), Recipe(steps=10, lr=1e-2))
    assert wrapper.loss(ids, ids).total < before
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "train_model"), [("moba", True), ("nsa", True), ("nsa", False), ("routing", True)])
def test_a_layer_computed_again_in_the_backward_pass_is_computed_the_same_way(name, train_model):
    ids, ended = windows(8), []
    for again in (False, True):
        model = build("llama").train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        wrapper = Trained(planned(name, model), model, train_model=train_model)
        train({name: wrapper}, TensorStream(ids, 8), Recipe(steps=3, lr=1e-2))
        ended.append({**wrapper.state_dict(), **model.state_dict()})
    torch.testing.assert_close(*ended)


@pytest.mark.parametrize(("name", "kind"), [("seer", Distilled), ("nsa", Trained)])
def test_a_run_cut_short_ends_with_the_same_bits(tmp_path, name, kind):
    ids, recipe = windows(), Recipe(steps=6, lr=1e-2, save_every=2)

    class Cut(TensorStream):
        def batches(self, start_step=0):
            for step, batch in enumerate(super().batches(start_step), start_step):
                if step == 3:
                    return
                yield batch

    def begun():
        model = build("llama")
        return kind(planned(name, model), model)

    whole, part, again = begun(), begun(), begun()
    train({"m": whole}, TensorStream(ids, 8), recipe)
    with pytest.raises(BadInput, match="ended at step 3"):
        train({"m": part}, Cut(ids, 8), recipe, tmp_path)
    train({"m": again}, TensorStream(ids, 8), recipe, tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_several_are_trained_on_one_stream():
    ids = windows()
    models = {name: build("llama") for name in ("moba", "nsa")}
    wrappers = {name: Trained(planned(name, model), model) for name, model in models.items()}
    logs = []
    train(wrappers, TensorStream(ids, 8), Recipe(steps=2, lr=1e-3, log_every=1), on_log=logs.append)
    assert set(logs[-1]["methods"]) == {"moba", "nsa"} and logs[-1]["methods"]["nsa"]["ce"] > 0


def test_what_cannot_be_is_refused_by_name():
    model, ids = build("llama"), windows(2)
    seer = planned("seer", model)
    with pytest.raises(BadInput, match=r"attention/seer has parameters.*rarefy\.plan"), replaced(model, attention="seer"):
        pytest.fail("entered")
    with pytest.raises(Unsupported, match="Distilled"):
        train({"seer": seer["layers.0.attn"]}, TensorStream(ids, 2), Recipe(steps=1))
    with pytest.raises(Unsupported, match="attention/nsa has no dense map"):
        Distilled(planned("nsa", model), model).loss(ids, ids)
    with pytest.raises(BadInput, match="training mode"):
        Distilled(seer, copy.deepcopy(model).train())
    with pytest.raises(BadInput, match="2 layers"):
        Distilled({"layers.*.attn": seer["layers.0.attn"]}, model)
    with pytest.raises(BadInput, match="no attention"):
        Trained({"layers.0.resid_post": seer["layers.0.attn"]}, model)
    with pytest.raises(BadInput, match="empty"):
        Trained({}, model)
    with pytest.raises(BadInput, match="token windows"):
        Distilled(seer, model).loss(ids.float(), ids)
    for wrong in (model.config.vocab_size, -1):
        with pytest.raises(BadInput, match=rf"vocabulary; these lie in .*{wrong}"):
            Trained(planned("moba", model), model).loss(torch.full_like(ids, wrong), ids)
    nsa = planned("nsa", model)
    with pytest.raises(BadInput, match=r"attention/nsa is in torch\.float32 and its layer in torch\.bfloat16"), replaced(model.bfloat16(), nsa):
        run(model, input_ids=ids)
    gpt2 = build("gpt2")                                            # as many query heads, but each has keys of its own
    with pytest.raises(BadInput, match="made for 4 query heads, 2 key heads"), replaced(gpt2, {"layers.0.attn": seer["layers.0.attn"]}):
        run(gpt2, **inputs("gpt2"))
