"""Dictionaries against dense autograd written out from the papers."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.gated import Gated
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK

TRAINED = [TopK, BatchTopK, ReLU, Gated, JumpReLU]


def rows(n: int = 63, d: int = 11) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4 + 1


def built(cls: type, **kw: object):  # type: ignore[no-untyped-def]
    method = cls(11, 29, **kw).double()
    method.initialise(rows())
    with torch.no_grad():
        method.b_enc_F.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.1)
    return method


@pytest.mark.parametrize("cls", TRAINED)
def test_forward_equals_reference_in_use_and_on_empty_batch(cls: type) -> None:
    method = built(cls).eval() if cls not in (TopK, BatchTopK) else built(cls, k=5).eval()
    torch.testing.assert_close(method(rows()), method.reference(rows()))
    assert method(rows(0)).shape == (0, 11)


def naive_topk(m: TopK, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pre = (x * m.scale - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F
    keep = pre >= pre.sort(1, descending=True).values[:, m.k - 1 : m.k]
    return pre, (pre.relu() * keep) @ m.W_dec_FD + m.b_dec_D


def test_topk_mse_and_gradients_equal_dense() -> None:
    m, x = built(TopK, k=5), rows()
    want = (naive_topk(m, x)[1] - x * m.scale).pow(2).mean()
    part = m.loss(x, x).parts["mse"]
    torch.testing.assert_close(part, want)
    p = (m.W_enc_FD, m.b_enc_F, m.W_dec_FD, m.b_dec_D)
    for a, b in zip(torch.autograd.grad(part, p), torch.autograd.grad(want, p), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D"])
def test_auxk_gradient_equals_dense(name: str) -> None:
    """e_hat = W_dec z has no bias (appendix A.2), so b_dec gets a gradient through the encoder only."""
    m, x = built(TopK, k=5, aux_k=3, dead_after=10), rows()
    m.idle_F[:8] = 100
    pre, y_hat = naive_topk(m, x)
    error = (x * m.scale - y_hat).detach()
    dead = torch.where(m.idle_F > 10, pre, -torch.inf)
    z = torch.where(dead >= dead.sort(1, descending=True).values[:, 2:3], pre.relu(), 0.0)
    want = (error - z @ m.W_dec_FD).pow(2).mean() / 32
    part = m.loss(x, x).parts["aux"]
    torch.testing.assert_close(part, want)
    p = getattr(m, name)
    torch.testing.assert_close(torch.autograd.grad(part, p)[0], torch.autograd.grad(want, p)[0])


@pytest.mark.parametrize("cls", TRAINED)
def test_loss_refuses_nan_before_any_state_changes(cls: type) -> None:
    m, x = built(cls, **({"k": 5} if issubclass(cls, TopK) else {})), rows()
    x[3, 2] = torch.nan
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(BadInput, match="NaN"):
        m.loss(x, x)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
