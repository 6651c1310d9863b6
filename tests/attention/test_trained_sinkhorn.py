"""Sinkhorn block matching: balance, the kernel's path against masks, the causal variant, and a match that is learned."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from trained_inputs import SIZES, gradients, qkv

import rarefy
from rarefy import replaced
from rarefy.attention.trained.balancing import balanced
from rarefy.attention.trained.sinkhorn import Sinkhorn
from rarefy.errors import BadInput
from site_models import build


def test_balance_is_doubly_stochastic_and_is_iterated_division_done_in_logarithms():
    logit = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P, plain = balanced(logit, 60, False), logit.exp()
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 6).double())
    torch.testing.assert_close(P.sum(-2), torch.ones(2, 6).double(), atol=1e-9, rtol=0)
    for _ in range(3):
        plain = plain / plain.sum(-2, keepdim=True)
        plain = plain / plain.sum(-1, keepdim=True)
    torch.testing.assert_close(balanced(logit, 3, False), plain)
    assert balanced(logit * 1e4, 8, False).isfinite().all()


def test_causal_balance_divides_by_what_came_before_and_never_reads_later_rows():
    logit = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = balanced(logit, 2, True)
    plain = logit.exp().tril(-1)
    for _ in range(2):
        plain = torch.stack([plain[i] / plain[: i + 1].sum(0).clamp_min(1e-300) for i in range(5)])
        plain = plain / plain.sum(1, keepdim=True).clamp_min(1e-300)
    torch.testing.assert_close(P, plain)
    assert P[0].sum() == 0 and (P.sum(1)[1:] - 1).abs().max() < 1e-12
    other = logit.clone()
    other[3:] += 5
    assert torch.equal(balanced(other, 2, True)[:3], P[:3])


@pytest.mark.parametrize("S", [32, 29])
def test_a_permutation_of_blocks_is_attention_under_its_mask_hard_and_soft(S):
    q, k, v = qkv(S)
    N, M, turn = 4, 8, torch.tensor([2, 0, 3, 1])

    class Planted(Sinkhorn):
        def matching(self, k, causal):
            return torch.eye(N, dtype=k.dtype)[turn].expand(len(k), self.heads, N, N)

    blocks = torch.eye(N, dtype=torch.bool) | torch.eye(N, dtype=torch.bool)[turn]
    mask = blocks.repeat_interleave(M, 0).repeat_interleave(M, 1)[:S, :S]
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for match in ("hard", "soft"):
        method = Planted(**SIZES, block=M, match=match).double()
        torch.testing.assert_close(method.attend(q, k, v, scale=6**-0.5, causal=False), wanted)
    trained = Planted(**SIZES, block=M).double().train()
    torch.testing.assert_close(trained.attend(q, k, v, scale=6**-0.5, causal=False), wanted)
    assert math.isclose(trained.measured_density(), mask.float().mean().item(), rel_tol=1e-6)


def test_two_blocks_causal_are_dense_attention():
    q, k, v = qkv(16)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(Sinkhorn(**SIZES, block=8).double().eval()(q, k, v), dense)


def test_soft_matching_without_causality_mixes_keys_and_values_position_by_position():
    q, k, v = qkv(12, grad=True)
    method = Sinkhorn(**SIZES, block=4, match="soft", width=3).double().eval()
    out = method.attend(q, k, v, scale=0.3, causal=False)
    kk, vv = (x.repeat_interleave(2, 1).view(2, 4, 3, 4, 6) for x in (k, v))
    mean = kk.mean(3)
    logit = torch.einsum("bhid,hdr,bhje,her->bhij", mean, method.row_HDR, mean, method.col_HDR) / 3**0.5 / 0.7
    P = balanced(logit, 8, False)
    rows = []
    for i in range(3):
        keys, values = (torch.cat([x[:, :, i], sum(P[:, :, i, j, None, None] * x[:, :, j] for j in range(3))], 2) for x in (kk, vv))
        rows.append((q[:, :, 4 * i : 4 * i + 4] @ keys.mT * 0.3).softmax(-1) @ values)
    wanted = torch.cat(rows, 2)
    torch.testing.assert_close(out, wanted)
    leaves = [q, k, v, method.row_HDR, method.col_HDR]
    for a, b in zip(gradients(out, leaves), gradients(wanted, leaves), strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("match", ["hard", "soft"])
def test_decoding_gives_what_prefill_gives(match):
    q, k, v = qkv(21)
    method = Sinkhorn(**SIZES, block=4, match=match).double().eval()
    whole = method(q, k, v)
    for start, end in ((0, 6), (6, 7), (7, 15), (15, 16), (16, 21)):
        torch.testing.assert_close(method(q[:, :, start:end], k[:, :, :end], v[:, :, :end]), whole[:, :, start:end])


def test_without_causality_queries_stand_for_all_keys():
    q, k, v = qkv(4, 9)
    with pytest.raises(BadInput, match="blocks of one sequence"):
        Sinkhorn(**SIZES, block=4).double().attend(q, k, v, scale=1.0, causal=False)


def planted(batch, seed, causal, blocks=8, size=4, width=16):
    """Blocks with codes of their own; each also holds, turned, the code of its partner: an earlier one, or that of a permutation."""
    draw = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(width // 2, width // 2, generator=torch.Generator().manual_seed(77)))[0]
    code = torch.nn.functional.normalize(torch.randn(batch, blocks, width // 2, generator=draw), dim=-1)
    earlier = torch.stack([torch.randint(max(1, i), (batch,), generator=draw) for i in range(blocks)], 1)
    partner = earlier if causal else torch.rand(batch, blocks, generator=draw).argsort(1)
    asked = 3 * code.gather(1, partner[..., None].expand_as(code)) @ turned
    k = torch.cat([3 * code, asked], -1)[:, None, :, None].repeat(1, 1, 1, size, 1)
    v = torch.randn(batch, 1, blocks, size, width, generator=draw)
    wanted = v[:, 0].mean(2).gather(1, partner[..., None].expand(-1, -1, width))
    return k.flatten(2, 3), v.flatten(2, 3), partner, wanted


def learned(causal, steps=150, **arguments):
    """Share of blocks matched rightly after training on the outputs of the last query of each block, and before."""
    method, shares = Sinkhorn(1, 1, 16, block=4, width=8, **arguments), []
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-2)
    for step in range(steps + 1):
        if step in (0, steps):
            k, _, partner, _ = planted(64, 10_000, causal)
            shares.append((method.eval().matching(k, causal)[:, 0].argmax(-1) == partner)[:, 2:].float().mean().item())
        k, v, _, wanted = planted(16, step, causal)
        out = method.train().attend(torch.zeros_like(k), k, v, scale=1.0, causal=causal)[:, 0, 3::4]      # the mean of both blocks
        loss = (2 * out - v[:, 0].unflatten(1, (8, 4)).mean(2) - wanted)[:, 1:].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("match", ["hard", "soft"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_planted_match_is_learned_through_the_output_alone(match, causal):
    before, after = learned(causal, match=match)
    assert after > 0.9 and before < 0.5


def test_many_causal_rounds_match_each_block_with_the_one_before_it_whatever_they_hold():
    logit = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (balanced(logit, 2000, True) - torch.eye(6).roll(1, 0).tril(-1)).abs().max() < 0.02
    assert (balanced(logit, 0, True)[1:] - logit.masked_fill(torch.ones(6, 6).triu().bool(), -torch.inf)[1:].softmax(-1)).abs().max() < 1e-12


def test_a_hybrid_stack_leaves_layers_dense_and_generates():
    model = build("llama")
    layers = rarefy.plan("attention/sinkhorn", model, block=4)
    plan = dict(list(layers.items())[:1])
    ids = torch.arange(2, 22)[None] % 40
    with replaced(model, plan), torch.no_grad():
        whole = model(ids).logits
        made = model.generate(ids[:, :9], max_new_tokens=4, do_sample=False, pad_token_id=0)
        again = model(made).logits.argmax(-1)
    assert torch.equal(made[0, 9:], again[0, 8:-1])
    with torch.no_grad():
        assert (model(ids).logits - whole).abs().max() > 1e-6
