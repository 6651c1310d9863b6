"""Dynamic attention by hashing, tournaments, graphs, head kinds and steps: each against its formula written out, and its claim."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rarefy.attention.cache import Cache
from rarefy.attention.dynamic.hashing import planes
from rarefy.attention.dynamic.hip import HiP
from rarefy.attention.dynamic.key_graph import build, search
from rarefy.attention.dynamic.lserve import LServe
from rarefy.attention.dynamic.lsh import LSH
from rarefy.attention.dynamic.magicpig import MagicPIG
from rarefy.attention.dynamic.retrieval import RetrievalAttention
from rarefy.attention.dynamic.scatterbrain import Scatterbrain
from rarefy.site import replaced

HEADS, KEY_HEADS, D = 4, 2, 8


def qkv(T=40, S=None, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    S = S or T
    return [torch.randn(batch, n, m, D, generator=draw, dtype=torch.float64) for n, m in ((HEADS, T), (KEY_HEADS, S), (KEY_HEADS, S))]


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense_tail(q, k, v):
    score = q @ k.repeat_interleave(2, 1).mT / D**0.5
    seen = torch.ones(score.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


def each_query(q, k, v, keys_of):
    """softmax(q k / sqrt(D) + bias) v over the {key: bias} that keys_of(b, h, position) gives."""
    (B, H, T, width), S, rows = q.shape, k.shape[2], []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                found = keys_of(b, h, S - T + t)
                at, bias = list(found), torch.tensor(list(found.values()), dtype=torch.float64)
                rows.append((k[b, h // 2, at] @ q[b, h, t] / width**0.5 + bias).softmax(0) @ v[b, h // 2, at])
    return torch.stack(rows).view(q.shape)


def decoded(method, q, k, v):
    return torch.cat([method(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(q.shape[2])], 2)


CAUSAL = {
    "magicpig": lambda: MagicPIG(bits=2, tables=5, sinks=2, window=3, centre=7), "hip": lambda: HiP(budget=0.4, block=2),
    "lsh": lambda: LSH(dial=5, rounds=8, bits=1), "scatterbrain": lambda: Scatterbrain(budget=0.3, features=6, rounds=5, bits=1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_is_decoding(name):
    q, k, v = qkv(33)
    torch.testing.assert_close(CAUSAL[name]()(q, k, v), decoded(CAUSAL[name](), q, k, v), rtol=1e-9, atol=1e-11)


IN_MODEL = {
    "magicpig": CAUSAL["magicpig"], "hip": CAUSAL["hip"], "scatterbrain": CAUSAL["scatterbrain"], "lsh": CAUSAL["lsh"],
    "retrieval": lambda: RetrievalAttention(budget=0.3, near=4, degree=3, breadth=4, sinks=1, window=2, stride=10),
}


@pytest.mark.parametrize("name", IN_MODEL)
def test_decoding_with_a_cache_in_a_model_is_its_prefill(name):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)).eval()
    plan = {f"layers.{i}.attn": IN_MODEL[name]() for i in range(2)}
    with torch.no_grad(), replaced(model, plan):
        cache, ids = Cache(), torch.randint(50, (2, 30))
        whole, first = model(ids).logits, model(ids[:, :20], past_key_values=cache).logits
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    torch.testing.assert_close(torch.cat([first, *steps], 1), whole, rtol=1e-4, atol=1e-5)
    assert all(0 < method.measured_density() < 1 for method in plan.values())


def same_side(x, normal):
    return [sum(a * b for a, b in zip(x, n, strict=True)) > 0 for n in normal]


def odds(q, k, bits, tables):
    p = 1 - math.acos(float(q @ k / (q.norm() * k.norm()))) / math.pi
    return 1 - (1 - p**bits) ** tables - tables * p**bits * (1 - p**bits) ** (tables - 1)


@pytest.mark.parametrize(("T", "S"), [(24, 24), (2, 24)])
def test_magicpig_is_importance_sampling_written_out(T, S):
    q, k, v = qkv(T, S, batch=1)
    method = MagicPIG(bits=2, tables=4, sinks=2, window=3, centre=9, seed=3)
    normal = planes(D, 4, 2, 3, q).mT.tolist()

    def keys_of(b, h, at):
        keys, query = k[b, h // 2], q[b, h, at - S + T]
        centre, mine, found = keys[2:9].mean(0), same_side(query.tolist(), normal), {}
        for s in range(at + 1):
            theirs = same_side((keys[s] - centre).tolist(), normal)
            agree = sum(mine[i : i + 2] == theirs[i : i + 2] for i in range(0, 8, 2))
            if at < 9 or s < 2 or at - s < 3:
                found[s] = 0.0
            elif agree >= 2:
                found[s] = -math.log(odds(query, keys[s] - centre, 2, 4))
        return found

    torch.testing.assert_close(method(q, k, v), each_query(q, k, v, keys_of), rtol=1e-9, atol=1e-11)
    kept = sum(len(keys_of(0, h, at)) for h in range(HEADS) for at in range(S - T, S))
    assert method.measured_density() == pytest.approx(kept / (HEADS * sum(range(S - T + 1, S + 1))))


def test_magicpig_draws_a_key_as_often_as_its_formula_says():
    q, k, _ = qkv(1, 60, batch=1)
    drawn = torch.stack([MagicPIG(bits=3, tables=6, centre=20, seed=seed).drawn(q, k)[0, 0, 0] for seed in range(2000)]).double().mean(0)
    wanted = torch.tensor([odds(q[0, 0, 0], k[0, 0, s] - k[0, 0, 4:20].mean(0), 3, 6) for s in range(60)])
    assert wanted.min() < 0.1 < 0.5 < wanted.max()
    assert ((drawn - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / 2000).sqrt()).all()


def test_magicpig_nears_dense_attention_as_tables_grow():
    q, k, v = qkv(4, 400, batch=1)
    errors = [(MagicPIG(bits=2, tables=tables, centre=16, window=4)(q, k, v) - dense_tail(q, k, v)).norm() for tables in (2, 8, 32, 128)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-2 * errors[0]


def tournament(score, best, n):
    """The winners among n blocks: chunks as intervals, each judged by the score at its middle; and the blocks looked at, round by round."""
    chunks, looks = [(i * n // (2 * best), (i + 1) * n // (2 * best)) for i in range(2 * best)], []
    while True:
        chunks = [c for c in chunks if c[1] > c[0]]
        looks.append(len(chunks))
        chunks = sorted(sorted(chunks, key=lambda c: -score[(c[0] + c[1] - 1) // 2])[:best])
        if all(b - a == 1 for a, b in chunks):
            return [a for a, _ in chunks], looks
        chunks = [half for a, b in chunks for half in ((a, (a + b + 1) // 2), ((a + b + 1) // 2, b))]


HIP_SHAPES = [(1, 1, 37, 37, 0.2), (4, 1, 5, 37, 0.4), (4, 8, 37, 37, 0.5), (2, 6, 9, 40, 0.3)]


@pytest.mark.parametrize(("block", "query_block", "T", "S", "budget"), HIP_SHAPES)
def test_hip_is_a_tournament(block, query_block, T, S, budget):
    q, k, _ = qkv(T, S)
    chosen = HiP(budget, block, query_block).choose(q, k, True)
    first_row = (S - T) // query_block
    for b in range(2):
        for h in range(HEADS):
            for row in range(chosen.shape[2]):
                start, stop = (first_row + row) * query_block, min((first_row + row + 1) * query_block, S)
                first, last = start // block, (stop - 1) // block
                logit = k[b, h // 2] @ q[b, h, max(start, S - T) - S + T : stop - S + T].mT
                score = [float(logit[n * block : (n + 1) * block].max()) for n in range(last + 1)]
                best = max(1, round(budget * (last + 1))) - (last + 1 - first)
                won = set(tournament(score, best, first)[0]) if best > 0 and first else set()
                assert set(chosen[b, h, row].nonzero()[:, 0].tolist()) == set(range(first, last + 1)) | won


def test_hip_finds_the_best_where_neighbours_score_alike_in_logarithmically_many_rounds():
    width, S, block = 8, 4096, 4
    peaks = torch.tensor([333, 1500, 2777])
    at = torch.arange(S)
    height = sum((1 - (at - p).abs() / 400).clamp_min(0) * (10 - i) for i, p in enumerate(peaks.tolist()))
    k = torch.zeros(1, 1, S, width, dtype=torch.float64)
    k[0, 0, :, 0] = height
    q = torch.eye(width, dtype=torch.float64)[None, None, :1]
    method = HiP(budget=16 / 1024, block=block)
    chosen = method.choose(q, k, True)[0, 0, 0]
    best = height.view(-1, block).amax(-1)[:-1].topk(15).indices
    assert chosen[best].all()
    looks = tournament(height.view(-1, block).amax(-1).tolist(), 15, 1023)[1]
    assert len(looks) == method.rounds(1024) == 1 + math.ceil(math.log2(1023 / 30)) and max(looks) <= 30


def agreements(x, y, normal, bits):
    mine, theirs = same_side(x.tolist(), normal), same_side(y.tolist(), normal)
    return sum(mine[i : i + bits] == theirs[i : i + bits] for i in range(0, len(normal), bits))


def test_lsh_keeps_pairs_that_agree_in_enough_rounds():
    q, k, v = qkv(3, 20, batch=1)
    normal = planes(D, 9, 2, 5, q).mT.tolist()

    def keys_of(b, h, at):
        return {s: 0.0 for s in range(at + 1) if s == at or agreements(q[b, h, at - 17], k[b, h // 2, s], normal, 2) >= 4}

    torch.testing.assert_close(LSH(dial=4, rounds=9, bits=2, seed=5)(q, k, v), each_query(q, k, v, keys_of))


@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_lsh_takes_the_threshold_nearest_to_its_budget_and_finds_more_of_the_mass_than_chance(budget):
    q, k, v = qkv(64, batch=4)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()

    def share(method):
        return float((method.choose(q, k, True) & seen).sum() / (seen.sum() * 16))

    method = LSH(budget, rounds=12, bits=1)
    method.observe(q, k, v)
    method.finish()
    assert abs(share(method) - budget) == min(abs(share(LSH(dial=dial, rounds=12, bits=1)) - budget) for dial in range(1, 13))
    mass = (3 * q @ k.repeat_interleave(2, 1).mT / D**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    assert float((mass * method.choose(q, k, True)).sum(-1).mean()) > 2 * share(method)


def written_out(method, q, k, v, normal, omega):
    """Scatterbrain's A by its formula, one pair at a time."""
    (B, H, T, width), S, rows = q.shape, k.shape[2], []

    def phi(x):
        x = x / width**0.25
        return (omega @ x - x @ x / 2).exp() / len(omega) ** 0.5

    for b in range(B):
        for h in range(H):
            for at in range(S - T, S):
                query, keys = q[b, h, at - S + T], k[b, h // 2]
                rank = {s: (agreements(query, keys[s], normal, method.bits), s) if s < at else (math.inf, s) for s in range(at + 1)}
                exact = sorted(rank, key=rank.__getitem__)[-max(1, round(method.budget * (at + 1))) :]
                a = torch.stack([(query @ keys[s] / width**0.5).exp() if s in exact else phi(query) @ phi(keys[s]) for s in range(at + 1)])
                rows.append(a @ v[b, h // 2, : at + 1] / a.sum())
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize(("T", "S"), [(20, 20), (3, 90)])
def test_scatterbrain_is_exact_on_its_support_and_low_rank_elsewhere(T, S):
    q, k, v = qkv(T, S, batch=1)
    method = Scatterbrain(budget=0.2, features=5, rounds=6, bits=1, seed=2)
    omega = torch.randn(D, 5, generator=torch.Generator().manual_seed(3)).double().mT
    wanted = written_out(method, q, k, v, planes(D, 6, 1, 2, q).mT.tolist(), omega)
    torch.testing.assert_close(method(q, k, v), wanted, rtol=1e-8, atol=1e-10)
    assert method.measured_density() < 0.3


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
def test_scatterbrain_is_finite_where_logits_are_large(spread):
    """The first key, which stands in for empty places of a list, outweighs all listed ones."""
    q, k, v = [x.float() for x in qkv(60, 60, batch=1)]
    q, k = q * spread, k * spread**0.5
    k[:, :, 0] *= 4
    method = Scatterbrain(budget=0.2)
    torch.testing.assert_close(method(q, k, v), method.reference(q.double(), k.double(), v.double()).float(), rtol=1e-4, atol=1e-4)


def test_scatterbrains_features_give_the_kernel_on_average():
    q, k, _ = [x / 2 for x in qkv(1, 6, batch=1)]
    logs = [(method.logs(q[0, 0], D**-0.5), method.logs(k[0, 0], D**-0.5)) for method in (Scatterbrain(features=4000, seed=s) for s in range(20))]
    mean = torch.stack([(a.exp() @ b.exp().mT)[0] / 4000 for a, b in logs]).mean(0)
    torch.testing.assert_close(mean, (q[0, 0, 0] @ k[0, 0].mT / D**0.5).exp(), rtol=0.05, atol=0.0)


class Layer:
    """Stands in for a cache's layer: something that lives as long as a sequence."""


def test_a_key_graph_joins_keys_that_queries_have_together():
    _, k, _ = qkv(1, 30, batch=1)
    probe = torch.randn(1, KEY_HEADS, 50, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    graph = build(probe, k, near=4, degree=30)
    for g in range(KEY_HEADS):
        pairs, named = set(), [0] * 30
        for p in range(50):
            first, *rest = sorted(range(30), key=lambda s: -float(k[0, g, s] @ probe[0, g, p]))[:4]  # noqa: B023
            pairs |= {(first, other) for other in rest} | {(other, first) for other in rest}
            for s in (first, *rest):
                named[s] += 1
        for s in range(30):
            wanted = {b for a, b in pairs if a == s} | {n for n in (s - 1, s + 1) if 0 <= n < 30}
            assert set(graph.neighbour_BGSM[0, g, s].tolist()) - {-1} == wanted
        assert sorted(named[s] for s in graph.entry_BGE[0, g].tolist()) == sorted(named)[-4:]


def test_search_is_exact_with_a_beam_of_all_keys_and_each_query_searches_alone():
    q, k, _ = qkv(9, 60, batch=1)
    q = q[:, :2]
    graph = build(q, k, near=5, degree=4)
    at, looked = search(q, k, graph, torch.full((9,), 60))
    assert looked.all() and torch.equal(at, (q @ k.mT).argsort(-1, descending=True))
    width = torch.tensor([1, 2, 3, 5, 8, 13, 4, 4, 1])
    at, looked = search(q, k, graph, width)
    for row, w in enumerate(width.tolist()):
        mine, seen = search(q[:, :, row : row + 1], k, graph, width[row : row + 1])
        assert torch.equal(at[:, :, row, :w], mine[:, :, 0]) and (at[:, :, row, w:] == -1).all() and torch.equal(looked[:, :, row], seen[:, :, 0])


def test_a_graph_of_queries_finds_what_a_graph_of_keys_does_not():
    """Queries off the keys' side: nearest keys of keys are no guide to theirs."""
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 1000, 16, generator=draw)
    offset = 3 * torch.randn(1, 1, 1, 16, generator=draw)
    probe, q = (torch.randn(1, 1, n, 16, generator=draw) + offset for n in (1000, 100))
    truth = (q @ k.mT).topk(10, -1).indices
    recall, cost = {}, {}
    for name, by in (("queries", probe), ("keys", k)):
        at, looked = search(q, k, build(by, k, 16, 16), torch.full((100,), 16))
        recall[name] = float((truth[..., None] == at[..., None, :]).any(-1).double().mean())
        cost[name] = float(looked.double().mean())
    assert recall["queries"] > 0.95 and recall["queries"] > recall["keys"] - 0.02
    assert cost["queries"] < 0.1 and cost["queries"] < cost["keys"] / 3


@pytest.mark.parametrize(("T", "S"), [(40, 40), (5, 40)])
def test_retrieval_attends_to_the_best_keys_the_first_and_the_newest(T, S):
    q, k, v = qkv(40, batch=1)
    method = RetrievalAttention(budget=0.5, near=5, degree=40, breadth=100, sinks=2, window=3, stride=8)
    layer = Layer()
    if T < S:
        method.attend(q[:, :, : S - T], k[:, :, : S - T], v[:, :, : S - T], scale=D**-0.5, cache=layer)

    def keys_of(b, h, at):
        found = {s: 0.0 for s in range(at + 1) if s < 2 or at - s < 3 or s >= at // 8 * 8}
        more = max(1, round(0.5 * (at + 1))) - len(found)
        others = sorted((s for s in range(at // 8 * 8) if s not in found), key=lambda s: -float(k[b, h // 2, s] @ q[b, h, at]))
        return found | dict.fromkeys(others[: max(0, more)], 0.0)

    got = method.attend(q[:, :, S - T :], k, v, scale=D**-0.5, cache=layer)
    torch.testing.assert_close(got, each_query(q, k, v, keys_of)[:, :, S - T :], rtol=1e-9, atol=1e-11)


def test_retrieval_decodes_as_it_prefills_beside_a_cache():
    q, k, v = qkv(50)
    method, layer = RetrievalAttention(budget=0.3, near=4, degree=3, breadth=4, sinks=1, window=2, stride=10), Layer()
    whole = method(q, k, v)
    steps = [method.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], scale=D**-0.5, cache=layer) for t in range(50)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-9, atol=1e-11)
    assert method.visited() < 0.9


def streaming_heads(*streams, **arguments):
    """LServe for the test's heads, those named streaming: queries and keys of theirs agree on the first key alone."""
    q, k, v = qkv(60, batch=1)
    k[:, :, 0] = 5.0
    for head in range(HEADS):
        q[:, head] = 5.0 if head in streams else q[:, head] - 5.0
    method = LServe(streaming=len(streams) / HEADS, **arguments).double()
    method.observe(q, k, v)
    method.finish()
    return method


def test_lserve_finds_the_heads_that_look_at_the_first_and_newest_keys():
    assert streaming_heads(1, 2, block=4, part=2, window=2).streams_H.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("query_block", "T", "S"), [(1, 37, 37), (1, 2, 37), (8, 37, 37)])
def test_lserve_by_its_formula(query_block, T, S):
    q, k, v = qkv(T, S)
    method = streaming_heads(0, 3, budget=0.4, block=4, part=2, window=2, query_block=query_block)
    chosen = method.choose(q, k, True)
    for b in range(2):
        for h in range(HEADS):
            for row in range(chosen.shape[2]):
                start = ((S - T) // query_block + row) * query_block
                stop = min(start + query_block, S)
                first, last = start // 4, (stop - 1) // 4
                own = set(range(first, last + 1))
                if h in (0, 3):
                    wanted = own | {0} | {n for n in range(last + 1) if n > first - 2}
                else:
                    score = []
                    for n in range(last + 1):
                        parts = [k[b, h // 2, s : min(s + 2, S)] for s in range(4 * n, min(4 * n + 4, S), 2)]
                        queries = q[b, h, max(start, S - T) - S + T : stop - S + T]
                        score.append(max(float(torch.maximum(x * p.amin(0), x * p.amax(0)).sum()) for x in queries for p in parts))
                        assert score[-1] >= float((queries @ k[b, h // 2, 4 * n : 4 * n + 4].mT).max()) - 1e-12
                    rest = sorted(set(range(last + 1)) - own, key=lambda n: -score[n])  # noqa: B023
                    wanted = own | set(rest[: max(0, max(1, round(0.4 * (last + 1))) - len(own))])
                assert set(chosen[b, h, row].nonzero()[:, 0].tolist()) == wanted


def test_lserve_takes_over_the_choice_of_the_first_of_a_few_queries_also_while_decoding():
    q, k, v = qkv(41)
    once, fresh = (streaming_heads(0, budget=0.4, block=4, part=2, window=2, reuse=n) for n in (5, 1))
    chosen, each, layer = once.choose(q, k, True), fresh.choose(q, k, True), Layer()
    for t in range(41):
        added = torch.zeros(11, dtype=torch.bool)
        added[t // 5 * 5 // 4 + 1 : t // 4 + 1] = True
        assert torch.equal(chosen[:, 1:, t], each[:, 1:, t // 5 * 5] | added)
    whole = once(q, k, v)
    cuts = [(0, 7), *((t, t + 1) for t in range(7, 20)), (20, 33), *((t, t + 1) for t in range(33, 41))]
    steps = [once.attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=D**-0.5, cache=layer) for a, b in cuts]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-9, atol=1e-11)
