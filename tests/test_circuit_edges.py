"""Edges between transcoder latents against gradients through a model whose patterns, norms and MLPs are held.

Shape letters: T = tokens, S = source tokens, D = width, F = latents, H = heads.
"""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf

from rarefy.circuits.transcoder_edges import Trace, edges, invariant_edges, paths
from rarefy.errors import BadInput, Unsupported
from rarefy.latents.abs_topk import AbsTopK
from rarefy.latents.gated import Gated
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.site import capture
from site_models import VOCAB, build

D, F, T = 32, 24, 6


@functools.cache
def deep(bias=True, layers=3, heads=4):
    """Three layers, grouped queries, biases in attention, norms that are not all ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2, intermediate_size=48,
            initializer_range=0.2, attention_bias=bias,
        ))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return model.double().eval()


def ids(t=T, seed=4):
    return torch.randint(3, VOCAB, (t,), generator=torch.Generator().manual_seed(seed))


def transcoders(model, kind=TopK, layers=None, biased=True, **kw):
    """Untrained, with scales and biases off their start."""
    made = {}
    for n in range(len(model.model.layers)) if layers is None else layers:
        m = kind(D, F, d_out=D, seed=n, **({"k": 4} if kind in (TopK, AbsTopK) else {}), **kw).double()
        with torch.no_grad():
            m.scale.fill_(0.7 + 0.1 * n)
            m.scale_out.fill_(1.6 - 0.2 * n)
            if biased:
                m.b_enc_F.normal_(0, 0.3, generator=torch.Generator().manual_seed(n))
                m.b_dec_D.normal_(0, 0.3, generator=torch.Generator().manual_seed(n + 9))
            if m.W_skip_ED is not None:
                m.W_skip_ED.normal_(0, 0.2, generator=torch.Generator().manual_seed(n + 20))
        made[n] = m.eval()
    return made


def by_gradient(model, made, x_T, layer, latent, token):
    """(terms of latents by layer [T, F], of errors [n, T], of the embedding [T], pre-activation): value times gradient, through the stack
    written out with transformers' eager attention patterns."""
    held = []
    hooks = [block.mlp.register_forward_hook(lambda m, a, o: held.append((a[0][0].detach(), o[0].detach()))) for block in model.model.layers]
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=x_T[None], output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation(was)
    for hook in hooks:
        hook.remove()

    def norm(x, module):
        r = torch.rsqrt(x.detach().float().pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return x * r * module.weight

    embedding = out.hidden_states[0][0].detach().requires_grad_()
    stream, codes, errors = embedding, {}, []
    for n, block in enumerate(model.model.layers):
        a, C = block.self_attn, block.self_attn.head_dim
        v = a.v_proj(norm(stream, block.input_layernorm)).view(len(x_T), -1, C).repeat_interleave(a.num_key_value_groups, 1)
        stream = stream + a.o_proj(torch.einsum("hts,shc->thc", out.attentions[n][0], v).flatten(1))
        if n == layer:
            m, x = made[n], norm(stream, block.post_attention_layernorm)
            pre = ((x * m.scale) @ m.W_enc_FD.T + m.b_enc_F)[token, latent]
            break
        x, y = held[n]
        rest = y
        if n in made:
            m = made[n]
            codes[n] = m.select(x).dense.detach().requires_grad_()
            begin = (m.b_dec_D / m.scale_out).detach()
            rest = y - (codes[n] @ m.W_dec_FD / m.scale_out + begin).detach()
            stream = stream + codes[n] @ m.W_dec_FD.detach() / m.scale_out + begin
        errors.append(rest.requires_grad_())
        stream = stream + errors[-1]
    leaves = [embedding, *errors, *codes.values()]
    g = [x * (0 if d is None else d) for x, d in zip(leaves, torch.autograd.grad(pre, leaves, allow_unused=True), strict=True)]
    parts = g[1 : 1 + len(errors)]
    return dict(zip(codes, g[1 + len(errors) :], strict=True)), [e.sum(-1) for e in parts], g[0].sum(-1), pre.detach()


@pytest.mark.parametrize(("layers", "asked", "kw"), [
    (None, (2, 5, 4), {}), (None, (2, 7, 0), {}), (None, (1, 0, 5), {"kind": AbsTopK}), (None, (0, 3, 3), {}), ([2, 0], (2, 5, 5), {"kind": ReLU}),
    (None, (2, 1, 5), {"skip": True}), (None, (2, 1, 5), {"kind": JumpReLU, "theta": 0.4}),
])
def test_every_term_is_value_times_gradient(layers, asked, kw):
    model = deep()
    made = transcoders(model, layers=layers, **kw)
    got = edges(Trace(model, made, ids()), *asked)
    latents, errors, embedding, pre = by_gradient(model, made, ids(), *asked)
    assert sorted(latents) == list(got.latent_LM)
    for n, want_TF in latents.items():
        token_M, latent_M, value_M = got.latent_LM[n]
        dense = torch.zeros_like(want_TF).index_put((token_M, latent_M), value_M)
        torch.testing.assert_close(dense, want_TF, rtol=1e-5, atol=1e-6)
        assert asked[2] == 0 or (value_M[token_M < asked[2]] != 0).any()     # through attention, not only at the same token
    for n, want_T in enumerate(errors):
        torch.testing.assert_close(got.error_LT[n], want_T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.embedding_T, embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pre, pre, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama_wide_heads", "mistral", "qwen2", "qwen3", "gemma", "deep"])
def test_terms_sum_to_the_pre_activation(name):
    model = deep() if name == "deep" else build(name).double()
    made = transcoders(model)
    last = max(made)
    trace = Trace(model, made, ids())
    for latent, token in ((0, 0), (5, 3), (11, T - 1)):
        got = edges(trace, last, latent, token)
        torch.testing.assert_close(got.total, got.pre, rtol=1e-5, atol=1e-6)
        assert abs(float(got.bias)) > 1e-3
        strongest = got.strongest(7)
        every = got.strongest(10**6)
        assert len(every) > 5 and strongest == every[:7] == sorted(every, key=lambda e: -abs(e.value))[:7]
        assert sum(e.value for e in every) == pytest.approx(float(got.pre - got.bias), rel=1e-5, abs=1e-6)
        assert all(e.token <= token for e in strongest)


def test_an_edge_at_the_same_token_is_activation_times_scale_times_an_invariant():
    model = deep()
    made = transcoders(model)
    token, latent = T - 1, 6
    weights = invariant_edges(model, made, 1, latent)
    assert list(weights) == [0]
    seen = []
    for seed in (4, 5):
        trace = Trace(model, made, ids(seed=seed))
        stream_TD = capture(model, "layers.1.resid_mid", input_ids=ids(seed=seed)[None])["layers.1.resid_mid"][0]
        scale = torch.rsqrt(stream_TD[token].pow(2).mean() + 1e-6)
        one_step = [p.steps[1] for p in paths(trace, 1, latent, token, width=10**4, depth=1) if p.steps[1].kind == "latent"]
        assert one_step
        for edge in one_step:
            value = trace.code_LTF[0][token, edge.index]
            assert edge.value == pytest.approx(float((value * scale * weights[0][edge.index]).detach()), rel=1e-5)
        seen.append({e.index: e.value for e in one_step})
    assert seen[0] != seen[1]
    reads_D = model.model.layers[1].post_attention_layernorm.weight * made[1].scale * made[1].W_enc_FD[latent]
    by_hand = ((made[0].W_dec_FD[3] / made[0].scale_out) @ reads_D).detach()
    assert float(weights[0][3]) == pytest.approx(float(by_hand), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- paths


@functools.cache
def small():
    model = deep(bias=False, layers=2, heads=2)
    return model, Trace(model, transcoders(model, biased=False), ids(3))


def test_all_paths_together_give_the_pre_activation():
    """Without biases nothing is lost on the way: what embeddings and errors give along every path sums to it."""
    _, trace = small()
    for latent in (2, 9):
        found = paths(trace, 1, latent, 2, width=10**6, depth=20)
        assert {p.steps[-1].kind for p in found} == {"embedding", "error"} and {len(p.steps) for p in found} >= {2, 3, 4, 5}
        pre = found[0].steps[0].value
        assert sum(p.value for p in found) == pytest.approx(pre, rel=1e-5, abs=1e-6)
        assert pre == pytest.approx(float(edges(trace, 1, latent, 2).pre))


def test_a_steps_sources_sum_to_what_it_gives():
    _, trace = small()
    one = paths(trace, 1, 2, 2, width=10**6, depth=1)
    assert sum(p.value for p in one) == pytest.approx(one[0].steps[0].value, rel=1e-5)
    assert {p.steps[1].kind for p in one} == {"embedding", "error", "latent", "head"}
    two = paths(trace, 1, 2, 2, width=10**6, depth=2)
    for p in one:
        if p.steps[1].kind in ("head", "latent"):
            sums = sum(q.value for q in two if q.steps[:2] == p.steps)
            assert sums == pytest.approx(p.value, rel=1e-4, abs=1e-7), p


def test_the_greedy_search_keeps_the_largest():
    _, trace = small()
    every = [p.value for p in paths(trace, 1, 2, 2, width=10**6, depth=1)]
    few = paths(trace, 1, 2, 2, width=3, depth=1)
    assert [p.value for p in few] == every[:3] == sorted(every, key=lambda v: -abs(v))[:3]
    deeper = paths(trace, 1, 2, 2, width=3, depth=4)
    assert len(deeper) == 3 and max(len(p.steps) for p in deeper) > 2
    every = {p.steps: p.value for p in paths(trace, 1, 2, 2, width=10**6, depth=4)}
    assert all(every[p.steps] == pytest.approx(p.value) for p in deeper)


def test_a_planted_circuit_is_found():
    """Latent 7 of layer 0 fires at token 1; head 1 of layer 1 copies it to the last token, where latent 3 of layer 1 reads it."""
    model = deep(bias=False, layers=2, heads=2)
    made = transcoders(model, biased=False)
    trace = Trace(model, made, ids(3))
    a = model.model.layers[1].self_attn
    C = a.head_dim
    with torch.no_grad():
        w = made[0].W_dec_FD[7] * model.model.layers[1].input_layernorm.weight
        copied = a.o_proj.weight[:, C : 2 * C] @ (a.v_proj.weight[C : 2 * C] @ w)
        made[1].W_enc_FD[3] = 5 * copied / copied.norm() / model.model.layers[1].post_attention_layernorm.weight
        first_D, last_D = trace.read_LTD[0][1], trace.read_LTD[0][2]
        made[0].W_enc_FD[7] = 20 * (first_D / first_D.norm() ** 2 - last_D * (first_D @ last_D) / (first_D.norm() * last_D.norm()) ** 2)
    trace = Trace(model, made, ids(3))
    assert trace.code_LTF[0][1, 7] > 5 and trace.code_LTF[0][2, 7] == 0
    best = next(e for e in edges(trace, 1, 3, 2).strongest(50) if e.kind == "latent")
    assert (best.layer, best.token, best.index) == (0, 1, 7)
    through = [p for p in paths(trace, 1, 3, 2, width=20, depth=2) if p.steps[-1].kind == "latent"]
    assert [(s.kind, s.layer, s.token, s.index) for s in through[0].steps[1:]] == [("head", 1, 1, 1), ("latent", 0, 1, 7)]


# --------------------------------------------------------------------------------------------------------- refusals


def gated():
    m = Gated(D, F, d_out=D).double()
    with torch.no_grad():
        m.r_mag_F.fill_(0.5)
    return m


@pytest.mark.parametrize(("call", "error", "said"), [
    (lambda m, t: Trace(m, {}, ids()), BadInput, "no transcoders are given"),
    (lambda m, t: Trace(m, {0: TopK(D, F, k=4).double()}, ids()), BadInput, "layer 0 is given latents/topk"),
    (lambda m, t: Trace(m, {3: t[0]}, ids()), BadInput, "at layers 0..2"),
    (lambda m, t: Trace(m, t, ids()[None]), BadInput, "token ids of one prompt"),
    (lambda m, t: Trace(m, t, ids().double()), BadInput, "token ids of one prompt"),
    (lambda m, t: Trace(m, {0: gated()}, ids()), Unsupported, "is not its pre-activation"),
    (lambda m, t: Trace(build("gpt2"), t, ids()), Unsupported, "models of Llama's family"),
    (lambda m, t: Trace(build("mistral_sliding").double(), {0: t[0]}, ids()), Unsupported, "sliding window"),
    (lambda m, t: edges(Trace(m, {0: t[0]}, ids()), 1, 0, 0), BadInput, "layer 1 has no transcoder"),
    (lambda m, t: edges(Trace(m, t, ids()), 1, F, 0), BadInput, f"latent={F}"),
    (lambda m, t: edges(Trace(m, t, ids()), 1, 0, T), BadInput, f"token={T}"),
    (lambda m, t: edges(Trace(m, t, ids()), 1, 0, 0).strongest(0), BadInput, "count=0"),
    (lambda m, t: paths(Trace(m, t, ids()), 1, 0, 0, width=0), BadInput, "width=0"),
    (lambda m, t: invariant_edges(m, t, 1, F), BadInput, f"no latent {F} of layer 1"),
])
def test_what_makes_no_sense_is_refused_by_name(call, error, said):
    model = deep()
    with pytest.raises(error, match=said):
        call(model, transcoders(model))


def test_the_model_is_as_it_was():
    model = build("llama").double()
    before, hooks = model(input_ids=ids()[None]).logits, sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    Trace(model, transcoders(model), ids())
    assert torch.equal(model(input_ids=ids()[None]).logits, before)
    assert hooks == sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
