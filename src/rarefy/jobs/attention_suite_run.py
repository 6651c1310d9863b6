"""One method at one budget on one sitting in one phase: what it answers, keeps, costs and how long it takes.

prefill: the whole sequence in one pass with the method in place. decode: the tokens before `start` dense, the rest one at a
time with the method in place (or the cache's policy), so that a loss is that phase's own.

Shape letters: B = sequences, T = tokens, A = judged places, V = vocabulary, C = sequences or documents.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.cache import Cache
from ..cost import Cost
from ..errors import RarefyError
from ..fidelity import Interval, ratio_interval
from ..site import replaced
from ..tasks.averaging import Averaging, averaging_score
from .attention_suite_tasks import Sitting

PHASES = ("prefill", "decode")
RUNS = 1
"""Timed passes each of the method and of the dense model, in turn, after the pass that was judged; the fastest counts."""
TIMED = 16
"""Most tokens of a timed decoding; what more are judged count as slow as these."""

PREFIX_BYTES = 256 << 20
"""Most bytes of dense caches kept with a sitting; batches beyond read their tokens anew for each candidate."""


@dataclass(frozen=True)
class Candidate:
    """How a method is put to work."""

    plan: Mapping[str, Any] = field(default_factory=dict)
    """Site -> method; empty is dense."""
    cache: Callable[[], Any] = Cache
    """Makes the cache of a decoding."""
    serve: Callable[[Any, Any], Any] | None = None
    """(model, cache) -> context in which a cache's policy is at work; for policies alone."""

    @property
    def methods(self) -> list[Any]:
        """Different methods of the plan."""
        return list({id(m): m for m in self.plan.values()}.values())


DENSE = Candidate()


def _read(sitting: Sitting, ids_BT: Tensor, at: int, candidate: Candidate, cache: Any) -> Any:
    """The cache with the tokens before `start`. A policy reads them itself; for a plain cache they are read once and copied from then on."""
    plain = candidate.serve is None and candidate.cache is Cache
    if plain and at in sitting.prefixes:
        return copy.deepcopy(sitting.prefixes[at])
    sitting.model(input_ids=ids_BT[:, : sitting.start], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if plain and sum(c.bytes() for c in (cache, *sitting.prefixes.values())) <= PREFIX_BYTES:
        sitting.prefixes[at] = copy.deepcopy(cache)
    return cache


@torch.no_grad()
def _logits(
    sitting: Sitting, ids_BT: Tensor, phase: str, candidate: Candidate, at: int, most: int | None = None,
) -> tuple[Tensor, int, float, Any]:
    """(logits of the tokens from `first` on, `first`, seconds of the part judged, the cache) of the batch whose first sequence is `at`.

    Args:
        most: tokens decoded, if not all.
    """
    model, start = sitting.model, sitting.start
    if phase == "prefill":
        began = time.perf_counter()
        with replaced(model, dict(candidate.plan)):
            out = model(input_ids=ids_BT, use_cache=False).logits
        return out, 0, time.perf_counter() - began, None
    cache = candidate.cache()
    served = candidate.serve(model, cache) if candidate.serve else contextlib.nullcontext()
    with served:
        cache = _read(sitting, ids_BT, at, candidate, cache)
        for method in candidate.methods:
            if hasattr(method, "measured_density"):
                method.measured_density()
        rows, began = [], time.perf_counter()
        with replaced(model, dict(candidate.plan)):
            for t in range(start, ids_BT.shape[1])[:most]:
                rows.append(model(input_ids=ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(rows, 1), start, time.perf_counter() - began, cache


def judged(sitting: Sitting, phase: str) -> Tensor:
    """[B, T] bool: places that a phase is judged on; of decoding those whose question is decoded."""
    if phase == "prefill":
        return sitting.answer_BT
    later = torch.arange(sitting.ids_BT.shape[1]) > sitting.start
    return sitting.answer_BT & later


def log_probs(sitting: Sitting, phase: str, candidate: Candidate) -> tuple[Tensor, Any]:
    """([A, V] float32 log-probabilities at the judged places, in row order; the last cache)."""
    parts, cache = [], None
    for at in range(0, len(sitting.ids_BT), sitting.at_once):
        ids, mark = (x[at : at + sitting.at_once] for x in (sitting.ids_BT, judged(sitting, phase)))
        logits, first, _, cache = _logits(sitting, ids, phase, candidate, at)
        parts.append(logits[:, :-1][mark[:, first + 1 :]].float().log_softmax(-1))
    return torch.cat(parts), cache


class Reference:
    """The dense model's answers on a sitting."""

    def __init__(self, sitting: Sitting) -> None:
        self.sitting = sitting
        self.all_AV, _ = log_probs(sitting, "prefill", DENSE)

    def at(self, phase: str) -> Tensor:
        """[A, V] at the places that a phase is judged on; dense decoding says what dense prefill does."""
        return self.all_AV[judged(self.sitting, phase)[self.sitting.answer_BT]]


def _mean(value_A: Tensor, doc_A: Tensor) -> Interval:
    """Mean with its interval; where every document has the same mean that is no proof of zero variance, but all there is."""
    total = torch.zeros(int(doc_A.max()) + 1, dtype=torch.float64).index_add_(0, doc_A, value_A.double())
    return ratio_interval(total, torch.bincount(doc_A, minlength=len(total)))


def _exp(ce: Interval) -> Interval:
    return Interval(math.exp(-ce.mean), math.exp(-ce.high), math.exp(-ce.low))


def _share(one: Interval) -> Interval:
    """A share's interval, cut to where shares are: the normal one of few sequences reaches beyond."""
    return Interval(one.mean, max(0.0, one.low), min(1.0, one.high))


def _turned(one: Interval) -> Interval:
    return Interval(1 - one.mean, 1 - one.high, 1 - one.low)


def metrics(sitting: Sitting, phase: str, log_AV: Tensor, dense_AV: Tensor) -> dict[str, Interval]:
    """score, loss (dense score less score, paired within sequences), kl, ce_increase, and scores by group.

    Of text the score is exp(-CE increase), the dense model's perplexity over the method's.
    """
    mark = judged(sitting, phase)
    token_A, doc_A = sitting.ids_BT[mark], sitting.doc_BT[mark]
    ce_A, dense_A = (-x.gather(1, token_A[:, None])[:, 0] for x in (log_AV, dense_AV))
    hit_A, dense_hit_A = ((x.argmax(1) == token_A).double() for x in (log_AV, dense_AV))
    more_A = (ce_A - dense_A).double()
    kl_A = (dense_AV.exp() * (dense_AV - log_AV)).sum(1)
    out = {"kl": _mean(kl_A, doc_A), "ce_increase": _mean(more_A, doc_A)}
    if sitting.is_text:
        score = _exp(out["ce_increase"])
        out |= {"score": score, "loss": _turned(score), "dense_score": Interval(1.0, 1.0, 1.0)}
    else:
        out |= {"score": _share(_mean(hit_A, doc_A)), "loss": _mean(dense_hit_A - hit_A, doc_A), "dense_score": _share(_mean(dense_hit_A, doc_A))}
    for name, group in sitting.by.items():
        here = group[mark]
        if here.any():
            part = _mean((more_A if sitting.is_text else hit_A)[here], doc_A[here])
            out[f"score, {name}"] = _exp(part) if sitting.is_text else _share(part)
    return out


def density(candidate: Candidate, cache: Any, sitting: Sitting) -> float:
    """Fraction of visible keys kept, as the methods counted it; of a cache's policy, entries within reach at the end."""
    counted = [m.measured_density() for m in candidate.methods if hasattr(m, "measured_density")]
    if counted:
        return sum(counted) / len(counted)
    if not candidate.serve:
        return 1.0
    if (read := getattr(cache, "measured_density", None)) is not None:       # a policy that keeps everything and reads a part
        return float(read())
    reach = [float(layer_BG.double().mean()) for layer_BG in cache.kept()]
    return sum(reach) / len(reach) / sitting.ids_BT.shape[1]


def costs(candidate: Candidate, kept: float) -> dict[str, float]:
    """FLOPs and bytes a query in the layers served, counted from shapes; {} where a method cannot say."""
    if not candidate.plan:
        return {}
    try:
        mine = sum((m.cost(kept) for m in candidate.plan.values()), Cost(0, 0))
        dense = sum((m.dense_cost() for m in candidate.plan.values()), Cost(0, 0))
    except (NotImplementedError, AttributeError, RarefyError):
        return {}
    return {"flops": mine.flops, "bytes": mine.bytes, "dense_flops": dense.flops, "dense_bytes": dense.bytes}


def timed_pair(sitting: Sitting, phase: str, candidate: Candidate) -> dict[str, float]:
    """ms of the whole model a sequence, and of dense in turn with it; the first batch, selection included; peak memory on a GPU."""
    ids, tokens = sitting.ids_BT[: sitting.at_once], sitting.ids_BT.shape[1] - sitting.start
    share = max(1.0, tokens / TIMED) if phase == "decode" else 1.0
    best = [math.inf, math.inf]
    peak: dict[str, float] = {}
    for _ in range(RUNS):
        for i, one in enumerate((candidate, DENSE)):
            if ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            best[i] = min(best[i], _logits(sitting, ids, phase, one, 0, TIMED)[2] * share * 1e3 / len(ids))
            if ids.is_cuda:
                peak[("peak_bytes", "dense_peak_bytes")[i]] = float(torch.cuda.max_memory_allocated())
    return {"ms": best[0], "dense_ms": best[1], **peak}


def sit(reference: Reference, phase: str, candidate: Candidate) -> tuple[dict[str, Interval], float, dict[str, float]]:
    """(metrics, density, cost) of a candidate."""
    sitting = reference.sitting
    for method in candidate.methods:
        if hasattr(method, "measured_density"):
            method.measured_density()
    log_AV, cache = log_probs(sitting, phase, candidate)
    kept = density(candidate, cache, sitting)
    cost = costs(candidate, kept)
    if candidate.serve and hasattr(cache, "bytes"):
        dense: Any = Cache()
        with torch.no_grad():
            sitting.model(input_ids=sitting.ids_BT[-sitting.at_once :], past_key_values=dense, use_cache=True, logits_to_keep=1)
        cost |= {"bytes": float(cache.bytes()), "dense_bytes": float(sum(x.nbytes for layer in dense.layers for x in (layer.keys, layer.values)))}
    return metrics(sitting, phase, log_AV, reference.at(phase)), kept, cost | timed_pair(sitting, phase, candidate)


@torch.no_grad()
def sit_averaging(task: Averaging, phase: str, method: Any) -> tuple[dict[str, Interval], float, dict[str, float]]:
    """Averaging needs no model: the method attends with the closed-form queries, all at once or one at a time."""
    method.measured_density()
    q, k, v, scale = task.q_BHTD, task.k_BGSD, task.v_BGSD, task.scale
    M, N = q.shape[2], k.shape[2] - q.shape[2]
    began = time.perf_counter()
    if phase == "prefill":
        out = method.attend(q, k, v, scale=scale)
    else:
        out = torch.cat([method.attend(q[:, :, m : m + 1], k[:, :, : N + m + 1], v[:, :, : N + m + 1], scale=scale) for m in range(M)], 2)
    ms = (time.perf_counter() - began) * 1e3 / len(q)
    kept = method.measured_density()
    score, dense = averaging_score(out, task), averaging_score(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale), task)
    loss = Interval(dense.mean - score.mean, dense.mean - score.high, dense.mean - score.low)     # the dense score has no spread to speak of
    return {"score": score, "loss": loss, "dense_score": dense}, kept, costs(Candidate({"averaging": method}), kept) | {"ms": ms}
