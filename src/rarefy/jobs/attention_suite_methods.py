"""From a card of any kind that chooses keys (method, pattern, cache policy) to something that a sitting can be sat with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..builtin.corpus import Batch
from ..catalogue import FAMILY_OF_UNIT, Entry
from ..errors import BadInput, Unsupported
from ..fit import calibrate
from ..tasks.averaging import Averaging
from .attention_suite_run import Candidate
from .attention_suite_tasks import Sitting
from .build import check_settings, make_plan, refuse_untrained, settings_for

CALIBRATION = 4
"""Sequences of the sitting that a calibrated method is shown, as a user would calibrate on the text that is to be read."""


def check_usable(one: Entry) -> None:
    """Raise BadInput for a card that chooses no keys, or needs training first."""
    if one.kind not in ("method", "pattern", "cache") or (one.kind == "method" and FAMILY_OF_UNIT[one.unit] != "attention"):
        raise BadInput(
            f"{one.name} is a {one.kind} of unit {one.unit!r}; the attention suite takes methods named attention/..., patterns and cache policies"
        )
    refuse_untrained([one])


def has_budget(one: Entry) -> bool:
    """Whether it is told how much to keep; patterns and maps from scores to probabilities keep what they keep."""
    return one.kind == "cache" or (one.kind == "method" and "budget" in inspect.signature(inspect.unwrap(one.load().__init__)).parameters)


def check_settings_of(cards: Sequence[Entry], settings: Mapping[str, Any]) -> None:
    """As `build.check_settings`, over those cards that have settings."""
    methods = [one for one in cards if one.kind == "method"]
    if settings and not methods:
        raise BadInput(f"--set {next(iter(settings))}: patterns and cache policies take no settings here")
    if settings:
        check_settings(methods, settings)


def _calibrated(model: Any, plan: dict[str, Any], sitting: Sitting) -> dict[str, Any]:
    calibrate(model, plan, [Batch(sitting.ids_BT[:CALIBRATION], sitting.doc_BT[:CALIBRATION], torch.zeros(0))], sequential=False)
    return plan


def prepare(one: Entry, budget: float, settings: Mapping[str, Any], sitting: Sitting | None, averaging: Averaging | None) -> Candidate:
    """A candidate for a sitting, or, without a model, for averaging; calibrated methods are fitted to its first sequences.

    Raises:
        BadInput, Unsupported: what this method cannot serve, with the reason.
    """
    if one.kind == "cache":
        return _policy(one, budget, sitting)
    if one.kind == "pattern":
        from ..attention.pattern import PatternAttention

        return Candidate({"averaging" if sitting is None else "layers.*.attn": PatternAttention(one.note.partition(";")[0]).eval()})
    own = settings_for(one, settings) | ({"budget": budget} if has_budget(one) else {})
    if sitting is None:
        method: Any = one.load()(**own).eval()
        if wanted := set(getattr(method, "wants", ())) - {"cache"}:
            raise Unsupported(f"{one.name} reads {', '.join(sorted(wanted))}, which attention without a model does not have")
        if averaging is not None and one.fitted == "calibrated":
            method.observe(averaging.q_BHTD, averaging.k_BGSD, averaging.v_BGSD)
            method.finish()
        return Candidate({"averaging": method})
    plan = make_plan(sitting.model, one, "", budget, settings_for(one, settings))
    return Candidate(_calibrated(sitting.model, plan, sitting) if one.fitted == "calibrated" else plan)


def _policy(one: Entry, budget: float, sitting: Sitting | None) -> Candidate:
    from ..attention.cache import make

    if sitting is None:
        raise Unsupported(f"{one.name} lives in a model's cache, and averaging has no model")
    model, ids_BT = sitting.model, sitting.ids_BT[:CALIBRATION]

    def made() -> Any:
        cache = make(one.name, budget=budget)
        if fit := getattr(cache, "fit", None):             # dictionaries and spans that are fitted offline
            fit(model, ids_BT)
        return cache

    return Candidate(cache=made, serve=lambda model, cache: cache.on(model))
