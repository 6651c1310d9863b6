"""Dictionaries of several places: skip transcoders, crosscoders, one dictionary for many layers, cross-layer transcoders.

Against formulas written out site by site, hooks put in by hand, scipy's clustering, and planted features.

Shape letters: B, N = rows, D, E = widths, F = latents, S = sites or layers, T = tokens.
"""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch.nn.functional import normalize

from rarefy import catalogue
from rarefy.errors import BadInput
from rarefy.fit import Recipe, train
from rarefy.frontier import Judge
from rarefy.jobs.dictionaries import SKIP
from rarefy.jobs.judge_joined import Lost, SplicedLayers, SplicedRow, judge_joined, spread_over_layers
from rarefy.latents.batch_topk import BatchTopK
from rarefy.latents.cross_layer import CrossLayer
from rarefy.latents.crosscoder import histogram, of_models, relative_norms
from rarefy.latents.dictionary import Dictionary
from rarefy.latents.groups import angular_distances, layer_groups
from rarefy.latents.layers import LayerSpread
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.site import replaced
from rarefy.streams import Flow, LiveStream, TensorStream
from site_models import VOCAB, build


def rows(n: int = 40, d: int = 12, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=g) * torch.linspace(0.3, 4, d) + torch.linspace(-2, 2, d)


def moved(method, x, y=None):
    """In float64, with data statistics, and parameters off their symmetric start."""
    method = method.double()
    method.initialise(x, y)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return method


def kept(pre: torch.Tensor, k: int) -> torch.Tensor:
    return (pre * (pre >= pre.sort(1, descending=True).values[:, k - 1 : k])).relu()


# --------------------------------------------------------------------------------------------------- skip connection


@pytest.mark.parametrize("cls, more", [(TopK, {"k": 4}), (ReLU, {"l1": 0.0, "warmup": 0})])
def test_skip_transcoder_is_the_papers_formula(cls, more):
    x, y = rows(), rows(d=7, seed=9) + 0.5 * rows()[:, :7]
    m = moved(cls(12, 23, d_out=7, skip=True, **more), x, y)
    s, t = m.scale, m.scale_out
    torch.testing.assert_close(torch.stack([s, t]), torch.stack([(v - v.mean(0)).pow(2).mean().rsqrt() for v in (x, y)]), rtol=1e-6, atol=0)
    pre = s * x @ m.W_enc_FD.T + m.b_enc_F
    f = kept(pre, 4) if cls is TopK else pre.relu()
    y_hat = f @ m.W_dec_FD + m.b_dec_D + s * x @ m.W_skip_ED.T
    torch.testing.assert_close(m(x), y_hat / t)
    want = (y_hat - t * y).pow(2).mean()
    loss = m.loss(x, y)
    torch.testing.assert_close(loss.parts["mse"], want)
    torch.testing.assert_close(loss.parts["fvu"], ((y_hat - t * y).pow(2).sum() / (t * (y - y.mean(0))).pow(2).sum()).detach())
    p = [m.W_enc_FD, m.W_dec_FD, m.b_dec_D, m.W_skip_ED]
    for a, b in zip(torch.autograd.grad(loss.parts["mse"], p), torch.autograd.grad(want, p), strict=True):
        torch.testing.assert_close(a, b)


def test_skip_starts_at_zero_or_at_the_affine_map():
    x = rows(200)
    y = x @ rows(12, 7, seed=1) + torch.arange(7.0)
    zero, fitted = (TopK(12, 23, k=4, d_out=7, skip=skip).double() for skip in (True, "least_squares"))
    for m in (zero, fitted):
        m.initialise(x, y)
        m.b_enc_F.data.fill_(-1e3)                          # no latent fires: what is left is the affine path
    torch.testing.assert_close(zero(x), y.mean(0).expand_as(y), rtol=1e-5, atol=1e-5)
    assert (fitted(x) - y).pow(2).sum() < 1e-5 * (y - y.mean(0)).pow(2).sum()


def test_the_affine_start_does_not_fit_noise():
    """Half as many rows as channels, and targets that have nothing to do with them: the mean is the best guess."""
    x, y, unseen = rows(40, 80), rows(40, 5, seed=7), rows(40, 80, seed=11)
    m = TopK(80, 23, k=4, d_out=5, skip="least_squares").double()
    m.initialise(x, y)
    m.b_enc_F.data.fill_(-1e3)
    assert (m(unseen) - y.mean(0)).pow(2).sum() < 0.1 * (y - y.mean(0)).pow(2).sum()


def test_skip_is_refused_where_nothing_is_predicted():
    with pytest.raises(BadInput, match="skip=True is for transcoders"):
        TopK(12, 23, k=4, skip=True)
    with pytest.raises(BadInput, match="skip='half'"):
        TopK(12, 23, k=4, d_out=7, skip="half")
    plain, skip = TopK(12, 23, k=4, d_out=7), TopK(12, 23, k=4, d_out=7, skip=True)
    assert skip.cost().flops - plain.cost().flops == 2 * 12 * 7


# ------------------------------------------------------------------------------------------------------- crosscoders


def test_crosscoder_is_a_sum_over_sites():
    """Each site scaled to mean square 1, encoders added up, squared errors added up; L1 with the norms of all sites added."""
    a, b = rows(60, 5) * 30, rows(60, 8, seed=8)
    x = torch.cat([a, b], -1)
    m = moved(ReLU([5, 8], 21, l1=0.3, warmup=0), x)
    pre, made, errors = m.b_enc_F, [], 0.0
    for site, part in ((a, slice(0, 5)), (b, slice(5, 13))):
        s = m.scale[part][0]
        torch.testing.assert_close(m.scale[part], (site - site.mean(0)).pow(2).mean().rsqrt().expand(site.shape[1]), rtol=1e-6, atol=0)
        pre = pre + (s * site - m.b_dec_D[part]) @ m.W_enc_FD[:, part].T
    for site, part in ((a, slice(0, 5)), (b, slice(5, 13))):
        s = m.scale[part][0]
        made.append((pre.relu() @ m.W_dec_FD[:, part] + m.b_dec_D[part]) / s)
        errors = errors + (s * (made[-1] - site)).pow(2).sum(-1).mean()
    torch.testing.assert_close(m(x), torch.cat(made, -1))
    norms = m.W_dec_FD[:, :5].norm(dim=1) + m.W_dec_FD[:, 5:].norm(dim=1)
    parts = m.loss(x, x).parts
    torch.testing.assert_close(parts["mse"], errors / 13)
    torch.testing.assert_close(parts["l1"], 0.3 * (pre.relu() * norms).sum(-1).mean() / 13)
    torch.testing.assert_close(relative_norms(m)[:, 1], (m.W_dec_FD[:, 5:].norm(dim=1) / norms).detach())


DICTIONARIES = [e for e in catalogue.ENTRIES if e.unit == "latent" and issubclass(e.load(), Dictionary)]


@pytest.mark.parametrize("card", DICTIONARIES, ids=lambda e: e.name)
def test_every_dictionary_makes_a_crosscoder(card):
    x = torch.cat([rows(30, 6) * 50, rows(30, 6, seed=2)], -1).float()
    m = card.load()([6, 6], 24, **({"k": 4} if "k" in inspect.signature(inspect.unwrap(card.load().__init__)).parameters else {}))
    m.initialise(x)
    torch.testing.assert_close((m.scaled(x) - m.scaled(x).mean(0)).view(30, 2, 6).pow(2).mean((0, 2)), torch.ones(2))
    if m.fitted == "trained":
        m.train()
        m.loss(x, x).total.backward()
        m.before_step()
        m.after_step(0)
    assert m.eval()(x).shape == (30, 12)


@pytest.mark.slow
def test_model_diffing_finds_who_owns_a_feature():
    """Two models: six features that both have, in directions of their own, and six that only one has, each."""
    g = torch.Generator().manual_seed(0)
    both_a, both_b, only_a, only_b = (normalize(torch.randn(6, 24, generator=g), dim=-1) for _ in range(4))
    shared, first, second = ((torch.rand(4000, 6, generator=g) < 0.1) * (0.5 + torch.rand(4000, 6, generator=g)) for _ in range(3))
    x = torch.cat([shared @ both_a + first @ only_a, shared @ both_b + second @ only_b], -1)
    m = BatchTopK([24, 24], 26, k=2, dead_after=2000, seed=1)
    train({"m": m}, TensorStream(x, 128), Recipe(steps=400, lr=1e-2))
    none = torch.zeros(6, 24)
    truth = torch.cat([torch.cat(pair, -1) for pair in ((both_a, both_b), (only_a, none), (none, only_b))])
    cosine, latent = (normalize(truth, dim=-1) @ normalize(m.W_dec_FD.detach(), dim=-1).T).max(-1)
    assert (cosine > 0.95).all()
    kinds = of_models(m)
    for kind, part in zip(("shared", "first", "second"), latent.split(6), strict=True):
        assert set(part.tolist()) <= set(kinds[kind].tolist())
    assert sum(len(there) for there in kinds.values()) == 26 == histogram(m).sum()
    assert min(histogram(m, 4)[[0, 3]]) >= 6
    with pytest.raises(BadInput, match="writes at one site"):
        relative_norms(TopK(20, 22, k=2))


# ----------------------------------------------------------------------------------------------------------- streams


IDS = torch.randint(0, VOCAB, (11, 6), generator=torch.Generator().manual_seed(5))
SITES = ["layers.0.resid_post", "layers.1.resid_post"]


def live(site, model=None, **kw):
    return LiveStream(model or build("llama"), site, IDS, kw.pop("size", 6), **{"buffer": 4, "at_once": 3, **kw})


def take(stream, count, start=0):
    return list(itertools.islice(stream.batches(start), count))


def test_concatenated_rows_are_those_of_each_site_side_by_side():
    singles = [take(live(site), 9) for site in SITES]
    for (x, y), (a, _), (b, _) in zip(take(live(SITES, join="concat"), 9), *singles, strict=True):
        assert x is y and torch.equal(x, torch.cat([a, b], -1))
    for (x, y), (a, _), (b, _) in zip(take(live(SITES[:1], target=SITES, join="concat"), 9), *singles, strict=True):
        assert torch.equal(x, a) and torch.equal(y, torch.cat([a, b], -1))


def test_mixed_rows_are_those_of_all_sites():
    x, y = live("layers.*.resid_post", join="mix").fill(1)
    a, b = (live(site).fill(1)[0] for site in SITES)
    assert x is y and torch.equal(x.sort(0).values, torch.cat([a, b]).sort(0).values)
    x, y = live(SITES[::-1], target=SITES, join="mix").fill(1)
    pairs = {tuple(r) for r in torch.cat([torch.cat([b, a], -1), torch.cat([a, b], -1)]).tolist()}
    assert {tuple(r) for r in torch.cat([x, y], -1).tolist()} == pairs


def test_rows_of_two_models_are_of_the_same_tokens():
    other = build("llama")
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    x = take(live(SITES[0], join="concat", beside=other), 5)
    for (both, _), (a, _), (b, _) in zip(x, take(live(SITES[0]), 5), take(live(SITES[0], other), 5), strict=True):
        assert torch.equal(both, torch.cat([a, b], -1)) and not torch.equal(a, b)


@pytest.mark.parametrize("more", [{"join": "concat"}, {"join": "mix", "size": 11}])
def test_joined_streams_resume_bit_for_bit(more):
    whole = take(live(SITES, **more), 15)
    for start in (1, 4, 9):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[start:], take(live(SITES, **more), 15 - start, start), strict=True))
    assert live(SITES, **more).made_from == live("layers.*.resid_post", **more).made_from
    assert live(SITES, **more).made_from != live(SITES[::-1], **more).made_from


@pytest.mark.parametrize("wrong, says", [
    (lambda: live(SITES), "names 2 sites"), (lambda: live(SITES, join="sum"), "join='sum'"), (lambda: live(SITES[0], join="mix"), "joins nothing"),
    (lambda: live(SITES, target=SITES[0], join="mix"), "there are 2 and 1"),
    (lambda: live(SITES[0], beside=build("llama")), "join them by concat"),
    (lambda: Flow.of(build("llama"), ["layers.0.resid_post", "layers.0.mlp.hidden"], join="mix").widths(build("llama"), IDS[:1]), "one width"),
])
def test_joins_that_make_no_sense_are_refused(wrong, says):
    with pytest.raises(BadInput, match=says):
        wrong()


# ---------------------------------------------------------------------------------------------------------- splicing


class Text:
    def __init__(self, ids):
        self.input_ids, self.doc, self.attention_mask = ids, torch.arange(len(ids))[:, None].expand_as(ids), None


@torch.no_grad()
def test_a_crosscoder_replaces_its_sites_by_what_a_clean_pass_gives():
    model, flow = build("llama"), Flow(tuple(SITES), tuple(SITES), "concat")
    clean = flow.read(model, IDS)[0]
    m = TopK([32, 32], 50, k=5)
    m.initialise(clean.flatten(0, 1))
    made = torch.cat([clean[:, :SKIP], m(clean[:, SKIP:])], 1).split(32, -1)
    splice = SplicedRow(m.eval(), flow)
    for names in (SITES, SITES[:1]):
        handles = [
            model.model.layers[int(name[7])].register_forward_hook(lambda mod, i, o, v=made[int(name[7])]: (v, *o[1:]) if isinstance(o, tuple) else v)
            for name in names
        ]
        want = model(IDS).logits
        for handle in handles:
            handle.remove()
        with splice.reading(model), replaced(model, splice.plan(names)):
            got = model(input_ids=IDS).logits
        torch.testing.assert_close(got, want)
    assert not torch.allclose(model(IDS).logits, want)


@torch.no_grad()
def test_judging_a_crosscoder_gives_a_point_a_site_and_one_of_all():
    model, flow = build("llama"), Flow(tuple(SITES), tuple(SITES), "concat")
    x = flow.read(model, IDS)[0][:, SKIP:].flatten(0, 1)
    m = TopK([32, 32], 50, k=5)
    m.initialise(x)
    board = Judge(model, [Text(IDS[:6]), Text(IDS[6:])])
    board.documents = 6
    points = judge_joined(board, flow, m.eval(), Lost.of(board, flow), name="c")
    assert [p.method for p in points] == ["c", *(f"c at {site}" for site in SITES)]
    for point, part in zip(points[1:], (slice(0, 32), slice(32, 64)), strict=True):
        a, b = x[:, part], m(x)[:, part]
        assert point.metrics["fvu"].mean == pytest.approx(float((a - b).pow(2).sum() / (a - a.mean(0)).pow(2).sum()), rel=1e-4)
    # the last site overwrites what the first did to the stream
    assert points[0].metrics["ce"].mean == pytest.approx(points[2].metrics["ce"].mean, rel=1e-5)
    assert points[0].metrics["ce"].mean != pytest.approx(points[1].metrics["ce"].mean, rel=1e-5)


# ---------------------------------------------------------------------------------------------- latents over layers


def test_variance_over_layers_by_hand():
    """Latent 0 fires at layers 0 and 2 of one token alike; latent 1 at layer 1 of one token and, three times as strong, at 3 of another."""
    spread = LayerSpread(3, 4)
    spread.add(torch.tensor([0, 0, 1, 1]), torch.tensor([2.0, 2.0, 1.0, 3.0]), torch.tensor([0, 2, 1, 3]), torch.tensor([0, 0, 0, 1]),
               torch.tensor([0, 0, 0, 0]))
    assert spread.layer_F.tolist() == [1.0, 2.5, 0.0] and spread.variance_F.tolist() == [1.0, 0.75, 0.0]
    assert spread.within("token").tolist() == [1.0, 0.0, 0.0] and spread.between("token").tolist() == [0.0, 0.75, 0.0]
    assert spread.within("prompt").tolist() == [1.0, 0.75, 0.0]
    assert spread.entropy_F[0] == pytest.approx(math.log(2))
    assert spread.summary()["within_token"] == pytest.approx(0.5)


def test_variance_over_layers_is_that_of_every_activation_one_by_one():
    g = torch.Generator().manual_seed(1)
    spread, seen = LayerSpread(5, 4), []
    for call in range(3):
        latent, layer, token = (torch.randint(0, n, (80,), generator=g) for n in (5, 4, 9))
        value = torch.rand(80, generator=g)
        spread.add(latent, value, layer, token, token // 3)
        lists = (v.tolist() for v in (latent, value, layer, token))
        seen += [(f, v, s, (call, t), (call, t // 3)) for f, v, s, t in zip(*lists, strict=True)]
    for f in range(5):
        mine = [s for s in seen if s[0] == f]
        total = sum(v for _, v, *_ in mine)
        mean = sum(v * s for _, v, s, *_ in mine) / total
        assert float(spread.layer_F[f]) == pytest.approx(mean)
        for by, at in (("token", 3), ("prompt", 4)):
            within = 0.0
            for group in {s[at] for s in mine}:
                there = [s for s in mine if s[at] == group]
                m = sum(v * s for _, v, s, *_ in there) / sum(v for _, v, *_ in there)
                within += sum(v * (s - m) ** 2 for _, v, s, *_ in there)
            assert float(spread.within(by)[f]) == pytest.approx(within / total)
            assert float(spread.within(by)[f] + spread.between(by)[f]) == pytest.approx(sum(v * (s - mean) ** 2 for _, v, s, *_ in mine) / total)


@torch.no_grad()
def test_spread_over_layers_of_a_model_is_that_of_its_selections():
    model, flow = build("llama"), Flow(tuple(SITES), tuple(SITES), "mix")
    a, b = (flow.read(model, IDS)[0][s][:, SKIP:].flatten(0, 1) for s in range(2))
    m = TopK(32, 40, k=4)
    m.initialise(torch.cat([a, b]))
    board = Judge(model, [Text(IDS[:6]), Text(IDS[6:])])
    spread = spread_over_layers(board, flow, m.eval())
    want = torch.stack([m.select(v).dense.sum(0) for v in (a, b)], -1)
    torch.testing.assert_close(spread.mass_FL, want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linkage", ["complete", "average", "single"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_scipys(linkage, seed):
    """Of layers along a line, where the nearest groups are neighbours anyway, so that clustering without that bond gives the same."""
    at = torch.rand(11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort().values
    distance = (at[:, None] - at).abs()
    tree = hierarchy.linkage(squareform(distance.numpy()), linkage)
    for groups in (1, 2, 4, 11):
        ours = layer_groups(distance, groups, linkage)
        labels = hierarchy.fcluster(tree, groups, "maxclust")
        assert [layer for group in ours for layer in group] == list(range(11))
        assert {frozenset(group) for group in ours} == {frozenset((labels == k).nonzero()[0].tolist()) for k in set(labels)}


def test_only_neighbours_share_a_group():
    """Layers 0 and 3 are alike, but the two between are not like them."""
    block = torch.tensor([0, 1, 1, 0, 2, 2])
    distance = (block[:, None] != block).double()
    assert layer_groups(distance, 4) == [[0], [1, 2], [3], [4, 5]]


@torch.no_grad()
def test_angles_between_layers():
    model = build("llama")
    got = angular_distances(model, SITES, [IDS[:6], IDS[6:]])
    a, b = (live(site, buffer=11).take(IDS)[0].double() for site in SITES)
    want = sum(math.acos(float(u @ v / u.norm() / v.norm())) for u, v in zip(a, b, strict=True)) / len(a) / math.pi
    assert float(got[0, 1]) == pytest.approx(want) == float(got[1, 0]) and float(got.diagonal().sum()) == 0
    with pytest.raises(BadInput, match="1 site to group"):
        angular_distances(model, SITES[:1], [IDS])
    with pytest.raises(BadInput, match="groups=3"):
        layer_groups(got, 3)


# ---------------------------------------------------------------------------------------- cross-layer transcoders


def dense_layers(m, x):
    """y_m = sum over l <= m of f_l W_{l -> m} + b_m, with every product written out; and the pre-activations."""
    S, C, D, E = m.layers, m.each, m.parts_in[0], m.parts_out[0]
    xs = (x * m.scale).split(D, -1)
    pre = torch.cat([xs[s] @ m.W_enc_FD[s * C : (s + 1) * C].T + m.b_enc_F[s * C : (s + 1) * C] for s in range(S)], -1)

    def write(f):
        out = []
        for t in range(S):
            out.append(m.b_dec_D[t * E : (t + 1) * E] + sum(f[:, s * C : (s + 1) * C] @ m.W_dec[t][s * C : (s + 1) * C] for s in range(t + 1)))
        return torch.cat(out, -1)

    return pre, write


def test_cross_layer_loss_and_gradients_equal_dense():
    x, y = rows(30, 12), rows(30, 9, seed=7)
    m = moved(CrossLayer([4, 4, 4], 24, k=3, d_out=[3, 3, 3], dead_after=50, aux_k=3), x, y).train()
    m.idle_F[[0, 1, 9, 10, 20]] = 100
    pre, write = dense_layers(m, x)
    least = pre.flatten().sort(descending=True).values[3 * 30 - 1]
    f = (pre * (pre >= least)).relu()
    y_hat = write(f)
    scaled = y * m.scale_out
    mse = (y_hat - scaled).pow(2).mean()
    dead = torch.where(m.idle_F > 50, pre, -torch.inf)
    z = torch.where(dead >= dead.sort(1, descending=True).values[:, 2:3], pre.relu(), 0.0)
    aux = ((scaled - y_hat).detach() - (write(z) - m.b_dec_D)).pow(2).mean() / 32
    parts = m.loss(x, y).parts
    torch.testing.assert_close(parts["mse"], mse)
    torch.testing.assert_close(parts["aux"], aux)
    p = [m.W_enc_FD, m.b_enc_F, m.b_dec_D, *m.W_dec]
    ours = torch.autograd.grad(parts["mse"] + parts["aux"], p)
    for a, b in zip(ours, torch.autograd.grad(mse + aux, p), strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_is_not_moved_by_later_ones():
    x = rows(20, 12)
    m = moved(CrossLayer([4, 4, 4], 24, k=3), x).eval()
    other = x.clone()
    other[:, 8:] = 0
    assert torch.equal(m(x)[:, :8], m(other)[:, :8]) and not torch.equal(m(x)[:, 8:], m(other)[:, 8:])
    norms = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 24 - len(t))).pow(2).sum(-1) for t in m.W_dec]).sum(0)
    m.after_step(0)
    assert not torch.allclose(norms, torch.ones_like(norms))
    torch.testing.assert_close(m.decoder_norms().pow(2).sum(-1), torch.ones_like(norms))
    assert (m.decoder_norms()[16:, :2] == 0).all() and (m.decoder_norms()[:8] > 0).all()


@torch.no_grad()
def test_cross_layer_replacement_reads_what_replaced_layers_give():
    model = build("llama")
    flow = Flow(("layers.0.mlp.in", "layers.1.mlp.in"), ("layers.0.mlp.out", "layers.1.mlp.out"), "concat")
    x, y = flow.read(model, IDS)
    m = CrossLayer([32, 32], 60, k=6)
    m.initialise(x.flatten(0, 1), y.flatten(0, 1))
    m.tau.fill_(0.5)
    m.eval()
    ins, handles = {}, []
    for s, layer in enumerate(model.model.layers):
        def hook(mod, i, o, s=s):
            ins[s] = i[0]
            row = torch.cat([*(ins[j] for j in range(s + 1)), *(torch.zeros_like(o) for _ in range(1 - s))], -1)
            pre, write = dense_layers(m, row.flatten(0, 1))
            made = (write(pre * (pre > 0.5)) / m.scale_out).view(*o.shape[:2], 64)[..., 32 * s : 32 * s + 32]
            return torch.cat([o[:, :SKIP], made[:, SKIP:]], 1)

        handles.append(layer.mlp.register_forward_hook(hook))
    want = model(IDS).logits
    for handle in handles:
        handle.remove()
    splice = SplicedLayers(m, flow)
    with replaced(model, splice.plan(flow.targets)):
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
