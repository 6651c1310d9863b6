"""Training by kernels that touch what is selected reaches what thirty lines of dense PyTorch reach in as many steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, normalize

from rarefy.fit import Recipe, train
from rarefy.latents.topk import TopK
from rarefy.streams import TensorStream
from rarefy.tasks.planted import make

D, F, K, B, STEPS, LR = 24, 96, 4, 128, 150, 3e-3


def naive(x_ND, batches, seed):
    """TopK with AuxK written densely, from the same start, with the same Adam, clipping, schedule and unit-norm rows."""
    begin = TopK(D, F, K, seed=seed)
    begin.initialise(x_ND[:B])
    scale = begin.scale.clone()
    W, b, V, c = (t.detach().clone().requires_grad_() for t in (begin.W_enc_FD, begin.b_enc_F, begin.W_dec_FD, begin.b_dec_D))
    idle, adam = torch.zeros(F, dtype=torch.long), torch.optim.Adam([W, b, V, c], lr=LR)
    recipe = Recipe(steps=STEPS, lr=LR)
    for step in range(STEPS):
        x, _ = next(batches)
        x = x * scale
        pre = linear(x - c, W, b)
        f = torch.where(pre >= pre.topk(K).values[:, -1:], pre, 0).relu()
        y = f @ V + c
        loss = (y - x).pow(2).mean()
        dead = idle > 500
        if dead.any():
            dead_pre = torch.where(dead, pre, -torch.inf)
            count = min(D // 2, int(dead.sum()))
            g = torch.where(dead_pre >= dead_pre.topk(count).values[:, -1:], pre, 0).relu()
            loss = loss + (g @ V - (x - y).detach()).pow(2).mean() / 32
        idle += len(x)
        idle[(f > 0).any(0)] = 0
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            V.grad -= (V.grad * V).sum(-1, keepdim=True) * V
            torch.nn.utils.clip_grad_norm_([W, b, V, c], 1.0)
            adam.param_groups[0]["lr"] = LR * recipe.rate(step)
            adam.step()
            V.copy_(normalize(V, dim=-1))
    with torch.no_grad():
        pre = linear(x_ND * scale - c, W, b)
        return (torch.where(pre >= pre.topk(K).values[:, -1:], pre, 0).relu() @ V + c) / scale


@pytest.mark.parametrize("seed", [0, 1])
def test_as_good_as_the_dense_oracle_at_equal_steps(seed):
    x = make(4000, D, F, 4.0, noise=0.05, seed=seed).x
    stream = TensorStream(x, B, seed=seed)
    ours = TopK(D, F, K, dead_after=500, seed=seed)
    train({"ours": ours}, stream, Recipe(steps=STEPS, lr=LR))
    with torch.no_grad():
        got = ours(x)
    spread = (x - x.mean(0)).pow(2).sum()
    mine, theirs = (float((x - y).pow(2).sum() / spread) for y in (got, naive(x, stream.batches(), seed)))
    assert theirs < 0.7                                                     # it learns
    assert mine == pytest.approx(theirs, rel=0.01)
