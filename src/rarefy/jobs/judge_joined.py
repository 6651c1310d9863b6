"""Judging dictionaries of several sites: reconstruction at each, and the model with all of them replaced or each in turn.

Shape letters: B = windows, T = tokens, N = rows, D, E = widths read and reproduced, M = activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..fidelity import Reconstruction
from ..frontier import Judge, Point
from ..latents.crosscoder import histogram, of_models, relative_norms
from ..latents.dictionary import Dictionary
from ..latents.layers import LayerSpread
from ..site import capture
from ..streams import Flow
from .dictionaries import SKIP, Ablations, ablate, active, judge_dictionary, pointed, rows_of
from .report import verdict

ROWS = 2048
"""Rows worked on at a time."""


def place(name: str, site: str) -> str:
    """Name of a method's point at one site."""
    return f"{name} at {site}"


def flow_in(made: Mapping[str, Any]) -> Flow:
    """The flow that a run was fitted to, from its record."""
    sites, target = tuple(made["sites"]), made["target"]
    targets = (target,) if isinstance(target, str) and target else tuple(target) or sites
    return Flow(sites, targets, made.get("join", ""), "beside" in made)


def verdicts(points: Sequence[Point]) -> str:
    """Who wins where, place by place: points of different places are not compared."""
    where: dict[str, list[Point]] = {}
    for point in points:
        name, _, at = point.method.partition(" at ")
        where.setdefault(at, []).append(replace(point, method=name))
    said = {at: verdict(row) for at, row in where.items()}
    return " ".join(f"{f'{at}: ' if at else ''}{words}" for at, words in said.items() if words)


class SplicedRow:
    """A dictionary of joined sites in the model: each of some targets gets its part of what is made of an undisturbed pass.

    All sites are needed for a row before the first of them can be replaced, so the model is run once as it is for the same
    tokens. Skipped positions pass through.
    """

    def __init__(self, method: Dictionary, flow: Flow, beside: nn.Module | None = None) -> None:
        self.method, self.flow, self.beside = method, flow, beside
        self._made: dict[str, Tensor] = {}
        self._reading = False

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """While open, every forward pass of `model` with input_ids is preceded by one that fills in the row."""

        def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._reading:
                return
            self._reading = True
            try:
                x_BTD, _ = self.flow.read(model, kwargs["input_ids"], self.beside)
                made_BTE = self.method(x_BTD[:, SKIP:])
                self._made = dict(zip(self.flow.parts, made_BTE.split(list(self.method.parts_out), -1), strict=True))
            finally:
                self._reading = False

        handle = model.register_forward_pre_hook(first, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._made = {}

    def plan(self, names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        """What `replaced` takes, to put something at the targets named."""
        return {name: self._putter(name) for name in names}

    def _putter(self, name: str) -> Callable[[Tensor], Tensor]:
        def put(y_BTE: Tensor) -> Tensor:
            return y_BTE if self._reading else torch.cat([y_BTE[:, :SKIP], self._made[name].to(y_BTE)], 1)

        return put


class SplicedLayers:
    """A cross-layer transcoder in the model: each target is made of what its layer and those before read in this very pass."""

    def __init__(self, method: Dictionary, flow: Flow) -> None:
        self.method, self.flow = method, flow
        self._read: list[Tensor] = [torch.empty(0)] * len(flow.sites)

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Nothing: what is needed is read as the pass goes."""
        yield

    def plan(self, names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        """What `replaced` takes, to put something at the targets named."""
        return {
            **{site: self._noter(s) for s, site in enumerate(self.flow.sites)},
            **{name: self._putter(self.flow.targets.index(name)) for name in names},
        }

    def _noter(self, layer: int) -> Callable[[Tensor], Tensor]:
        def note(x_BTD: Tensor) -> Tensor:
            self._read[layer] = x_BTD
            return x_BTD

        return note

    def _putter(self, layer: int) -> Callable[[Tensor], Tensor]:
        def put(y_BTE: Tensor) -> Tensor:
            later = [torch.zeros(*y_BTE.shape[:2], width).to(y_BTE) for width in self.method.parts_in[layer + 1 :]]   # these write nothing here
            x_BTD = torch.cat([*self._read[: layer + 1], *later], -1)[:, SKIP:]
            made_BTE = self.method(x_BTD).split(list(self.method.parts_out), -1)[layer]
            return torch.cat([y_BTE[:, :SKIP], made_BTE.to(y_BTE)], 1)

        return put


@dataclass
class Lost:
    """What replacing targets by nothing costs: each by itself, and all together."""

    each: dict[str, Ablations]
    all: Ablations | None

    @classmethod
    def of(cls, judge: Judge, flow: Flow) -> Lost:
        """For every target; all together where one row holds them all and there are several."""
        each = {name: ablate(judge, name) for name in flow.targets}
        return cls(each, ablate(judge, *flow.targets) if flow.join == "concat" and len(each) > 1 else None)


@torch.no_grad()
def judge_joined(
    judge: Judge, flow: Flow, method: Dictionary, lost: Lost, *, name: str, role: str = "method", beside: nn.Module | None = None,
) -> list[Point]:
    """Points of a dictionary of joined sites: with all targets replaced (not where sites are mixed), then with each in turn.

    FVU of all is of rows in which every site has mean square 1, as in training; of one, of that site. A second model's sites
    are reconstructed but not replaced.
    """
    if flow.join == "mix":
        return [
            judge_dictionary(judge, site, method, lost.each[target], target=target, name=place(name, target), role=role)
            for site, target in zip(flow.sites, flow.targets, strict=True)
        ]
    whole, parts = _reconstruction(judge, flow, method, beside)
    spliced = SplicedLayers(method, flow) if type(method).join else SplicedRow(method, flow, beside)
    points = []
    with spliced.reading(judge.model):
        if lost.all is not None:
            point = judge.measure(spliced.plan(flow.targets), method=name, unit="latent", role=role)
            points.append(pointed(method, whole, point, lost.all))
        for target, stats in zip(flow.targets, parts, strict=False):
            point = judge.measure(spliced.plan([target]), method=place(name, target), unit="latent", role=role)
            points.append(pointed(method, stats, point, lost.each[target]))
    return points


def _reconstruction(judge: Judge, flow: Flow, method: Dictionary, beside: nn.Module | None) -> tuple[Reconstruction, list[Reconstruction]]:
    """Of whole rows in scaled units, and of each part in its own."""
    width, widths = method.width, list(method.parts_out)
    whole, *parts = [Reconstruction(d, width, judge.documents) for d in (sum(widths), *widths)]
    for batch in judge.batches:
        keep = rows_of(batch)
        x, y = flow.read(judge.model, batch.input_ids, beside)
        for x_ND, y_NE, doc in zip(x[keep].split(ROWS), y[keep].split(ROWS), batch.doc[keep].split(ROWS), strict=True):
            latent_M, _, row_M = active(method, x_ND)
            l0_N, made_NE = torch.bincount(row_M, minlength=len(x_ND)), method(x_ND)
            whole.add(y_NE * method.scale_out, made_NE * method.scale_out, latent_M, l0_N, doc)
            for stats, y_part, made_part in zip(parts, y_NE.split(widths, -1), made_NE.split(widths, -1), strict=True):
                stats.add(y_part, made_part, latent_M, l0_N, doc)
    return whole, parts


@torch.no_grad()
def spread_over_layers(judge: Judge, flow: Flow, method: Dictionary) -> LayerSpread:
    """Where in depth the latents of a dictionary of mixed sites are active, on the text judged on."""
    spread = LayerSpread(method.width, len(flow.sites))
    for batch in judge.batches:
        keep, got = rows_of(batch), capture(judge.model, flow.sites, input_ids=batch.input_ids)
        token_N = keep.flatten().nonzero()[:, 0]
        window_N = token_N // keep.shape[1]
        found = [active(method, got[site][keep]) for site in flow.sites]
        latent_M, value_M, row_M = (torch.cat(parts) for parts in zip(*found, strict=True))
        layer_M = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(latent) for latent, _, _ in found]))
        spread.add(latent_M, value_M, layer_M, token_N[row_M], window_N[row_M])
    return spread


def told(judge: Judge, flow: Flow, method: Dictionary, name: str) -> tuple[dict[str, Any], str]:
    """What a joined dictionary says of its sites: a record for the run folder, and a sentence."""
    if flow.join == "mix":
        spread = spread_over_layers(judge, flow, method)
        mean = spread.summary()
        record = {
            "sites": list(flow.sites), "summary": mean, "layer": spread.layer_F.tolist(), "share": spread.share_FL.tolist(),
            "variance": spread.variance_F.tolist(),
            "within_token": spread.within("token").tolist(), "within_context": spread.within("prompt").tolist(),
        }
        return record, (
            f"{name}: the layer of a latent's activations has variance {mean['variance']:.3g}, of which {mean['within_prompt']:.3g} is within one "
            f"context and {mean['within_token']:.3g} within one token"
        )
    share_FS = relative_norms(method) if len(method.parts_out) > 1 else torch.ones(method.width, 1)
    record = {"sites": list(flow.parts), "relative_norms": share_FS.tolist()}
    if flow.beside:
        kinds = of_models(method)
        counts = {kind: len(latents) for kind, latents in kinds.items()}
        record |= {"kinds": counts, "histogram": histogram(method).tolist()}
        return record, f"{name}: latents shared {counts['shared']}, of the first model {counts['first']}, of the second {counts['second']}"
    shares = ", ".join(f"{part} {float(share):.0%}" for part, share in zip(flow.parts, share_FS.mean(0), strict=True))
    return record, f"{name}: mean share of a latent's decoder norm: {shares}"
