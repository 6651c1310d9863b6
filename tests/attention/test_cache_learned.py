"""Cache policies with parts that are fitted, each against its definition written out over plain lists."""

from __future__ import annotations

from math import log1p
from typing import Any

import pytest
import torch
from caches import controller, drive, over, qkv
from torch import Tensor

from rarefy.attention.cache import make
from rarefy.attention.cache.attamba import fit_rates
from rarefy.attention.cache.controller import Controller, attended, fit_controller, wanted
from rarefy.errors import BadInput


def recurrence(made: Controller, x_TE: Tensor) -> list[Tensor]:
    """States of a gated recurrent unit by its three formulas, float64."""
    p = {n: x.double() for n, x in made.gru.named_parameters()}
    z, out = torch.zeros(made.gru.hidden_size, dtype=torch.float64), []
    for x in x_TE.double():
        (ri, ui, ni), (rh, uh, nh) = (p["weight_ih_l0"] @ x + p["bias_ih_l0"]).chunk(3), (p["weight_hh_l0"] @ z + p["bias_hh_l0"]).chunk(3)
        update, new = (ui + uh).sigmoid(), (ni + (ri + rh).sigmoid() * nh).tanh()
        z = (1 - update) * new + update * z
        out.append(z)
    return out


@pytest.mark.parametrize("most", [None, 5])
def test_adore_attends_to_what_its_controller_names(most: int | None) -> None:
    q, k, v = qkv(1, 4, 2, 34, 8, seed=7)
    policy: Any = make("adore", budget=0.3, most=most)
    with pytest.raises(BadInput, match=r"cache\.fit"):
        drive(policy, q, k, v, [20])
    made = controller(8, 2, 4)
    policy.controllers = [made]
    sizes: list[int] = []
    out = drive(policy, q, k, v, [20, 24, *range(25, 35)], after=lambda layer: sizes.append(int(layer.kept().max())))
    z = recurrence(made, q[0, 0])
    A, B, c = made.query.weight.double(), made.key.weight.double(), made.own.weight.double()
    before: list[set[int]] = [set(), set()]
    back = 0
    for t in range(34):
        for g in range(2):
            part = slice(4 * g, 4 * g + 4)
            own, slope = float(made.own.bias[g]), float(made.slope_G[g])
            score = [float((A[part] @ z[t]) @ (B[part] @ z[s]) / 2 + c[g] @ z[s]) + own - slope * log1p(t - s) for s in range(t)]
            keep = min(max(1, round(0.3 * (t + 1))), most or 34)
            chosen = sorted([*sorted(range(t), key=score.__getitem__, reverse=True)[: keep - 1], t])
            if t >= 20:
                back += len(set(chosen) - before[g] - {t})
            before[g] = set(chosen)
            seen = chosen if t >= 20 else list(range(t + 1))
            for h in (2 * g, 2 * g + 1):
                torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], k[0, g, seen], v[0, g, seen]), rtol=1e-4, atol=1e-5)
    assert policy.rebuilt == back > 0
    assert sizes == [min(most or 34, round(0.3 * n)) for n in (20, 24, *range(25, 35))]


def test_targets_are_the_top_of_full_attention() -> None:
    q, k, _ = qkv(1, 4, 2, 12, 8, seed=1)
    weight = attended(q, k, 8**-0.5)
    got = wanted(weight, 0.4)
    for g in range(2):
        for t in range(12):
            p = sum((k[0, g, : t + 1].double() @ q[0, h, t].double() / 8**0.5).softmax(-1) for h in (2 * g, 2 * g + 1))
            assert isinstance(p, Tensor)
            torch.testing.assert_close(weight[0, g, t, : t + 1].double(), p / 2, rtol=1e-5, atol=1e-6)
            assert sorted(p.topk(max(1, round(0.4 * (t + 1)))).indices.tolist()) == got[0, g, t].nonzero()[:, 0].tolist()


def test_a_fitted_controller_names_what_is_asked_for_again() -> None:
    """Planted: a token asks for the earlier ones of its own kind, which no rule by place finds."""
    random = torch.Generator().manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(5, 8, generator=random), dim=-1)
    fit, judge = (kinds[torch.randint(5, (6, 40), generator=random)] for _ in range(2))

    def found(steps: int) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            made = fit_controller([(fit, 6 * fit[:, None], fit[:, None], 1.0)], 12, 0.2, steps)
        with torch.no_grad():
            z = made.gru(judge)[0]
            score = made(z, z, torch.arange(40).expand(6, 40))
        same = (judge @ judge.mT > 0.99).tril(-1)[:, 20:]
        keep = score[:, 0, 20:].masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(-1)[20:], -torch.inf).topk(4).indices
        return float(same.gather(-1, keep).float().mean())

    assert found(1) < 0.4 and found(200) > 0.7


def test_a_controller_names_the_token_that_gets_all_the_probability() -> None:
    """Full attention goes to the first token; which others are in its top K is noise of no weight, though it is most of the top K."""
    T, random = 160, torch.Generator().manual_seed(1)
    x = torch.randn(4, T, 8, generator=random)
    k = 0.01 * torch.randn(4, 1, T, 8, generator=random)
    k[:, :, 0] = 2.0
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = fit_controller([(x, torch.ones(4, 1, T, 8), k, 1.0)], 8, 0.5, 20)
    with torch.no_grad():
        z = made.gru(x)[0]
        score = made(z, z, torch.arange(T).expand(4, T))[:, 0, 20:]
    above = ((score > score[..., :1]) & torch.ones(T, T, dtype=torch.bool).tril(-1)[20:]).sum(-1)
    assert float((above < torch.arange(20, T) / 2).float().mean()) > 0.95


def test_attamba_attends_to_states_at_chunk_ends() -> None:
    q, k, v = qkv(1, 4, 2, 40, 8, seed=3)
    policy: Any = make("attamba", budget=0.25, recent=5, sinks=2)
    rates = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(2))
    policy.rates_of = [rates]
    kept: list[int] = []
    cuts = [23, 26, *range(27, 41)]
    out = drive(policy, q, k, v, cuts, after=lambda layer: kept.append(int(layer.kept().max())))
    assert kept == [n - 3 * ((n - 5 - 2) // 4) for n in cuts]      # a chunk of four counts as one

    def state(x_PD: Tensor, rate_D: Tensor) -> Tensor:
        """The recurrence, step by step."""
        decay = (-rate_D.double()).exp()
        h, ones = torch.zeros(8).double(), torch.zeros(8).double()
        for x in x_PD.double():
            h, ones = decay * h + x, decay * ones + 1
        return h / ones

    for start, stop in zip(cuts, cuts[1:], strict=False):
        last = 2 + (start - 5 - 2) // 4 * 4
        for t in range(start, stop):
            for h in range(4):
                g = h // 2
                keys, values = (
                    torch.stack([*x[:2].double(), *(state(x[s : s + 4], rates[n, g]) for s in range(2, last, 4)), *x[last : t + 1].double()])
                    for n, x in enumerate((k[0, g], v[0, g]))
                )
                torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], keys, values), rtol=1e-4, atol=1e-5)


def test_fitted_decays_weigh_the_tokens_that_dense_attention_reads() -> None:
    """Planted: of each chunk of four, dense attention reads the last token alone (or the first)."""
    random = torch.Generator().manual_seed(0)
    for read_at, sign in ((3, 1.0), (0, -1.0)):
        q, k = torch.ones(2, 1, 42, 4), torch.zeros(2, 1, 42, 4)
        k[:, :, 2 + read_at :: 4] = 4.0
        v = torch.randn(2, 1, 42, 4, generator=random)
        out = torch.stack([torch.stack([over(q[b, 0, t], k[b, 0, : t + 1], v[b, 0, : t + 1]) for t in range(42)]) for b in range(2)])[:, None]
        rates = fit_rates([(q, k, v, out.float(), 0.5)], 4, 4, 2, 60, 0)
        assert float((sign * rates[1]).min()) > 0.5
