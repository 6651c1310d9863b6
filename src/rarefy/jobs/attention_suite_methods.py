"""From a card of any kind that chooses keys (method, pattern, cache policy) to something that a sitting can be sat with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..builtin.corpus import Batch
from ..catalogue import FAMILY_OF_UNIT, Entry, card
from ..errors import BadInput, Unsupported
from ..fit import calibrate
from ..site import sites
from ..tasks.averaging import Averaging
from .attention_suite_run import Candidate
from .attention_suite_tasks import Sitting
from .build import check_settings, make_plan, refuse_untrained, settings_for

CALIBRATION, CALIBRATION_TOKENS = 4, 8192
"""Sequences of the sitting that a calibrated method is shown, as a user would calibrate on the text that is to be read, and most tokens of them."""


def card_of(name: str) -> Entry:
    """The card of a name, or one made for a pattern written as an expression. Raises BadInput for an unknown name or an expression that is none."""
    if "(" not in name:
        return card(name)
    from ..attention.patterns import parse

    parse(name)
    return Entry(name, "attention.patterns:parse", "key", "an expression of one's own", 0, "none", "softmax attention", kind="pattern", note=name)


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


def calibration(sitting: Sitting) -> list[Batch]:
    """The sitting's first sequences, as many at once as are sat."""
    count = min(len(sitting.ids_BT), CALIBRATION, max(1, CALIBRATION_TOKENS // sitting.length))
    ends = [(at, min(at + sitting.at_once, count)) for at in range(0, count, sitting.at_once)]
    return [Batch(sitting.ids_BT[a:b], sitting.doc_BT[a:b], torch.zeros(0)) for a, b in ends]


class Candidates:
    """Candidates for the cells of one run. A fit is kept until another is asked for: the phases of a budget, which follow one another, share it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self._key: tuple[str, float, int] | None = None
        self._plan: dict[str, Any] = {}

    def of(self, one: Entry, budget: float, *, sitting: Sitting | None = None, averaging: Averaging | None = None) -> Candidate:
        """As `prepare`."""
        if sitting is None or one.fitted != "calibrated" or one.kind != "method":
            return prepare(one, budget, self.settings, sitting, averaging)
        key = one.name, budget, id(sitting)
        if key != self._key:
            self._key, self._plan = None, {}
            self._plan, self._key = dict(prepare(one, budget, self.settings, sitting, averaging).plan), key
        return Candidate(copy.deepcopy(self._plan))             # what a method remembers of one sitting stays out of the next


def prepare(one: Entry, budget: float, settings: Mapping[str, Any], sitting: Sitting | None, averaging: Averaging | None) -> Candidate:
    """A candidate for a sitting, or, without a model, for averaging; calibrated methods are fitted to its first sequences.

    Raises:
        BadInput, Unsupported: what this method cannot serve, with the reason.
    """
    if one.kind == "cache":
        return _policy(one, budget, sitting)
    if one.kind == "pattern":
        from ..attention.pattern import PatternAttention

        made = PatternAttention(one.note.partition(";")[0]).eval()
        return Candidate(dict.fromkeys(["averaging"] if sitting is None else sites(sitting.model, "layers.*.attn"), made))
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
    if one.fitted == "calibrated":
        calibrate(sitting.model, plan, calibration(sitting), sequential=False)
    return Candidate(plan)


def _policy(one: Entry, budget: float, sitting: Sitting | None) -> Candidate:
    from ..attention.cache import make

    if sitting is None:
        raise Unsupported(f"{one.name} lives in a model's cache, and averaging has no model")
    empty = make(one.name, budget=budget)
    if fit := getattr(empty, "fit", None):                     # dictionaries and spans that are fitted offline, once
        fit(sitting.model, torch.cat([batch.input_ids for batch in calibration(sitting)]))
    return Candidate(cache=lambda: copy.deepcopy(empty), serve=lambda model, cache: cache.on(model))
