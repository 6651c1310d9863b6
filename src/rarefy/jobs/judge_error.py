"""Where a dictionary's error lies, and what each part of it does to the running model.

The error y - y_hat is split in two by the least-squares map from what stands at the target to the error (Engels et al. 2024,
"Decomposing The Dark Matter of Sparse Autoencoders", arXiv 2410.14670): the linear error is what the map predicts, the nonlinear
error the rest. Each is put into the model by itself, y less the linear error or y less the nonlinear, and costs its cross-entropy.
Maps are fitted on the text that was fitted on, and measured, as everything else, on the text judged on.

Shape letters: B = windows, T = tokens, N = rows, D, E = widths read and given back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval
from ..frontier import Judge
from ..method import Sparse
from ..site import capture
from ..tasks.dark_matter import DarkMatter, LinearMap, error_maps, shares
from ..tasks.geometry import fvu_by, norm_groups
from .dictionaries import SKIP, Spliced, rows_of

MOST = 16_384
"""Rows held at a time, of each text; more judged text is measured in the model, but its rows are not looked at one by one."""
NORMS = 10
"""Groups of rows by norm."""


class PartOfError(Spliced):
    """What flows at the target with one part of a dictionary's error in it, the other part taken out.

    Args:
        part: "linear" gives y - to_error(y), "nonlinear" y_hat + to_error(y). Others as for Spliced.
    """

    def __init__(self, method: Sparse, site: str, target: str, to_error: LinearMap, part: str) -> None:
        super().__init__(method, site, target)
        self.to_error, self.part = to_error, part

    def _put(self, y_BTE: Tensor) -> Tensor:
        rows_BTE = y_BTE[:, SKIP:]
        linear_BTE = self.to_error(rows_BTE)
        if self.part == "linear":
            made_BTE = rows_BTE - linear_BTE
        else:
            made_BTE = super()._put(y_BTE)[:, SKIP:] + linear_BTE
        return torch.cat([y_BTE[:, :SKIP], made_BTE.to(y_BTE)], 1)


@dataclass(frozen=True)
class ErrorParts:
    """One dictionary's error on the text judged on."""

    shares: DarkMatter | None
    """None where the text fitted on has too few rows for the maps."""
    increase: dict[str, Interval]
    """CE increase with all of the error in the model, with its linear part alone, and with its nonlinear part alone."""
    by_norm: list[float]
    """FVU of rows by their norm, the shortest tenth first."""
    by_position: dict[str, float]
    """FVU by position in the window, doubling: 1, 2-3, 4-7, ..."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; FVU of a group without rows is null."""
        plain = {name: {"mean": v.mean, "low": _finite(v.low), "high": _finite(v.high)} for name, v in self.increase.items()}
        share = {} if self.shares is None else {name: getattr(self.shares, name) for name in ("linear", "nonlinear", "norm")}
        by_norm, by_position = [_finite(v) for v in self.by_norm], {name: _finite(v) for name, v in self.by_position.items()}
        return {**share, "ce_increase": plain, "fvu_by_norm": by_norm, "fvu_by_position": by_position}

    def told(self, name: str) -> str:
        """In a sentence or two."""
        places = ", ".join(f"{at} {v:.3f}" for at, v in self.by_position.items() if math.isfinite(v))
        ends = f"FVU {self.by_norm[0]:.3f} in the tenth of rows of least norm, {self.by_norm[-1]:.3f} in that of greatest; by position {places}."
        if self.shares is None:
            return f"{name}: {ends}"
        cost = {part: f"{v.mean:+.3f}" for part, v in self.increase.items()}
        return (
            f"{name}: of its error {self.shares.linear:.0%} is linear in what it reproduces (of the error's squared norm {self.shares.norm:.0%}); CE "
            f"{cost['all']} with all of it in the model, {cost['linear']} with the linear part alone, {cost['nonlinear']} with the nonlinear. {ends}"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def error_parts(judge: Judge, fit: Sequence[Any], site: str, method: Sparse, whole: Interval, *, target: str = "") -> ErrorParts:
    """Split a dictionary's error and measure the parts.

    Args:
        fit: batches of the text fitted on. whole: CE increase of the dictionary itself. target: what it reproduces; default the site.
    """
    target = target or site
    y_NE, y_hat_NE, place_N = _rows(judge.model, judge.batches, site, method, target)
    increase, found = {"all": whole}, None
    with contextlib.suppress(BadInput):                 # of a text that is too short for the width
        maps = error_maps(*_rows(judge.model, fit, site, method, target)[:2])
        found = shares(maps, y_NE, y_hat_NE)
        for part in ("linear", "nonlinear"):
            put = PartOfError(method, site, target, maps.to_error, part)
            increase[part] = judge.measure(put.plan(), method=part, unit="latent").metrics["ce_increase"]
    group_N = place_N.log2().floor().long()
    by_position = fvu_by(y_NE, y_hat_NE, group_N).tolist()
    names = [f"{2**g}-{2 ** (g + 1) - 1}" if g else "1" for g in range(len(by_position))]
    by_norm = fvu_by(y_NE, y_hat_NE, norm_groups(y_NE, min(NORMS, len(y_NE)))).tolist()
    return ErrorParts(found, increase, by_norm, dict(zip(names, by_position, strict=True)))


def _rows(model: Any, batches: Sequence[Any], site: str, method: Sparse, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """(what stands at the target, what the dictionary makes of its site, position in the window), of up to MOST rows, in float32."""
    parts, count = [], 0
    for batch in batches:
        keep_BT = rows_of(batch)
        got = capture(model, {site, target}, input_ids=batch.input_ids)
        place_BT = torch.arange(keep_BT.shape[1]).expand(keep_BT.shape)
        made = torch.cat([method(x).float() for x in got[site][keep_BT].split(2048)])
        parts.append((got[target][keep_BT].float(), made, place_BT[keep_BT].double()))
        count += len(made)
        if count >= MOST:
            break
    y_NE, y_hat_NE, place_N = (torch.cat(some)[:MOST] for some in zip(*parts, strict=True))
    return y_NE, y_hat_NE, place_N
