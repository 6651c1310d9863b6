"""Sparse GIN-Attention: an adapter along the attention map's own graph."""

import pytest
import torch

import rarefy
from rarefy.attention.trained import Trained
from rarefy.attention.trained.gin import GIN, RULES
from site_models import build

H, G, D = 4, 2, 6


def qkv(T=7, S=11, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(2, H, T, D, generator=draw).double(), *torch.randn(2, 2, G, S, D, generator=draw).double().unbind())


def made(**more):
    method = GIN(H, G, D, width=3, **more).double()
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 3)
    return method


@pytest.mark.parametrize("sharp", [1.0, 3.0])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_sum_over_edges_and_the_network_written_out(rule, sharp):
    q, k, v = qkv()
    method = made(rule=rule, threshold=0.12, sharp=sharp)
    got, wanted = method(q, k, v), torch.zeros(2, H, 7, D).double()
    for b in range(2):
        for t in range(7):
            x, seen = [v[b, h // 2] for h in range(H)], 11 - 7 + t + 1
            u = []
            for h in range(H):
                logit = torch.stack([q[b, h, t] @ k[b, h // 2, s] / D**0.5 for s in range(seen)])
                wanted[b, h, t] += sum(w * x[h][s] for s, w in enumerate(logit.softmax(0)))
                mine = x[h][seen - 1] * (1 + method.eps)
                for s, a in enumerate((sharp * logit).softmax(0)):
                    if a > 0.12:
                        mine = mine + {"keep": a, "shift": a - 0.12, "binary": 1.0}[rule] * x[h][s]
                u.append(mine)
            inner = torch.maximum(torch.cat(u) @ method.in_EW + method.in_W, torch.zeros(3))
            wanted[b, :, t] += (inner @ method.out_WE + method.out_E).view(H, D)
    torch.testing.assert_close(got, wanted)


def test_edges_are_those_above_the_threshold_and_none_lies_ahead():
    q, k, _ = qkv(11, 11)
    for threshold in (0.05, 0.3):
        edges = made(threshold=threshold).edges(q, k, D**-0.5)
        p = (q @ k.repeat_interleave(2, 1).mT * D**-0.5).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
        assert ((edges > 0) == (p > threshold)).all() and not edges.triu(1).any()


def test_untrained_it_changes_nothing_and_training_moves_it_alone():
    model, ids = build("llama").eval(), torch.arange(24).view(2, 12) % 29
    plan = rarefy.plan("attention/gin", model, width=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with rarefy.replaced(model, plan), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model(ids).logits)
        same = model(ids).logits
    torch.testing.assert_close(same, model(ids).logits)
    wrapper = Trained(plan, model, train_model=False)
    rarefy.train({"gin": wrapper}, rarefy.TensorStream(ids, 2), rarefy.Recipe(steps=5, lr=1e-2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with rarefy.replaced(model, plan), torch.no_grad():
        assert (model(ids).logits - same).abs().max() > 1e-4


def test_parameters_are_counted():
    method = GIN(H, G, D, width=5)
    assert sum(p.numel() for p in method.parameters()) == 2 * H * D * 5 + 5 + H * D + 1
