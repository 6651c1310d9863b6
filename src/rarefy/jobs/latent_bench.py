"""What `rarefy judge --suite latents` computes once for all dictionaries: rows with labels, probes, pairs, and the tests.

Shape letters: B = windows, T = tokens, N = rows, D = width, F = latents, C = concepts or documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval, Reconstruction
from ..frontier import Judge
from ..method import Sparse
from ..site import capture
from ..tasks.absorption import absorption
from ..tasks.codes import Codes, Lens
from ..tasks.disentangle import ReadOut, control, disentangle, read_out
from ..tasks.learned import decoder_of
from ..tasks.logistic import Probes, fit_probes
from ..tasks.probing import probe_codes, probe_rows
from ..tasks.python_rows import KINDS, PARENTS, PythonRows, python_rows
from ..tasks.removal import Confounded, confound, confounded_pairs, perturb, remove
from ..tasks.senses import Pairs, sense_pairs, tell_senses
from ..tasks.supervised import Supervised, match
from ..tasks.unlearning import Encode, chosen_latents, clamp, forgotten, losses
from .dictionaries import SKIP, Ablations, ablate, active, judge_dictionary, rows_of

BOARD_TOKENS = 20_000
"""Most tokens on which dictionaries are spliced into the model; probes and codes are judged on all."""
ABLATED = 10
"""Latents taken out in removal and perturbation."""
STRENGTH = 3.0
"""Clamp of unlearning: times the mean firing code, downwards."""
STEPS = 60
"""Of dense probes: after so many their held-out accuracy no longer rises (measured on 34,000 rows, 49 concepts)."""
_WINDOWS = 16
Metrics = dict[str, Interval]


@dataclass
class Reader:
    """One row of the table: how it reads rows, and what it is called."""

    key: str
    """Tells it from all others, also from the same method fitted otherwise."""
    name: str
    role: str
    budget: float
    group: str
    """Readers that differ in the seed alone share it."""
    width: int
    lens: Callable[[Tensor], Lens]
    """[N, D] -> codes and directions."""
    method: Sparse | None = None
    labelled: Supervised | None = None


@torch.no_grad()
def lens_of(method: Sparse, x_ND: Tensor) -> Lens:
    """A dictionary as a lens. A latent with codes of both signs counts as two, of opposite directions.

    Raises:
        BadInput: its reconstruction is not the weighted sum of its decoder's rows.
    """
    width = int(method.arguments["width"])
    parts, begin = [], 0
    for some in x_ND.split(2048):
        latent_M, value_M, row_M = active(method, some)
        parts.append((latent_M, value_M.float(), row_M + begin))
        begin += len(some)
    latent_M, value_M, row_M = (torch.cat(p) for p in zip(*parts, strict=True))
    direction_FD = _directions(method, x_ND, latent_M, value_M, row_M)
    if (value_M < 0).any():
        latent_M, value_M, width = latent_M + width * (value_M < 0), value_M.abs(), 2 * width
        direction_FD = torch.cat([direction_FD, -direction_FD])
    return Lens(Codes.sparse(latent_M, value_M, row_M, len(x_ND), width), direction_FD)


def _directions(method: Sparse, x_ND: Tensor, latent_M: Tensor, value_M: Tensor, row_M: Tensor) -> Tensor:
    """[F, D] decoder rows in the rows' units, checked against what the dictionary itself makes of a few rows."""
    direction_FD = decoder_of(method, x_ND.shape[1]).float() / getattr(method, "scale_out", torch.ones(()))
    few = min(64, len(x_ND))
    made_ND = method(x_ND[:few]).float()
    z_NF = torch.zeros(few, len(direction_FD))
    here = row_M < few
    z_NF[row_M[here], latent_M[here]] = value_M[here]
    rest_ND = made_ND - z_NF @ direction_FD                    # what is left must be the same for all rows: the bias
    if (rest_ND - rest_ND.mean(0)).norm() > 1e-2 * (made_ND - made_ND.mean(0)).norm() + 1e-6:
        raise BadInput(f"{method.name} does not reconstruct by a weighted sum of its decoder's rows; the suite cannot take latents out of it")
    return direction_FD


@dataclass
class Bench:
    """Shared by all rows of the table. A test that the text is too small for is left out, with the reason."""

    model: Any
    site: str
    batches: list[Any]
    rows: PythonRows
    x_ND: Tensor
    board: Judge
    lost: Ablations
    left_out: dict[str, str] = field(default_factory=dict)
    concepts: list[str] = field(default_factory=list)
    y_NC: Tensor = field(default_factory=lambda: torch.empty(0))
    dense: float = 0.0
    """Accuracy of the dense probe."""
    letters: tuple[Tensor, Tensor, Probes] | None = None
    """Rows where a name begins, their labels and probes."""
    parents: tuple[Tensor, Probes] | None = None
    kinds: tuple[Tensor, Probes] | None = None
    pairs: list[Confounded] = field(default_factory=list)
    swaps: ReadOut | None = None
    senses: Pairs | None = None
    package: str = ""
    forget: Forget | None = None

    @property
    def least(self) -> int:
        """Rows that a class needs on either side."""
        return max(20, len(self.x_ND) // 600)


@dataclass
class Forget:
    """A package to forget: windows of its held-back files and as many of others, and the loss on them as it was."""

    batches: list[Any]
    documents: int
    before: tuple[Tensor, Tensor]
    forget_C: Tensor
    keep_C: Tensor
    forget_N: Tensor
    """Rows of side 0, of the package and of the rest."""
    keep_N: Tensor


def bench(model: Any, site: str, batches: list[Any], docs: Sequence[Any]) -> Bench:
    """Read rows, label them and fit every probe. Raises BadInput where the text is not Python source."""
    keep = [rows_of(b) for b in batches]
    rows = python_rows(batches, docs, keep)
    x_LD = torch.cat([capture(model, [site], input_ids=b.input_ids)[site].flatten(0, 1) for b in batches])
    few, count = [], 0
    for batch in batches:
        if few and count + batch.input_ids.numel() > BOARD_TOKENS:
            break
        few.append(batch)
        count += batch.input_ids.numel()
    board = Judge(model, few)
    made = Bench(model, site, batches, rows, x_LD[rows.at_N].float(), board, ablate(board, site))
    for name, prepare in _PREPARE.items():
        try:
            prepare(made)
        except BadInput as error:
            made.left_out[name] = str(error)
    return made


def _fit(made: Bench, x_ND: Tensor, y_NC: Tensor, side_N: Tensor) -> Probes:
    return fit_probes(x_ND[side_N == 0], y_NC[side_N == 0], most_steps=STEPS)


def _concepts(made: Bench) -> None:
    made.concepts = made.rows.common(made.least, documents=3)
    if len(made.concepts) < 2:
        raise BadInput(f"{len(made.concepts)} concepts have {made.least} rows in 3 documents on either side; give more text")
    made.y_NC = made.rows.of(*made.concepts)
    made.dense = probe_rows(made.x_ND, made.y_NC, made.rows.side_N, made.rows.doc_N, most_steps=STEPS).accuracy.mean


def _absorption(made: Bench) -> None:
    rows = made.rows
    at_R = (rows.letter_N >= 0).nonzero()[:, 0]
    letters = rows.letters(max(10, made.least // 3))
    if not len(letters):
        raise BadInput("no letter begins enough names on both sides")
    y_RC = rows.letter_N[at_R, None] == letters
    made.letters = at_R, y_RC, _fit(made, made.x_ND[at_R], y_RC, rows.side_N[at_R])
    if parents := [p for p in PARENTS if p in made.concepts]:
        made.parents = rows.of(*parents), _fit(made, made.x_ND, rows.of(*parents), rows.side_N)


def _removal(made: Bench) -> None:
    kinds = [k for k in KINDS if k in made.concepts]
    if len(kinds) < 2 or not len(made.concepts):
        raise BadInput("fewer than two kinds of token are frequent enough")
    y_NC = made.rows.of(*kinds)
    made.kinds = y_NC, _fit(made, made.x_ND, y_NC, made.rows.side_N)
    pairs = confounded_pairs(made.y_NC, made.rows.side_N, most=8, least=made.least)
    made.pairs = confound(made.x_ND, made.y_NC, pairs, made.concepts, made.rows.side_N, most_steps=STEPS)
    if not made.pairs:
        raise BadInput("no two concepts occur in all four combinations often enough")


def _swaps(made: Bench) -> None:
    made.swaps = read_out(made.x_ND, made.rows.attributes(), made.rows.side_N, most_steps=STEPS)


def _senses(made: Bench) -> None:
    made.senses = sense_pairs(made.rows.word_N, made.rows.sense_N)


def _forget(made: Bench) -> None:
    rows = made.rows
    per = torch.stack([torch.bincount(rows.doc_N[rows.side_N == s], minlength=len(rows.packages)) for s in (0, 1)])
    sizes = {p: per[:, [i for i, q in enumerate(rows.packages) if q == p]].sum(1) for p in set(rows.packages) - {""}}
    fit = {p: int(n.min()) for p, n in sizes.items() if n.min() > 0 and n.sum() <= len(rows.doc_N) / 4}
    if not fit:
        raise BadInput("no package has documents on both sides and at most a quarter of the text")
    made.package = max(sorted(fit), key=lambda p: fit[p])
    of_C = torch.tensor([p == made.package for p in rows.packages])
    side_C = torch.full((len(of_C),), -1, dtype=torch.int8).index_put((rows.doc_N,), rows.side_N)
    ids, doc = torch.cat([b.input_ids for b in made.batches]), torch.cat([b.doc for b in made.batches])
    mine_B = (of_C & (side_C == 1))[doc].float().mean(1)
    other_B = (~of_C & (side_C == 1))[doc].float().mean(1)
    at = torch.cat([(share_B > 0.5).nonzero()[:, 0][:_WINDOWS] for share_B in (mine_B, other_B)])
    few = [SimpleNamespace(input_ids=ids[part], doc=doc[part]) for part in at.split(8)]
    before = losses(made.model, few, {}, len(of_C))
    there_C = (before[1] > 0) & (side_C == 1)
    row_N = of_C[rows.doc_N]
    made.forget = Forget(few, len(of_C), before, there_C & of_C, there_C & ~of_C, row_N & (rows.side_N == 0), ~row_N & (rows.side_N == 0))
    if not made.forget.forget_C.any() or not made.forget.keep_C.any():
        made.forget = None
        raise BadInput(f"no window is mostly of {made.package}'s held-back files, or none of others")


_PREPARE: dict[str, Callable[[Bench], None]] = {
    "probing": _concepts, "absorption": _absorption, "removal": _removal, "disentanglement": _swaps, "senses": _senses, "unlearning": _forget,
}


# ------------------------------------------------------------------------------------------------------------- the tests


def _one(value: float) -> Interval:
    return Interval(value, value, value)


class _ByLabel:
    """What `replaced` puts at the site for a supervised dictionary: rows as their labels have it, batch after batch in order.

    Tokens without labels, of files that are not Python, pass through.
    """

    def __init__(self, made: Bench, labelled: Supervised) -> None:
        whole_LD = torch.full((sum(b.input_ids.numel() for b in made.batches), made.x_ND.shape[1]), torch.nan)
        whole_LD[made.rows.at_N] = labelled(made.y_NC)
        sizes = [b.input_ids.numel() for b in made.batches]
        self.next = itertools.cycle(whole_LD.split(sizes)[: len(made.board.batches)])

    def __call__(self, x_BTD: Tensor) -> Tensor:
        new_BTD = next(self.next).view_as(x_BTD)
        return torch.where(new_BTD.isnan(), x_BTD, new_BTD.to(x_BTD))


def fidelity(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """Proxies: L0, FVU, loss recovered, dead share."""
    if reader.method is not None:
        point = judge_dictionary(made.board, made.site, reader.method, made.lost)
        return {name: point.metrics[name] for name in ("l0", "fvu", "loss_recovered", "loss_recovered_mean", "ce_increase", "dead")}
    if reader.labelled is None:                                # a whole basis gives every row back
        return {"l0": _one(lens.codes.l0), "fvu": _one(0.0), "loss_recovered": _one(1.0), "loss_recovered_mean": _one(1.0)}
    stats = Reconstruction(made.x_ND.shape[1], 1, len(made.rows.packages))
    none = torch.empty(0, dtype=torch.long)
    stats.add(made.x_ND, reader.labelled(made.y_NC), none, made.y_NC.sum(1), made.rows.doc_N)
    worse = made.board.measure({made.site: _ByLabel(made, reader.labelled)}, method=reader.name, unit="latent").metrics["ce_increase"]
    share = partial(lambda worst, v: 1 - v / worst)
    back = {
        name: Interval(share(worst, worse.mean), share(worst, worse.high), share(worst, worse.low))
        for name, worst in (("loss_recovered", made.lost.zero), ("loss_recovered_mean", made.lost.mean))
    }
    return {"l0": stats.l0(), "fvu": stats.fvu(), **back, "ce_increase": worse}


def probing(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """k-sparse probes, and the F1 of each concept's best single latent."""
    found = probe_codes(lens.codes, made.y_NC, made.rows.side_N, made.rows.doc_N, tuple(k for k in (1, 2, 5) if k <= lens.codes.width))
    return {
        **{f"probe_{k}": p.accuracy for k, p in found.items()}, "probe_f1": _one(found[1].f1),
        "match_f1": _one(match(lens.codes, made.y_NC, made.rows.side_N).f1),
    }


def absorbed(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """Absorption of first letters and of kinds of token that contain others."""
    rows, out = made.rows, {}
    if made.letters is not None:
        at_R, y_RC, probes = made.letters
        found = absorption(lens.take(at_R), made.x_ND[at_R], y_RC, probes, rows.side_N[at_R], rows.doc_N[at_R])
        out = {"absorption": found.rate, "splits": _one(found.splits)}
    if made.parents is not None:
        out["absorption_kinds"] = absorption(lens, made.x_ND, *made.parents, rows.side_N, rows.doc_N).rate
    return out


def removed(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """Spurious correlation removal and targeted perturbation."""
    assert made.kinds is not None
    rows, n = made.rows, min(ABLATED, lens.codes.width)
    y_NC, probes = made.kinds
    return {
        "removal": remove(lens, made.x_ND, made.pairs, rows.side_N, rows.doc_N, n=(n,))[n].score,
        "perturbation": perturb(lens, made.x_ND, y_NC, probes, rows.side_N, rows.doc_N, n=(n,))[n].score,
    }


def disentangled(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """Attributes changed by swaps: any number of latents up to 20, and two a row."""
    assert made.swaps is not None
    found = disentangle(lens, made.swaps, made.rows.side_N, made.rows.doc_N)
    return {
        "disentanglement": found.score, "cause": _one(found.cause), "isolation": _one(found.isolation),
        "control": control(lens, made.swaps, made.rows.doc_N),
    }


def told(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """Senses of one word."""
    assert made.senses is not None
    found = tell_senses(lens.codes, made.senses)
    more = {name: _one(getattr(found, name)) for name in ("precision", "recall", "f1", "specificity")}
    return {"senses": found.accuracy, **{f"senses_{k}": v for k, v in more.items()}}


def unlearned(made: Bench, reader: Reader, lens: Lens) -> Metrics:
    """One package forgotten. Needs codes of rows that were never labelled, which a supervised dictionary has not."""
    there = made.forget
    if there is None or reader.labelled is not None:
        return {}
    at_R = (there.forget_N | there.keep_N).nonzero()[:, 0]
    chosen = lens.take(at_R)
    latent_L = chosen_latents(chosen.codes, there.forget_N[at_R], there.keep_N[at_R])
    encode: Encode = lambda x_ND: reader.lens(x_ND).codes
    out: Metrics = {"unlearn_latents": _one(float(len(latent_L)))}
    for name, strength in (("ablate", 0.0), ("unlearn", STRENGTH)):
        after = there.before
        if len(latent_L):
            put = clamp(chosen, encode, latent_L, strength, SKIP)
            after = losses(made.model, there.batches, {made.site: put}, there.documents)
        found = forgotten(there.before, after, there.forget_C, there.keep_C, len(latent_L), strength)
        out |= {f"{name}_selective": _one(found.selective), f"{name}_forget": found.forget, f"{name}_damage": found.keep}
    return out


TESTS: dict[str, tuple[str, Callable[[Bench, Reader, Lens], Metrics]]] = {
    "fidelity": ("", fidelity), "probing": ("probing", probing), "absorption": ("absorption", absorbed), "removal": ("removal", removed),
    "disentanglement": ("disentanglement", disentangled), "senses": ("senses", told), "unlearning": ("unlearning", unlearned),
}
"""Name -> (what the bench must have prepared for it, the test)."""
