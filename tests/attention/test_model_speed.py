"""What makes attention fast inside a model must not change what it says: strips of bounds, kept sums, counts of single queries."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.block import highest
from rarefy.attention.cache import Cache
from rarefy.attention.quest import Quest
from rarefy.errors import BadInput
from rarefy.kernels.block_attention import BlockMask


def heads(T: int, S: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, s, 8, generator=r, dtype=torch.float64) for n, s in ((4, T), (2, S), (2, S)))  # type: ignore[return-value]


@pytest.mark.parametrize(("T", "S", "rows", "block", "causal"), [
    (70, 133, 16, 16, True), (1500, 1501, 64, 32, True), (1100, 1130, 32, 64, False), (5, 133, 64, 16, True)])
def test_bounds_made_in_strips_are_the_largest_of_each_block(T: int, S: int, rows: int, block: int, causal: bool) -> None:
    q, k, _ = heads(T, S)
    got = Quest(0.2, block, rows).scores(q, k, rows, causal)
    at_T = torch.arange(S - T, S) // rows - (S - T) // rows
    for n in range(got.shape[-1]):
        page = k[:, :, n * block : (n + 1) * block].repeat_interleave(2, 1)
        bound = torch.maximum(q * page.amin(2, keepdim=True), q * page.amax(2, keepdim=True)).sum(-1)
        want = torch.full(got.shape[:3], -torch.inf, dtype=q.dtype).scatter_reduce(2, at_T.expand(2, 4, -1), bound, "amax")
        seen = (((S - T) // rows + torch.arange(got.shape[2])) * rows + rows > n * block) | torch.tensor(not causal)
        torch.testing.assert_close(got[:, :, seen, n], want[:, :, seen])


@pytest.mark.parametrize("S", [1, 4, 23, 24])
def test_a_step_chooses_and_counts_as_the_general_path(S: int) -> None:
    q, k, v = heads(1, S)
    method = Quest(budget=0.3, block=4)
    score = method.scores(q, k, 1, True)
    score[..., -1] = torch.inf
    N = score.shape[-1]
    want = highest(score, torch.tensor([[max(1, round(0.3 * N))]]))
    assert torch.equal(method.choose(q, k, True), want)
    method(q, k, v)
    assert method.measured_density() == pytest.approx(BlockMask(want, None, None, 4, 1).density(1, S, True), abs=1e-12)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_is_refused_with_a_cache_whenever_it_came(which: str) -> None:
    """Old keys and values are looked at through kept sums and the output; here everything is attended to."""
    q, k, v = heads(12, 12)
    for bad in (2, 11):
        cache, method = Cache(), Quest(budget=1.0, block=4)
        broken = {"keys": k.clone(), "values": v.clone()}
        broken[which][0, 1, bad, 3] = torch.nan
        keys, values = cache.update(broken["keys"][:, :, :11], broken["values"][:, :, :11], 0)
        keys, values = cache.update(broken["keys"][:, :, 11:], broken["values"][:, :, 11:], 0)
        with pytest.raises(BadInput, match=rf"{which} of attention/quest in layer 3.*\[0, 1, {bad}, 3\]" if which == "keys" or bad == 2 else which):
            method.attend(q[:, :, 11:], keys, values, scale=0.3, layer=3, cache=cache.layers[0])
