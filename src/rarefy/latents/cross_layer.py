"""Cross-layer transcoder (Lindsey et al. 2024; Ameisen et al. 2025, "Circuit Tracing", sec. 3.1), with BatchTopK's selection.

    a_l = selected latents of W_enc,l x_l + b_enc,l,    y_hat_m = sum over l <= m of a_l W_dec,l->m + b_dec,m

Latents of layer l read what enters its MLP and write to the output of its MLP and of every later one; the loss is the sum of
squared errors over layers. The paper selects by JumpReLU. Here one budget is shared by all layers' latents: the k * B largest
pre-activations of a batch of B tokens over all layers in training, one threshold in use, so that what a layer selects does not
wait for later layers and all MLPs can be replaced in one pass.

Shape letters: B = rows, S = layers, D, E = widths read and written at a layer, F = latents of all layers, C = F / S, those of
one; M = kept pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize, pad

from ..cost import Cost
from ..errors import BadInput
from ..kernels.routes import Routes
from ..kernels.sparse_decode import sparse_decode
from ..kernels.sparse_encode import encode_pairs
from ..kernels.top_k import top_k
from .batch_topk import BatchTopK
from .dictionary import Widths


class CrossLayer(BatchTopK):
    """Latents c of layer l are numbers l * C + c. Decoders to layer m are one table of the latents of layers 0 .. m.

    Args:
        d_in: widths of what the layers read, all alike; one number is a single layer, a plain transcoder. d_out: of what they
            write; 0 means as d_in. width: latents of all layers together, a multiple of their number. k: latents active a
            token, over all layers. Others as for BatchTopK.
    """

    name = "latents/cross_layer"
    join = "concat"

    def __init__(
        self, d_in: Widths, width: int, k: int = 32, d_out: Widths = 0, aux_alpha: float = 1 / 32, aux_k: int = 0,
        dead_after: int = 10_000_000, momentum: float = 0.99, seed: int = 0,
    ) -> None:
        super().__init__(d_in, width, k, d_out or d_in, aux_alpha, aux_k, dead_after, momentum, seed)

    def draw(self, generator: torch.Generator) -> None:
        """Encoder [F, D], and for each layer m the decoder [(m + 1) C, E] of the latents that write there."""
        self.layers = len(self.parts_in)
        if len(self.parts_out) != self.layers or len({*self.parts_in}) > 1 or len({*self.parts_out}) > 1:
            raise BadInput(
                f"d_in={list(self.parts_in)} and d_out={list(self.parts_out)} must be one width for each layer read, and one for each written"
            )
        if self.width % self.layers:
            raise BadInput(f"width={self.width} must be a multiple of the {self.layers} layers: latents are shared out evenly")
        self.each = self.width // self.layers
        rows_FD = torch.randn(self.width, self.parts_in[0], generator=generator)
        self.W_enc_FD = nn.Parameter(normalize(rows_FD, dim=-1))
        tables = [torch.randn((m + 1) * self.each, self.parts_out[0], generator=generator) for m in range(self.layers)]
        self.W_dec = nn.ParameterList([nn.Parameter(table) for table in tables])
        self.after_step(0)

    def _by_layer(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layers, self.parts_in[0]))

    def pre_activations(self, x: Tensor) -> Tensor:
        """[..., F] W_enc,l (scale x_l) + b_enc,l of rows [..., S * D], layer after layer."""
        return self._pre(self.scaled(x))

    def _pre(self, scaled: Tensor) -> Tensor:
        x_SBD = self._by_layer(scaled.reshape(-1, self.d_in)).transpose(0, 1)
        pre_SBC = x_SBD @ self.W_enc_FD.view(self.layers, self.each, -1).mT
        return (pre_SBC.transpose(0, 1).flatten(1) + self.b_enc_F).view(*scaled.shape[:-1], self.width)

    def encoded(self, x_BD: Tensor, unit_M: Tensor, edges_B1: Tensor) -> Tensor:
        """[M] pre-activations of pairs chosen beforehand, for rows in scaled units; gradients touch their latents only."""
        layer_M, values, places = unit_M // self.each, [], []
        own = (self._by_layer(x_BD).unbind(1), self.W_enc_FD.view(self.layers, self.each, -1).unbind(), self.b_enc_F.view(self.layers, -1).unbind())
        for layer, (rows_BD, weight_CD, bias_C) in enumerate(zip(*own, strict=True)):
            here_M = layer_M == layer
            places.append(here_M.nonzero()[:, 0])
            values.append(encode_pairs(rows_BD, weight_CD, bias_C, unit_M[here_M] % self.each, _edges(here_M, edges_B1)))
        return torch.cat(values)[torch.cat(places).argsort()]

    def allotted(self, x_BD: Tensor) -> tuple[Tensor, Routes]:
        """As BatchTopK's, over the latents of all layers."""
        with torch.no_grad():
            flat = self._pre(x_BD).flatten()
            keep = min(len(flat), round(self.k * len(x_BD)))
            at_M = top_k(flat[None], keep)[0].sort().values if keep else flat.new_zeros(0, dtype=torch.long)
            at_M = at_M[flat[at_M] > 0]
        edges_B1 = pad(torch.bincount(at_M // self.width, minlength=len(x_BD)).cumsum(0), (1, 0))
        value_M = self.encoded(x_BD, at_M % self.width, edges_B1)
        self._follow(value_M.detach())
        return value_M, Routes(at_M % self.width, edges_B1, self.width)

    def written(self, value_M: Tensor, routes: Routes, begin_D: Tensor | None) -> Tensor:
        """[B, S * E]: to each layer, what the selected latents of it and of those before write there."""
        parts = []
        for layer, table in enumerate(self.W_dec):
            here_M = routes.unit_M < len(table)
            own = Routes(routes.unit_M[here_M], _edges(here_M, routes.edges_N1), len(table))
            begin_E = None if begin_D is None else begin_D.split(list(self.parts_out))[layer]
            parts.append(sparse_decode(value_M[here_M], own, table, begin_E))
        return torch.cat(parts, -1)

    def reference(self, x: Tensor) -> Tensor:
        """The same with every latent multiplied out."""
        f = self.select(x).dense
        return self.in_units(torch.cat([f[..., : len(table)] @ table for table in self.W_dec], -1) + self.b_dec_D)

    def aux_loss(self, scaled_BD: Tensor, error_BE: Tensor) -> Tensor | None:
        """As TopK's: the aux_k strongest dead latents of all layers explain the error of all."""
        dead_G = self.needy()
        if not len(dead_G) or not self.aux_alpha:
            return None
        with torch.no_grad():
            unit_BK = dead_G[top_k(self._pre(scaled_BD)[:, dead_G], min(self.aux_k, len(dead_G)))]
        routes = Routes.from_index(unit_BK, self.width)
        e_hat_BE = self.written(self.encoded(scaled_BD, routes.unit_M, routes.edges_N1).relu(), routes, None)
        return self.aux_alpha * mse_loss(e_hat_BE.to(error_BE.dtype), error_BE)

    def decoder_rows(self, part: int = 0) -> Tensor:
        """[F, E] what each latent writes to a layer; zeros for latents of later layers."""
        return pad(self.W_dec[part], (0, 0, 0, self.width - len(self.W_dec[part])))

    @torch.no_grad()
    def before_step(self) -> None:
        """As Dictionary's, of a latent's rows to all layers taken as one."""
        along_F = self.b_enc_F.new_zeros(self.width)
        moved = [table for table in self.W_dec if table.grad is not None]
        for table in moved:
            along_F[: len(table)] += (table.grad * table).sum(-1)  # type: ignore[operator]
        for table in moved:
            table.grad.addcmul_(table, along_F[: len(table), None], value=-1)  # type: ignore[union-attr]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """A latent's rows to all layers, taken as one, are 1 long."""
        square_F = self.W_enc_FD.new_zeros(self.width)
        for table in self.W_dec:
            square_F[: len(table)] += table.square().sum(-1)
        for table in self.W_dec:
            table.div_(square_F[: len(table), None].sqrt().clamp_min(1e-8))

    def cost(self, density: float | None = None) -> Cost:
        """A dense encoder product a layer, and the decoder rows of the latents kept."""
        kept = (self.budget if density is None else density) * sum(table.numel() for table in self.W_dec)
        return Cost(2 * (self.W_enc_FD.numel() + kept), self.W_enc_FD.element_size() * (self.W_enc_FD.numel() + kept))


def _edges(here_M: Tensor, edges_B1: Tensor) -> Tensor:
    """[B + 1] edges of the pairs marked."""
    return pad(here_M.cumsum(0), (1, 0))[edges_B1]
