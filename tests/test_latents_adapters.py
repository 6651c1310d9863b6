"""Transcoder adapters against a loss taken straight through hybrid models, and on a planted behaviour.

Shape letters: B = windows, T = tokens, N = rows, D = width, F = latents, V = vocabulary.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers as tf
from torch import nn

from rarefy.errors import BadInput, Unsupported
from rarefy.fit import Recipe, train
from rarefy.latents.adapters import Adapters, adapted
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.store.checkpoint import load_checkpoint
from rarefy.streams import TensorStream
from rarefy.surrogate import jump_relu, step
from site_models import VOCAB, build

D, F, B, T, L = 32, 40, 3, 7, 3


def ids(n=B, seed=4):
    return torch.randint(3, VOCAB, (n, T), generator=torch.Generator().manual_seed(seed))


@functools.cache
def _pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=D, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            max_position_embeddings=64, initializer_range=0.2,
        )
        base = tf.LlamaForCausalLM(config).double().eval()
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return base, tuned


def pair():
    return tuple(copy.deepcopy(m) for m in _pair())


MAKE = {
    "topk": lambda **kw: TopK(D, F, k=5, d_out=D, **kw),
    "batch_topk": lambda **kw: BatchTopK(D, F, k=5, d_out=D, **kw),
    "relu": lambda **kw: ReLU(D, F, d_out=D, l1=0.3, warmup=0, **kw),
    "jumprelu": lambda **kw: JumpReLU(D, F, d_out=D, theta=0.3, bandwidth=0.4, sparsity=0.1, warmup=0, **kw),
}


def started(name="topk", **kw):
    """Adapters whose parameters are off their start."""
    base, tuned = pair()
    whole = Adapters([MAKE[name](seed=n).double() for n in range(L)], base, tuned, **kw)
    whole.initialise(ids())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return whole.train()


class Beside(nn.Module):
    """Base MLP with every latent of a branch multiplied out; adds the branch's penalty to `prices`."""

    def __init__(self, name, mlp, branch, prices):
        super().__init__()
        self.name, self.mlp, self.branch, self.prices = name, mlp, branch, prices

    def forward(self, x_BTD):
        m, x_ND = self.branch, x_BTD.reshape(-1, D)
        # What a branch's own penalty sees of its input is a constant; what flows on through the branch is not.
        y_ND, _ = self.given(x_ND)
        _, price = self.given(x_ND.detach())
        self.prices.setdefault(id(m), []).append(price)
        return self.mlp(x_BTD) + y_ND.view_as(x_BTD)

    def given(self, x_ND):
        m = self.branch
        pre = (x_ND * m.scale) @ m.W_enc_FD.T + m.b_enc_F
        price = pre.new_zeros(())
        if self.name == "relu":
            f = pre.relu()
            price = m.l1 * (f * m.W_dec_FD.pow(2).sum(-1).sqrt()).sum(-1).mean() / D
        elif self.name == "jumprelu":
            f = jump_relu(pre.relu(), m.log_theta_F.exp(), m.bandwidth)
            price = m.sparsity * step(pre.relu(), m.log_theta_F.exp(), m.bandwidth).sum(-1).mean() / D
        else:
            scores = pre.relu().flatten() if self.name == "batch_topk" else pre
            least = scores.detach().topk(m.k * len(pre) if self.name == "batch_topk" else m.k, -1).values[..., -1:]
            f = pre.relu() * (pre.detach() >= least)
        return (f @ m.W_dec_FD + m.b_dec_D) / m.scale_out, price


def naive(name, whole, x_BT, switch, nmse, kl, bridge):
    """(nmse, kl, bridge, sparsity) by models that are really built of the parts."""
    prices = {}

    def model_of(layers):
        model = copy.deepcopy(whole.tuned)
        for n in layers:
            model.model.layers[n].mlp = Beside(name, whole.base.model.layers[n].mlp, whole.branches[n], prices)
        return model

    seen = []
    hooks = [layer.mlp.register_forward_hook(lambda m, a, o: seen.append((a[0].detach(), o.detach()))) for layer in whole.tuned.model.layers]
    with torch.no_grad():
        p = whole.tuned(input_ids=x_BT).logits.softmax(-1)
    for hook in hooks:
        hook.remove()

    def kl_of(layers):
        q = model_of(layers)(input_ids=x_BT).logits.softmax(-1)
        return (p * (p.log() - q.log())).sum(-1).mean()

    local = []
    for n, (x, y) in enumerate(seen):
        got = Beside(name, whole.base.model.layers[n].mlp, whole.branches[n], prices)(x)
        local.append(((got - y).pow(2).sum(-1) / y.pow(2).sum(-1)).mean())
    parts = nmse * sum(local), kl * kl_of(range(L)), bridge * (kl_of(range(switch)) + kl_of(range(switch, L)))
    return *parts, sum(sum(each) / len(each) for each in prices.values())


@pytest.mark.parametrize("name", MAKE)
def test_loss_and_gradient_are_those_through_the_hybrid_models(name):
    whole = started(name, nmse=0.7, kl=1.3, bridge=0.6)
    torch.manual_seed(3)
    loss = whole.loss(ids(), ids())
    loss.total.backward()
    got = {k: p.grad for k, p in whole.named_parameters() if p.grad is not None}
    torch.manual_seed(3)
    switch = int(torch.randint(1, L, ()))
    parts = naive(name, whole, ids(), switch, 0.7, 1.3, 0.6)
    for key, want in zip(("nmse", "kl", "bridge", "sparsity"), parts, strict=True):
        torch.testing.assert_close(loss.parts[key], torch.as_tensor(want, dtype=torch.float64), msg=lambda text, key=key: f"{key}: {text}")
        assert want > 1e-3 or name in ("topk", "batch_topk")
    torch.testing.assert_close(loss.total, sum(parts))
    wanted = dict(zip(got, torch.autograd.grad(sum(parts), [dict(whole.named_parameters())[k] for k in got]), strict=True))
    assert {k.split(".")[1] for k in got} == {"0", "1", "2"} and len(got) >= 4 * L
    for key, grad in wanted.items():
        assert grad.any()
        torch.testing.assert_close(got[key], grad, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("weights", "parts"), [
    ({"nmse": 0, "kl": 0}, {"bridge"}), ({"kl": 0, "bridge": 0}, {"nmse"}), ({"nmse": 0, "bridge": 0}, {"kl"}),
])
def test_a_part_without_weight_is_not_there(weights, parts):
    loss = started(**weights).loss(ids(), ids())
    assert set(loss.parts) == {*parts, "sparsity", "l0"}
    assert float(loss.parts["l0"]) <= 5


def test_gradients_reach_the_branches_alone_and_the_models_are_as_they_were():
    whole = started()
    before = [copy.deepcopy(m.state_dict()) for m in (whole.base, whole.tuned)]
    whole.loss(ids(), ids()).total.backward()
    assert {n.split(".")[0] for n, _ in whole.named_parameters()} == {"branches"} == {n.split(".")[0] for n in whole.state_dict()}
    for m, state in zip((whole.base, whole.tuned), before, strict=True):
        assert all(p.grad is None and p.requires_grad for p in m.parameters())
        assert all(torch.equal(v, m.state_dict()[k]) for k, v in state.items())
        assert not any(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in m.modules())


def test_the_adapted_model_is_the_one_trained_and_latents_can_be_switched_off():
    whole = started().eval()
    base, tuned, branches = whole.base, whole.tuned, list(whole.branches)
    dense = tuned(input_ids=ids()).logits
    by_hand = copy.deepcopy(tuned)
    for n, layer in enumerate(by_hand.model.layers):
        layer.mlp = Beside("topk", base.model.layers[n].mlp, branches[n], {})
    with adapted(tuned, base, branches):
        torch.testing.assert_close(tuned(input_ids=ids()).logits, by_hand(input_ids=ids()).logits)
    codes = whole.codes(ids())
    assert [tuple(c.weight.shape) for c in codes] == [(B, T, 5)] * L
    latent = int(codes[1].index[0, 3, 0])
    with torch.no_grad():
        branches[1].W_dec_FD[latent] = 0
        want = by_hand(input_ids=ids()).logits
        branches[1].W_dec_FD[latent] = 3.0
    with adapted(tuned, base, branches, off={1: [latent]}):
        torch.testing.assert_close(tuned(input_ids=ids()).logits, want)
    assert torch.equal(tuned(input_ids=ids()).logits, dense)


# -------------------------------------------------------------------------------------------------- what is learnt

A_TOKEN, B_TOKEN = 11, 12


def planted():
    """Random tokens; after A_TOKEN always comes B_TOKEN."""
    x = torch.randint(13, VOCAB, (256, 12), generator=torch.Generator().manual_seed(2))
    at = torch.randint(1, 11, (256,), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(256)
    x[rows, at], x[rows, at + 1] = A_TOKEN, B_TOKEN
    return x


@functools.cache
def finetuned():
    """(base, a copy with the behaviour): only its MLPs were trained."""
    base, x = copy.deepcopy(_pair()[0]).float(), planted()
    tuned = copy.deepcopy(base)
    chosen = [p for n, p in tuned.named_parameters() if ".mlp." in n]
    optimiser = torch.optim.Adam(chosen, lr=0.01)
    for i in range(80):
        batch = x[(i * 32) % 256 :][:32]
        logits = tuned(input_ids=batch).logits
        after = (batch[:, :-1] == A_TOKEN)
        keep = nn.functional.kl_div(logits.log_softmax(-1), base(input_ids=batch).logits.detach().log_softmax(-1), log_target=True, reduction="none")
        told = -logits[:, :-1].log_softmax(-1)[after][:, B_TOKEN].mean()
        loss = told + 5 * keep.sum(-1)[:, :-1][~after].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return base, tuned.eval()


def chance(model, x):
    """Probability of B_TOKEN after A_TOKEN."""
    with torch.no_grad():
        return float(model(input_ids=x).logits.softmax(-1)[:, :, B_TOKEN][x == A_TOKEN].mean())


@pytest.mark.slow
def test_a_planted_behaviour_is_found_in_few_latents_and_goes_with_them():
    base, tuned = finetuned()
    x = planted()
    assert chance(base, x) < 0.05 and chance(tuned, x) > 0.8
    branches = [TopK(D, 64, k=1, d_out=D, seed=n) for n in range(L)]
    said = []
    train({"it": Adapters(branches, base, tuned)}, TensorStream(x, 32), Recipe(steps=200, lr=0.01, log_every=1), on_log=said.append)
    first, last = (said[i]["methods"]["it"] for i in (0, -1))
    assert last["kl"] < 0.2 * first["kl"] and last["bridge"] < 0.3 * first["bridge"] and last["l0"] <= 1

    def without(off):
        with torch.no_grad(), adapted(tuned, base, branches, off=off):
            return chance(tuned, x)

    assert without({}) > 0.7
    at = x == A_TOKEN
    codes = [c.dense for c in Adapters(branches, base, tuned).codes(x)]
    lead_LF = torch.stack([c[at].mean(0) - c[~at].mean(0) for c in codes])
    few = {n: lead_LF[n].topk(2).indices.tolist() for n in range(L)}
    assert without(few) < 0.1
    others = {n: lead_LF[n].abs().topk(20, largest=False).indices.tolist() for n in range(L)}
    assert without(others) > 0.6


def test_identical_models_give_an_adapter_that_is_not_used():
    base = copy.deepcopy(_pair()[0]).float()
    branches, said = [TopK(D, 32, k=4, d_out=D, seed=n) for n in range(L)], []
    whole = Adapters(branches, base, copy.deepcopy(base))
    train({"it": whole}, TensorStream(planted()[:8], 4), Recipe(steps=60, lr=0.01, log_every=1), on_log=said.append)
    first, last = (said[i]["methods"]["it"] for i in (0, -1))
    assert first["l0"] > 2 and last["l0"] < 0.5
    assert last["kl"] < 1e-4 and last["nmse"] < 1e-3 * first["nmse"]


def run_of(folder=None, stop=0, **kw):
    base, tuned = (m.float() for m in pair())
    whole = Adapters([MAKE["topk"](seed=n) for n in range(L)], base, tuned, **kw)

    def on_log(record):
        if record["step"] == stop:
            raise KeyboardInterrupt

    train({"it": whole}, TensorStream(ids(12), 4), Recipe(steps=6, lr=0.01, save_every=2, log_every=1), folder, on_log=on_log if stop else None)
    return whole


def test_training_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(7)
    whole = run_of()
    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "run", stop=5)
    assert load_checkpoint(tmp_path / "run/checkpoints").step == 4
    torch.manual_seed(99)
    other = run_of(tmp_path / "run").state_dict()
    assert [k for k, v in whole.state_dict().items() if not torch.equal(v, other[k])] == []
    with pytest.raises(BadInput, match="bridge: was 1.0, now 0.5"):
        run_of(tmp_path / "run", bridge=0.5)


def branches_for(name="topk", n=L):
    return [MAKE[name]() for _ in range(n)]


@pytest.mark.parametrize(("make", "said"), [
    (lambda a, b: Adapters(branches_for(n=2), a, b), "2 branches for 3 layers"),
    (lambda a, b: Adapters([TopK(D, F)] * 3, a, b), "must be a transcoder of rows of 32"),
    (lambda a, b: Adapters([TopK(D, F, d_out=16)] * 3, a, b), "layer 0 must be a transcoder"),
    (lambda a, b: Adapters(branches_for(), a.train(), b), "the base model is in training mode"),
    (lambda a, b: Adapters(branches_for(), a, b.train()), "the fine-tuned model is in training mode"),
    (lambda a, b: Adapters(branches_for(), a, b, kl=-1.0), "kl=-1.0"),
    (lambda a, b: Adapters(branches_for(), a, b, nmse=0, kl=0, bridge=0), "all 0"),
    (lambda a, b: Adapters(branches_for(), build("llama"), b), "has 2 layers of width 32 and the fine-tuned one 3"),
    (lambda a, b: Adapters(branches_for(), a, b).loss(ids().float(), ids()), "token windows"),
    (lambda a, b: adapted(b, a, branches_for(), off={1: [F]}).__enter__(), "off names"),
    (lambda a, b: adapted(b, a, branches_for(), off={3: [0]}).__enter__(), "off names"),
    (lambda a, b: Adapters(branches_for(n=3), a.model, b.model).initialise(ids()), "gives no logits"),
])
def test_what_makes_no_sense_is_refused_by_name(make, said):
    with pytest.raises(BadInput, match=said):
        make(*(m.float() for m in pair()))


def test_what_is_not_served_is_refused_by_name():
    opt = build("opt")
    with pytest.raises(Unsupported, match="not one module each"):
        Adapters(branches_for(n=2), opt, opt)
    with pytest.raises(Unsupported, match="shards=1"):
        started().shard(None)


@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "qwen3", "gemma2"])
def test_other_architectures(name):
    tuned, base = build(name), build(name, seed=1)
    branches = branches_for(n=2)
    whole = Adapters(branches, base, tuned)
    train({"it": whole}, TensorStream(ids(4), 4), Recipe(steps=1, lr=0.001))
    by_hand = copy.deepcopy(tuned)
    layers = by_hand.transformer.h if name == "gpt2" else by_hand.gpt_neox.layers if name == "neox_parallel" else by_hand.model.layers
    theirs = base.transformer.h if name == "gpt2" else base.gpt_neox.layers if name == "neox_parallel" else base.model.layers
    for layer, other, branch in zip(layers, theirs, branches, strict=True):
        layer.mlp = Beside("topk", other.mlp, branch, {})
    with torch.no_grad(), adapted(tuned, base, branches):
        torch.testing.assert_close(tuned(input_ids=ids()).logits, by_hand(input_ids=ids()).logits)
