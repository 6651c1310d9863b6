"""Pages, pieces and shared beginnings, against each request gathered and attended to by itself."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import BadInput
from rarefy.kernels.block_attention import merge
from rarefy.kernels.block_attention.paged import Paged, paged_attention, schedule, shared_prefixes

PAGE = 4


def pool(pages, G=2, D=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(pages, PAGE, G, D, generator=draw, dtype=dtype) for _ in range(2)]


def alone(q, k, v, table, length, scale):
    """Each request by itself, its keys put together in order."""
    outs, lses = [], []
    for r in range(len(q)):
        keys, values = (torch.cat([x[p] for p in table[r].tolist() if p >= 0] or [x[0][:0]])[: int(length[r])] for x in (k, v))
        share = q.shape[1] // k.shape[2]
        score = torch.einsum("hd,shd->hs", q[r], keys.repeat_interleave(share, 1)) * scale
        outs.append(torch.einsum("hs,shd->hd", score.softmax(-1), values.repeat_interleave(share, 1)))
        lses.append(score.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def ragged(seed, requests=7, most=9):
    """A table over scattered pages; requests 0-3 begin alike for 3 pages, 0-1 for 5, and 5 is empty."""
    draw = random.Random(seed)
    order = draw.sample(range(80), 80)
    table = torch.full((requests, most), -1)
    for r in range(requests):
        for n in range(most):
            table[r, n] = order[n] if r < 4 and n < 3 or r < 2 and n < 5 else order[9 + 10 * r + n] if 9 + 10 * r + n < 80 else n
    length = torch.tensor([draw.randint(1, most * PAGE) for _ in range(requests)])
    length[5], length[:2] = 0, torch.tensor([21, most * PAGE])
    return table, length


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("workers", [1, 3, 50])
@pytest.mark.parametrize("seed", range(4))
def test_paged_attention_is_each_request_alone(share, workers, seed):
    table, length = ragged(seed)
    k, v = pool(80)
    q = torch.randn(7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out, lse = paged_attention(q, k, v, table, length, scale=0.4, return_lse=True, workers=workers, share=share)
    want, sums = alone(q, k, v, table, length, 0.4)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, sums)
    assert not out[5].any() and bool((lse[5] == -torch.inf).all())


def test_shared_pages_are_read_once():
    table, length = ragged(0)
    length[:4] = torch.tensor([30, 30, 14, 12])
    made, apart = Paged(table, length, PAGE), Paged(table, length, PAGE, share=False)
    assert [(p.requests, p.start, p.stop) for p in made.prefixes] == [((0, 1, 2, 3), 0, 12), ((0, 1), 12, 20)]
    assert apart.keys_read() == int(length.sum()) and made.keys_read() == int(length.sum()) - 3 * 12 - 8
    long = Paged(table, length, PAGE, least=3)                           # two pages are too few to go together for
    assert [p.stop for p in long.prefixes] == [12] and long.keys_read() == int(length.sum()) - 3 * 12


def test_a_page_is_shared_only_where_all_of_it_is_seen():
    """Two queries of one request, a key apart: whole pages together, the last one by each."""
    table = torch.tensor([[3, 1, 2], [3, 1, 2]])
    made = Paged(table, torch.tensor([10, 11]), PAGE)
    assert [(p.start, p.stop) for p in made.prefixes] == [(0, 8)] and sorted(p[:3] for p in made.pieces) == [(0, 8, 10), (1, 8, 11)]
    found, spans = shared_prefixes(torch.tensor([[1, 2], [1, 2]]), torch.tensor([3, 8]), PAGE)
    assert found == [] and spans == [(0, 0, 3), (1, 0, 8)]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), least=st.integers(1, 3), requests=st.integers(0, 8))
def test_prefixes_and_what_is_left_are_every_key_once(seed, least, requests):
    draw = random.Random(seed)
    table = torch.tensor([[draw.randrange(2) for _ in range(6)] for _ in range(requests)]).view(requests, 6)
    length = torch.tensor([draw.randrange(6 * PAGE + 1) for _ in range(requests)], dtype=torch.long)
    found, spans = shared_prefixes(table, length, PAGE, least)
    parts = [*spans, *((r, p.start, p.stop) for p in found for r in p.requests)]
    assert sorted((r, x) for r, start, stop in parts for x in range(start, stop)) == [(r, x) for r in range(requests) for x in range(int(length[r]))]
    for prefix in found:
        pages = table[list(prefix.requests), prefix.start // PAGE : prefix.stop // PAGE]
        assert len(prefix.requests) > 1 and pages.shape[1] >= least and bool((pages == pages[:1]).all())
    if least == 1:                                  # nothing that two could have read together is read by each
        alike = {(tuple(table[r, : n + 1].tolist())) for r in range(requests) for n in range(int(length[r]) // PAGE)}
        part_pages = sum(int(length[r]) % PAGE for r in range(requests))
        assert sum(p.stop - p.start for p in found) + sum(b - a for _, a, b in spans) == PAGE * len(alike) + part_pages


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 500), max_size=20), workers=st.integers(1, 12), step=st.integers(1, 64))
def test_a_schedule_covers_all_work_once_and_evenly(lengths, workers, step):
    pieces = schedule([(r, 5, 5 + n) for r, n in enumerate(lengths)], workers, step)
    covered = sorted((r, x) for r, start, stop, _ in pieces for x in range(start, stop))
    assert covered == [(r, x) for r, n in enumerate(lengths) for x in range(5, 5 + n)]
    load = [sum(p.stop - p.start for p in pieces if p.worker == w) for w in range(workers)]
    longest, share = max((p.stop - p.start for p in pieces), default=0), sum(lengths) / workers
    assert longest < share + step and max(load) <= share + longest
    assert [p.worker for p in pieces] == sorted(p.worker for p in pieces)


def test_one_long_request_among_short_ones_does_not_hold_up_the_rest():
    pieces = schedule([(0, 0, 32768), *((r, 0, 256) for r in range(1, 16))], 8, 16)
    load = [sum(p.stop - p.start for p in pieces if p.worker == w) for w in range(8)]
    assert max(load) <= 1.05 * sum(load) / 8


def test_merging_is_associative_and_equals_attention_over_all_keys():
    q, (k, v) = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), pool(6)
    draw, table = random.Random(1), torch.arange(6).expand(5, 6)
    want = alone(q, k, v, table, torch.full((5,), 24), 0.3)
    for _ in range(5):
        cuts = [0, *sorted(draw.sample(range(1, 24), 5)), 24]
        keys, values = (x.flatten(0, 1) for x in (k, v))
        parts = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            score = torch.einsum("rhd,shd->rhs", q, keys[a:b].repeat_interleave(2, 1)) * 0.3
            parts.append((torch.einsum("rhs,shd->rhd", score.softmax(-1), values[a:b].repeat_interleave(2, 1)), score.logsumexp(-1)))
        while len(parts) > 1:                                            # brackets anywhere
            n = draw.randrange(len(parts) - 1)
            parts[n : n + 2] = [merge(*zip(*parts[n : n + 2], strict=True))]
        for got, true in zip(parts[0], want, strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near_double(dtype):
    table, length = ragged(2)
    k, v = pool(80, D=32, dtype=torch.float32)
    q = torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(3))
    got = paged_attention(q.to(dtype), k.to(dtype), v.to(dtype), table, length, scale=0.2)
    want = alone(q.double(), k.double(), v.double(), table, length, 0.2)[0]
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


def test_what_does_not_fit_is_refused():
    k, v = pool(3)
    q, table = torch.zeros(2, 4, 6, dtype=torch.float64), torch.tensor([[0, 1], [2, -1]])
    assert not paged_attention(q[:0], k, v, table[:0], torch.zeros(0, dtype=torch.long), scale=1.0).numel()
    for given_table, length, page in (
        (table, [8, 9], PAGE), (table, [8, 5], PAGE), (table, [-1, 3], PAGE), (table.float(), [8, 4], PAGE), (table, [8, 4], 0),
    ):
        with pytest.raises(BadInput):
            Paged(given_table, torch.tensor(length), page)
    fits = Paged(table, torch.tensor([8, 4]), PAGE)
    for wrong in ((q[:1], k, v), (q, k[:2], v[:2]), (q, k[:, :3], v[:, :3]), (q[:, :3], k, v), (q, k, v[:, :, :1])):
        with pytest.raises(BadInput):
            fits.attend(*wrong, scale=1.0)
    with pytest.raises(BadInput, match="workers=0"):
        schedule([], 0)
