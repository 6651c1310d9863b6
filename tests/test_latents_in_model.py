"""Dictionaries trained with the model in the loop, against gradients taken straight through it.

Shape letters: B = windows, T = tokens, N = rows, D = width, F = latents, V = vocabulary, H = heads, S = source tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rarefy.errors import BadInput, Unsupported
from rarefy.fit import Recipe, train
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.end_to_end import EndToEnd, later_sites
from rarefy.latents.gated import Gated
from rarefy.latents.head_attribution import attribute, head_shares
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.random import RandomDictionary
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.latents.track import drift, formation, identity_kept
from rarefy.method import Loss
from rarefy.site import capture, replaced
from rarefy.store.checkpoint import load_checkpoint
from rarefy.streams import TensorStream
from rarefy.surrogate import jump_relu, step
from rarefy.tasks.planted import make, recovery
from site_models import VOCAB, build

D, F, B, T = 32, 96, 3, 9


def ids(n=B, seed=4):
    return torch.randint(3, VOCAB, (n, T), generator=torch.Generator().manual_seed(seed))


def model(name="llama"):
    return build(name).double()


MAKE = {
    "topk": lambda: TopK(D, F, k=5),
    "topk transcoder": lambda: TopK(D, F, k=5, d_out=D),
    "batch_topk": lambda: BatchTopK(D, F, k=5),
    "relu": lambda: ReLU(D, F, l1=0.3, warmup=0),
    "jumprelu": lambda: JumpReLU(D, F, theta=0.3, bandwidth=0.4, sparsity=0.1, warmup=0),
    "gated": lambda: Gated(D, F, l1=0.3, warmup=0),
}


def made(name="topk"):
    return MAKE[name]().double()


def naive_codes(name, m, x_ND):
    """Latents of rows, every one multiplied out, with the gradients that the paper of each has."""
    s = x_ND * m.scale
    pre = (s if m.transcodes else s - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F
    if name == "relu":
        return pre.relu()
    if name == "jumprelu":
        return jump_relu(pre.relu(), m.log_theta_F.exp(), m.bandwidth)
    if name == "gated":
        product = (s - m.b_dec_D) @ m.W_enc_FD.T
        return (pre.detach() > 0) * (product * m.r_mag_F.exp() + m.b_mag_F).relu()
    kept = m.k * len(pre) if name == "batch_topk" else m.k
    scores = pre.relu().flatten() if name == "batch_topk" else pre
    least = scores.detach().topk(kept, -1).values[..., -1:]
    return pre.relu() * (pre.detach() >= least)


def naive_penalty(name, m, x_ND):
    pre = ((x_ND * m.scale) - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F
    if name == "relu":
        return m.l1 * (pre.relu() * m.W_dec_FD.pow(2).sum(-1).sqrt()).sum(-1).mean() / D
    if name == "gated":
        return m.l1 * pre.relu().sum(-1).mean() / D
    if name == "jumprelu":
        return m.sparsity * step(pre.relu(), m.log_theta_F.exp(), m.bandwidth).sum(-1).mean() / D
    return 0.0


def naive_loss(name, m, llama, x_BT, read, put, downstream=0.0):
    """(KL, sum of later distances, penalty), by hooks written out here; read and put: modules whose outputs are read and replaced."""
    seen, rows = {}, {}
    outs = {f"layers.{n}": layer for n, layer in enumerate(llama.model.layers)}

    def look(key, where):
        return where.register_forward_hook(lambda _, a, o: where_to.__setitem__(key, o[0] if isinstance(o, tuple) else o))

    where_to = seen
    hooks = [look("read", read), *(look(k, v) for k, v in outs.items())]
    with torch.no_grad():
        p = llama(input_ids=x_BT).logits.softmax(-1)
    for hook in hooks:
        hook.remove()
    x_ND = seen["read"][:, 1:].reshape(-1, D).detach()
    f = naive_codes(name, m, x_ND)
    y_hat = (f @ m.W_dec_FD + m.b_dec_D) / m.scale_out

    def splice(_, a, o):
        old = o[0] if isinstance(o, tuple) else o
        new = torch.cat([old[:, :1], y_hat.view(B, T - 1, D)], 1)
        return (new, *o[1:]) if isinstance(o, tuple) else new

    where_to = rows
    hooks = [put.register_forward_hook(splice), *(look(k, v) for k, v in outs.items())]
    q = llama(input_ids=x_BT).logits.softmax(-1)
    for hook in hooks:
        hook.remove()
    kl = (p * (p.log() - q.log())).sum(-1)[:, 1:].mean()
    a, b = (v["layers.1"][:, 1:].reshape(-1, D) for v in (seen, rows))
    far = downstream * (a - b).pow(2).sum() / (a - a.mean(0)).pow(2).sum()
    return kl, far, naive_penalty(name, m, x_ND)


def started(name, llama, site="layers.0.resid_post", **kw):
    """A dictionary with its scale set and parameters moved off their start, and its objective."""
    m = made(name)
    whole = EndToEnd(m, llama, site, **kw)
    whole.initialise(ids())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in m.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    whole.train()
    return m, whole


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(("name", "kw"), [
    *((name, {}) for name in ("topk", "batch_topk", "relu", "jumprelu", "gated")), ("topk", {"downstream": 0.7}), ("relu", {"downstream": 2.0}),
])
def test_the_gradient_is_that_through_the_model(name, kw):
    llama = model()
    m, whole = started(name, llama, **kw)
    loss = whole.loss(ids(), ids())
    loss.total.backward()
    grads = {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    layer = llama.model.layers[0]
    kl, far, penalty = naive_loss(name, m, llama, ids(), layer, layer, **kw)
    torch.testing.assert_close(loss.parts["kl"], kl)
    if kw:
        torch.testing.assert_close(loss.parts["downstream"], far)
        assert far > 1e-3
    total = kl + far + penalty
    if name != "gated":                                        # the gate's own reconstruction comes on top
        torch.testing.assert_close(loss.total, total)
    own = {k: p for k, p in m.named_parameters() if name != "gated" or k in ("W_dec_FD", "r_mag_F", "b_mag_F")}
    naive = torch.autograd.grad(total, list(own.values()))
    assert own and kl > 1e-3
    for (k, _), g in zip(own.items(), naive, strict=True):
        torch.testing.assert_close(grads[k], g, msg=lambda text, k=k: f"{k}: {text}")


def test_a_transcoder_is_spliced_at_its_target():
    llama = model()
    m, whole = started("topk transcoder", llama, "layers.0.resid_post", target="layers.1.mlp.out", downstream=0.5)
    assert whole.later == ["layers.1.resid_post"]
    loss = whole.loss(ids(), ids())
    loss.total.backward()
    kl, far, _ = naive_loss("topk", m, llama, ids(), llama.model.layers[0], llama.model.layers[1].mlp, 0.5)
    torch.testing.assert_close(loss.parts["kl"], kl)
    (g,) = torch.autograd.grad(kl + far, [m.W_enc_FD])
    torch.testing.assert_close(m.W_enc_FD.grad, g)


def test_fvu_is_of_the_activation_and_not_of_the_pseudo_target():
    llama = model()
    m, whole = started("topk", llama)
    fvu = whole.loss(ids(), ids()).parts["fvu"]
    with torch.no_grad():
        x = whole._through({}, ids())["layers.0.resid_post"][:, 1:].flatten(0, 1)
        error = x - m.eval()(x)
    torch.testing.assert_close(fvu, error.pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def test_dead_latents_are_shown_what_the_model_wants_changed():
    """AuxK's error is -(N / 2) dL / d y_hat, of which the squared error's own is y - y_hat."""
    llama = model()
    m, whole = started("topk", llama)
    m.idle_F[:40] = m.dead_after + 1
    dead = m.idle_F > m.dead_after
    loss = whole.loss(ids(), ids())
    x = whole._through({}, ids())["layers.0.resid_post"][:, 1:].flatten(0, 1)
    y_hat = m(x).detach().requires_grad_()
    layer = llama.model.layers[0]
    hook = layer.register_forward_hook(lambda _, a, o: torch.cat([(o[0] if isinstance(o, tuple) else o)[:, :1], y_hat.view(B, T - 1, D)], 1))
    q = llama(input_ids=ids()).logits.log_softmax(-1)
    hook.remove()
    p = llama(input_ids=ids()).logits.log_softmax(-1).detach()
    (g,) = torch.autograd.grad((p.exp() * (p - q)).sum(-1)[:, 1:].mean(), y_hat)
    e = -(y_hat.numel() / 2) * g / m.scale_out
    pre = torch.where(dead, (x * m.scale - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F, -torch.inf)
    kept = pre >= pre.topk(m.aux_k, -1).values[:, -1:]
    e_hat = torch.where(kept, pre, 0.0).relu() @ m.W_dec_FD
    torch.testing.assert_close(loss.parts["aux"], m.aux_alpha * (e - e_hat).pow(2).mean())


def identity():
    """Every coordinate and its opposite: reconstructs exactly."""
    m = ReLU(D, 2 * D, l1=0.0).double()
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)]).double()
        m.W_enc_FD.copy_(both)
        m.W_dec_FD.copy_(both)
    return m


def test_a_perfect_dictionary_has_zero_kl():
    whole = EndToEnd(identity(), model(), "layers.0.resid_post", downstream=1.0)
    loss = whole.train().loss(ids(), ids())
    assert abs(loss.parts["kl"]) < 1e-20 and loss.parts["downstream"] < 1e-20 and loss.parts["fvu"] < 1e-20 and abs(loss.total) < 1e-20
    loss.total.backward()
    assert float(whole.dictionary.W_dec_FD.grad.abs().max()) < 1e-9


def test_only_the_dictionary_is_trained_and_the_model_is_as_it_was():
    llama = model()
    before, hooks = copy.deepcopy(llama.state_dict()), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules())
    _, whole = started("topk", llama, downstream=1.0)
    whole.loss(ids(), ids()).total.backward()
    assert {n.split(".")[0] for n, _ in whole.named_parameters()} == {"dictionary"} == {n.split(".")[0] for n in whole.state_dict()}
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())
    assert all(torch.equal(v, llama.state_dict()[k]) for k, v in before.items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules())


def run_of(folder=None, steps=6, stop=0, names=("topk", "batch_topk"), begun=(), recipe=None, **kw):
    llama = build("llama")
    plan = {name: EndToEnd(MAKE[name](), llama, "layers.0.resid_post", **kw) for name in names}

    def on_log(record):
        if record["step"] == stop:
            raise KeyboardInterrupt

    settings = {"steps": steps, "lr": 0.01, "save_every": 2, "log_every": 1, **(recipe or {})}
    train(plan, TensorStream(ids(20), 4), Recipe(**settings), folder, on_log=on_log if stop else None, begun=begun)
    return plan


def test_training_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    whole = run_of(downstream=0.5)
    for stop in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path / "run", stop=stop, downstream=0.5)
    assert load_checkpoint(tmp_path / "run/checkpoints").step == 4
    taken_up = run_of(tmp_path / "run", downstream=0.5)
    for name, method in whole.items():
        other = taken_up[name].state_dict()
        assert [k for k, v in method.state_dict().items() if not torch.equal(v, other[k])] == []
    with pytest.raises(BadInput, match="downstream: was 0.5, now 0.25"):
        run_of(tmp_path / "run", downstream=0.25)


def test_training_lowers_the_kl(tmp_path):
    said = []
    plan = {"topk": EndToEnd(TopK(D, F, k=5), build("llama"), "layers.0.resid_post")}
    train(plan, TensorStream(ids(16), 16), Recipe(steps=60, lr=0.005, log_every=1), on_log=said.append)
    first, last = (said[i]["methods"]["topk"]["kl"] for i in (0, -1))
    assert last < 0.6 * first
    assert said[-1]["rows_per_s"] * said[-1]["seconds"] == pytest.approx(60 * 16 * T, rel=0.01)


def test_pieces_of_a_batch_make_the_step_of_the_whole():
    one = run_of(steps=3, names=("topk",))["topk"].dictionary
    two = run_of(steps=3, names=("topk",), recipe={"accumulate": 2})["topk"].dictionary
    torch.testing.assert_close(one.W_dec_FD, two.W_dec_FD, rtol=1e-3, atol=1e-4)
    assert torch.equal(one.idle_F, two.idle_F)


class Nested(TopK):
    name = "latents/nested"

    def loss(self, x, y):
        made = super().loss(x, y)
        return Loss(made.total + 1.0, {**made.parts, "mse": made.parts["mse"] + 1.0})


@pytest.mark.parametrize(("make", "said"), [
    (lambda llama: EndToEnd(Nested(D, F, k=5), llama, "layers.0.resid_post"), "latents/nested is trained on more than the error of one"),
    (lambda llama: EndToEnd(TopK([16, 16], F, k=5), llama, "layers.0.resid_post"), "reads or gives back several sites"),
    (lambda llama: EndToEnd(RandomDictionary(D, F), llama, "layers.0.resid_post"), "latents/random is not a dictionary that is trained"),
    (lambda llama: EndToEnd(TopK(D, F), llama.train(), "layers.0.resid_post"), "training mode"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.1.resid_post", downstream=1.0), "no layer's output comes after layers.1.resid_post"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.*.resid_post"), "names 2 sites"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.0.q_proj"), "is a linear site"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "model.layers.0.mlp", downstream=1.0), "raw module path"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.0.resid_post", downstream=-1.0), "downstream=-1.0"),
    (lambda llama: EndToEnd(TopK(D, F), llama.model, "layers.0.resid_post").train().loss(ids(), ids()), "gives no logits"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.0.resid_post").loss(ids()[:, :1], ids()[:, :1]), "token windows"),
    (lambda llama: EndToEnd(TopK(D, F), llama, "layers.0.resid_post").loss(ids().float(), ids().float()), "token windows"),
])
def test_what_makes_no_sense_is_refused_by_name(make, said):
    with pytest.raises(BadInput, match=said):
        make(build("llama"))


def test_it_is_not_shared_out_over_processes():
    with pytest.raises(Unsupported, match="whole on every process"):
        EndToEnd(TopK(D, F), build("llama"), "layers.0.resid_post").shard(None)


def test_looking_at_a_dictionarys_loss_leaves_no_trace():
    m = BatchTopK(D, F, k=5)
    before, random = copy.deepcopy(m.state_dict()), torch.get_rng_state()
    EndToEnd(m, build("llama"), "layers.0.resid_post")
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in before.items()) and torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(("site", "later"), [
    ("layers.0.resid_pre", 2), ("layers.0.mlp.out", 2), ("layers.0.resid_post", 1), ("layers.1.attn.z", 1),
])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_later_sites_are_the_layers_outputs_that_follow(name, site, later):
    assert later_sites(build(name), site) == ["layers.0.resid_post", "layers.1.resid_post"][2 - later :]


def test_methods_trained_before_are_not_initialised_again(tmp_path):
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(2)) + 3
    first = TopK(D, F, k=5)
    train({"topk": first}, TensorStream(x, 16), Recipe(steps=5, lr=0.01))
    scale = first.scale.clone()
    again, fresh = copy.deepcopy(first), copy.deepcopy(first)
    recipe = Recipe(steps=3, lr=0.0001)
    train({"topk": again}, TensorStream(2 * x, 16), recipe, tmp_path / "run", begun=["topk"])
    assert torch.equal(again.scale, scale)
    train({"topk": fresh}, TensorStream(2 * x, 16), recipe)
    torch.testing.assert_close(fresh.scale, scale / 2, rtol=0.2, atol=0)
    with pytest.raises(BadInput, match="other settings: begun"):
        train({"topk": TopK(D, F, k=5)}, TensorStream(2 * x, 16), recipe, tmp_path / "run", begun=["topk"])
    with pytest.raises(BadInput, match="begun names gated"):
        train({"topk": first}, TensorStream(x, 16), recipe, begun=["gated"])


def test_a_method_that_reads_something_else_is_refused():
    class Odd(TopK):
        name = "latents/odd"

        def forward(self, x):
            return nn.functional.linear(x, torch.zeros(3, 3))

    with pytest.raises(Unsupported, match="latents/odd does not read rows of one site"):
        EndToEnd(Odd(D, F), build("llama"), "layers.0.resid_post")


# ------------------------------------------------------------------------------------- attention outputs and heads


def on_z(name, layer=1, transcode=False):
    """A model in double precision and a dictionary of one layer's attention output, moved off its start."""
    llama = build(name).double()
    site = f"layers.{layer}.attn.z"
    with torch.no_grad():
        z_BTD = capture(llama, [site], input_ids=ids())[site]
    d = z_BTD.shape[-1]
    m = TopK(d, 48, k=5, d_out=7 if transcode else 0).double()
    m.initialise(z_BTD.flatten(0, 1), z_BTD.flatten(0, 1)[:, :7] if transcode else None)
    with torch.no_grad():
        for value in m.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype))
    return llama, site, m, z_BTD


EVERYWHERE = {
    "latent_M": torch.arange(90) % 48, "window_M": torch.arange(90) % B, "position_M": torch.arange(90) // B % T,
}


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_wide_heads", "qwen3", "gpt2", "neox_parallel", "opt", "phi", "gemma2", "bert"])
def test_heads_and_tokens_sum_to_the_pre_activation(name, transcode):
    llama, site, m, z_BTD = on_z(name, transcode=transcode)
    got = attribute(llama, site, m, ids(), **EVERYWHERE)
    pre = m.pre_activations(z_BTD)[EVERYWHERE["window_M"], EVERYWHERE["position_M"], EVERYWHERE["latent_M"]].detach()
    torch.testing.assert_close(got.pre_M, pre, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.by_head_MH.sum(-1) + got.rest_M, pre, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.by_source_MS.sum(-1) + got.rest_M, pre, rtol=1e-6, atol=1e-6)
    # each head's share is what its slice of z gives
    z_MHC = z_BTD.unflatten(-1, (4, -1))[EVERYWHERE["window_M"], EVERYWHERE["position_M"]]
    slices = z_MHC * m.W_enc_FD.unflatten(-1, (4, -1))[EVERYWHERE["latent_M"]]
    torch.testing.assert_close(got.by_head_MH, (slices.sum(-1) * m.scale).detach(), rtol=1e-6, atol=1e-6)
    if name != "bert":                                         # nothing comes from tokens ahead
        later = torch.arange(T) > EVERYWHERE["position_M"][:, None]
        assert float(got.by_source_MS[later].abs().max()) == 0
    assert float(got.by_source_MS.abs().max()) > 0.1


def test_what_a_token_gives_is_what_goes_when_its_value_goes():
    """The last token's value is added to by hand, where only its own position can see it."""
    llama, site, m, _ = on_z("llama", layer=0)
    where = {"latent_M": torch.tensor([7]), "window_M": torch.tensor([0]), "position_M": torch.tensor([T - 1])}
    before = attribute(llama, site, m, ids(), **where)
    with torch.no_grad(), replaced(llama, {"layers.0.attn.v": lambda v: torch.cat([v[:, :-1], 0 * v[:, -1:]], 1)}):
        after = capture(llama, [site], input_ids=ids())[site]
    pre = m.pre_activations(after)[0, T - 1, 7].detach()
    torch.testing.assert_close(before.pre_M[0] - before.by_source_MS[0, T - 1], pre, rtol=1e-6, atol=1e-6)


def test_head_shares_by_hand():
    m = TopK(6, 3, k=1)
    with torch.no_grad():
        m.W_dec_FD.copy_(torch.tensor([[3.0, 4, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [2, 0, 2, 0, 1, 0]]))
    want = torch.tensor([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5], [2 / 3, 2 / 3, 1 / 3]])
    torch.testing.assert_close(head_shares(m, 3), want)
    with pytest.raises(BadInput, match="do not fall into 4 heads"):
        head_shares(m, 4)
    with pytest.raises(BadInput, match="reproduces another site"):
        head_shares(TopK(6, 3, k=1, d_out=6), 3)


@pytest.mark.parametrize(("change", "said"), [
    ({"site": "layers.1.attn.out"}, "not one layer's attention output"),
    ({"site": "layers.*.attn.z"}, "not one layer's attention output"),
    ({"latent_M": torch.tensor([48])}, "latent_M must be 1 whole numbers in 0..47"),
    ({"window_M": torch.tensor([-1])}, "window_M"),
    ({"position_M": torch.tensor([0, 1])}, "position_M"),
    ({"dictionary": TopK(16, 8, k=1)}, "reads rows of 16"),
])
def test_attribution_is_refused_where_there_is_nothing_to_attribute(change, said):
    llama, site, m, _ = on_z("llama")
    asked = {"site": site, "dictionary": m, "latent_M": torch.tensor([0]), "window_M": torch.tensor([0]), "position_M": torch.tensor([0]), **change}
    with pytest.raises(BadInput, match=said):
        attribute(llama, ids_BT=ids(), **asked)


def test_an_encoder_that_is_no_linear_map_is_refused():
    class Squared(TopK):
        name = "latents/squared"

        def pre_activations(self, x):
            return super().pre_activations(x).square()

    llama, site, m, _ = on_z("llama")
    odd = Squared(m.d_in, m.width, k=5).double()
    odd.load_state_dict(m.state_dict())
    with pytest.raises(Unsupported, match="latents/squared are not W_enc"):
        attribute(llama, site, odd, ids(), **EVERYWHERE)


def test_attribution_of_no_place_is_empty():
    llama, site, m, _ = on_z("llama")
    none = torch.zeros(0, dtype=torch.long)
    got = attribute(llama, site, m, ids(), latent_M=none, window_M=none, position_M=none)
    assert got.parts_MHS.shape == (0, 4, T) and got.pre_M.shape == (0,)


# ------------------------------------------------------------------------- one dictionary over a model's training


def test_formation_is_the_mean_cosine_over_pairs_less_that_of_all_rows():
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    at = torch.tensor([[0, 3, 7, 8], [2, 5, -1, -1], [4, -1, -1, -1], [8, -1, -1, -1], [-1, -1, -1, -1]])

    def pairs(numbers):
        cosines = [torch.cosine_similarity(x[i], x[j], dim=0) for k, i in enumerate(numbers) for j in numbers[k + 1 :]]
        return torch.stack(cosines).mean().double()

    got = formation(x, at)
    for f, numbers in enumerate(([0, 3, 7, 8], [2, 5])):
        torch.testing.assert_close(got[f], pairs(numbers) - pairs(range(11)), rtol=1e-5, atol=1e-6)
    assert got[2:].isnan().all()
    with pytest.raises(BadInput, match="row numbers below N"):
        formation(x, torch.tensor([[11]]))


def test_drift_is_the_cosine_of_the_same_latent():
    a, b, c = (torch.randn(4, 5, generator=torch.Generator().manual_seed(s)) for s in range(3))
    got = drift([a, b, 3 * c])
    cos = lambda p, q: torch.cosine_similarity(p, q, dim=-1)
    torch.testing.assert_close(got.to_previous_CF, torch.stack([torch.ones(4), cos(a, b), cos(b, c)]))
    torch.testing.assert_close(got.to_last_CF, torch.stack([cos(a, c), cos(b, c), torch.ones(4)]))
    with pytest.raises(BadInput, match="decoders of one shape"):
        drift([a, b[:3]])


def test_identity_is_kept_by_rows_that_stay_nearest_to_themselves():
    old = torch.eye(4)
    assert identity_kept(old, 2 * old + 0.1) == 1
    assert identity_kept(old, old[[1, 0, 2, 3]]) == 0.5
    assert identity_kept(old, 0 * old) == 0


def rotated(number, d=12, features=24, n=1000):
    """Rows of a planted dictionary that turns a little each checkpoint, and that dictionary."""
    planted = make(n, d, features, 2, seed=3)
    turn = torch.linalg.matrix_exp(0.06 * number * (lambda a: a - a.T)(torch.randn(d, d, generator=torch.Generator().manual_seed(8))))
    return planted.x @ turn.T, planted.dictionary @ turn.T


def followed(method, number, steps):
    """The method trained on from what it is, at one checkpoint."""
    method = copy.deepcopy(method)
    train({"m": method}, TensorStream(rotated(number)[0], 128), Recipe(steps=steps, lr=0.01), begun=["m"] if number else [])
    return method


def test_latents_begun_from_the_last_checkpoint_keep_their_identity_and_others_do_not():
    series = [followed(TopK(12, 24, k=2), 0, 150)]
    for number in (1, 2):
        series.append(followed(series[-1], number, 30))
        assert identity_kept(series[-2].W_dec_FD, series[-1].W_dec_FD) > 0.9
    cold = TopK(12, 24, k=2, seed=1)
    train({"m": cold}, TensorStream(rotated(1)[0], 128), Recipe(steps=150, lr=0.01))
    assert identity_kept(series[0].W_dec_FD, cold.W_dec_FD) < 0.25
    assert recovery(cold.W_dec_FD, rotated(1)[1]).mmcs > 0.8 and recovery(series[-1].W_dec_FD, rotated(2)[1]).mmcs > 0.8
    turned = torch.cosine_similarity(rotated(0)[1], rotated(2)[1], dim=-1)
    assert turned.mean() < 0.9 and torch.allclose(drift([rotated(i)[1] for i in (0, 1, 2)]).to_last_CF[0], turned)
    assert drift([m.W_dec_FD for m in series]).to_last_CF[0].mean() < 0.93            # they did turn with it
