"""Sparse Forcing: its memory against a list kept by hand, dense in the limit, a stream whose salient blocks recur, and decoding."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from trained_inputs import qkv

from rarefy.attention.trained.forcing import Forcing
from rarefy.errors import BadInput, Unsupported


def test_unlimited_memory_and_a_full_window_are_dense_attention():
    q, k, v = qkv(37)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(Forcing(memory=99, window=2, top=0, block=4)(q, k, v), dense)
    torch.testing.assert_close(Forcing(memory=0, window=99, top=0, block=4)(q, k, v), dense)
    assert (Forcing(memory=1, window=2, top=0, block=4)(q, k, v) - dense).abs().max() > 0.01


def by_hand(means, memory, window, decay):
    """Memory of one head, as lists: what is held when each block is served."""
    held, salience, told = [], {}, []
    for i in range(len(means)):
        if i >= 1:
            last = i - 1
            there = held + list(range(max(0, last - window), last))
            if there:
                weight = torch.stack([means[last] @ means[c] / means.shape[1] ** 0.5 for c in there]).softmax(0)
                salience = {c: decay * salience.get(c, 0.0) + weight[there.index(c)].item() - 1 / len(there) for c in there}
            if last - window >= 0:
                held.append(last - window)
            while len(held) > memory:
                held.remove(min(held, key=lambda c: salience.get(c, 0.0)))
        told.append(list(held))
    return told


@pytest.mark.parametrize(("memory", "window", "top"), [(2, 3, 2), (1, 1, 1), (0, 2, 1), (3, 2, 0)])
def test_what_is_seen_is_the_memory_kept_by_hand_and_the_best_of_the_window(memory, window, top):
    q, k, v = qkv(46, batch=1)
    method = Forcing(memory=memory, window=window, top=top, decay=0.8, block=4)
    mask = method.select(q, k, v).mask[0]
    for head in range(4):
        keys = k[0, head // 2]
        means = torch.stack([keys[a : a + 4].mean(0) for a in range(0, 46, 4)])
        told = by_hand(means, memory, window, 0.8)
        for t in range(46):
            i = t // 4
            near = sorted(range(max(0, i - window), i), key=lambda c, t=t: -float(q[0, head, t] @ means[c]))
            wanted = {i, *told[i], *near[: top or None]}
            assert set(mask[head, t].nonzero()[:, 0].tolist()) == wanted, (head, t)
            assert len(told[i]) <= memory


def test_decoding_gives_what_prefill_gives():
    q, k, v = qkv(46)
    method = Forcing(memory=2, window=3, top=1, block=4)
    whole = method(q, k, v)
    for start, end in ((0, 6), (6, 7), (7, 30), (30, 31), (31, 46)):
        torch.testing.assert_close(method(q[:, :, start:end], k[:, :, :end], v[:, :, :end]), whole[:, :, start:end])


def stream(seed, kinds=3, block=4, width=16):
    """Blocks of noise between which a few directions recur: often at first, then once in 24 blocks. Keys [1, 1, S, D], and kinds, -1 for noise."""
    draw = torch.Generator().manual_seed(seed)
    n = torch.arange(144)
    kind = torch.where(n < 24, torch.where(n % 2 == 0, n // 2 % kinds, -1), torch.where(n % 8 == 0, n // 8 % kinds, -1))
    ways = torch.linalg.qr(torch.randn(width, kinds, generator=draw))[0].T
    keys = torch.randn(len(n), block, width, generator=draw) * 0.5
    keys[kind >= 0] += 6 * ways[kind[kind >= 0]][:, None]
    return keys.flatten(0, 1)[None, None], kind


def held_share(memory, seed):
    """Share of (kind, moment) pairs with a block of that kind in memory or window, and the same of a memory of the newest blocks."""
    keys, kind = stream(seed)
    method = Forcing(memory=memory, window=2, block=4)
    kept, N = method.remembered(method.describe(keys))[0, 0], len(kind)
    n = torch.arange(N)
    newest = (n < n[:, None] - 2) & (n >= n[:, None] - 2 - memory)
    window = (n <= n[:, None]) & (n >= n[:, None] - 2)
    return [torch.stack([((m | window)[24:] & (kind == c)).any(1).float().mean() for c in range(3)]).mean().item() for m in (kept, newest)]


def test_a_stream_keeps_its_recurring_blocks_under_a_fixed_memory():
    shares = torch.tensor([held_share(6, seed) for seed in range(5)]).mean(0)
    assert shares[0] > 0.9 and shares[1] < 0.5          # 0.91 and 0.41


def test_other_than_causal_is_refused_and_bad_numbers_are_named():
    q, k, v = qkv(9)
    with pytest.raises(Unsupported, match="not causal"):
        Forcing(block=4).attend(q, k, v, scale=1.0, causal=False)
    for bad in ({"memory": -1}, {"top": -1}, {"window": 0}, {"decay": 0.0}, {"query_block": 3}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            Forcing(**bad)
