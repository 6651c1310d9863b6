"""A top-k dictionary whose latents lie in several processes: each encodes its own, and only values compete across them.

Every process sees the same rows. Its k strongest latents hold all that can be among the k strongest of all, so one exchange
of B * k values settles the choice, and one sum of [B, E] the reconstruction; no process ever holds [B, F] or the others' rows.

Shape letters: B = rows, D = input width, E = output width, F = latents of all, L = latents here, K = kept, S = shards, G = dead latents here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss, pad

from ..errors import BadInput, Unsupported
from ..kernels.sparse_decode import rows_of
from ..kernels.top_k import top_k
from ..method import Loss
from ..selection import Selection
from ..world import Shards
from .topk import TopK

_OWN = ("strongest", "combine", "aux_loss", "loss", "latent_loss", "learned", "choose", "penalties")
_ROWS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "idle_F")


class ShardedTopK(TopK):
    """One process's part of a TopK; made by `TopK.shard`. Saved, resumed and used as the whole it is a part of."""

    sharded = _ROWS
    shards: Shards

    @classmethod
    def of(cls, whole: TopK, shards: Shards) -> ShardedTopK:
        """Raises Unsupported if the method's choice is not that of its k strongest latents; BadInput if a part would be too small."""
        changed = [name for name in _OWN if getattr(type(whole), name) is not getattr(TopK, name)]
        strange = {name for name, _ in (*whole.named_parameters(), *whole.named_buffers())} - {*_ROWS, "b_dec_D", "scale", "scale_out"}
        if changed or strange:
            raise Unsupported(f"{whole.name} has a {(changed or sorted(strange))[0]} of its own and cannot be shared out; train it with shards=1")
        if whole.width % shards.size or whole.width // shards.size < whole.k:
            raise BadInput(
                f"width={whole.width} does not divide over {shards.size} shards of at least k={whole.k} latents; use another width or fewer shards"
            )
        kind = type(f"Sharded{type(whole).__name__}", (cls,), {k: getattr(type(whole), k) for k in ("name", "weigh", "absolute", "keeps")})
        part = kind.__new__(kind)
        nn.Module.__init__(part)
        object.__setattr__(part, "_arguments", whole.arguments)
        part.shards, part.width, part.d_in, part.d_out = shards, whole.width // shards.size, whole.d_in, whole.d_out
        part.transcodes, part.k = whole.transcodes, whole.k
        part.parts_in, part.parts_out, part.skip, part.W_skip_ED = whole.parts_in, whole.parts_out, False, None
        part.aux_k, part.aux_alpha, part.dead_after = whole.aux_k, whole.aux_alpha, whole.dead_after
        for name, value in whole.named_parameters():
            setattr(part, name, nn.Parameter((shards.part(value) if name in _ROWS else value).detach().clone()))
        for name, value in whole.named_buffers():
            part.register_buffer(name, (shards.part(value) if name in _ROWS else value).clone())
        return part

    def strongest(self, rows_BD: Tensor, k: int, dead_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As TopK's, of the latents here; the weight of one that is not among the k strongest of all shards is 0."""
        here = min(k, self.width if dead_G is None else len(dead_G))
        if here:
            weight_BK, unit_BK = super().strongest(rows_BD, here, dead_G)
        else:
            weight_BK, unit_BK = rows_BD.new_zeros(len(rows_BD), 0), torch.zeros(len(rows_BD), 0, dtype=torch.long, device=rows_BD.device)
        all_SBK = self.shards.gather(pad(weight_BK.detach().abs(), (0, k - here)))
        won_BK = top_k(all_SBK.transpose(0, 1).reshape(len(rows_BD), -1), k)
        taken = torch.zeros(len(rows_BD), self.shards.size * k, dtype=torch.bool, device=rows_BD.device).scatter_(1, won_BK, True)
        ours = taken[:, self.shards.rank * k : self.shards.rank * k + here]
        return torch.where(ours, weight_BK, weight_BK.new_zeros(())), unit_BK

    def combine(self, selection: Selection, begin_D: Tensor | None = None) -> Tensor:
        """As Dictionary's, summed over shards; the first one's sum begins at `begin_D`."""
        return self.shards.total(super().combine(selection, begin_D if self.shards.rank == 0 else None))

    def aux_loss(self, scaled_BD: Tensor, error_BE: Tensor) -> Tensor | None:
        """As TopK's, of the dead latents of all shards."""
        dead_G = self.needy()
        dead = self.shards.count(len(dead_G))
        if not dead or not self.aux_alpha:
            return None
        if dead > self.aux_k:
            weight_BK, unit_BK = self.strongest(scaled_BD, self.aux_k, dead_G)
            e_hat_BE = self.combine(Selection(self.width, weight_BK, index=unit_BK))
        else:
            centred_BD = scaled_BD if self.centre_D is None else scaled_BD - self.centre_D
            weight_BG = self.weigh(linear(centred_BD, rows_of(self.W_enc_FD, dead_G), self.b_enc_F[dead_G]))
            e_hat_BE = self.shards.total(weight_BG @ rows_of(self.W_dec_FD, dead_G))
        return self.aux_alpha * mse_loss(e_hat_BE.to(error_BE.dtype), error_BE)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """As TopK's. Parts are averaged over processes when they are logged, and L0 is a sum over shards."""
        made = super().loss(x, y)
        return Loss(made.total, {**made.parts, "l0": made.parts["l0"] * self.shards.size})
