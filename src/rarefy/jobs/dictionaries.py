"""Judging dictionaries: reconstruction, spliced loss, what each latent is about.

Shape letters: B = windows, T = tokens, N = B*T rows, D = width, F = latents, K = contexts kept a latent, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..fidelity import Interval, Reconstruction
from ..frontier import Judge, Point
from ..latents.dictionary import Dictionary
from ..method import Sparse
from ..places import known_sites
from ..site import capture
from ..streams import Flow

SKIP = 1
"""Positions left out at the start of each window: the first token's activation has its own, far larger norm."""


def rows_of(batch: Any) -> Tensor:
    """[B, T] bool: tokens that count."""
    keep = torch.ones_like(batch.input_ids, dtype=torch.bool)
    keep[:, :SKIP] = False
    return keep


class Spliced:
    """A dictionary in the model: what flows at `target` is replaced by what it makes of what flowed at `site`.

    Skipped positions pass through. For an autoencoder both are one site.
    """

    def __init__(self, method: Sparse, site: str, target: str = "") -> None:
        self.method, self.site, self.target = method, site, target or site
        self._read = torch.empty(0)

    def plan(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What `replaced` takes."""
        return {self.target: self._put} if self.target == self.site else {self.site: self._note, self.target: self._put}

    def _note(self, x_BTD: Tensor) -> Tensor:
        self._read = x_BTD
        return x_BTD

    def _put(self, y_BTE: Tensor) -> Tensor:
        x_BTD = y_BTE if self.target == self.site else self._read
        return torch.cat([y_BTE[:, :SKIP], self.method(x_BTD[:, SKIP:]).to(y_BTE)], 1)


@dataclass
class Ablations:
    """CE increase of putting nothing, or the mean, where the dictionary goes: computed once a site."""

    zero: float
    mean: float


def ablate(judge: Judge, *names: str) -> Ablations:
    """Zero and mean ablation of the same positions that a dictionary replaces, at all the sites named."""
    total: dict[str, Tensor] = dict.fromkeys(names, torch.zeros(()))
    rows = 0
    for batch in judge.batches:
        got, keep = capture(judge.model, names, input_ids=batch.input_ids), rows_of(batch)
        total, rows = {name: total[name] + got[name][keep].double().sum(0) for name in names}, rows + int(keep.sum())

    def put(share: float) -> float:
        def instead(value_D: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: torch.cat([x[:, :SKIP], value_D.to(x).expand_as(x[:, SKIP:])], 1)

        plan = {name: instead((total[name] / rows * share).float()) for name in names}
        return judge.measure(plan, method="ablation", unit="latent").metrics["ce_increase"].mean

    return Ablations(put(0.0), put(1.0))


@torch.no_grad()
def judge_dictionary(
    judge: Judge, site: str, method: Sparse, ablations: Ablations, *, target: str = "", name: str = "", role: str = "method", note: str = "",
) -> Point:
    """A dictionary as a Point: spliced CE, KL, agreement, loss recovered (zero and mean), FVU, cosine, L0, dead share.

    Args:
        target: site that a transcoder reproduces; FVU, cosine and `ablations` are of that site then.
    """
    width, target = int(method.arguments["width"]), target or site
    stats: Reconstruction | None = None
    for batch in judge.batches:
        keep = rows_of(batch)
        got = capture(judge.model, {site, target}, input_ids=batch.input_ids)
        stats = stats or Reconstruction(got[target].shape[-1], width, judge.documents)
        parts = (v[keep].split(2048) for v in (got[site], got[target], batch.doc))
        for x, y, doc in zip(*parts, strict=True):
            latent_M, _, row_M = active(method, x)
            stats.add(y, method(x), latent_M, torch.bincount(row_M, minlength=len(x)), doc)
    assert stats is not None
    spliced = judge.measure(Spliced(method, site, target).plan(), method=name or method.name, unit="latent", role=role)
    return pointed(method, stats, spliced, ablations, note)


def pointed(method: Sparse, stats: Reconstruction, spliced: Point, ablations: Ablations, note: str = "") -> Point:
    """The spliced model's point with what is known of the reconstruction."""
    l0, width = stats.l0(), int(method.arguments["width"])
    increase = spliced.metrics["ce_increase"]

    def recovered(worst: float) -> Interval:
        return Interval(1 - increase.mean / worst, 1 - increase.high / worst, 1 - increase.low / worst)

    metrics = {
        **spliced.metrics, "fvu": stats.fvu(), "l0": l0, "loss_recovered": recovered(ablations.zero),
        "loss_recovered_mean": recovered(ablations.mean), "dead": _exact(stats.dead_fraction()), "cosine": _exact(stats.cosine()),
        "explained_variance": _exact(stats.explained_variance()),
    }
    cost = method.cost(l0.mean / width)
    return Point(
        spliced.method, "latent", spliced.role, method.budget, l0.mean / width, metrics,
        {"flops": cost.flops, "bytes": cost.bytes}, note,
    )


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def active(method: Sparse, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(latent, value, row), each [M]: the latents that fire on rows, in index form."""
    row_M, latent_M, value_M = method.select(x_ND).pairs()
    return latent_M, value_M, row_M


class TopContexts:
    """The K strongest tokens of each latent, of either sign, kept while text streams by."""

    def __init__(self, width: int, keep: int = 6) -> None:
        self.value_FK = torch.zeros(width, keep)
        self.at_FK = torch.full((width, keep), -1, dtype=torch.long)
        self.count_F = torch.zeros(width, dtype=torch.long)
        self.rows = 0

    def add(self, latent_M: Tensor, value_M: Tensor, at_M: Tensor, rows: int) -> None:
        """Take in activations: latent, value and token number, each [M]."""
        width, keep = self.value_FK.shape
        self.rows += rows
        self.count_F += torch.bincount(latent_M, minlength=width)
        # Merge with what is kept: sort by latent, then by falling size, and take the first K of each latent.
        latent = torch.cat([latent_M, torch.arange(width).repeat_interleave(keep)])
        value = torch.cat([value_M.float(), self.value_FK.flatten()])
        at = torch.cat([at_M, self.at_FK.flatten()])
        order = value.abs().argsort(dim=-1, descending=True, stable=True)
        order = order[latent[order].argsort(dim=-1, stable=True)]
        latent, value, at = latent[order], value[order], at[order]
        start_F = torch.searchsorted(latent, torch.arange(width))
        first = start_F[:, None] + torch.arange(keep)          # every latent has at least the K that it had
        self.value_FK, self.at_FK = value[first], at[first]


class Reading(Protocol):
    """What `describe` reads: a model and text for it. A Judge is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def batches(self) -> Sequence[Any]: ...


@torch.no_grad()
def describe(
    reading: Reading, site: str, method: Dictionary, tokenizer: Any, *, target: str = "", labels: list[Any] | None = None,
    sides: list[Tensor] | None = None, doc_names: list[str] | None = None, around: int = 14, keep: int = 6, flow: Flow | None = None,
    beside: nn.Module | None = None,
) -> dict[str, Any]:
    """What a report says of each latent: density, histogram, logits, top contexts, best concept.

    Args:
        flow: what the dictionary reads, where that is a row of several sites; logits are then of the last one's part.
        labels: per batch, {concept: [B, T] bool}; `sides` per batch, [B, T] of 0 (choose on) and 1 (report on).
    """
    width = int(method.arguments["width"])
    top = TopContexts(width, keep)
    scores = None
    ids_L, acts = torch.cat([b.input_ids.flatten() for b in reading.batches]), []
    offset = 0
    for i, batch in enumerate(reading.batches):
        keep_BT = rows_of(batch)
        if flow is None:
            x_ND = capture(reading.model, [site], input_ids=batch.input_ids)[site][keep_BT]
        else:
            x_ND = flow.read(reading.model, batch.input_ids, beside)[0][keep_BT]
        at_N = keep_BT.flatten().nonzero()[:, 0] + offset
        latent_M, value_M, row_M = active(method, x_ND)
        top.add(latent_M, value_M, at_N[row_M], len(x_ND))
        acts.append((at_N[row_M].int(), latent_M.int(), value_M.half()))
        if labels is not None and sides is not None:
            scores = _observe(scores, width, labels[i], keep_BT, sides[i], latent_M, value_M, row_M)
        offset += batch.input_ids.numel()
    context = reading.batches[0].input_ids.shape[1]
    doc_L = torch.cat([b.doc.flatten() for b in reading.batches])
    at_M, latent_M, value_M = (torch.cat(parts).long() if i < 2 else torch.cat(parts).float() for i, parts in enumerate(zip(*acts, strict=True)))
    last = len(flow.targets) - 1 if flow else 0
    logits = _logits(reading.model, flow.targets[last] if flow else target or site, method.decoder_rows(last))
    kept = _Kept(ids_L, doc_L, doc_names, context, latent_M * len(ids_L) + at_M, value_M)
    return {
        **_table(top, scores), "site": site, "method": method.name, "width": width,
        "tokens": [tokenizer.decode([i]) for i in range(len(tokenizer))],
        "top": _tops(top, kept, around, _histograms(top, latent_M, value_M), logits),
    }


def _observe(
    scores: Any, width: int, labels: dict[str, Tensor], keep_BT: Tensor, side_BT: Tensor, latent_M: Tensor, value_M: Tensor, row_M: Tensor,
) -> Any:
    from ..tasks.concepts import ConceptScores

    if scores is None:
        scores = ConceptScores(width, list(labels))
    labels_NC = torch.stack([labels[name][keep_BT] for name in scores.names], -1)
    scores.observe(latent_M, value_M, row_M, labels_NC, side_BT[keep_BT])
    return scores


def _table(top: TopContexts, scores: Any) -> dict[str, Any]:
    density = (top.count_F / max(1, top.rows)).tolist()
    table: dict[str, Any] = {"density": [round(d, 6) for d in density], "max": [round(v, 3) for v in top.value_FK[:, 0].abs().tolist()]}
    names: list[str] = []
    if scores is not None:
        best = scores.best()
        names = list(scores.names)
        table |= {"concept": best.concept.tolist(), **{k: [round(v, 3) for v in getattr(best, k).tolist()] for k in ("precision", "recall", "f1")}}
    return {"table": table, "concepts": names}


WRITES_STREAM = (".resid_pre", ".resid_mid", ".resid_post", ".attn.out", ".mlp.out", "embed")
"""Ends of the names of sites whose value is, or is added to, the residual stream that the unembedding reads."""


def _logits(model: Any, target: str, rows_FE: Tensor, most: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Tokens that each latent's decoder row raises and lowers most, through the final norm's gain and the unembedding.

    None where the rows do not lie in the stream that is unembedded.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    if not target.endswith(WRITES_STREAM) or head is None or head.shape[1] != rows_FE.shape[1]:
        return None
    norm = known_sites(model).get("final_norm")
    gain = getattr(model.get_submodule(norm.module_path), "weight", None) if norm else None
    gain = torch.ones(head.shape[1]) if gain is None else gain
    up_v, up_i, down_v, down_i = [], [], [], []
    for rows in rows_FE.detach().float().split(1024):
        logits_FV = (rows * gain.float()) @ head.float().T
        logits_FV = logits_FV - logits_FV.mean(-1, keepdim=True)
        v, i = logits_FV.topk(most)
        up_v.append(v)
        up_i.append(i)
        v, i = (-logits_FV).topk(most)
        down_v.append(-v)
        down_i.append(i)
    return torch.cat(up_v), torch.cat(up_i), torch.cat(down_v), torch.cat(down_i)


HIST_BINS = 20


def _histograms(top: TopContexts, latent_M: Tensor, value_M: Tensor) -> Tensor:
    """[F, 20] counts of each latent's activations, whatever their sign, in equal bins from 0 to its strongest."""
    width = len(top.value_FK)
    most_F = top.value_FK[:, 0].abs().clamp_min(1e-9)
    bin_M = (value_M.abs() / most_F[latent_M] * HIST_BINS).long().clamp(0, HIST_BINS - 1)
    return torch.bincount(latent_M * HIST_BINS + bin_M, minlength=width * HIST_BINS).view(width, HIST_BINS)


class _Kept:
    """Every activation of the text, to be looked up by latent and place."""

    def __init__(self, ids_L: Tensor, doc_L: Tensor, names: list[str] | None, context: int, key_M: Tensor, value_M: Tensor) -> None:
        order = key_M.argsort()
        self.key, self.value = key_M[order], value_M[order]
        self.ids, self.doc, self.names, self.context = ids_L, doc_L, names, context

    def around(self, latent: int, at: int, before: int) -> dict[str, Any]:
        """Tokens about a place, in its window and document, with the latent's activations along them."""
        low = max(at - before, at // self.context * self.context)
        high = min(at + before // 2 + 1, (at // self.context + 1) * self.context)
        same = self.doc[low:high] == self.doc[at]
        low, high = low + int(same.nonzero()[0]), low + int(same.nonzero()[-1]) + 1
        base = latent * len(self.ids)
        a, b = torch.searchsorted(self.key, torch.tensor([base + low, base + high])).tolist()
        shown = torch.zeros(high - low)
        shown[self.key[a:b] - base - low] = self.value[a:b]
        doc = int(self.doc[at])
        return {
            "tokens": self.ids[low:high].tolist(), "acts": [round(v, 2) for v in shown.tolist()], "pos": at - low,
            "doc": self.names[doc] if self.names else str(doc),
        }


def _pairs(index: Tensor, value: Tensor) -> list[list[float]]:
    return [[i, round(v, 2)] for i, v in zip(index.tolist(), value.tolist(), strict=True)]


def _raised(logits: tuple[Tensor, Tensor, Tensor, Tensor] | None, f: int) -> dict[str, Any]:
    if logits is None:
        return {}
    up_v, up_i, down_v, down_i = logits
    return {"logits_up": _pairs(up_i[f], up_v[f]), "logits_down": _pairs(down_i[f], down_v[f])}


def _tops(top: TopContexts, kept: _Kept, before: int, hist_FH: Tensor, logits: Any) -> list[Any]:
    """Per latent what the page shows of it; None for latents that never fired."""
    out: list[Any] = []
    for f, (ats, values) in enumerate(zip(top.at_FK.tolist(), top.value_FK.tolist(), strict=True)):
        if not values[0]:
            out.append(None)
            continue
        out.append({
            "contexts": [kept.around(f, at, before) for at, v in zip(ats, values, strict=True) if v],
            "hist": hist_FH[f].tolist(), **_raised(logits, f),
        })
    return out
