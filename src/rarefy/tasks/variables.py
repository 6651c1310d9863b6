"""Variable tracking (Hsieh et al. 2024, RULER, multi-hop tracing), in a small model's vocabulary.

A statement is two tokens, a name and what it stands for: a value, or a name defined earlier. `chains` chains of `hops`
statements each, X1 = V, X2 = X1, ..., stand interleaved in filler, each chain in its order. At the end one chain's last name
is given, and the chain is traced to its value: X3 X2 X1 V. All but the first of these are answers, each one lookup away from
the token before it, so that two layers suffice and one link that attention does not see breaks the rest of a free trace.
(RULER asks for the names of a value; this is the same chain read from the other end.)

Shape letters: B = sequences, T = tokens, N = chains, J = hops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import BadInput
from ..method import positive
from .needles import places
from .recall import Recall


def variables(
    names: Sequence[int], values: Sequence[int], filler: Sequence[int], length: int, batch: int, *, chains: int = 4, hops: int = 4, seed: int = 0
) -> Recall:
    """Sequences of `length` tokens that end with one chain's trace; between statements stands at least one filler token.

    Raises:
        BadInput: more variables than names, a length that does not hold them, empty values or filler.
    """
    positive("chains", chains)
    positive("hops", hops)
    positive("batch", batch)
    if chains * hops > len(names):
        raise BadInput(f"{chains} chains of {hops} need {chains * hops} names; there are {len(names)}")
    if not (len(values) and len(filler)):
        raise BadInput("variables need values and filler tokens")
    generator = torch.Generator().manual_seed(seed)
    total = chains * hops
    at_BS = places(batch, length - hops - 1, total, 3, generator)
    name_BNJ = torch.as_tensor(names)[torch.rand(batch, len(names), generator=generator).argsort(1)[:, :total]].view(batch, chains, hops)
    value_BN = torch.as_tensor(values)[torch.randint(len(values), (batch, chains), generator=generator)]
    stands_BNJ = torch.cat([value_BN[..., None], name_BNJ[..., :-1]], -1)
    # Which chain speaks when: a random order of chain numbers; a chain's n-th turn is its n-th statement.
    turn_BS = torch.arange(total).remainder(chains).expand(batch, -1)
    turn_BS = turn_BS.gather(1, torch.rand(batch, total, generator=generator).argsort(1))
    order_BS = turn_BS.argsort(dim=1, stable=True)              # places of the statements, chain after chain
    at_BNJ = at_BS.gather(1, order_BS).view(batch, chains, hops)
    ids = torch.as_tensor(filler)[torch.randint(len(filler), (batch, length), generator=generator)]
    ids.scatter_(1, at_BNJ.flatten(1), name_BNJ.flatten(1)).scatter_(1, at_BNJ.flatten(1) + 1, stands_BNJ.flatten(1))
    asked_B, row = torch.randint(chains, (batch,), generator=generator), torch.arange(batch)
    ids[:, length - hops - 1] = name_BNJ[row, asked_B, -1]
    ids[:, length - hops :] = stands_BNJ[row, asked_B].flip(1)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, length - hops :] = True
    link_J = length - 1 - torch.arange(hops)                   # where the answer of each statement stands
    return Recall(ids, answer, int((link_J - 1 - at_BNJ[row, asked_B]).min()))
