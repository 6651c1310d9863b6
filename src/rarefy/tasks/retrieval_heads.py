"""Retrieval heads (Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality").

Sec. 2: at a step at which the model gives a token of the needle, a head retrieves when its most attended position holds that
very token and lies in the needle. A head's retrieval score is the share of needle tokens that it so retrieves, averaged over
lengths and depths; heads from about 0.1 on are retrieval heads. Masking tells cause from company: `without_heads`.

Shape letters: B = sequences, L = layers, H = heads, G = key heads, T = queries, S = keys, D = head width, A = answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import BadInput
from ..families import config_of
from ..fidelity import Interval
from ..site import replaced, sites
from .recall import Recall, distances, hits, recall_accuracy

AT_LEAST = 0.1
"""Score from which on a head is called a retrieval head."""


class _Looker:
    """Dense attention that notes where each head looks most."""

    unit = "key"

    def __init__(self) -> None:
        self.most: dict[int, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        raise BadInput("a looker stands at attention sites only")

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """Dense causal attention; leaves [B, H, T], the key each query looks at most, under its layer."""
        share, T, S = q_BHTD.shape[1] // k_BGSD.shape[1], q_BHTD.shape[2], k_BGSD.shape[2]
        k_BHSD, v_BHSD = k_BGSD.repeat_interleave(share, 1), v_BGSD.repeat_interleave(share, 1)
        seen_TS = torch.arange(S) <= torch.arange(S - T, S)[:, None]
        self.most[layer] = (q_BHTD @ k_BHSD.mT).masked_fill(~seen_TS.to(q_BHTD.device), -torch.inf).argmax(-1).cpu()
        return scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1, scale=scale)


@torch.no_grad()
def retrieval_scores(model: nn.Module, tasks: Iterable[Recall], *, at_once: int = 8) -> Tensor:
    """[L, H] float64: share of answers that each head retrieves, averaged over tasks (one a length and depth).

    An answer is retrieved by a head when the model gives it and the head's most attended position, from the question, is the
    last earlier place of the answer (`recall.distances`).

    Raises:
        BadInput: no task, or one without an answer that stands earlier in its sequence.
    """
    scores = []
    for task in tasks:
        away, caught, total = distances(task), 0.0, int((distances(task) > 0).sum())
        if not total:
            raise BadInput("no answer of the task stands earlier in its sequence: there is nothing to retrieve")
        for ids_BT, away_BT, mark_BT in zip(task.input_ids.split(at_once), away.split(at_once), task.answer.split(at_once), strict=True):
            looker = _Looker()
            with replaced(model, {"layers.*.attn": looker}):
                right_BT = hits(model, Recall(ids_BT, mark_BT, task.gap), at_once=len(ids_BT)) & (away_BT > 0)
            row_A, at_A = right_BT.nonzero(as_tuple=True)
            most_LBHT = torch.stack([looker.most[layer] for layer in sorted(looker.most)])
            there_LHA = most_LBHT[:, row_A, :, at_A - 1].permute(1, 2, 0) == (at_A - away_BT[row_A, at_A])
            caught = caught + there_LHA.double().sum(-1)
        scores.append(caught / total)
    if not scores:
        raise BadInput("no task given; give needle sequences of several lengths and depths")
    return torch.stack([torch.as_tensor(s) for s in scores]).mean(0)


@contextlib.contextmanager
def without_heads(model: nn.Module, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Set what these (layer, head) give to the output projection to zero, for the length of a `with` block.

    Raises:
        BadInput: a layer or head that the model does not have.
    """
    there, count = sites(model, "layers.*.attn.z"), config_of(model).num_attention_heads
    plan = {}
    for layer in sorted({layer for layer, _ in heads}):
        mine, name = [head for at, head in heads if at == layer], f"layers.{layer}.attn.z"
        if name not in there or not all(0 <= head < count for head in mine):
            raise BadInput(f"no heads {mine} in layer {layer}: the model has {len(there)} layers of {count} heads")
        plan[name] = _Silence(mine, count)
    with replaced(model, plan):
        yield


class _Silence:
    """Zeros in place of some heads' outputs."""

    def __init__(self, heads: Sequence[int], count: int) -> None:
        self.keep_H = torch.ones(count)
        self.keep_H[list(heads)] = 0

    def __call__(self, z_BTD: Tensor) -> Tensor:
        return (z_BTD.unflatten(-1, (len(self.keep_H), -1)) * self.keep_H.to(z_BTD)[:, None]).flatten(-2)


@dataclass(frozen=True)
class Masking:
    """Accuracy with all heads, without the retrieval heads, and without as many others."""

    scores_LH: Tensor
    heads: list[tuple[int, int]]
    """Those that score at least the threshold, best first."""
    dense: Interval
    without: Interval
    others: list[Interval]
    """One a draw of as many other heads of the same layers, or of any layer where there are too few."""


def masking(model: nn.Module, tasks: Sequence[Recall], judge: Recall, *, at_least: float = AT_LEAST, draws: int = 3, seed: int = 0) -> Masking:
    """Find retrieval heads on `tasks`, mask them and, `draws` times, as many random others; accuracy on `judge`.

    Others are drawn from the layers that hold retrieval heads: in a model of few layers the heads below them are the ones
    that mark each token with the one before it, without which no head can retrieve.

    Raises:
        BadInput: no head reaches the threshold, or all do.
    """
    scores_LH = retrieval_scores(model, tasks)
    every = sorted(((float(s), at) for at, s in zip(_grid(scores_LH), scores_LH.flatten(), strict=True)), key=lambda one: -one[0])
    found = [at for score, at in every if score >= at_least]
    spare = [at for score, at in every if score < at_least and at[0] in {layer for layer, _ in found}]
    spare = spare if len(spare) >= len(found) else [at for score, at in every if score < at_least]
    if not found or len(spare) < len(found):
        many = f"{len(found)} of {len(every)} heads score {at_least} or more"
        raise BadInput(f"{many}: masking as many others is no comparison; choose another threshold")
    generator = torch.Generator().manual_seed(seed)
    sets = [[spare[i] for i in torch.randperm(len(spare), generator=generator)[: len(found)].tolist()] for _ in range(draws)]
    accuracies = []
    for heads in (found, *sets):
        with without_heads(model, heads):
            accuracies.append(recall_accuracy(model, judge))
    return Masking(scores_LH, found, recall_accuracy(model, judge), accuracies[0], accuracies[1:])


def _grid(scores_LH: Tensor) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(scores_LH.shape[0]) for head in range(scores_LH.shape[1])]
