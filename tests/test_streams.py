"""Streams are pure functions of (seed, step) and give every row its turn (T8, A6), against rows worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.store.shards import ActivationStore, ActivationWriter
from rarefy.streams import LiveStream, StoreStream, TensorStream, windows
from site_models import VOCAB, build

N, SIZE = 53, 7


def rows(n=N, d=3):
    return torch.arange(n * d, dtype=torch.float32).view(n, d)


def first(stream, count, start=0):
    return list(itertools.islice(stream.batches(start), count))


def tensors(seed=0, **kw):
    return TensorStream(rows(), SIZE, seed=seed, **kw)


def live(model=None, seed=0, **kw):
    ids_NT = torch.randint(0, VOCAB, (11, 6), generator=torch.Generator().manual_seed(5))
    settings = {"site": "layers.1.resid_post", "buffer": 4, "at_once": 3, "skip": 1, "size": 6, **kw}
    return LiveStream(model or build("llama"), settings.pop("site"), ids_NT, seed=seed, **settings)


@pytest.fixture
def stored(tmp_path):
    with ActivationWriter(tmp_path / "s", 3, "float32", {"a": 1}) as writer:
        writer.append(rows())
    return lambda seed=0: StoreStream(ActivationStore(tmp_path / "s"), SIZE, seed=seed)


@pytest.fixture(params=["tensor", "store", "live"])
def make(request):
    return request.getfixturevalue("stored") if request.param == "store" else {"tensor": tensors, "live": live}[request.param]


def test_a_batch_depends_on_seed_and_step_alone(make):
    whole = first(make(), 24)
    assert all(x is y for x, y in whole)
    for start in (0, 1, 6, 7, 13, 23):
        again = first(make(), 24 - start, start)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[start:], again, strict=True))
    stream = make()       # one object read twice over, and two readings that alternate
    one, two = stream.batches(3), stream.batches(9)
    for step in range(5):
        assert torch.equal(next(one)[0], whole[3 + step][0]) and torch.equal(next(two)[0], whole[9 + step][0])
    assert not torch.equal(first(make(seed=1), 1)[0][0], whole[0][0])
    assert make().made_from == make().made_from != make(seed=1).made_from


def test_the_global_generator_is_neither_read_nor_moved(make):
    torch.manual_seed(1)
    a = first(make(), 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = first(make(), 3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


def test_tensor_rows_come_at_most_once_an_epoch_and_all_in_turn():
    an_epoch = N // SIZE
    seen = [x for x, _ in first(tensors(), 40 * an_epoch)]
    for epoch in range(40):
        part = torch.cat(seen[epoch * an_epoch : (epoch + 1) * an_epoch])[:, 0] / 3
        assert len(part.unique()) == an_epoch * SIZE and set(part.long().tolist()) <= set(range(N))
    assert len(torch.cat(seen).unique(dim=0)) == N      # none is left out for good
    orders = {tuple(torch.cat(seen[e * an_epoch : (e + 1) * an_epoch])[:, 0].tolist()) for e in range(40)}
    assert len(orders) == 40


def test_targets_keep_to_their_rows():
    for x, y in first(TensorStream(rows(), SIZE, y_NE=-rows(d=3)[:, :2]), 20):
        assert torch.equal(y, -x[:, :2])


def test_store_rows_come_once_in_every_n(stored):
    seen = torch.cat([x for x, _ in first(stored(), 3 * N)])      # SIZE * 3 epochs
    for epoch in range(3 * SIZE):
        assert torch.equal(seen[epoch * N : (epoch + 1) * N].sort(0).values, rows())


@torch.no_grad()
def test_live_rows_are_the_models_own():
    """Hidden states as transformers returns them: every row of a buffer is one of them, and each comes once."""
    model, stream = build("llama"), live(target="layers.0.resid_post")
    states = model(stream.windows_NT, output_hidden_states=True).hidden_states       # after the last layer comes the final norm
    deep = torch.cat([model.model.layers[1](states[1][i : i + 1], position_embeddings=_rotary(model, states[1])) for i in range(11)])
    want_x, want_y = deep[:, 1:].flatten(0, 1), states[1][:, 1:].flatten(0, 1)
    epoch = [stream.fill(number) for number in range(2)]
    found = []
    for x, y in epoch:
        assert len(x) == 4 * 5
        for row, target in zip(x, y, strict=True):
            at = int((want_x - row).abs().sum(-1).argmin())
            torch.testing.assert_close(row, want_x[at], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(target, want_y[at], atol=1e-5, rtol=1e-5)
            found.append(at)
    assert len(set(found)) == len(found) == 40           # two buffers of an epoch share no context
    contexts = [sorted({at // 5 for at in found[:20]}), sorted({at // 5 for at in found[20:]})]
    assert [len(c) for c in contexts] == [4, 4]
    for x, y in first(stream, 8):
        assert x.shape == y.shape == (6, 32) and not torch.equal(x, y)


def _rotary(model, states):
    return model.model.rotary_emb(states, torch.arange(states.shape[1])[None])


def test_live_rows_are_mixed_across_contexts_and_epochs_differ():
    stream = live()
    x, _ = stream.fill(0)
    again, _ = stream.fill(2)        # 11 contexts make two buffers of four an epoch: buffer 2 begins the next
    assert not torch.equal(x.sort(0).values, again.sort(0).values)
    deal = live(buffer=11).fill(0)[0]
    other = live(buffer=11, seed=1).fill(0)[0]
    assert not torch.equal(deal, other) and torch.equal(deal.sort(0).values, other.sort(0).values)


def test_what_a_stream_is_made_from_names_every_difference():
    base = live().made_from
    other = build("llama")
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    for changed in (
        live(other), live(site="layers.0.resid_post"), live(target="layers.0.resid_post"), live(buffer=5), live(at_once=2), live(size=5),
        live(skip=0), live(seed=3),
    ):
        assert changed.made_from != base
    assert live(build("llama")).made_from == base
    x = rows()
    base = TensorStream(x, SIZE).made_from
    for changed in (
        TensorStream(x + 1e-6, SIZE), TensorStream(x, SIZE + 1), TensorStream(x, SIZE, seed=1), TensorStream(x, SIZE, y_NE=x.clone()),
        TensorStream(x.double(), SIZE), TensorStream(x.view(N * 3, 1), SIZE),
    ):
        assert changed.made_from != base
    assert TensorStream(x, SIZE, y_NE=x * 2).made_from != TensorStream(x, SIZE, y_NE=x * 3).made_from


def test_an_alias_names_the_same_stream():
    assert live(site="blocks.1.hook_resid_post").made_from == live().made_from
    assert torch.equal(live(site="blocks.1.hook_resid_post").fill(0)[0], live().fill(0)[0])


@pytest.mark.parametrize("wrong, says", [
    (lambda: TensorStream(rows(), N + 1), f"in 1..{N}"),
    (lambda: TensorStream(rows(), 0), "size=0"),
    (lambda: TensorStream(rows()[0], 1), r"shape \[3\]"),
    (lambda: TensorStream(rows()[:0], 1), "at least one row"),
    (lambda: TensorStream(rows(), 5, y_NE=rows(4)), "one target a row"),
    (lambda: next(tensors().batches(-1)), "start_step=-1"),
    (lambda: next(live().batches(-1)), "start_step=-1"),
    (lambda: live(size=21), "larger than the buffer of 20"),
    (lambda: live(skip=6), "tokens > 6"),
    (lambda: live(skip=-1), "skip=-1"),
    (lambda: live(at_once=0), "at_once=0"),
    (lambda: live(site="layers.*.resid_post"), "names 2 sites"),
    (lambda: live(site="layers.9.resid_post"), "no site"),
    (lambda: windows([]), "no contexts"),
])
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(BadInput, match=says):
        wrong()
