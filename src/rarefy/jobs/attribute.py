"""`rarefy attribute`: which heads and which tokens make the latents of an attention output's dictionary fire.

Shape letters: B = windows, T = tokens, N = rows, F = latents, H = heads, S = source tokens, M = places shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..catalogue import entry
from ..errors import BadInput
from ..families import config_of
from ..latents.dictionary import Dictionary
from ..latents.head_attribution import Attribution, attention_site, attribute, head_shares
from ..method import positive
from ..site import capture
from .dictionaries import SKIP, TopContexts, active, rows_of
from .fit import saved_plan
from .flows import one_site
from .judge import fitted_run
from .models import check_context, cut_text, opened, probe, read_documents
from .screen import Screen

SOURCES = 5
"""Source tokens shown of each place, by what they give."""


@dataclass
class AttributeResult:
    """Latents by head, and the places where some of them are strongest, split over heads and tokens."""

    site: str
    method: str
    heads: list[dict[str, Any]]
    """Per head: latents of which it holds more than half of the decoder row's squared norm, and its mean share of all rows."""
    latents: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "site": self.site, "method": self.method, "heads": self.heads, "latents": self.latents}

    def show(self, out: Path) -> None:
        """Print heads as a table and each place as two lines."""
        screen = Screen()
        screen.table(
            f"{self.method} at {self.site}", ["head", "latents mostly its own", "share of all decoder rows"],
            [[str(h["head"]), str(h["latents"]), f"{h['share']:.1%}"] for h in self.heads],
        )
        for latent in self.latents:
            most = max(range(len(self.heads)), key=lambda h: latent["shares"][h])
            screen.say(f"latent {latent['latent']}: head {most} holds {latent['shares'][most] ** 2:.0%} of its decoder row")
            for place in latent["places"]:
                by = ", ".join(f"head {h} {v:+.2f}" for h, v in enumerate(place["by_head"]))
                read = ", ".join(f"{s['token']!r} {place['position'] - s['position']} back {s['value']:+.2f}" for s in place["sources"])
                screen.say(f"  {place['before']!r} fires {place['pre']:.2f} = {place['rest']:+.2f} bias, {by}")
                screen.say(f"    reads {read}")


def attribute_run(run: Path, latents: list[int], *, data: str, tokens: int, places: int, screen: Screen) -> AttributeResult:
    """Do it on text held out from the run.

    Args:
        latents: numbers of latents to look at; none looks at the eight whose strongest place owes most to a single token.
        places: strongest places of each latent, at most one a window.
    """
    made, request = fitted_run(run)
    positive("places", places)
    check_context(request.context, tokens=tokens)
    if entry(request.methods[0]).unit != "latent":
        raise BadInput(f"{run} holds no dictionary; attribution needs a run of `rarefy fit latents/...` at layers.N.attn.z")
    name = next((n for n in request.methods if not entry(n).baseline), request.methods[0])
    method, site = saved_plan(run, [name])[name], one_site(run, made, "attribution")
    if not isinstance(method, Dictionary):
        raise BadInput(f"{name} is no dictionary of one site's rows; attribution needs one")
    if wrong := [f for f in latents if not 0 <= f < method.width]:
        raise BadInput(f"--latent {wrong[0]}: the dictionary has latents 0..{method.width - 1}")
    docs = read_documents(data or request.data, screen)
    model = opened(request.model, screen)
    attention_site(model.model, site)
    text = cut_text(docs, model, screen, context=request.context, fit_tokens=request.tokens, judge_tokens=tokens)
    probe(model, text)
    ids_NT = torch.cat([b.input_ids for b in text.judge])
    with screen.stage(f"split latents of {name} over heads and tokens"):
        strongest = _strongest(model.model, site, method, text.judge, places)
        chosen = latents or _striking(model.model, site, method, ids_NT, strongest)
        shares_FH = head_shares(method, config_of(model.model).num_attention_heads)
        found = [
            {"latent": f, "shares": _rounded(shares_FH[f]), "places": _places(model, site, method, ids_NT, f, strongest[f])} for f in chosen
        ]
    mine_FH = shares_FH.square()
    heads = [
        {"head": h, "latents": int((mine_FH[:, h] > 0.5).sum()), "share": float(mine_FH[:, h].mean())} for h in range(shares_FH.shape[1])
    ]
    return AttributeResult(site, name, heads, found)


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


@torch.no_grad()
def _strongest(model: Any, site: str, method: Dictionary, batches: list[Any], places: int) -> list[list[tuple[int, int]]]:
    """Per latent, (window, position) of its strongest places, strongest first and at most one a window."""
    top, windows = TopContexts(method.width, places * 4), 0
    context = batches[0].input_ids.shape[1]
    for batch in batches:
        x_ND = capture(model, [site], input_ids=batch.input_ids)[site][rows_of(batch)]
        latent_M, value_M, row_M = active(method, x_ND)
        at_M = row_M // (context - SKIP) * context + row_M % (context - SKIP) + SKIP + windows * context
        top.add(latent_M, value_M, at_M, len(x_ND))
        windows += len(batch.input_ids)
    out: list[list[tuple[int, int]]] = []
    for ats, values in zip(top.at_FK.tolist(), top.value_FK.tolist(), strict=True):
        first: dict[int, int] = {}
        for at, value in zip(ats, values, strict=True):
            if value > 0:
                first.setdefault(at // context, at % context)
        out.append(list(first.items())[:places])
    return out


def _split(model: Any, site: str, method: Dictionary, ids_NT: Tensor, latents: list[int], places: list[tuple[int, int]]) -> Attribution:
    window, position = (torch.tensor(side) for side in zip(*places, strict=True))
    there, window_M = window.unique(return_inverse=True)
    return attribute(model, site, method, ids_NT[there], latent_M=torch.tensor(latents), window_M=window_M, position_M=position)


def _striking(model: Any, site: str, method: Dictionary, ids_NT: Tensor, strongest: list[list[tuple[int, int]]], most: int = 8) -> list[int]:
    """Latents whose strongest place owes most to a single token other than itself and the first, as a share of its pre-activation."""
    fired = [f for f, places in enumerate(strongest) if places]
    by_window: dict[int, list[int]] = {}
    for f in fired:
        by_window.setdefault(strongest[f][0][0], []).append(f)
    score: dict[int, float] = {}
    for some in by_window.values():
        got = _split(model, site, method, ids_NT, some, [strongest[f][0] for f in some])
        for i, f in enumerate(some):
            elsewhere = got.by_source_MS[i, 1 : strongest[f][0][1]]
            score[f] = float(elsewhere.max() / got.pre_M[i].clamp_min(1e-9)) if len(elsewhere) else 0.0
    return sorted(score, key=lambda f: -score[f])[:most]


def _places(opened: Any, site: str, method: Dictionary, ids_NT: Tensor, latent: int, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    if not places:
        return []
    got = _split(opened.model, site, method, ids_NT, [latent] * len(places), places)
    out = []
    for i, (window, position) in enumerate(places):
        value, source = got.by_source_MS[i].sort(descending=True)
        ids_T = ids_NT[window].tolist()
        sources = [
            {"position": s, "token": opened.tokenizer.decode([ids_T[s]]), "value": round(v, 4), "by_head": _rounded(got.parts_MHS[i, :, s])}
            for s, v in zip(source.tolist()[:SOURCES], value.tolist(), strict=False) if v       # 0: a token that is not to be seen
        ]
        out.append({
            "window": window, "position": position, "token": opened.tokenizer.decode([ids_T[position]]),
            "before": opened.tokenizer.decode(ids_T[max(0, position - 11) : position + 1]), "pre": round(float(got.pre_M[i]), 4),
            "rest": round(float(got.rest_M[i]), 4), "by_head": _rounded(got.by_head_MH[i]), "sources": sources,
        })
    return out
