"""Attention to a few sampled points of a picture instead of all of its cells, and to a band of rows.

    deformable:  out_q = sum over points p of softmax_p(A q) value(ref_q + offset_p(q))      Sparse Laneformer (Liu et al. 2024, arXiv 2404.07821)
    adaptive:    f [P, C] sampled;  m = ReLU(LN(f W_c(q)));  out_q = map of ReLU(LN(W_p(q) m))       SparseBEV (Liu et al. 2023, arXiv 2308.09244)
    row band:    softmax over the cells of rows less than `half` away from the query's row                        Sparse Laneformer's horizontal one
value(.) between cells is bilinear and zero outside. W_c and W_p are made by the query. A query costs heads x points cells however large the
picture is; the row band 2 half - 1 rows. SparseBEV's projection of 3-D points to cameras and its shift to earlier frames come before and are
not here; its distance-penalised self-attention is near.py.

Shape letters: B = batch, Q = queries, W = width, H = heads, P = points of a head, C = width of a head, Y, X = rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, layer_norm

from ...errors import BadInput
from ...kernels.block_attention import token_attention
from ...method import positive

MIXES = ("weights", "adaptive")


def sample(map_BHCYX: Tensor, place_BQHP2: Tensor) -> Tensor:
    """[B, Q, H, P, C]: values between cells, bilinear; a picture goes from (0, 0) to (1, 1), cells' centres lie half a cell inside.

    Differentiable in both. What lies outside counts as zeros.

    Args:
        place_BQHP2: (x, y), as deformable attention has it.

    Raises:
        BadInput: shapes that do not fit.
    """
    if map_BHCYX.ndim != 5 or place_BQHP2.ndim != 5 or place_BQHP2.shape[-1] != 2:
        raise BadInput(f"map must be [B, H, C, Y, X] and places [B, Q, H, P, 2], not {list(map_BHCYX.shape)} and {list(place_BQHP2.shape)}")
    B, H, C = map_BHCYX.shape[:3]
    if place_BQHP2.shape[0] != B or place_BQHP2.shape[2] != H:
        raise BadInput(f"a map of {B} pictures and {H} heads, and places {list(place_BQHP2.shape)}")
    at = (2 * place_BQHP2 - 1).transpose(1, 2).flatten(0, 1)                                       # [B H, Q, P, 2] in -1 .. 1
    got = grid_sample(map_BHCYX.flatten(0, 1), at, mode="bilinear", padding_mode="zeros", align_corners=False)
    return got.view(B, H, C, *at.shape[1:3]).permute(0, 3, 1, 4, 2)


class Deformable(nn.Module):
    """Queries read a few points each of a feature map, at offsets from a reference point that they choose themselves.

    Args:
        width: W of queries and map. heads, points: H and P.
        mix: "weights" adds points up by a softmax; "adaptive" mixes channels and points by matrices that the query makes.
        reach: how far the first offsets lie, as a part of the picture; they begin in a ring, one direction a head.
    """

    def __init__(self, width: int, heads: int = 4, points: int = 4, mix: str = "weights", reach: float = 0.1) -> None:
        super().__init__()
        if mix not in MIXES:
            raise BadInput(f"no mix {mix!r}; there are {', '.join(MIXES)}")
        if positive("width", width) % positive("heads", heads):
            raise BadInput(f"width {width} is no multiple of {heads} heads")
        self.heads, self.points, self.mix, self.size = heads, positive("points", points), mix, width // heads
        self.value, self.out = nn.Conv2d(width, width, 1), nn.Linear(width, width)
        self.offset = nn.Linear(width, heads * points * 2)
        turn = torch.arange(heads) * (2 * torch.pi / heads)
        ring = torch.stack([turn.cos(), turn.sin()], -1)[:, None] * torch.arange(1, points + 1)[:, None] * reach / points
        nn.init.zeros_(self.offset.weight)
        with torch.no_grad():
            self.offset.bias.copy_(ring.flatten())
        if mix == "weights":
            self.weigh = nn.Linear(width, heads * points)
        else:
            self.channels = nn.Linear(width, heads * self.size * self.size)
            self.places = nn.Linear(width, heads * points * points)
            self.gather = nn.Linear(heads * points * self.size, width)

    def where(self, q_BQW: Tensor, at_BQ2: Tensor) -> Tensor:
        """[B, Q, H, P, 2] the points that each query reads."""
        return at_BQ2[:, :, None, None] + self.offset(q_BQW).unflatten(-1, (self.heads, self.points, 2))

    def forward(self, q_BQW: Tensor, at_BQ2: Tensor, map_BWYX: Tensor) -> Tensor:
        """[B, Q, W].

        Args:
            at_BQ2: reference points (x, y) in 0 .. 1, which may be learned or predicted: gradients reach them.
            map_BWYX: features of the picture.
        """
        if at_BQ2.shape != (*q_BQW.shape[:2], 2):
            raise BadInput(f"queries {list(q_BQW.shape)} need reference points [B, Q, 2], not {list(at_BQ2.shape)}")
        value = self.value(map_BWYX).unflatten(1, (self.heads, self.size))
        f_BQHPC = sample(value, self.where(q_BQW, at_BQ2))
        if self.mix == "weights":
            weight = self.weigh(q_BQW).unflatten(-1, (self.heads, self.points)).softmax(-1)
            return self.out((weight[..., None] * f_BQHPC).sum(3).flatten(2))
        W_c = self.channels(q_BQW).unflatten(-1, (self.heads, self.size, self.size))
        W_p = self.places(q_BQW).unflatten(-1, (self.heads, self.points, self.points))
        mixed = torch.relu(layer_norm(f_BQHPC @ W_c, (self.points, self.size)))
        mixed = torch.relu(layer_norm(W_p @ mixed, (self.points, self.size)))
        return self.out(self.gather(mixed.flatten(2)))

    def share(self, rows: int, columns: int) -> float:
        """Cells read for a query (four a point, so that values between them can be told) as a part of all that dense attention reads."""
        return 4 * self.points / (rows * columns)


def row_band(q_BHQC: Tensor, k_BHYXC: Tensor, v_BHYXC: Tensor, row_Q: Tensor, half: int, *, scale: float | None = None) -> Tensor:
    """[B, H, Q, C]: each query attends to the cells of rows less than `half` from its own; no others are looked at.

    Args:
        row_Q: whole numbers, the row of each query; a row that is not there leaves its query what of the band is, or zeros.
        scale: 1 / sqrt(C) unless told.
    """
    positive("half", half)
    if row_Q.dtype != torch.long or row_Q.shape != (q_BHQC.shape[2],):
        raise BadInput(f"rows must be int64 [{q_BHQC.shape[2]}], not {row_Q.dtype} {list(row_Q.shape)}")
    Y, X = k_BHYXC.shape[2:4]
    rows_QR = row_Q[:, None] + torch.arange(1 - half, half, device=row_Q.device)
    cells_QRX = rows_QR[..., None] * X + torch.arange(X, device=row_Q.device)
    index = torch.where(((rows_QR >= 0) & (rows_QR < Y))[..., None], cells_QRX, -1).flatten(1)
    by = q_BHQC.shape[-1] ** -0.5 if scale is None else scale
    return token_attention(q_BHQC, k_BHYXC.flatten(2, 3), v_BHYXC.flatten(2, 3), index[None, None], scale=by)
