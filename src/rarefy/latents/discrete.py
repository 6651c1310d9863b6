"""Discretised codes: a row stands for its strongest latent alone (O'Neill & Bui 2024, arXiv 2405.12522, sec. 3).

Places of a model, such as attention heads, are then compared by which codes they use: one that does something peculiar to a
task has codes on its prompts that it never has on others.

Shape letters: N = rows, D = width, H = places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput
from .dictionary import Dictionary

SILENT = -1
"""The code of a row on which no latent fires."""
_AT_ONCE = 4096


@torch.no_grad()
def discrete_codes(method: Dictionary, x_ND: Tensor) -> Tensor:
    """[N] int64: latent with the greatest absolute weight times decoder norm on each row, the lower of equals; SILENT where none fires.

    Args:
        x_ND: rows as the dictionary reads them.
    """
    norm_F, out = method.W_dec_FD.norm(dim=-1), []
    for x in x_ND.split(_AT_ONCE):
        size_NF = method.select(x).dense.abs() * norm_F
        value_N, latent_N = size_NF.max(-1)
        out.append(torch.where(value_N > 0, latent_N, SILENT))
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.long)


def peculiar(positive_N: Tensor, negative_N: Tensor) -> Tensor:
    """Codes that occur on positive rows and on no negative one, each once, ascending; silence is no code."""
    codes = positive_N.unique()
    return codes[~torch.isin(codes, negative_N) & (codes != SILENT)]


def place_scores(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Tensor:
    """[H] softmax over places of the number of codes peculiar to positive rows (eq. 4): the share of the task each place seems to have.

    Args:
        positive, negative: codes of each place on either kind of prompt, in one order of places.

    Raises:
        BadInput: no place, or numbers of places that differ.
    """
    if not positive or len(positive) != len(negative):
        raise BadInput(f"codes of {len(positive)} places on positive and {len(negative)} on negative prompts; give both of every place")
    count_H = torch.tensor([len(peculiar(p, n)) for p, n in zip(positive, negative, strict=True)], dtype=torch.float64)
    return count_H.softmax(0)
