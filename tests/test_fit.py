"""The training loop against loops written out by hand, and what it does when it is stopped, fed wrongly or taken up again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from rarefy import fit
from rarefy.cost import Cost
from rarefy.errors import BadInput, Damaged, Halted
from rarefy.fit import Recipe, train
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.gated import Gated
from rarefy.latents.jumprelu import JumpReLU
from rarefy.latents.random import RandomDictionary
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.method import Loss, Sparse
from rarefy.store.checkpoint import checkpoints, load_checkpoint
from rarefy.store.lines import read_lines
from rarefy.streams import LiveStream, StoreStream, TensorStream
from site_models import VOCAB, build

D, F, B, STEPS = 7, 61, 32, 12


def rows(n=150, d=D, dtype=torch.float64):
    made = torch.Generator().manual_seed(3)
    codes = torch.relu(torch.randn(n, 24, generator=made, dtype=torch.float64) - 0.8)
    return (codes @ torch.randn(24, d, generator=made, dtype=torch.float64) + 0.3).to(dtype)


def stream(dtype=torch.float64, size=B, seed=0):
    return TensorStream(rows(dtype=dtype), size, seed=seed)


MAKE = {
    "topk": lambda **kw: TopK(D, F, **{"k": 2, "dead_after": 40, "aux_k": 3, **kw}),
    "batch_topk": lambda **kw: BatchTopK(D, F, **{"k": 2, "dead_after": 40, "aux_k": 3, "momentum": 0.8, **kw}),
    "relu": lambda **kw: ReLU(D, F, **{"warmup": 5, "l1": 0.1, **kw}),
    "gated": lambda **kw: Gated(D, F, **{"warmup": 5, **kw}),
    "jumprelu": lambda **kw: JumpReLU(D, F, **{"warmup": 5, "bandwidth": 0.3, "theta": 0.05, **kw}),
}


def made(name="topk", dtype=torch.float64, **kw):
    return MAKE[name](**kw).to(dtype)


def plan(*names, dtype=torch.float64, **kw):
    return {name: made(name, dtype, **kw) for name in names or MAKE}


def recipe(**kw):
    return Recipe(**{"steps": STEPS, "lr": 0.01, "save_every": 4, "log_every": 3, **kw})


def state(method):
    return {k: v.clone() for k, v in method.state_dict().items()}


def assert_same(a, b):
    a, b = (state(v) if isinstance(v, nn.Module) else v for v in (a, b))
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


def differs(a, b):
    return any(not torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ------------------------------------------------------------------------------------ the step, written out by hand


def naive_topk(m, p, x, idle):
    """Loss of Gao et al. 2024 with AuxK over dense matrices; also which latents fired."""
    pre = (x * m.scale - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"]
    keep = pre >= pre.sort(1, descending=True).values[:, m.k - 1 : m.k]
    z = pre.relu() * keep
    error = x * m.scale - (z @ p["W_dec_FD"] + p["b_dec_D"])
    loss = error.pow(2).mean()
    if (idle > m.dead_after).any():
        dead = torch.where(idle > m.dead_after, pre, -torch.inf)
        among = min(m.aux_k, int((idle > m.dead_after).sum()))
        zd = torch.where(dead >= dead.sort(1, descending=True).values[:, among - 1 : among], pre.relu(), 0.0)
        loss = loss + m.aux_alpha * (error.detach() - zd @ p["W_dec_FD"]).pow(2).mean()
    return loss, (z > 0).any(0)


def naive_relu(m, p, x, step):
    f = torch.relu((x * m.scale - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"])
    error = x * m.scale - f @ p["W_dec_FD"] - p["b_dec_D"]
    norms = p["W_dec_FD"].pow(2).sum(1).sqrt()
    return error.pow(2).mean() + m.l1 * min(1, step / m.warmup) * (f * norms).sum(1).mean() / D, (f > 0).any(0)


def naive_rate(r, step):
    """Linear rise to the peak, then level, then linear fall that would reach 0 one step after the last."""
    warmup = r.warmup if r.warmup else max(1, r.steps // 20)
    factor = (step + 1) / warmup if step < warmup else 1.0
    left = r.steps - step
    return factor * (left / (r.decay * r.steps) if left < r.decay * r.steps else 1.0)


def naive_train(m, batches, r):
    """Adam as Kingma and Ba have it; the decoder's gradient loses its radial part and its rows stay of norm 1 (TopK)."""
    m.initialise(batches[0], batches[0])
    p = {k: v.detach().clone() for k, v in m.named_parameters()}
    first, second, idle = {k: 0 * v for k, v in p.items()}, {k: 0 * v for k, v in p.items()}, torch.zeros(F)
    peak = r.lr or 2e-4 / math.sqrt(F / 16384)
    unit = isinstance(m, TopK)
    for step, x in enumerate(batches):
        live = {k: v.clone().requires_grad_() for k, v in p.items()}
        loss, fired = naive_topk(m, live, x, idle) if unit else naive_relu(m, live, x, step)
        grad = dict(zip(p, torch.autograd.grad(loss, list(live.values())), strict=True))
        idle = torch.where(fired, 0, idle + len(x))
        if unit:
            w = p["W_dec_FD"]
            grad["W_dec_FD"] = grad["W_dec_FD"] - (grad["W_dec_FD"] * w).sum(1, keepdim=True) * w
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grad.values()))
        shrink = min(1.0, r.clip / norm) if r.clip else 1.0
        for k in p:
            g = grad[k] * shrink
            first[k] = r.betas[0] * first[k] + (1 - r.betas[0]) * g
            second[k] = r.betas[1] * second[k] + (1 - r.betas[1]) * g * g
            m_hat, v_hat = first[k] / (1 - r.betas[0] ** (step + 1)), second[k] / (1 - r.betas[1] ** (step + 1))
            p[k] = p[k] - peak * naive_rate(r, step) * m_hat / (v_hat.sqrt() + 1e-8)
        if unit:
            p["W_dec_FD"] = p["W_dec_FD"] / p["W_dec_FD"].norm(dim=1, keepdim=True)
    return p, idle


RECIPES = [
    recipe(), recipe(lr=0.0), recipe(warmup=6, decay=0.0), recipe(warmup=1, decay=1.0), recipe(clip=0.0), recipe(clip=0.02), recipe(betas=(0.0, 0.5)),
    recipe(accumulate=4), recipe(steps=41, warmup=0),
]


@pytest.mark.parametrize("name", ["topk", "relu"])
@pytest.mark.parametrize("r", RECIPES, ids=range(len(RECIPES)))
def test_training_is_the_loop_written_out(name, r):
    batches = [x for x, _ in itertools.islice(stream().batches(), r.steps)]
    want, idle = naive_train(made(name), batches, r)
    got = made(name)
    train({"a": got}, stream(), r)
    for k, v in got.named_parameters():
        torch.testing.assert_close(v.detach(), want[k], rtol=1e-7, atol=1e-9, msg=k)
    assert torch.equal(got.idle_F.double(), idle.double())
    assert not got.training and all(p.grad is None for p in got.parameters())


def test_the_written_out_loop_uses_auxk_and_clips():
    """The oracle above is worth something only where its branches are taken."""
    batches = [x for x, _ in itertools.islice(stream().batches(), STEPS)]
    _, idle = naive_train(made(), batches, recipe())
    assert (idle > 40).any()
    tight, loose = (naive_train(made(), batches, recipe(clip=c))[0] for c in (0.02, 0.0))
    assert not torch.equal(tight["W_enc_FD"], loose["W_enc_FD"])


def test_decoder_rows_keep_norm_one_where_the_method_says_so():
    methods = plan()
    train(methods, stream(), recipe())
    for name, m in methods.items():
        off = float((m.W_dec_FD.detach().norm(dim=1) - 1).abs().max())
        assert (off > 1e-3) if name == "relu" else (off < 1e-12), name      # ReLU's penalty takes the constraint's place


# ------------------------------------------------------------------------------------------------ many on one stream


class Counting:
    """A stream that counts how often it is asked."""

    def __init__(self, inner):
        self.inner, self.made_from, self.count = inner, inner.made_from, 0

    def batches(self, start_step=0):
        for batch in self.inner.batches(start_step):
            self.count += 1
            yield batch


def test_many_methods_on_one_stream_are_each_as_if_alone():
    together, read = plan(), Counting(stream())
    train(together, read, recipe())
    assert read.count == STEPS
    for name in MAKE:
        alone = plan(name)
        train(alone, stream(), recipe())
        assert_same(alone[name], together[name])


def test_from_a_store_and_on_the_fly(tmp_path):
    from rarefy.store.shards import ActivationStore, ActivationWriter

    model = build("llama")
    ids_NT = torch.randint(0, VOCAB, (9, 8), generator=torch.Generator().manual_seed(5))
    live = LiveStream(model, "layers.0.resid_post", ids_NT, 16, buffer=4)
    rows_ND = torch.cat([live.fill(n)[0] for n in range(2)])
    with ActivationWriter(tmp_path / "s", 32, "bfloat16", {"a": 1}) as writer:
        writer.append(rows_ND.bfloat16())
    stored = StoreStream(ActivationStore(tmp_path / "s"), 16)
    for source in (live, stored):
        logs = []
        train({"a": TopK(32, 64, 8)}, source, recipe(steps=80, log_every=1), on_log=logs.append)
        fvu = [r["methods"]["a"]["fvu"] for r in logs]
        assert sum(fvu[-10:]) < 0.6 * sum(fvu[:10]), source
    # rows of a narrower dtype are those numbers: the same training on them in float32, bit for bit
    methods = [TopK(32, 64, 8) for _ in range(2)]
    train({"a": methods[0]}, TensorStream(rows_ND.bfloat16(), 16), recipe())
    train({"a": methods[1]}, TensorStream(rows_ND.bfloat16().float(), 16), recipe())
    assert_same(*methods)


def test_a_transcoder_learns_the_target():
    x = rows()
    y = x[:, :3] * 2 - 1
    logs = []
    train({"a": TopK(D, F, 6, d_out=3).double()}, TensorStream(x, B, y_NE=y), recipe(steps=300, lr=0.02, log_every=10), on_log=logs.append)
    assert logs[-1]["methods"]["a"]["fvu"] < 0.1 < logs[0]["methods"]["a"]["fvu"]


# ------------------------------------------------------------------------------------------- batches worked in pieces


@pytest.mark.parametrize("name", ["topk", "relu", "gated", "jumprelu"])
def test_four_pieces_of_eight_are_one_of_thirty_two(name):
    """T9, with every counter; AuxK comes on in between."""
    one, four, odd = (made(name) for _ in range(3))
    for m, pieces in ((one, 1), (four, 4), (odd, 5)):       # 5: pieces of 7, 7, 7, 7 and 4
        train({"a": m}, stream(), recipe(accumulate=pieces))
    for other in (four, odd):
        for k, v in one.state_dict().items():
            if v.is_floating_point():
                torch.testing.assert_close(other.state_dict()[k], v, rtol=1e-8, atol=1e-10, msg=k)
            else:
                assert torch.equal(other.state_dict()[k], v), k
    assert name != "topk" or (one.idle_F > 40).any()


@torch.no_grad()
def test_batch_topk_moves_its_threshold_once_a_step_whatever_the_pieces():
    """Each piece selects k a row of its own; the threshold moves by the mean of what the pieces kept least."""
    m, tau = made("batch_topk", aux_alpha=0.0), None
    for step, (x, _) in enumerate(itertools.islice(stream().batches(), 5)):
        if step == 0:
            m.initialise(x)
        least = []
        for piece in x.chunk(4):
            pre = ((piece * m.scale - m.b_dec_D) @ m.W_enc_FD.T + m.b_enc_F).relu().flatten()
            kept = pre.sort(descending=True).values[: m.k * len(piece)]
            least.append(float(kept[kept > 0].min()))
        tau = sum(least) / 4 if tau is None else 0.8 * tau + 0.2 * sum(least) / 4
    got = made("batch_topk", aux_alpha=0.0)
    with torch.enable_grad():       # at a rate so small that the weights above are those of every step
        train({"a": got}, stream(), recipe(steps=5, accumulate=4, lr=1e-13))
    assert float(got.tau) == pytest.approx(tau, rel=1e-9)
    assert int(got.seen) == 5 and got.scale == m.scale


def test_a_piece_does_not_see_what_its_predecessor_did_to_a_counter():
    """A latent that fires in the first piece only is idle for 0 rows, not for the rows of the other three."""
    m = Toy()
    train({"a": m}, TensorStream(torch.eye(8)[:, :3].contiguous(), 8), recipe(steps=3, accumulate=4, lr=1e-9))
    assert m.idle_F.tolist() == [0, 0, 0, 24] and int(m.calls) == 3


class Toy(Sparse):
    """Counts which of 4 inputs are ever non-zero; the fourth never is. `poison` makes loss or gradient NaN at a step."""

    name, unit, fitted, row_counters = "toy", "latent", "trained", ("idle_F",)

    def __init__(self, poison: str = "", at: int = -1, noisy: bool = False):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.poison, self.at, self.noisy = poison, at, noisy
        self.register_buffer("idle_F", torch.zeros(4, dtype=torch.long))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def loss(self, x, y):
        self.idle_F += len(x)
        self.idle_F[(x != 0).any(0).nonzero()[:, 0]] = 0
        self.calls += 1
        noise = torch.rand(()) if self.noisy else 1.0
        total = (self.w * x * noise - y).pow(2).mean() + self.w.pow(2).mean()
        if self.poison != "weights" and int(self.calls) == self.at + 1:
            total = {"loss": total * torch.nan, "grad": total + _NaNGradient.apply(self.w).sum(), "inf": total * torch.inf}[self.poison]
        return Loss(total, {"mse": total.detach()})

    def after_step(self, step):
        if self.poison == "weights" and step == self.at:
            self.w.data[1] = torch.inf

    def cost(self, density=None):
        return Cost(1, 1)


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return torch.zeros_like(w)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


# ------------------------------------------------------------------------------------------------------- the recipe


def outcome(r, tmp_path, name="relu"):
    """All that a run leaves: weights, moments, log steps, checkpoints."""
    m = made(name, torch.float32)
    train({"a": m}, stream(torch.float32), r, tmp_path)
    found = load_checkpoint(tmp_path / "checkpoints")
    log = [x["step"] for x in read_lines(tmp_path / "log.jsonl")]
    weights = tuple(v.tolist() for k, v in sorted(found.tensors.items()) if v.dtype == torch.float32 and "/step" not in k)
    return {"weights": str(weights), "log": log, "kept": [p.name for p in checkpoints(tmp_path / "checkpoints")]}


OTHER = {
    "steps": (STEPS + 1, "weights"), "lr": (0.02, "weights"), "warmup": (6, "weights"), "decay": (0.9, "weights"), "betas": ((0.5, 0.9), "weights"),
    "clip": (0.01, "weights"), "accumulate": (4, "weights"), "precision": ("bfloat16", "weights"), "save_every": (5, "kept"), "log_every": (5, "log"),
}


def test_every_field_of_the_recipe_is_in_the_table():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("name", OTHER)
def test_every_field_of_the_recipe_changes_something(name, tmp_path):
    other, where = OTHER[name]
    base, changed = outcome(recipe(), tmp_path / "a"), outcome(recipe(**{name: other}), tmp_path / "b")
    assert base[where] != changed[where]
    assert outcome(recipe(), tmp_path / "c") == base      # and nothing else does: the same recipe gives the same bits


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", 1.5), ("steps", True), ("lr", -1e-3), ("lr", math.nan), ("lr", "fast"),
    ("warmup", -1), ("warmup", STEPS + 1),
    ("warmup", 0.5),
    ("decay", 1.1), ("decay", -0.1), ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("clip", -1.0), ("clip", math.inf),
    ("accumulate", 0), ("precision", "float16"), ("save_every", 0), ("log_every", 0),
])
def test_the_recipe_names_what_is_out_of_range(name, value):
    with pytest.raises(BadInput, match=f"^{name}="):
        train(plan("topk"), stream(), recipe(**{name: value}))


def test_the_rate_of_a_method_follows_its_width():
    assert fit.Recipe(steps=1).lr == 0.0
    from rarefy.learner import peak_rate

    assert peak_rate(Recipe(steps=1), TopK(4, 16384 // 4, 2)) == pytest.approx(4e-4)
    assert peak_rate(Recipe(steps=1, lr=0.5), TopK(4, 64, 2)) == 0.5


def planted(n=4096, d=32, units=64):
    made = torch.Generator().manual_seed(11)
    atoms = nn.functional.normalize(torch.randn(units, d, generator=made), dim=1)
    codes = torch.rand(n, units, generator=made) * (torch.rand(n, units, generator=made) < 3 / units)
    return codes @ atoms + 0.01 * torch.randn(n, d, generator=made)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu", "gated", "jumprelu"])
def test_bfloat16_trains_about_as_well_on_float32_weights(name):
    x, fvu = planted(), {}
    for precision in ("float32", "bfloat16"):
        m = {"topk": TopK(32, 64, 4), "batch_topk": BatchTopK(32, 64, 4), "relu": ReLU(32, 64, l1=0.05), "gated": Gated(32, 64, l1=0.05),
             "jumprelu": JumpReLU(32, 64, sparsity=0.05, theta=0.05, bandwidth=0.3)}[name]
        logs = []
        train({"a": m}, TensorStream(x, 256), Recipe(steps=200, lr=0.01, precision=precision, log_every=1), on_log=logs.append)
        assert all(p.dtype == torch.float32 for p in m.parameters())
        assert all(b.dtype in (torch.float32, torch.long) for b in m.buffers())
        # master weights: updates far below bfloat16's resolution must not be lost
        assert any(not torch.equal(p, p.bfloat16().float()) for p in m.parameters())
        with torch.no_grad():
            fvu[precision] = float((m(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        assert fvu[precision] < 0.5 * logs[0]["methods"]["a"]["fvu"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.1, abs=0.005)


# ------------------------------------------------------------------------------------- stopped and taken up again


SOURCES = {
    "tensor": lambda: stream(torch.float32),
    "live": lambda: LiveStream(
        build("llama"), "layers.0.resid_post", torch.randint(0, VOCAB, (9, 8), generator=torch.Generator().manual_seed(5)), 12, buffer=4
    ),
}


def stopped(run, methods, source, r, at, how=signal.SIGINT):
    """Train until the log record of step `at`, which raises a signal."""
    def on_log(record):
        if record["step"] == at:
            os.kill(os.getpid(), how)

    with pytest.raises(Halted) as caught:
        train(methods, source, r, run, on_log=on_log)
    assert caught.value.signum == how
    return caught.value.step


@pytest.mark.parametrize("source, names, how", [
    ("tensor", tuple(MAKE), signal.SIGINT), ("tensor", ("topk", "relu"), signal.SIGTERM), ("live", ("topk",), signal.SIGTERM),
])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, source, names, how):
    """T6 and T1: stopped three times, at steps that are no multiple of save_every; log and moments agree too."""
    d = 32 if source == "live" else D
    def fresh():
        return {n: type(m)(d, *list(m.arguments.values())[1:]) for n, m in plan(*names, dtype=torch.float32).items()}

    r = recipe(log_every=1, precision="bfloat16" if how == signal.SIGTERM else "float32", accumulate=2)
    whole = fresh()
    train(whole, SOURCES[source](), r, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for at in (2, 5, 7):
        methods = fresh()
        # the record of step `at` is written while that step is at work; it ends there or after the next
        assert stopped(tmp_path / "parts", methods, SOURCES[source](), r, at, how) in (at, at + 1)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        assert not any(m.training for m in methods.values())
    last = fresh()
    train(last, SOURCES[source](), r, tmp_path / "parts")
    for name in whole:
        assert_same(whole[name], last[name])
    a, b = (load_checkpoint(tmp_path / p / "checkpoints") for p in ("whole", "parts"))
    assert a.step == b.step == STEPS and a.meta == b.meta
    assert_same({k: v for k, v in a.tensors.items() if k != "rng/torch"}, {k: v for k, v in b.tensors.items() if k != "rng/torch"})
    logs = [[{"step": x["step"], **x["methods"]} for x in read_lines(tmp_path / p / "log.jsonl")] for p in ("whole", "parts")]
    assert logs[0] == logs[1] and [x["step"] for x in logs[0]] == list(range(1, STEPS + 1))


def test_a_method_that_draws_random_numbers_goes_on_with_the_same_ones(tmp_path):
    torch.manual_seed(0)
    whole = Toy(noisy=True)
    train({"a": whole}, TensorStream(torch.rand(20, 3), 5), recipe())
    torch.manual_seed(0)
    source = TensorStream(torch.rand(20, 3), 5)
    stopped(tmp_path, {"a": Toy(noisy=True)}, source, recipe(log_every=1), 5)
    torch.manual_seed(99)
    again = Toy(noisy=True)
    train({"a": again}, source, recipe(log_every=1), tmp_path)
    assert_same(whole, again)


def test_signals_while_saving_corrupt_nothing(tmp_path, monkeypatch):
    save = fit.save_checkpoint
    def interrupted(root, step, tensors, meta):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        save(root, step, tensors, meta)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fit, "save_checkpoint", interrupted)
    with pytest.raises(Halted) as caught:
        train(plan("topk"), stream(), recipe(), tmp_path)
    assert caught.value.step == 5 and caught.value.signum == signal.SIGINT      # saved at 4; one more step, saved, end
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found.step == 5 and not found.skipped
    with pytest.raises(Halted) as caught:      # a signal during the last save still ends with Halted, and all is there
        train(plan("topk"), stream(), recipe(save_every=4), tmp_path)
    monkeypatch.undo()
    while load_checkpoint(tmp_path / "checkpoints").step < STEPS:
        train(plan("topk"), stream(), recipe(), tmp_path)
    last, whole = plan("topk"), plan("topk")
    train(last, stream(), recipe(), tmp_path)
    train(whole, stream(), recipe())
    assert_same(last["topk"], whole["topk"])


def test_a_signal_during_the_last_save_is_not_swallowed(tmp_path, monkeypatch):
    save = fit.save_checkpoint
    monkeypatch.setattr(fit, "save_checkpoint", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), save(*a)))
    with pytest.raises(Halted) as caught:
        train(plan("topk"), stream(), recipe(save_every=100), tmp_path)
    assert caught.value.step == STEPS and load_checkpoint(tmp_path / "checkpoints").step == STEPS


def test_without_a_run_folder_ctrl_c_is_ctrl_c():
    methods, handler = plan("topk"), signal.getsignal(signal.SIGTERM)
    def on_log(record):
        assert signal.getsignal(signal.SIGTERM) is handler
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(methods, stream(), recipe(), on_log=on_log)
    assert not methods["topk"].training


def test_a_thread_trains_without_touching_signals(tmp_path):
    methods, errors = plan("topk"), []
    def work():
        try:
            train(methods, stream(), recipe(), tmp_path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and load_checkpoint(tmp_path / "checkpoints").step == STEPS


def test_a_finished_run_is_given_back_as_it_is(tmp_path):
    first, again, read = plan("topk"), plan("topk"), Counting(stream())
    train(first, stream(), recipe(), tmp_path)
    train(again, read, recipe(), tmp_path)
    assert_same(first["topk"], again["topk"])
    assert read.count == 0


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    whole = plan("topk")
    train(whole, stream(), recipe(), tmp_path)
    newest = checkpoints(tmp_path / "checkpoints")[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 4
    newest.write_bytes(data)
    said, again = [], plan("topk")
    train(again, stream(), recipe(), tmp_path, on_log=said.append)
    assert said[0]["step"] == 8 and newest.parent.name in said[0]["skipped"][0]
    assert_same(whole["topk"], again["topk"])
    assert [x["step"] for x in read_lines(tmp_path / "log.jsonl")] == [3, 6, 9, 12]


# ----------------------------------------------------------------------------------- other settings, data or model (T4)


def llama_stream(change=0.0):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] += change
    return LiveStream(model, "layers.0.resid_post", torch.randint(0, VOCAB, (9, 8), generator=torch.Generator().manual_seed(5)), 12, buffer=4)


@pytest.mark.parametrize("field", OTHER)
def test_another_recipe_is_refused_and_shown(tmp_path, field):
    stopped(tmp_path, plan("topk"), stream(), recipe(log_every=3), 3)
    changed = recipe(**{field: OTHER[field][0]})
    was, now = getattr(recipe(), field), getattr(changed, field)
    what = rf"recipe\.{field}\[0\]: was {was[0]}, now {now[0]}" if field == "betas" else rf"recipe\.{field}: was {was!r}, now {now!r}"
    m = plan("topk")
    before = state(m["topk"])
    with pytest.raises(BadInput, match=what):
        train(m, stream(), changed, tmp_path)
    assert_same(before, m["topk"])


@pytest.mark.parametrize("methods, source, says", [
    (lambda: plan("topk", k=5), stream, r"methods\.topk\.k: was 2, now 5"),
    (lambda: plan("topk", seed=2), stream, r"methods\.topk\.seed: was 0, now 2"),
    (lambda: plan("topk", dtype=torch.float32), stream, r"methods\.topk\.dtype: was 'float64', now 'float32'"),
    (lambda: plan("topk", "relu"), stream, r"methods\.relu: was absent, now"),
    (lambda: {"topk": made("relu")}, stream, r"methods\.topk\.method: was 'latents/topk', now 'latents/relu'"),
    (lambda: {"other": made("topk")}, stream, r"methods\.other: was absent.*methods\.topk: was .*now absent"),
    (lambda: plan("topk"), lambda: TensorStream(rows() + 1e-9, B), r"data\.rows: was '\w{32}', now '\w{32}'"),
    (lambda: plan("topk"), lambda: TensorStream(rows(), B, y_NE=rows() * 2), r"data\.rows: was"),
    (lambda: plan("topk"), lambda: stream(size=16), r"data\.size: was 32, now 16"),
    (lambda: plan("topk"), lambda: stream(seed=5), r"data\.seed: was 0, now 5"),
])
def test_other_methods_or_data_are_refused_and_shown(tmp_path, methods, source, says):
    stopped(tmp_path, plan("topk"), stream(), recipe(), 3)
    found = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(BadInput, match=says):
        train(methods(), source(), recipe(), tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == found


def test_activations_of_another_model_are_refused_and_shown(tmp_path):
    def fresh():
        return {"a": TopK(32, 64, 8)}

    stopped(tmp_path, fresh(), llama_stream(), recipe(), 3)
    with pytest.raises(BadInput, match=r"data\.model: was '\w{32}', now '\w{32}'"):
        train(fresh(), llama_stream(1e-4), recipe(), tmp_path)
    train(fresh(), llama_stream(), recipe(), tmp_path)


def test_a_run_is_not_begun_over_unless_asked_to_go_on(tmp_path):
    train(plan("topk"), stream(), recipe(steps=3), tmp_path)
    with pytest.raises(BadInput, match="already holds a training run"):
        train(plan("topk"), stream(), recipe(steps=3), tmp_path, resume=False)


def test_a_checkpoint_of_another_make_is_refused(tmp_path):
    stopped(tmp_path, plan("topk"), stream(), recipe(), 3)
    found = load_checkpoint(tmp_path / "checkpoints")
    for key, says in (
        ("topk/method/W_enc_FD", "W_enc_FD is missing"), ("topk/optimiser/1/exp_avg", "exp_avg is missing"), ("rng/torch", "rng/torch"),
    ):
        kept = {k: v for k, v in found.tensors.items() if k != key}
        fit.save_checkpoint(tmp_path / key.replace("/", "_") / "checkpoints", 3, kept, found.meta)
        with pytest.raises(Damaged, match=says):
            train(plan("topk"), stream(), recipe(), tmp_path / key.replace("/", "_"))
    fit.save_checkpoint(tmp_path / "foreign" / "checkpoints", 3, {"w": torch.ones(2)}, {"s": 1})
    with pytest.raises(BadInput, match="was begun with other settings"):
        train(plan("topk"), stream(), recipe(), tmp_path / "foreign")


def test_a_folder_that_is_being_trained_in_is_refused(tmp_path):
    """T5 within a process; tests/crash has the one with two."""
    said = []
    def on_log(record):
        with pytest.raises(BadInput, match=f"is being written by process {os.getpid()}") as caught:
            train(plan("topk"), stream(), recipe(), tmp_path)
        said.append(str(caught.value))

    train(plan("topk"), stream(), recipe(), tmp_path, on_log=on_log)
    assert len(said) == STEPS // 3
    train(plan("topk"), stream(), recipe(), tmp_path)


# -------------------------------------------------------------------------------------------------- NaN and inf (T7)


class Spoilt:
    """A stream whose batch `at` holds a bad number in its inputs or targets."""

    def __init__(self, at, where, value):
        self.at, self.where, self.value, self.made_from = at, where, value, {"a": 1}

    def batches(self, start_step=0):
        for step, (x, _) in enumerate(stream().batches(start_step), start_step):
            x, y = x.clone(), x.clone()
            if step == self.at:
                (x if self.where == "rows" else y)[5, 2] = self.value
            yield x, y


@pytest.mark.parametrize("where, value, word", [("rows", math.nan, "NaN"), ("rows", -math.inf, "inf"), ("targets", math.nan, "NaN")])
def test_bad_data_is_named_and_no_method_moves(tmp_path, where, value, word):
    got = plan()
    with pytest.raises(BadInput, match=rf"training {where} of step 6: 1 of 224 .* first a {word} at \[5, 2\]"):
        train(got, Spoilt(6, where, value), recipe(), tmp_path)
    six = plan()
    with pytest.raises(BadInput, match="ended at step 6 of 12"):
        train(six, Short(6), recipe())
    for name in got:
        assert_same(six[name], got[name])
    assert load_checkpoint(tmp_path / "checkpoints").step == 4


class Short:
    """A stream that ends."""

    def __init__(self, count):
        self.count, self.made_from = count, {"a": 1}

    def batches(self, start_step=0):
        yield from itertools.islice(stream().batches(start_step), self.count - start_step)


@pytest.mark.parametrize("poison, says", [("loss", "loss became nan"), ("inf", "loss became inf"), ("grad", "norm of its gradient became nan")])
@pytest.mark.parametrize("order", [("topk", "bad", "relu"), ("bad", "topk"), ("relu", "bad")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_lost_stops_all_before_any_has_moved(tmp_path, poison, says, order, accumulate):
    x = rows(d=3, dtype=torch.float32)
    def fresh(bad):
        return {n: bad if n == "bad" else (TopK(3, F, 2, dead_after=40) if n == "topk" else ReLU(3, F)) for n in order}

    got = fresh(Toy(poison, at=6))
    with pytest.raises(BadInput) as caught:
        train(got, TensorStream(x, B), recipe(accumulate=accumulate), tmp_path)
    text = str(caught.value)
    assert text.startswith("bad: ") and says in text and "step 6" in text and "batch 6" in text and "stream.batches(6)" in text
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found.step == 4
    # what six good steps of the same schedule give, from the checkpoint of step 4 and the two steps after it
    six = fresh(Toy())
    with pytest.raises(BadInput, match="ended at step 6"):
        train(six, _Six(x), recipe(accumulate=accumulate))
    for name in order:
        assert_same(six[name], got[name])
        assert not got[name].training and all(p.grad is None for p in got[name].parameters())


class _Six(Short):
    def __init__(self, x):
        super().__init__(6)
        self.x = x

    def batches(self, start_step=0):
        yield from itertools.islice(TensorStream(self.x, B).batches(start_step), self.count - start_step)


def test_weights_that_became_infinite_are_never_saved(tmp_path):
    """The step before a loss is lost may be the one that is saved."""
    m = Toy("weights", at=7)
    with pytest.raises(BadInput, match="a: w became NaN or inf; it is not saved"):
        train({"a": m}, TensorStream(rows(d=3, dtype=torch.float32), B), recipe(), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints").step == 4


def test_what_a_good_checkpoint_holds_trains_on_after_a_lost_loss(tmp_path):
    """The checkpoint of step 4 under a method that is not poisoned (told so in the meta) ends where an untroubled run does."""
    x = rows(d=3, dtype=torch.float32)
    with pytest.raises(BadInput, match="loss became"):
        train({"a": Toy("loss", at=6)}, TensorStream(x, B), recipe(), tmp_path)
    found, healed, whole = load_checkpoint(tmp_path / "checkpoints"), Toy("loss", at=99), Toy("loss", at=99)
    found.meta["made"]["methods"]["a"]["at"] = 99
    fit.save_checkpoint(tmp_path / "b" / "checkpoints", 4, found.tensors, found.meta)
    train({"a": healed}, TensorStream(x, B), recipe(), tmp_path / "b")
    train({"a": whole}, TensorStream(x, B), recipe())
    assert_same(healed, whole)


# ------------------------------------------------------------------------------------------------------------- the log


def test_the_log_is_what_the_callback_hears(tmp_path):
    heard = []
    m = plan("topk", "relu")
    train(m, stream(), recipe(), tmp_path, on_log=heard.append)
    assert read_lines(tmp_path / "log.jsonl") == json.loads(json.dumps(heard))
    assert [r["step"] for r in heard] == [3, 6, 9, 12] and {r["of"] for r in heard} == {STEPS}
    for r in heard:
        assert set(r) == {"step", "of", "seconds", "rows_per_s", "methods"} and set(r["methods"]) == {"topk", "relu"}
        assert r["rows_per_s"] == pytest.approx(r["step"] * B / r["seconds"], rel=0.2) or r["seconds"] < 0.01
        for values in r["methods"].values():
            assert {"loss", "mse", "fvu", "l0", "dead"} <= set(values) and all(isinstance(v, float) for v in values.values())
    train({"a": made()}, stream(), recipe(steps=7), tmp_path / "b")
    assert [r["step"] for r in read_lines(tmp_path / "b" / "log.jsonl")] == [3, 6, 7]      # the last step too


@torch.no_grad()
def test_logged_numbers_are_those_of_the_batch_by_hand():
    heard, m = [], made("relu")
    with torch.enable_grad():
        train({"a": m}, stream(), recipe(steps=1, log_every=1), on_log=heard.append)
    x, fresh = next(stream().batches())[0], made("relu")
    fresh.initialise(x)
    p = dict(fresh.named_parameters())
    f = torch.relu((x * fresh.scale - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"])
    y = (f @ p["W_dec_FD"] + p["b_dec_D"]) / fresh.scale
    got = heard[0]["methods"]["a"]
    assert got["fvu"] == pytest.approx(float((x - y).pow(2).sum() / (x - x.mean(0)).pow(2).sum()))
    assert got["l0"] == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert got["loss"] == pytest.approx(got["mse"] + got["l1"]) and got["mse"] == pytest.approx(float(((x - y) * fresh.scale).pow(2).mean()))


def test_records_of_a_run_that_died_before_its_first_checkpoint_are_dropped(tmp_path):
    def die(record):
        if record["step"] == 3:
            raise RuntimeError("dead")

    with pytest.raises(RuntimeError):
        train(plan("topk"), stream(), recipe(), tmp_path, on_log=die)
    assert len(read_lines(tmp_path / "log.jsonl")) == 1
    train(plan("topk"), stream(), recipe(), tmp_path)
    assert [r["step"] for r in read_lines(tmp_path / "log.jsonl")] == [3, 6, 9, 12]


# ------------------------------------------------------------------------------------------------------- wrong plans


def test_plans_that_cannot_be_trained_are_refused():
    with pytest.raises(BadInput, match="plan is empty"):
        train({}, stream(), recipe())
    with pytest.raises(BadInput, match="a: latents/random is not trained"):
        train({"a": RandomDictionary(D, F, 2)}, stream(), recipe())
    same = made()
    with pytest.raises(BadInput, match="a and b are the same method"):
        train({"a": same, "b": same}, stream(), recipe())
    with pytest.raises(BadInput, match="no parameter of latents/topk requires a gradient"):
        train({"a": made().requires_grad_(False)}, stream(), recipe())
