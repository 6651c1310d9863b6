"""What every dictionary shares: encoder, decoder, input scale, dead-latent counts.

    x_hat = (f(x) W_dec + b_dec) / scale,  f = selected latents of W_enc (scale x - b_dec) + b_enc

`scale` makes the centred input's mean squared channel 1, so that learning rates and penalties mean the same at every
site; it is set by `initialise` and folded in, so that everything outside is in the input's own units. A row may be what
flows at several sites, one after another (a crosscoder): each site then has a scale of its own.

Shape letters: B = rows, D = input width, E = output width, F = latents, K = kept latents, S = sites of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..cost import Cost
from ..errors import BadInput
from ..kernels.routes import Routes
from ..kernels.sparse_decode import sparse_decode
from ..method import Loss, Sparse, positive
from ..selection import Selection, check_finite

_AT_ONCE = 1024
"""Rows C of a decoder worked on at a time, so that what they need in between stays in cache."""
Widths = int | Sequence[int]
"""Width of what flows at one site, or the widths of several in the order in which a row holds them."""


class Dictionary(Sparse):
    """Base of autoencoders (d_out = 0) and transcoders (d_out > 0: another output, b_dec not taken from the input).

    Args:
        d_in: width D of what is read; several widths make a crosscoder (Lindsey et al. 2024), a dictionary of their
            concatenation. width: number of latents F. d_out: width E of what is reproduced, or several; 0 means x itself.
        seed: of the initial directions, independent of the global generator.
        skip: of transcoders only: a dense affine path W_skip [E, D] beside the latents, which then explain what it does not
            (Paulo et al. 2025, arXiv 2501.18823); True begins it at zero as the paper does, "least_squares" at the best
            affine map of the first batch.
    """

    unit = "latent"
    fitted = "trained"
    row_counters = ("idle_F",)
    join: ClassVar[str] = ""
    """How several sites must be made into rows for it, concat or mix; "" for a class that takes one as well."""
    tied: ClassVar[bool] = False
    """Whether one matrix encodes and decodes; such a class gives W_dec_FD itself."""
    reads_gradients: ClassVar[bool] = False
    """Whether training targets are to bring the gradient of the model's loss with them (see gradient_stream)."""

    scale: Tensor
    scale_out: Tensor
    idle_F: Tensor
    W_skip_ED: nn.Parameter | None

    def __init__(self, d_in: Widths, width: int, d_out: Widths = 0, seed: int = 0, skip: bool | str = False) -> None:
        super().__init__()
        self.parts_in, self.width = _parts("d_in", d_in), positive("width", width)
        self.parts_out = _parts("d_out", d_out) if d_out else self.parts_in
        """Widths of the sites of a row read and of one reproduced."""
        self.d_in, self.d_out, self.transcodes = sum(self.parts_in), sum(self.parts_out), bool(d_out)
        self.skip = _checked_skip(skip, self.transcodes)
        self.draw(torch.Generator().manual_seed(seed))
        self.b_enc_F, self.b_dec_D = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(self.d_out))
        self.W_skip_ED = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if skip else None
        self.register_buffer("scale", torch.ones(self.d_in if len(self.parts_in) > 1 else ()))
        self.register_buffer("scale_out", torch.ones(self.d_out if len(self.parts_out) > 1 else ()))
        self.register_buffer("idle_F", torch.zeros(width, dtype=torch.long))

    def draw(self, generator: torch.Generator) -> None:
        """Make encoder and decoder as they begin: the same random directions where widths allow it."""
        width = self.width
        rows_FE = normalize(torch.randn(width, self.d_out, generator=generator), dim=-1)
        same = rows_FE if self.d_out == self.d_in else normalize(torch.randn(width, self.d_in, generator=generator), dim=-1)
        self.W_enc_FD = nn.Parameter(same.clone())
        if not self.tied:
            self.W_dec_FD = nn.Parameter(rows_FE)

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Set scale and b_dec from a first batch: b_dec to the mean, as every row's reconstruction starts there."""
        y = x if y is None else y
        self.scale.copy_(_scale(x, self.parts_in))
        self.scale_out.copy_(_scale(y, self.parts_out))
        self.b_dec_D.copy_(y.float().mean(0) * self.scale_out)
        if self.W_skip_ED is not None and self.skip == "least_squares":
            mean_D, x_ND = x.double().mean(0) * self.scale, x.double() * self.scale
            self.W_skip_ED.copy_(_affine(x_ND - mean_D, y.double() * self.scale_out - self.b_dec_D))
            self.b_dec_D.sub_(self.W_skip_ED @ mean_D.to(self.b_dec_D))

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
        return self.written(value_M, routes, begin_D).view(*lead, self.d_out)

    def written(self, value_M: Tensor, routes: Routes, begin_D: Tensor | None) -> Tensor:
        """[B, E] `begin_D` plus the weighted sum of the decoder rows of each row's pairs."""
        return sparse_decode(value_M, routes, self.W_dec_FD, begin_D)

    def in_units(self, y: Tensor) -> Tensor:
        """From the dictionary's units to the output's."""
        return y / self.scale_out.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E] reconstruction."""
        check_finite(x, f"input of {self.name}")
        return self.beside(self.decode(self.select(x)), x)

    def reference(self, x: Tensor) -> Tensor:
        """The same with every latent multiplied out."""
        return self.beside(self.in_units(self.select(x).dense @ self.W_dec_FD + self.b_dec_D), x)

    def skipped(self, x: Tensor) -> Tensor:
        """[..., E] what the skip connection gives for rows [..., D], in the output's units; only where there is one."""
        assert self.W_skip_ED is not None
        return self.in_units(linear(self.scaled(x), self.W_skip_ED))

    def beside(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` with the skip connection's share added, where there is one."""
        return y if self.W_skip_ED is None else y + self.skipped(x)

    def decoder_rows(self, part: int = 0) -> Tensor:
        """[F, E] what each latent writes at one of the sites reproduced, in scaled units."""
        return self.W_dec_FD.split(self.parts_out, -1)[part]

    def decoder_norms(self) -> Tensor:
        """[F, S] length of each latent's decoder row at each site reproduced, in scaled units, in which sites compare."""
        return torch.stack([self.decoder_rows(s).norm(dim=-1) for s in range(len(self.parts_out))], -1)

    def check_rows(self, x: Tensor, y: Tensor) -> None:
        """Raise BadInput if training rows hold NaN or inf, before any counter moves."""
        check_finite(x, f"input of {self.name}")
        if y is not x:
            check_finite(y, f"target of {self.name}")

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """`latent_loss` of rows and targets; beside a skip connection, of what that leaves of the targets, as
        ||y - (f W + b + skip)||^2 is ||(y - skip) - (f W + b)||^2. Raises BadInput for rows with NaN or inf."""
        self.check_rows(x, y)
        if self.W_skip_ED is None:
            return self.latent_loss(x, y)
        rest = y - self.skipped(x)
        made = self.latent_loss(x, rest)
        return Loss(made.total, {**made.parts, "fvu": made.parts["fvu"] * self._spread(rest) / self._spread(y)})

    def latent_loss(self, x: Tensor, y: Tensor) -> Loss:
        """What the latents are trained on: rows [B, D] and what is to be made of them, [B, E], both checked and in their own units.

        A class gives this, or a `loss` of its own, which then takes no skip connection.
        """
        raise NotImplementedError

    def error(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Mean squared error a channel, in scaled units (about 1 for a dictionary that gives the mean)."""
        return ((y_hat - y) * self.scale_out).pow(2).mean()

    @torch.no_grad()
    def fired(self, unit_M: Tensor, rows: int) -> None:
        """Count the rows since each latent last fired."""
        self.idle_F += rows
        self.idle_F[unit_M] = 0

    def ended(self, trained: dict[str, Tensor], y_BE: Tensor, y_hat_BE: Tensor, unit_M: Tensor, active: Tensor | int, after: float) -> Loss:
        """The sum of the parts `trained`, with the diagnostics beside them; counts who fired.

        Args:
            y_BE, y_hat_BE: in the dictionary's units. unit_M: latents that fired. active: (row, latent) pairs that count as active.
            after: rows without firing after which a latent is dead.
        """
        self.fired(unit_M, len(y_BE))
        dead = (self.idle_F > after).float().mean()
        parts = {**trained, **diagnostics(y_BE, y_hat_BE, active / max(1, len(y_BE))), "dead": dead}
        return Loss(sum(trained.values(), torch.zeros((), dtype=y_BE.dtype, device=y_BE.device)), parts)

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

    @torch.no_grad()
    def _spread(self, y: Tensor) -> Tensor:
        """Squared distance of rows [B, E] to their mean, summed, in scaled units."""
        y = y * self.scale_out.to(y.dtype)
        return (y - y.mean(0)).pow(2).sum().clamp_min(1e-12)

    def cost(self, density: float | None = None) -> Cost:
        """One dense encoder product, the decoder rows of the latents kept, and the skip connection."""
        density = self.budget if density is None else density
        size = self.W_enc_FD.element_size()
        encode, kept = self.d_in * self.width, self.d_out * self.width * density
        total = encode + kept + (0 if self.W_skip_ED is None else self.W_skip_ED.numel())
        return Cost(2 * total, size * total)

    def dense_cost(self) -> Cost:
        """The same dictionary with every latent decoded."""
        return self.cost(1.0)


def _parts(name: str, given: Widths) -> tuple[int, ...]:
    if isinstance(given, list | tuple) and given:
        return tuple(positive(name, width) for width in given)
    return (positive(name, given),)  # type: ignore[arg-type]


def _checked_skip(skip: bool | str, transcodes: bool) -> bool | str:
    if skip not in (False, True, "least_squares"):
        raise BadInput(f'skip={skip!r} must be true (begun at zero), "least_squares" or false')
    if skip and not transcodes:
        raise BadInput(f"skip={skip!r} is for transcoders: an autoencoder's input would pass by its latents; give d_out (--target), or leave it out")
    return skip


def _scale(x_BD: Tensor, parts: Sequence[int]) -> Tensor:
    """Scalar for one site, else [D] with one value a site."""
    spread = [(x_BS - x_BS.mean(0)).pow(2).mean().clamp_min(1e-12).rsqrt() for x_BS in x_BD.float().split(list(parts), -1)]
    return spread[0] if len(parts) == 1 else torch.cat([s.expand(width) for s, width in zip(spread, parts, strict=True)])


_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the least squares, per row, in units in which a channel's mean square is 1."""


def _affine(x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """[E, D] ridge regression of centred rows. A batch has few rows for so many numbers: of several ridges, that which, fitted to
    every other row, predicts the rest best."""

    def fitted(x_BD: Tensor, y_BE: Tensor, ridge: float) -> Tensor:
        gram_DD = x_BD.T @ x_BD + ridge * max(1, len(x_BD)) * torch.eye(x_BD.shape[1], dtype=x_BD.dtype, device=x_BD.device)
        return torch.linalg.solve(gram_DD, x_BD.T @ y_BE)

    left = [(y_BE[1::2] - x_BD[1::2] @ fitted(x_BD[::2], y_BE[::2], ridge)).square().sum() for ridge in _RIDGES]
    return fitted(x_BD, y_BE, _RIDGES[int(torch.stack(left).argmin())]).T


@torch.no_grad()
def diagnostics(y: Tensor, y_hat: Tensor, active: Tensor | float) -> dict[str, Tensor]:
    """Logged, not trained on: fraction of variance unexplained in this batch and latents active a row."""
    spread = (y - y.mean(0)).pow(2).sum().clamp_min(1e-12)
    return {"fvu": (y - y_hat).pow(2).sum() / spread, "l0": torch.as_tensor(active, dtype=torch.float32)}
