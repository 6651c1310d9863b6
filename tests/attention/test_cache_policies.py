"""Each cache policy against its definition, written out entry by entry over plain lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import drive, over, qkv, small
from torch import Tensor

from rarefy.attention.cache import make
from rarefy.attention.cache.base import Cache
from rarefy.attention.cache.csr import CSR, fit_atoms, pursue
from rarefy.attention.cache.probe import activation_weights, shares
from rarefy.attention.cache.sentinel import sentinel_loss, wrap
from rarefy.attention.cache.shadow import rotate
from rarefy.errors import BadInput, Unsupported
from rarefy.kernels.coded_attention import prune_rows, unpack_rows
from rarefy.site import replaced
from site_models import build, inputs

CUTS = [19, 24, *range(25, 36)]


def weights(q_HTD: Tensor, k_SD: Tensor, heads: range, t: int, seen: list[int]) -> Tensor:
    """Sum over some heads of the softmax of query t over `seen` keys, float64."""
    total = torch.zeros(len(seen), dtype=torch.float64)
    for h in heads:
        total += (k_SD[seen].double() @ q_HTD[h, t].double() / q_HTD.shape[-1] ** 0.5).softmax(-1)
    return total


def naive(name: str, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], budget: float, **settings: Any) -> tuple[Tensor, list[list[list[int]]]]:
    """(outputs, after each call the places that each key head keeps) of one batch row."""
    H, T, D = q.shape
    G = k.shape[0]
    out, history = torch.zeros(H, T, D, dtype=torch.float64), []
    kept: list[list[int]] = [[] for _ in range(G)]
    total = torch.zeros(G, T, dtype=torch.float64)
    start = 0
    for stop in cuts:
        for g in range(G):
            heads = range(g * H // G, (g + 1) * H // G)
            kept[g] += range(start, stop)
            for t in range(start, stop):
                seen = [s for s in kept[g] if s <= t]
                for h in heads:
                    out[h, t] = over(q[h, t], k[g, seen], v[g, seen])
                total[g, seen] += weights(q, k[g], heads, t, seen)
            keep = max(1, round(budget * stop))
            if len(kept[g]) > keep and not (name == "snapkv" and stop - start == 1):
                kept[g] = sorted(choose(name, kept[g], keep, q, k[g], heads, total[g], start, stop, **settings))
        history.append([list(x) for x in kept])
        start = stop
    return out, history


def choose(
    name: str, held: list[int], keep: int, q: Tensor, k: Tensor, heads: range, total: Tensor, start: int, stop: int,
    sinks: int = 0, window: int = 0, kernel: int = 1,
) -> list[int]:
    if name == "window":
        first = min(sinks, keep - 1)
        return [s for s in held if s < first] + [s for s in held if s >= first][-(keep - first):]
    if name == "h2o":
        newest = [s for s in held if s > stop - 1 - max(1, keep // 2)]
        rest = sorted((s for s in held if s not in newest), key=lambda s: float(total[s]), reverse=True)
        return newest + rest[: keep - len(newest)]
    voters = range(max(start, stop - min(window, max(1, keep // 2))), stop)
    newest = [s for s in held if s >= stop - min(window, max(1, keep // 2))]
    votes = torch.zeros(len(held), dtype=torch.float64)
    for t in voters:
        seen = [s for s in held if s <= t]
        votes[: len(seen)] += weights(q, k, heads, t, seen)
    before = [i for i, s in enumerate(held) if s not in newest]
    pooled = {held[i]: max(float(votes[j]) for j in before if abs(i - j) <= kernel // 2) for i in before}
    # of equal pooled votes the later place wins
    return newest + sorted(pooled, key=lambda s: (pooled[s], s), reverse=True)[: keep - len(newest)]


@pytest.mark.parametrize("budget", [0.2, 0.45, 0.8])
@pytest.mark.parametrize(("name", "settings"), [("window", {"sinks": 3}), ("h2o", {}), ("snapkv", {"window": 4, "kernel": 3})])
def test_evicting_policies_keep_and_give_what_their_definition_does(name: str, settings: dict[str, Any], budget: float) -> None:
    q, k, v = qkv(1, 4, 2, CUTS[-1], 8, seed=4)
    history: list[list[list[int]]] = []

    def after(layer: Any) -> None:
        at = layer.positions()[0]
        history.append([sorted(int(p) for p in row if p >= 0) for row in at])
        for g, row in enumerate(at.tolist()):                     # what stands beside a place is that place's key and value
            for slot, place in enumerate(row):
                assert place < 0 or torch.equal(layer.entries["k"][0, g, slot], k[0, g, place])
                assert place < 0 or torch.equal(layer.entries["v"][0, g, slot], v[0, g, place])

    out = drive(make(name, budget=budget, **settings), q, k, v, CUTS, after=after)
    wanted, places = naive(name, q[0], k[0], v[0], CUTS, budget, **settings)
    assert history == places
    torch.testing.assert_close(out[0].double(), wanted, rtol=1e-4, atol=1e-5)
    if name != "window":
        assert any(row[0] != row[1] for row in places)            # heads keep entries of their own


def test_random_eviction_keeps_its_share_and_the_newest() -> None:
    q, k, v = qkv(2, 4, 2, 300, 4)
    seen: list[Tensor] = []
    drive(make("random", budget=0.3), q, k, v, [200, *range(201, 301)], after=lambda layer: seen.append(layer.positions().sort(-1).values))
    assert [int(x.shape[-1]) for x in seen] == [round(0.3 * n) for n in range(200, 301)]
    assert all((x[..., -1] == n - 1).all() for x, n in zip(seen, range(200, 301), strict=True))
    assert abs(float(seen[-1].float().mean()) - 150) < 30 and not torch.equal(seen[-1][:, 0], seen[-1][:, 1])
    assert torch.equal(seen[-1][0], seen[-1][1])


def test_positions_in_a_model_are_true_ones() -> None:
    """The first layer's keys depend on token and position alone: what is held must be the dense cache's, rotated by its place."""
    model, ids = build("llama"), inputs("llama", 1, 40)["input_ids"]
    dense, cache = Cache(), small("h2o", 0.3)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=dense)
        with cache.on(model):
            for part in ids.split([30, *[1] * 10], 1):
                model(input_ids=part, past_key_values=cache)
    layer: Any = cache.layers[0]
    at = layer.positions().long()
    assert layer.entries["k"].shape[2] == 12 and int(at.min()) < 20
    wanted = dense.layers[0].keys.gather(2, at[..., None].expand(-1, -1, -1, 8))  # type: ignore[union-attr]
    torch.testing.assert_close(layer.entries["k"], wanted, rtol=1e-5, atol=1e-5)


def test_pages_are_the_ones_with_the_largest_bound() -> None:
    q, k, v = qkv(1, 4, 2, 43, 8, seed=2)
    policy = make("pages", budget=0.4, page=4)
    out = drive(policy, q, k, v, [30, 32, *range(33, 44)])
    read = there = 0
    for t in range(43):
        for h in range(4):
            g, seen = h // 2, list(range(t + 1))
            if t >= 32:
                pages = [seen[i : i + 4] for i in range(0, len(seen), 4)]
                bound = [sum(max(float(q[0, h, t, d] * k[0, g, s, d]) for s in page) for d in range(8)) for page in pages]
                keep = max(1, round(0.4 * len(pages)))
                chosen = sorted(range(len(pages) - 1), key=lambda i: bound[i], reverse=True)[: keep - 1] + [len(pages) - 1]
                seen = [s for i in chosen for s in pages[i]]
                read, there = read + len(seen), there + t + 1
            torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], k[0, g, seen], v[0, g, seen]), rtol=1e-4, atol=1e-5)
    assert policy.measured_density() == pytest.approx(read / there)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [5, 8, 20])
def test_bitmaps_unpack_to_what_was_packed(width: int) -> None:
    x = torch.randn(2, 3, 7, width, generator=torch.Generator().manual_seed(0))
    for keep in (1, width // 2, width):
        bits, values = prune_rows(x, keep)
        assert bits.shape == (2, 3, 7, -(-width // 8)) and bits.dtype == torch.uint8 and values.shape == (2, 3, 7, keep)
        least = x.abs().sort(-1, descending=True).values[..., keep - 1 : keep]
        assert torch.equal(unpack_rows(bits, values, width), torch.where(x.abs() >= least, x, 0.0))
    assert prune_rows(torch.tensor([[3.0, 0.1, -5.0, 0.2, 0.3, 0.4, 0.5, 0.6, 4.0]]), 3)[0].tolist() == [[0b101, 1]]


def test_mustafar_is_attention_over_pruned_vectors_and_a_whole_window() -> None:
    q, k, v = qkv(1, 4, 2, 40, 16, seed=3)
    sizes: list[int] = []
    out = drive(make("mustafar", budget=0.5, recent=6), q, k, v, [30, *range(31, 41)], after=lambda layer: sizes.append(layer.bytes()))
    pruned = [torch.where(x.abs() >= x.abs().sort(-1, descending=True).values[..., 7:8], x, 0.0) for x in (k, v)]
    for t in range(40):
        for h in range(4):
            # a prompt attends to itself before it is packed; a step sees what was packed before it came
            cut = 0 if t < 30 else t - 6
            keys, values = (torch.cat([p[0, h // 2, :cut], x[0, h // 2, cut : t + 1]]) for p, x in zip(pruned, (k, v), strict=True))
            torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], keys, values), rtol=1e-4, atol=1e-5)
    window, far = 6 * 2 * (2 * 16 * 4 + 4), 24 * 2 * 2 * (2 + 8 * 4) + 8
    assert sizes[0] == window + far                               # 2 bytes of bitmap and 8 floats a vector, a row's count


def test_pursuit_finds_planted_atoms_and_its_error_falls() -> None:
    random = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(48, 32, generator=random), dim=-1)
    index = torch.stack([torch.randperm(48, generator=random)[:3] for _ in range(60)])
    weight = torch.rand(60, 3, generator=random) + 0.5
    x = (weight[..., None] * atoms[index]).sum(1)
    got, how = pursue(x, atoms, 3)
    same = (got.sort(-1).values == index.sort(-1).values).all(-1)
    assert same.float().mean() > 0.85
    rebuilt = (how[..., None] * atoms[got].double()).sum(1)
    torch.testing.assert_close(rebuilt[same], x[same].double(), rtol=1e-4, atol=1e-5)
    errors = []
    for k in (1, 2, 4, 8, 16):
        i, w = pursue(torch.randn(50, 32, generator=torch.Generator().manual_seed(1)), atoms, k)
        x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).double()
        rest = x_ND - (w[..., None] * atoms[i].double()).sum(1)
        errors.append(float(rest.norm()))
        assert float((rest[:, None] @ atoms[i].double().mT).abs().max()) < 1e-6     # least squares leaves nothing along what it used
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_compiled_pursuit_takes_the_atoms_that_plain_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.kernels import native

    random = torch.Generator().manual_seed(2)
    atoms = torch.nn.functional.normalize(torch.randn(30, 12, generator=random), dim=-1)
    x = torch.randn(80, 12, generator=random)
    x[3], x[4] = 0.0, 2 * atoms[7]                                # nothing to code; one atom is all of it
    compiled = pursue(x, atoms, 5)
    monkeypatch.setattr(native, "serves", lambda *given, **rest: False)
    plain = pursue(x, atoms, 5)
    assert torch.equal(compiled[0], plain[0]) and compiled[1][3].eq(0).all() and compiled[1][4].tolist()[1:] == [0.0] * 4
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-8, atol=1e-9)


def test_fitted_atoms_code_better_than_samples_of_the_text() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(24, 16, generator=random), dim=-1)
    index = torch.stack([torch.randperm(24, generator=random)[:2] for _ in range(800)])
    x = (torch.randn(800, 2, generator=random)[..., None] * truth[index]).sum(1)

    def error(rounds: int) -> float:
        atoms = fit_atoms(x[:600], 24, 2, rounds, 0)
        i, w = pursue(x[600:], atoms, 2)
        return float((x[600:].double() - (w[..., None] * atoms[i].double()).sum(1)).square().sum() / x[600:].double().square().sum())

    assert error(15) < 0.5 * error(1)
    with pytest.raises(BadInput, match="10 calibration rows cannot start 24"):
        fit_atoms(x[:10], 24, 2, 1, 0)


def test_csr_computes_on_codes_what_rebuilt_vectors_give() -> None:
    q, k, v = qkv(1, 4, 2, 34, 16, seed=5)
    random = torch.Generator().manual_seed(1)
    atoms = torch.nn.functional.normalize(torch.randn(2, 40, 16, generator=random), dim=-1)
    policy = CSR(0.2, recent=5, atoms=40)
    with pytest.raises(BadInput, match=r"cache\.fit"):
        drive(policy, q, k, v, [20, 21])
    policy.atoms_of = [(atoms[0], atoms[1])]
    sizes: list[int] = []
    out = drive(policy, q, k, v, [20, *range(21, 35)], after=lambda layer: sizes.append(layer.bytes()))
    coded = []
    for x, a in ((k, atoms[0]), (v, atoms[1])):
        i, w = pursue(x.flatten(0, 2), a, 3)
        coded.append((w[..., None] * a[i].double()).sum(1).unflatten(0, x.shape[:3]))
    for t in range(20, 34):
        for h in range(4):
            keys, values = (torch.cat([p[0, h // 2, : t - 5], x[0, h // 2, t - 5 : t + 1].double()]) for p, x in zip(coded, (k, v), strict=True))
            torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], keys, values), rtol=1e-4, atol=1e-5)
    assert sizes[0] == 5 * 2 * (2 * 16 * 4 + 4) + 15 * 2 * 2 * 3 * (2 + 4) + 8 and policy.dictionary_bytes() == 2 * 40 * 16 * 4


def test_rotation_is_the_models_own_and_can_be_undone() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(9)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
    cos, sin = angle.cos()[None], angle.sin()[None]
    torch.testing.assert_close(rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])
    torch.testing.assert_close(rotate(rotate(x, 1.3 * cos, 1.3 * sin), 1.3 * cos, 1.3 * sin, back=True), x)
    part = rotate(x, cos[..., :4], sin[..., :4])
    assert torch.equal(part[..., 4:], x[..., 4:])


def test_shadow_attends_to_rebuilt_chunks_that_its_landmarks_name() -> None:
    C, D, T0 = 4, 8, 34                                           # 8 whole chunks, of which the last two stay exact like the unfinished one
    q, k, v = qkv(1, 4, 2, 40, D, seed=6)
    policy = make("shadow", budget=0.5, chunk=C, rank=5, outliers=1, local=2)
    out = drive(policy, q, k, v, [T0, *range(T0 + 1, 41)])
    flat = k[0, :, :24].transpose(0, 1).flatten(1).double()
    u, s, w = torch.linalg.svd(flat, full_matrices=False)
    low = ((u[:, :5] * s[:5]) @ w[:5]).unflatten(1, (2, D)).transpose(0, 1)
    fetched = 0
    for g in range(2):
        chunks = k[0, g, :24].unflatten(0, (6, C))
        mark = chunks.mean(1)
        alike = torch.cosine_similarity(chunks, mark[:, None], dim=-1).amin(1)
        odd = int(alike.argmin())
        far = [n for n in range(6) if n != odd]
        keys = torch.cat([low[g], k[0, g, 24:].double()])
        keys[odd * C : odd * C + C] = k[0, g, odd * C : odd * C + C].double()
        for t in range(T0, 40):
            heads = (2 * g, 2 * g + 1)
            p = torch.stack([(mark[far] @ q[0, h, t] / D**0.5).softmax(-1) for h in heads]).amax(0)
            best = [far[i] for i in p.topk(round(0.5 * 5)).indices.tolist()]
            seen = [s for n in sorted([*best, odd]) for s in range(n * C, n * C + C)] + list(range(24, t + 1))
            fetched += len(best) * C * D * 4
            for h in heads:
                torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], keys[seen], v[0, g, seen]), rtol=1e-3, atol=1e-4)
    assert policy.fetched_bytes() == fetched and policy.fetched_bytes() == 0  # type: ignore[attr-defined]


def test_keys_before_rotation_need_fewer_directions() -> None:
    """ShadowKV's premise (sec. 3): rank for rank, unrotated keys of a trained model are the better approximated."""
    from rarefy.builtin.model import recall_model
    from rarefy.tasks.recall import FILLER, KEYS, VALUES, needle

    model, cache = recall_model(), Cache()
    ids = needle(KEYS, VALUES, FILLER, 192, 2, seed=1).input_ids
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cos, sin = model.model.rotary_emb(cache.layers[0].keys, torch.arange(192)[None])  # type: ignore[union-attr]
    rest = {}
    for where in ("before", "after"):
        error = 0.0
        for layer in cache.layers:
            keys = layer.keys if where == "after" else rotate(layer.keys, cos, sin, back=True)  # type: ignore[union-attr, arg-type]
            s = torch.linalg.svdvals(keys.transpose(1, 2).flatten(2))
            error += float(s[:, 16:].square().sum() / s.square().sum())
        rest[where] = error
    assert rest["before"] < 0.7 * rest["after"]


def test_shared_weights_are_the_first_layers_and_no_keys_are_kept_behind_it() -> None:
    model, ids = build("llama"), inputs("llama", 2, 20)["input_ids"]
    cache = make("shared", spans=[[0, 1]])
    maps: dict[int, Tensor] = {}

    class Forced(torch.nn.Module):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int, **rest: Any) -> Tensor:
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            if layer == 0:
                later = ~torch.ones(20, 20, dtype=torch.bool).tril()
                maps[0] = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
            return maps[0] @ v

    with replaced(model, {"layers.*.attn": Forced()}), torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    got = []
    with cache.on(model), torch.no_grad():
        for part in ids.split([12, 1, 1, 6], 1):
            got.append(model(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-4, atol=1e-5)
    first, second = (layer.tensors() for layer in cache.layers)  # type: ignore[union-attr]
    assert set(first) == {"k", "v", "count"} and set(second) == {"v", "count"} and not cache.layers[0].weights  # type: ignore[union-attr]


def test_spans_join_the_layers_whose_maps_are_alike() -> None:
    """Layer 2's queries and keys are made layer 1's, whose output is nothing, so that their maps are the same."""
    import transformers as tf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
        model = tf.LlamaForCausalLM(config).eval()
    layers: Any = model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.q_proj.weight.mul_(30)
        layers[1].self_attn.o_proj.weight.zero_()
        layers[1].mlp.down_proj.weight.zero_()
        for part in ("q_proj", "k_proj"):
            getattr(layers[2].self_attn, part).weight.copy_(getattr(layers[1].self_attn, part).weight)
    ids = inputs("llama", 2, 24)["input_ids"]
    policy: Any = make("shared", budget=0.75).fit(model, ids)  # type: ignore[attr-defined]
    assert policy.spans == [(0, 0), (1, 2), (3, 3)]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with policy.on(model):
            torch.testing.assert_close(model(input_ids=ids, past_key_values=policy).logits, dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="spans"):
        make("shared", spans=[[0, 2], [2, 3]])
    with make("shared", budget=0.5).on(model) as unfit, torch.no_grad(), pytest.raises(BadInput, match=r"cache\.fit"):
        model(input_ids=ids, past_key_values=unfit)



def test_alisa_reads_the_newest_and_those_with_most_recent_weight() -> None:
    local, budget, cuts = 3, 0.4, [12, 15, *range(16, 30)]
    q, k, v = qkv(1, 4, 2, 29, 8, seed=8)
    out = drive(make("alisa", budget=budget, local=local), q, k, v, cuts)
    weight = torch.zeros(29, 2, 29, dtype=torch.float64)                        # by query, key head and place
    for t in range(29):
        for g in range(2):
            heads, seen = range(2 * g, 2 * g + 2), list(range(t + 1))
            if t >= 12:
                keep = max(1, round(budget * (t + 1)))
                newest = seen[-max(1, keep // 2) :]
                total = weight[max(0, t - local) : t, g].sum(0)
                rest = sorted((s for s in seen if s not in newest), key=lambda s: (float(total[s]), s), reverse=True)
                seen = sorted(newest + rest[: keep - len(newest)])
            weight[t, g, seen] = weights(q[0], k[0, g], heads, t, seen)
            for h in heads:
                torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], k[0, g, seen], v[0, g, seen]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox_parallel", "qwen3"])
def test_what_alisa_dropped_is_rebuilt_as_it_was(family: str) -> None:
    model, ids = build(family), inputs(family, 2, 48)["input_ids"]
    logits, caches = {}, {}
    for rebuild in (0.0, 0.5, 1.0):
        cache: Any = make("alisa", budget=0.4, local=3, rebuild=rebuild)
        with cache.on(model), torch.no_grad():
            logits[rebuild] = torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split([40, *[1] * 8], 1)], 1)
        caches[rebuild] = cache
    for rebuild in (0.5, 1.0):
        torch.testing.assert_close(logits[rebuild], logits[0.0], rtol=1e-4, atol=1e-4)
        assert caches[rebuild].rebuilt > 0 and caches[0.0].rebuilt == 0
    held = [caches[r].layers[0].tensors()["k"].shape[2] for r in (0.0, 0.5, 1.0)]
    assert held[0] >= 48 > held[1] > held[2]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with make("alisa", rebuild=0.5).on(model) as cache, torch.no_grad(), pytest.raises(Unsupported, match="rebuild=0"):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(BadInput, match="rebuild"):
        make("alisa", rebuild=1.5)


def test_wrapping_by_the_rules_of_the_paper() -> None:
    made = wrap(torch.tensor([10, 11, 12, 13, 14, 15]), [(1, 3), (3, 4)], 1, 2)
    assert made.input_ids.tolist() == [10, 1, 11, 12, 2, 1, 13, 2, 14, 15]
    assert made.position_ids.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 5]
    assert made.labels.tolist() == [-100, -100, 11, 12, -100, -100, 13, -100, 14, 15]
    sees = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [0, 4, 5], [0, 4, 5, 6], [5, 6, 7], [0, 4, 7, 8], [0, 4, 7, 8, 9]]
    assert [row.nonzero()[:, 0].tolist() for row in made.mask] == sees
    assert wrap(torch.tensor([10, 11]), [(0, 2)], 1, 2).position_ids.tolist() == [0, 0, 1, 1]
    ids = torch.arange(10, 16)
    for spans in ([(2, 2)], [(1, 3), (2, 4)], [(4, 7)], [(3, 4), (0, 1)]):
        with pytest.raises(BadInput, match="span"):
            wrap(ids, spans, 1, 2)
    with pytest.raises(BadInput, match="sentinel"):
        wrap(ids, [(0, 2)], 12, 2)
    bad = {"opening": {}, "opening and closing": {"opening": 1, "closing": 1}, "budget": {"budget": 0.5, "opening": 1, "closing": 2}}
    for wrong, settings in bad.items():
        with pytest.raises(BadInput, match=wrong):
            make("sentinel", **settings)


@pytest.mark.parametrize("cuts", [[30], [6, 11, 12, 13, 30], list(range(1, 31))])
def test_decoding_with_spans_gone_is_the_masked_pass_over_everything(cuts: list[int]) -> None:
    model, text = build("llama"), inputs("llama", 1, 24)["input_ids"][0]
    made = wrap(text, [(3, 9), (9, 12), (15, 20)], 1, 2)
    assert len(made.input_ids) == 30
    bias = torch.zeros(1, 1, 30, 30).masked_fill(~made.mask, torch.finfo(torch.float32).min)
    what = {"input_ids": made.input_ids[None], "position_ids": made.position_ids[None]}
    cache, got, start, held = make("sentinel", opening=1, closing=2), [], 0, []
    with torch.no_grad():
        wanted = model(**what, attention_mask=bias, use_cache=False).logits
        with cache.on(model):
            for stop in cuts:
                got.append(model(**{n: x[:, start:stop] for n, x in what.items()}, past_key_values=cache).logits)
                start = stop
                held.append(int(cache.kept()[1][0, 0]))
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-4, atol=1e-5)
    assert held[-1] == 24 - 14 + 3                                # tokens in no span, and a closing token for each
    if len(cuts) == 30:
        assert held[9:12] == [10, 4, 5]                           # the first span's seven entries go when its closing token is read
    with make("sentinel", opening=1, closing=2).on(model) as cache, torch.no_grad(), pytest.raises(BadInput, match="in turn"):
        model(input_ids=torch.tensor([[5, 2, 7]]), past_key_values=cache)


def test_sentinels_learn_to_carry_a_span() -> None:
    """The token behind a span is the span's own, and only the closing token can tell."""
    import transformers as tf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    made = [wrap(torch.full((5,), key), [(0, 4)], 1, 2) for key in range(4, 24)]
    bias = torch.zeros(1, 1, 7, 7).masked_fill(~made[0].mask, torch.finfo(torch.float32).min)

    def right() -> float:
        with torch.no_grad():
            ids, at = torch.stack([m.input_ids for m in made]), made[0].position_ids[None]
            guess = model(input_ids=ids, position_ids=at, attention_mask=bias, use_cache=False).logits[:, 5].argmax(-1)
        return float((guess == torch.arange(4, 24)).float().mean())

    random = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = right()
    for step in range(120):
        text = torch.randint(4, 24, (16, 1), generator=random).expand(-1, 6)
        optimiser.zero_grad()
        sentinel_loss(model, text, 1, 2, spans=1, length=4, seed=step).backward()
        optimiser.step()
    assert before < 0.2 and right() > 0.9
    with pytest.raises(BadInput, match="3 spans of 9"):
        sentinel_loss(model, torch.zeros(1, 20, dtype=torch.long) + 5, 1, 2, spans=3, length=9)


def test_a_window_reads_the_blocks_its_weighted_probe_names() -> None:
    q, k, v = qkv(1, 4, 2, 30, 8, seed=9)
    out = drive(make("probe", budget=0.4, block=4), q, k, v, [18, 26])
    hidden = q[0, 0, 18:26].double()
    bias = (hidden - hidden.mean(0)).norm(dim=-1)
    for g in range(2):
        probe = sum((bias / bias.sum())[:, None] * q[0, h, 18:26].double() for h in (2 * g, 2 * g + 1)).sum(0)  # type: ignore[union-attr]
        blocks = [list(range(s, min(s + 4, 26))) for s in range(0, 18, 4)]                                      # the fifth is half new
        score = [float(probe @ k[0, g, b].double().mean(0)) for b in blocks]
        best = sorted(range(4), key=lambda i: score[i], reverse=True)[: round(0.4 * 5) - 1] + [4]
        past = sorted(s for i in best for s in blocks[i] if s < 18)
        for t in range(18, 26):
            for h in (2 * g, 2 * g + 1):
                seen = past + list(range(18, t + 1))
                torch.testing.assert_close(out[0, h, t].double(), over(q[0, h, t], k[0, g, seen], v[0, g, seen]), rtol=1e-4, atol=1e-5)


def test_an_anchor_among_distractors_is_heard_by_the_weighted_probe() -> None:
    """The paper's claim, planted: one token of a window asks for a block, the others for nothing in particular."""
    random = torch.Generator().manual_seed(0)
    hits = {"weighted": 0, "mean": 0}
    for _ in range(200):
        blocks = torch.randn(32, 16, generator=random)
        planted = int(torch.randint(32, (1,), generator=random))
        q = torch.randn(24, 16, generator=random)
        hidden = 0.2 * torch.randn(24, 10, generator=random)
        q[7], hidden[7] = 3 * blocks[planted], hidden[7] + 3.0
        weight = activation_weights(hidden[None], torch.ones(1, 24, dtype=torch.bool))[0]
        hits["weighted"] += int((blocks @ (weight[:, None] * q).sum(0)).argmax()) == planted
        hits["mean"] += int((blocks @ q.mean(0)).argmax()) == planted
    assert hits["weighted"] > hits["mean"] + 20


def test_layers_share_one_budget() -> None:
    density = torch.tensor([0.9, 0.1, 0.3, 0.05])
    for budget in (0.1, 0.25, 0.6, 1.0):
        share = shares(density, budget)
        assert float(share.mean()) == pytest.approx(budget) and float(share.max()) <= 1 and float(share.min()) > 0
    assert torch.equal(shares(density, 0.1).argsort(), density.argsort())
    torch.testing.assert_close(shares(density, 0.1), 0.4 * density.double() / density.double().sum())
