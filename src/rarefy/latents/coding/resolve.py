"""Codes solved for anew on a trained dictionary's decoder: what its encoder, one product and a threshold, leaves on the table.

The mitigation of "Decomposing The Dark Matter of Sparse Autoencoders" (Engels et al. 2024, arXiv 2410.14670, sec. 6): the
decoder is kept, the codes come from gradient pursuit; or from orthogonal pursuit, or the non-negative lasso.

Shape letters: D = width, F = latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput, Unsupported
from ..dictionary import Dictionary
from .coded import Coded
from .omp import OMP
from .sparse_coding import SparseCoding


@torch.no_grad()
def resolved(method: Dictionary, by: str = "gradient", *, k: int = 0, weight: float = 0.0) -> Coded:
    """A dictionary with the directions, centre and scale of `method` whose codes are solved for; made for use, and trainable.

    Atoms are the decoder's rows brought to length 1, a row of zeros left as it is; `method` is not changed.

    Args:
        method: an autoencoder with a decoder W_dec_FD. by: gradient or orthogonal (pursuits, which need `k`) or lasso (which
            needs `weight`, in the dictionary's units). k: latents a row; 0 takes the method's own k.

    Raises:
        Unsupported: a transcoder, whose codes are of another vector than what it reproduces, or no decoder matrix of that shape.
        BadInput: `by` unknown, or its k or weight missing or out of range.
    """
    decoder = getattr(method, "W_dec_FD", None)
    if not isinstance(decoder, Tensor) or method.transcodes or decoder.shape != (method.width, method.d_in):
        raise Unsupported(f"{method.name} does not reproduce what it reads through one matrix W_dec_FD; its codes cannot be solved for anew")
    if by == "lasso":
        if not weight > 0:
            raise BadInput(f"weight={weight!r} must be > 0 for by={by!r}: the penalty, in units in which a channel's mean square is 1")
        made: Coded = SparseCoding(method.d_in, method.width, weight=weight)
    elif by in ("gradient", "orthogonal"):
        made = OMP(method.d_in, method.width, k=k or getattr(method, "k", 0), by=by)
    else:
        raise BadInput(f"by={by!r} must be gradient, orthogonal or lasso")
    made = made.to(decoder.device, decoder.dtype)
    made.W_dec_FD.copy_(decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(1e-8))
    made.b_dec_D.copy_(method.b_dec_D)
    made.scale.copy_(method.scale)
    made.scale_out.copy_(method.scale_out)
    return made.eval()
