"""Same word, different sense: does the strongest latent tell senses apart (Minegishi et al. 2025, PS-Eval)?

Two occurrences of one word; "same sense" is predicted when both have the same strongest latent. For Python the word is an
identifier, and its sense what it is used as: attribute, parameter, import, keyword argument.

Shape letters: N = rows, P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..fidelity import Interval
from .codes import Codes
from .probing import by_document


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows that hold the same word."""

    first_P: Tensor
    second_P: Tensor
    same_P: Tensor
    """Bool: the same sense."""
    word_P: Tensor


def sense_pairs(word_N: Tensor, sense_N: Tensor, *, each: int = 20, seed: int = 0) -> Pairs:
    """As many pairs of the same sense as of different ones, at most `each` of both kinds a word.

    Args:
        word_N: number of the word at each row, -1 for none. sense_N: of its sense, -1 for none.

    Raises:
        BadInput: no word occurs in two senses and twice in one of them.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor, bool, int]] = []
    there = (word_N >= 0) & (sense_N >= 0)
    for word in word_N[there].unique().tolist():
        at_R = (there & (word_N == word)).nonzero()[:, 0]
        sense_R = sense_N[at_R]
        if len(at_R) < 3 or (sense_R == sense_R[0]).all():
            continue
        i, j = torch.triu_indices(len(at_R), len(at_R), 1)
        if len(i) > 20_000:                                    # a word as frequent as this has pairs enough in a sample
            some = torch.randperm(len(i), generator=generator)[:20_000]
            i, j = i[some], j[some]
        same = sense_R[i] == sense_R[j]
        kinds = [k[torch.randperm(len(k), generator=generator)] for k in (same.nonzero()[:, 0], (~same).nonzero()[:, 0])]
        many = min(each, *map(len, kinds))
        found += [(at_R[i[k[:many]]], at_R[j[k[:many]]], number == 0, word) for number, k in enumerate(kinds) if many]
    if not found:
        raise BadInput("no word occurs in two senses, and twice in one; give more text")
    sizes = torch.tensor([len(f[0]) for f in found])
    first, second = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
    same_P, word_P = (torch.tensor([f[n] for f in found]).repeat_interleave(sizes) for n in (2, 3))
    return Pairs(first, second, same_P, word_P)


@dataclass(frozen=True)
class Senses:
    """The confusion matrix of "same strongest latent" against "same sense", and what follows from it."""

    true_same: int
    false_same: int
    false_different: int
    true_different: int
    accuracy: Interval
    """Its interval over words; chance is 1/2 where both kinds are equally many."""

    @property
    def precision(self) -> float:
        """Same sense among pairs called the same; 0 where none is."""
        return self.true_same / max(1, self.true_same + self.false_same)

    @property
    def recall(self) -> float:
        """Pairs called the same among those of the same sense."""
        return self.true_same / max(1, self.true_same + self.false_different)

    @property
    def specificity(self) -> float:
        """Pairs called different among those of different senses."""
        return self.true_different / max(1, self.true_different + self.false_same)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.true_same / max(1, 2 * self.true_same + self.false_same + self.false_different)


def strongest(codes: Codes) -> Tensor:
    """[N] the latent of each row with the greatest code; -1 where none is above 0."""
    out = []
    for some in torch.arange(codes.n).split(1024):
        value, at = codes.rows(some).max(1)
        out.append(torch.where(value > 0, at, -1))
    return torch.cat(out) if out else torch.empty(0, dtype=torch.long)


def tell_senses(codes: Codes, pairs: Pairs) -> Senses:
    """Judge codes on pairs of rows. A row on which nothing is active agrees with no other."""
    rows, at = torch.cat([pairs.first_P, pairs.second_P]).unique(return_inverse=True)
    latent_P, other_P = strongest(codes.take(rows))[at].chunk(2)
    said_P = (latent_P == other_P) & (latent_P >= 0)
    right_P = (said_P == pairs.same_P).float()
    a, b, c, d = (int((s & t).sum()) for s in (said_P, ~said_P) for t in (pairs.same_P, ~pairs.same_P))
    return Senses(a, b, c, d, by_document(right_P, torch.ones_like(right_P), pairs.word_P))
