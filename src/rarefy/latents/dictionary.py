"""What every dictionary shares: encoder, decoder, input scale, dead-latent counts.

    x_hat = (f(x) W_dec + b_dec) / scale,  f = selected latents of W_enc (scale x - b_dec) + b_enc

`scale` makes the centred input's mean squared channel 1, so that learning rates and penalties mean the same at every
site; it is set by `initialise` and folded in, so that everything outside is in the input's own units.

Shape letters: B = rows, D = input width, E = output width, F = latents, K = kept latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..cost import Cost
from ..kernels.routes import Routes
from ..kernels.sparse_decode import sparse_decode
from ..method import Sparse, positive
from ..selection import Selection, check_finite

_AT_ONCE = 1024
"""Rows C of a decoder worked on at a time, so that what they need in between stays in cache."""


class Dictionary(Sparse):
    """Base of autoencoders (d_out = 0) and transcoders (d_out > 0: another output, b_dec not taken from the input).

    Args:
        d_in: width D of what is read. width: number of latents F. d_out: width E of what is reproduced; 0 means x itself.
        seed: of the initial directions, independent of the global generator.
    """

    unit = "latent"
    fitted = "trained"
    row_counters = ("idle_F",)

    scale: Tensor
    scale_out: Tensor
    idle_F: Tensor

    def __init__(self, d_in: int, width: int, d_out: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.d_in, self.width = positive("d_in", d_in), positive("width", width)
        self.d_out = positive("d_out", d_out) if d_out else d_in
        self.transcodes = d_out > 0
        generator = torch.Generator().manual_seed(seed)
        rows_FE = normalize(torch.randn(width, self.d_out, generator=generator), dim=-1)
        same = rows_FE if self.d_out == d_in else normalize(torch.randn(width, d_in, generator=generator), dim=-1)
        self.W_enc_FD, self.b_enc_F = nn.Parameter(same.clone()), nn.Parameter(torch.zeros(width))
        self.W_dec_FD, self.b_dec_D = nn.Parameter(rows_FE), nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))
        self.register_buffer("idle_F", torch.zeros(width, dtype=torch.long))

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Set scale and b_dec from a first batch: b_dec to the mean, as every row's reconstruction starts there."""
        y = x if y is None else y
        self.scale.copy_(_scale(x))
        self.scale_out.copy_(_scale(y))
        self.b_dec_D.copy_(y.float().mean(0) * self.scale_out)

    def scaled(self, x: Tensor) -> Tensor:
        """[..., D] in the dictionary's own units."""
        return x * self.scale.to(x.dtype)

    @property
    def centre_D(self) -> Tensor | None:
        """What is taken from scaled rows before they are encoded: b_dec, or nothing where another output is reproduced."""
        return None if self.transcodes else self.b_dec_D

    def centred(self, x: Tensor) -> Tensor:
        """[..., D] as the encoder's product sees it."""
        return self.scaled(x) if self.centre_D is None else self.scaled(x) - self.centre_D

    def pre_activations(self, x: Tensor) -> Tensor:
        """[..., F] W_enc (scale x - b_dec) + b_enc."""
        return linear(self.centred(x), self.W_enc_FD, self.b_enc_F)

    def encode(self, x: Tensor) -> Selection:
        """Latents of rows [..., D]; the same as select."""
        return self.select(x)

    def decode(self, selection: Selection) -> Tensor:
        """[..., E] in the output's units; work in proportion to what is selected."""
        return self.in_units(self.combine(selection, self.b_dec_D))

    def combine(self, selection: Selection, begin_D: Tensor | None = None) -> Tensor:
        """[..., E] `begin_D` plus the weighted sum of the selected decoder rows, in the dictionary's units."""
        lead = selection.weight.shape[:-1]
        if selection.index is not None:
            routes = Routes.from_index(selection.index.reshape(-1, selection.index.shape[-1]), self.width)
            value_M = selection.weight.reshape(-1)
        else:
            mask_NF = selection.mask.reshape(-1, self.width)
            routes, value_M = Routes.from_mask(mask_NF), selection.weight.reshape(-1, self.width)[mask_NF]
        return sparse_decode(value_M, routes, self.W_dec_FD, begin_D).view(*lead, self.d_out)

    def in_units(self, y: Tensor) -> Tensor:
        """From the dictionary's units to the output's."""
        return y / self.scale_out.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E] reconstruction."""
        check_finite(x, f"input of {self.name}")
        return self.decode(self.select(x))

    def reference(self, x: Tensor) -> Tensor:
        """The same with every latent multiplied out."""
        return self.in_units(self.select(x).dense @ self.W_dec_FD + self.b_dec_D)

    def check_rows(self, x: Tensor, y: Tensor) -> None:
        """Raise BadInput if training rows hold NaN or inf, before any counter moves."""
        check_finite(x, f"input of {self.name}")
        if y is not x:
            check_finite(y, f"target of {self.name}")

    def error(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Mean squared error a channel, in scaled units (about 1 for a dictionary that gives the mean)."""
        return ((y_hat - y) * self.scale_out).pow(2).mean()

    @torch.no_grad()
    def fired(self, unit_M: Tensor, rows: int) -> None:
        """Count the rows since each latent last fired."""
        self.idle_F += rows
        self.idle_F[unit_M] = 0

    def dead_fraction(self, after: int) -> float:
        """Share of latents silent for more than `after` rows of training."""
        return float((self.idle_F > after).float().mean())

    @torch.no_grad()
    def before_step(self) -> None:
        """Take out of the decoder's gradient what would only change row norms, which `after_step` undoes anyway."""
        if self.W_dec_FD.grad is not None:
            for grad_CE, row_CE in zip(self.W_dec_FD.grad.split(_AT_ONCE), self.W_dec_FD.split(_AT_ONCE), strict=True):
                grad_CE.addcmul_(row_CE, (grad_CE * row_CE).sum(-1, keepdim=True), value=-1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Unit-norm decoder rows."""
        self.W_dec_FD.div_(self.W_dec_FD.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    def cost(self, density: float | None = None) -> Cost:
        """One dense encoder product and the decoder rows of the latents kept."""
        density = self.budget if density is None else density
        size = self.W_enc_FD.element_size()
        encode, kept = self.d_in * self.width, self.d_out * self.width * density
        return Cost(2 * (encode + kept), size * (encode + kept))

    def dense_cost(self) -> Cost:
        """The same dictionary with every latent decoded."""
        return self.cost(1.0)


def _scale(x_BD: Tensor) -> Tensor:
    spread = (x_BD.float() - x_BD.float().mean(0)).pow(2).mean()
    return spread.clamp_min(1e-12).rsqrt()


@torch.no_grad()
def diagnostics(y: Tensor, y_hat: Tensor, active: Tensor | float) -> dict[str, Tensor]:
    """Logged, not trained on: fraction of variance unexplained in this batch and latents active a row."""
    spread = (y - y.mean(0)).pow(2).sum().clamp_min(1e-12)
    return {"fvu": (y - y_hat).pow(2).sum() / spread, "l0": torch.as_tensor(active, dtype=torch.float32)}
