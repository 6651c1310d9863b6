"""What the papers of static patterns say, on a model that lives by recall: it is not trained for any of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rarefy.attention.pattern import PatternAttention
from rarefy.builtin.model import recall_model
from rarefy.site import replaced
from rarefy.tasks.recall import FILLER, KEYS, VALUES, key_value, needle, recall_accuracy


@pytest.fixture(scope="module")
def accuracy() -> Callable[[str], tuple[float, float, float]]:
    """(key-value accuracy, needle accuracy, density) under a pattern."""
    model = recall_model()
    tasks = key_value(KEYS, VALUES, 32, 8, filler=FILLER, gap=128, seed=9), needle(KEYS, VALUES, FILLER, 256, 48, seed=9)

    def measured(pattern: str) -> tuple[float, float, float]:
        method = PatternAttention(pattern=pattern, block=16, query_block=16)
        with replaced(model, {"layers.*.attn": method}):
            return *(recall_accuracy(model, task).mean for task in tasks), method.measured_density()

    return measured


def test_static_patterns_lose_needles_that_dense_attention_finds(accuracy: Callable[[str], tuple[float, float, float]]) -> None:
    assert min(accuracy("full()")[:2]) > 0.97
    for pattern in ("window(64) | sinks(4)", "blocks(8, window(2) | keys(0) | random(2, past=True))", "window(2) | strided(2)"):
        pairs, found, density = accuracy(pattern)
        assert 0.2 < density < 0.6 and pairs < 0.5 and found < 0.7, pattern


def test_a_hybrid_stack_keeps_what_windows_of_equal_density_lose(accuracy: Callable[[str], tuple[float, float, float]]) -> None:
    """MASFormer and LongGen: few full layers are enough; of the two layers here, the one that looks keys up."""
    hybrid, local = accuracy("on_layers([1], full(), window(8) | sinks(4))"), accuracy("window(80) | sinks(4)")
    assert abs(hybrid[2] - local[2]) < 0.01
    assert min(hybrid[:2]) > 0.97 and max(local[:2]) < 0.6
    assert max(accuracy("on_layers([0], full(), window(8) | sinks(4))")[:2]) < 0.3      # not any layer will do
