"""A trained TopK-like dictionary as a JumpReLU one, so that a latent's activity depends on no other latent.

The last step of Llama Scope (He et al. 2024, arXiv 2410.20526); sound for BatchTopK too, whose training already
compares latents across rows (Bussmann et al. 2024, sec. 2.2).

Shape letters: N = rows, D = width, F = latents, M = latents that fire.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput, Unsupported
from ..selection import check_finite
from .group_max import GroupMax
from .jumprelu import JumpReLU
from .topk import TopK

_AT_ONCE = 1024
"""Rows encoded at a time."""


@torch.no_grad()
def to_jumprelu(method: TopK, x_ND: Tensor) -> JumpReLU:
    """The dictionary with one threshold in place of its selection, set so that as many latents fire on the rows as did before.

    Norms of decoder rows are moved into the encoder first, so that the threshold is one on what a latent adds. Equal
    pre-activations at the threshold fire together or not at all; but for these the number that fires is the same exactly.

    Args:
        method: TopK, BatchTopK, AnnealedTopK or another whose latents are ReLUs ranked by size; it is not changed.
        x_ND: rows like those that it will be used on.

    Returns:
        in eval mode, with the method's dtype and device. Its target L0 is the mean L0 on the rows.

    Raises:
        BadInput: no rows, rows of another width, NaN or inf, or rows on which nothing fires.
        Unsupported: latents that may be negative, or that are compared within groups only.
    """
    if method.absolute or isinstance(method, GroupMax) or method.weigh(torch.tensor(-1.0)) != 0:
        raise Unsupported(
            f"{method.name} does not keep the largest positive latents, so that no threshold stands for it; convert a TopK or BatchTopK"
        )
    if x_ND.ndim != 2 or not len(x_ND) or x_ND.shape[1] != method.d_in:
        raise BadInput(f"rows have shape {list(x_ND.shape)}; need [rows, {method.d_in}] with at least one row")
    check_finite(x_ND, f"rows for {method.name}")
    was, rows = method.training, x_ND.to(method.W_enc_FD).split(_AT_ONCE)
    method.eval()
    try:
        fire = sum(int(method.select(x).on.sum()) for x in rows)
    finally:
        method.train(was)
    if not fire:
        raise BadInput(f"no latent of {method.name} fires on these {len(x_ND)} rows; give rows like those it was trained on")
    given = method.arguments
    made = JumpReLU(**{name: given[name] for name in ("d_in", "width", "d_out", "skip") if name in given}, target_l0=fire / len(x_ND))
    made = made.to(method.W_enc_FD)
    held = method.state_dict()
    made.load_state_dict({name: held.get(name, value) for name, value in made.state_dict().items()})
    norm_F = made.W_dec_FD.norm(dim=-1).clamp_min(torch.finfo(made.W_dec_FD.dtype).tiny)
    made.W_enc_FD.mul_(norm_F[:, None])
    made.b_enc_F.mul_(norm_F)
    made.W_dec_FD.div_(norm_F[:, None])
    made.log_theta_F.fill_(_between(made, rows, fire).log())
    return made.eval()


def _between(made: JumpReLU, rows: tuple[Tensor, ...], fire: int) -> Tensor:
    """Half way between the last of the `fire` largest pre-activations of all rows and the next, or 0 if that is less."""
    largest_M = torch.zeros(1, dtype=torch.float64, device=made.W_enc_FD.device)
    for x in rows:
        pre_M = made.pre_activations(x).flatten()
        seen_M = torch.cat([largest_M, pre_M[pre_M > 0].double()])
        largest_M = seen_M.topk(min(len(seen_M), fire + 1)).values
    return largest_M[-2:].sum() / 2
