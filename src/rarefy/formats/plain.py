"""One dictionary in the form that every layout says in its own words, and the way from and to ours.

    x_hat = f W_dec + b_dec (+ W_skip x),   f = select(W_enc (x - b_dec) + b_enc)  where `centred`, else select(W_enc x + b_enc)

in the units of raw activations: our `scale` and `scale_out` are folded in. A factor s on all latents and 1 / s on nothing else
is what a selection cannot see (ReLU, top-k, thresholds that move with it: all are positively homogeneous), so that encoder and
decoder rows keep their bits and only biases and thresholds are divided by the scale. Sums are formed in float64.

Shape letters: D = input width, E = output width, F = latents.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..catalogue import entry
from ..errors import BadInput, Unsupported
from ..latents.dictionary import Dictionary

KINDS = {
    "latents/relu": "relu", "latents/p_annealed": "relu", "latents/gated": "gated", "latents/gated_p_annealed": "gated",
    "latents/jumprelu": "jumprelu", "latents/topk": "topk", "latents/annealed_topk": "topk", "latents/nested_topk": "topk",
    "latents/archetypal": "topk", "latents/mutual_feature": "topk", "latents/gradient_topk": "topk", "latents/abs_topk": "abs_topk",
    "latents/group_max": "group_max", "latents/batch_topk": "batch_topk", "latents/matryoshka": "matryoshka",
}
"""Method -> how it selects in use. Methods that are not here select in a way that no layout has a word for."""
_ROUTE = "rarefy.latents.convert.to_jumprelu makes a jumprelu of a TopK or BatchTopK, which most layouts have"
_LEAST_THETA = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Plain:
    """A dictionary in raw units, float32."""

    kind: str
    W_enc_FD: Tensor
    b_enc_F: Tensor
    """Of the gate, where kind is gated."""
    W_dec_FE: Tensor
    b_dec_E: Tensor
    centred: bool
    """Whether b_dec is taken from the input."""
    transcodes: bool
    """Whether what is reproduced is another site than what is read."""
    k: int = 0
    theta: Tensor | None = None
    """[F] thresholds of jumprelu, or the one [] of batch_topk and matryoshka."""
    r_mag_F: Tensor | None = None
    b_mag_F: Tensor | None = None
    W_skip_ED: Tensor | None = None
    prefixes: tuple[int, ...] = ()

    @property
    def d_in(self) -> int:
        """D."""
        return self.W_enc_FD.shape[1]

    @property
    def width(self) -> int:
        """F."""
        return self.W_enc_FD.shape[0]

    @property
    def d_out(self) -> int:
        """E."""
        return self.W_dec_FE.shape[1]

    @property
    def theta_F(self) -> Tensor:
        """[F] the threshold of each latent; 0 for relu."""
        if self.theta is None:
            return torch.zeros(self.width)
        return self.theta.expand(self.width).contiguous()


def recentred(plain: Plain, centred: bool) -> Plain:
    """The same function, with b_dec taken from the input or not: what that changes goes into the encoder's biases.

    Raises:
        BadInput: b_dec is to be taken from an input of another width.
    """
    if plain.centred == centred:
        return plain
    if plain.d_in != plain.d_out:
        raise BadInput(f"b_dec has {plain.d_out} channels and cannot be taken from an input of {plain.d_in}")
    shift_F = plain.W_enc_FD.double() @ plain.b_dec_E.double()
    return _shifted(plain, shift_F if centred else -shift_F, centred)


def _shifted(plain: Plain, shift_F: Tensor, centred: bool) -> Plain:
    b_mag_F = plain.b_mag_F
    if b_mag_F is not None and plain.r_mag_F is not None:
        b_mag_F = (b_mag_F.double() + plain.r_mag_F.double().exp() * shift_F).float()
    return dataclasses.replace(plain, b_enc_F=(plain.b_enc_F.double() + shift_F).float(), b_mag_F=b_mag_F, centred=centred)


def unit_rows(plain: Plain) -> Plain:
    """Norms of decoder rows moved into the encoder: latents are then ranked by the length of what they add.

    Another selection than before, for top-k; the same function otherwise. A row of zeros gives a latent that is never on.
    """
    norm_F = plain.W_dec_FE.double().norm(dim=-1)

    def by(value: Tensor | None) -> Tensor | None:
        return None if value is None else (value.double() * norm_F).float()

    return dataclasses.replace(
        plain, W_enc_FD=(plain.W_enc_FD.double() * norm_F[:, None]).float(), b_enc_F=(plain.b_enc_F.double() * norm_F).float(),
        W_dec_FE=(plain.W_dec_FE.double() / norm_F.clamp_min(1e-300)[:, None]).float(), b_mag_F=by(plain.b_mag_F), theta=by(plain.theta),
    )


def has_unit_rows(plain: Plain) -> bool:
    """Whether every decoder row has length 1, to a few roundings."""
    return bool((plain.W_dec_FE.norm(dim=-1) - 1).abs().max() < 1e-4)


@torch.no_grad()
def of_method(method: Dictionary) -> Plain:
    """A dictionary of ours in raw units.

    Raises:
        Unsupported: a method whose selection no layout expresses.
    """
    kind = KINDS.get(method.name)
    if kind is None or type(method) is not entry(method.name).load():
        raise Unsupported(f"no layout has a word for how {method.name or type(method).__name__} selects; {_ROUTE}")
    if len(method.parts_in) > 1 or len(method.parts_out) > 1:
        raise Unsupported(f"{method.name} reads or gives {len(method.parts_in)} and {len(method.parts_out)} sites; no layout has crosscoders")
    scale, out = method.scale.double(), method.scale_out.double()
    own = cast(Any, method)                                  # what only some methods have

    def over(value: Tensor) -> Tensor:
        return (value.detach().double() / out).float()

    def rescaled(value: Tensor) -> Tensor:
        return value.detach().float().clone() if scale == out else (value.detach().double() * (scale / out)).float()

    parts: dict[str, Any] = {"k": own.k} if "topk" in kind or kind in ("group_max", "matryoshka") else {}
    if kind == "jumprelu":
        parts["theta"] = over(own.log_theta_F.double().exp())
    elif kind in ("batch_topk", "matryoshka"):
        parts["theta"] = over(own.tau)
    elif kind == "gated":
        parts |= {"r_mag_F": own.r_mag_F.detach().float().clone(), "b_mag_F": over(own.b_mag_F)}
    if kind == "matryoshka":
        parts["prefixes"] = own.prefixes
    if method.W_skip_ED is not None:
        parts["W_skip_ED"] = rescaled(method.W_skip_ED)
    plain = Plain(
        kind, rescaled(method.W_enc_FD), over(method.b_enc_F), method.W_dec_FD.detach().float().clone(), over(method.b_dec_D),
        centred=method.centre_D is not None, transcodes=method.transcodes, **parts,
    )
    if plain.centred and scale != out:                       # the centre is b_dec / scale, which is not what is added in the end
        centre_D = method.b_dec_D.detach().double() / scale
        plain = _shifted(plain, -(plain.W_enc_FD.double() @ centre_D), False)
    return unit_rows(plain) if method.name == "latents/annealed_topk" else plain


_CLASSES = {kind: name for name, kind in reversed(KINDS.items()) if name.removeprefix("latents/") == kind}


@torch.no_grad()
def to_method(plain: Plain) -> Dictionary:
    """The dictionary of ours that gives the same output, in eval mode, with scale 1.

    Penalties that rise from 0 while training begins stand at their full height, as this is no beginning.

    Raises:
        BadInput: k out of range, or a group size that does not divide the width.
        Unsupported: a skip connection beside a selection that has none here.
    """
    cls = entry(_CLASSES[plain.kind]).load()
    transcodes = plain.transcodes or plain.W_skip_ED is not None     # what skips is a transcoder here, if to the site that it reads
    plain = recentred(plain, not transcodes)
    arguments: dict[str, Any] = {"d_in": plain.d_in, "width": plain.width, "d_out": plain.d_out if transcodes else 0}
    if plain.W_skip_ED is not None:
        if "skip" not in inspect.signature(inspect.unwrap(cls.__init__)).parameters:
            raise Unsupported(f"a skip connection (W_skip) beside {plain.kind} has no place in {cls.name}; use its own library")
        arguments["skip"] = True
    if plain.k:
        arguments["k"] = plain.k
    if plain.kind == "matryoshka":
        arguments["prefixes"] = ", ".join(map(str, plain.prefixes))
    method = cast(Any, cls(**arguments))
    held: dict[str, Any] = {"W_enc_FD": plain.W_enc_FD, "b_enc_F": plain.b_enc_F, "W_dec_FD": plain.W_dec_FE, "b_dec_D": plain.b_dec_E}
    if plain.W_skip_ED is not None:
        held["W_skip_ED"] = plain.W_skip_ED
    if plain.kind == "jumprelu":
        held["log_theta_F"] = plain.theta_F.double().clamp_min(_LEAST_THETA).log()
    elif plain.kind in ("batch_topk", "matryoshka"):
        held["tau"] = plain.theta_F[0].clamp_min(0.0)
        held["seen"] = (held["tau"] > 0).long()
    elif plain.kind == "gated":
        held |= {"r_mag_F": plain.r_mag_F, "b_mag_F": plain.b_mag_F}
    if "steps" in (state := method.state_dict()):
        held["steps"] = torch.tensor(method.warmup)
    method.load_state_dict({**state, **held})
    return method.eval()
