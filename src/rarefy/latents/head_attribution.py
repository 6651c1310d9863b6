"""Dictionaries of attention outputs, and which head and which token makes a latent fire (Kissane et al. 2024, arXiv 2406.17759).

The dictionary reads `layers.N.attn.z`: the heads' weighted values side by side, before W_O. With the attention patterns
A held as they are, z is linear in the values, so a latent's pre-activation splits without remainder (direct feature attribution):

    pre_f(t) = sum_h sum_s A[h, t, s] * scale * v[s, h] . W_enc[f, h]  +  (b_enc[f] - W_enc[f] . b_dec)

W_enc[f, h] is the slice of the latent's encoder row that reads head h. Of its decoder row, the norm of each slice says
which heads the latent stands for. With grouped-query attention several heads h read the values of one key head.

Shape letters: B = windows, T = tokens, H = heads, G = key heads, S = source tokens, C = width of a head, F = latents, M = places asked about.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput, Unsupported
from ..method import positive
from ..places import sites
from ..site import replaced
from .dictionary import Dictionary

_AT_ONCE = 64
"""Places worked out at a time: values are gathered for each."""


@dataclass(frozen=True)
class Attribution:
    """What pre-activations at M places are sums of. `parts_MHS` sums, with `rest_M`, to `pre_M`."""

    parts_MHS: Tensor
    """What head h gives by reading token s; zero for tokens that it may not see."""
    rest_M: Tensor
    """The biases: what is there whatever is read."""

    @property
    def pre_M(self) -> Tensor:
        """The pre-activations."""
        return self.parts_MHS.sum((-1, -2)) + self.rest_M

    @property
    def by_head_MH(self) -> Tensor:
        """What each head gives."""
        return self.parts_MHS.sum(-1)

    @property
    def by_source_MS(self) -> Tensor:
        """What each token gives, through any head."""
        return self.parts_MHS.sum(-2)


def head_shares(dictionary: Dictionary, heads: int) -> Tensor:
    """[F, H]: norm of each head's slice of the decoder rows over the norm of the whole row; squares sum to 1 along H.

    Raises:
        BadInput: what is reproduced is no attention output of that many heads.
    """
    if dictionary.transcodes or dictionary.d_in % positive("heads", heads):
        kind = "reproduces another site" if dictionary.transcodes else f"is {dictionary.d_in} wide"
        raise BadInput(f"the dictionary {kind}, so its rows do not fall into {heads} heads; train one at layers.N.attn.z")
    slices_FHC = dictionary.W_dec_FD.detach().unflatten(-1, (heads, -1))
    return slices_FHC.norm(dim=-1) / dictionary.W_dec_FD.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)


class _Patterns:
    """Dense attention that keeps its pattern [B, H, T, S] and its values [B, G, S, C]."""

    pattern: Tensor
    value: Tensor

    def __call__(
        self, q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, *, scale: float, causal: bool = True, padding_BS: Tensor | None = None,
        layer: int = 0,
    ) -> Tensor:
        share = q_BHTC.shape[1] // k_BGSC.shape[1]
        score_BHTS = q_BHTC @ k_BGSC.repeat_interleave(share, 1).mT * scale
        T, S = score_BHTS.shape[-2:]
        if causal:
            score_BHTS = score_BHTS.masked_fill(~torch.ones(T, S, dtype=torch.bool, device=score_BHTS.device).tril(S - T), -torch.inf)
        if padding_BS is not None:
            score_BHTS = score_BHTS.masked_fill(~padding_BS[:, None, None], -torch.inf)
        self.pattern, self.value = score_BHTS.softmax(-1), v_BGSC
        return self.pattern @ v_BGSC.repeat_interleave(share, 1)

    attend = __call__


def attention_site(model: nn.Module, site: str) -> str:
    """Canonical name of the attention whose output `site` is. Raises BadInput for any place but layers.N.attn.z."""
    found = list(sites(model, site))
    match = re.fullmatch(r"(layers\.\d+\.attn)\.z", found[0]) if len(found) == 1 else None
    if not match:
        raise BadInput(f"{site} is not one layer's attention output; attribution to heads reads dictionaries trained at layers.N.attn.z")
    return match[1]


@torch.no_grad()
def attribute(
    model: nn.Module, site: str, dictionary: Dictionary, ids_BT: Tensor, *, latent_M: Tensor, window_M: Tensor, position_M: Tensor,
) -> Attribution:
    """Split the pre-activations of latents at places of text over heads and source tokens.

    Args:
        model: of any family whose attention goes through transformers' interface.
        site: layers.N.attn.z, where `dictionary` (autoencoder or transcoder) reads.
        ids_BT: token windows without padding.
        latent_M, window_M, position_M: which latent, in which window, at which token.

    Raises:
        BadInput: another site, a dictionary of another width, or places that are not there.
        Unsupported: sliding windows, capped logits, or attention that is the model's own; an encoder that is no linear map of z.
    """
    asked = {"latent_M": (latent_M, dictionary.width), "window_M": (window_M, ids_BT.shape[0]), "position_M": (position_M, ids_BT.shape[1])}
    for name, (given, most) in asked.items():
        if given.ndim != 1 or len(given) != len(latent_M) or (len(given) and not 0 <= int(given.min()) <= int(given.max()) < most):
            raise BadInput(f"{name} must be {len(latent_M)} whole numbers in 0..{most - 1}, one a place; got {given.tolist()[:8]}")
    seen = _Patterns()
    with replaced(model, {attention_site(model, site): seen}):
        model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
    weight_FD = dictionary.W_enc_FD.detach()
    H = seen.pattern.shape[1]
    if H * seen.value.shape[-1] != dictionary.d_in:
        raise BadInput(f"the dictionary reads rows of {dictionary.d_in}, but {site} is {H} heads of {seen.value.shape[-1]}")
    rest_F = dictionary.b_enc_F.detach()
    if dictionary.centre_D is not None:
        rest_F = rest_F - weight_FD @ dictionary.centre_D.detach()
    S, like = seen.pattern.shape[-1], dictionary.scale
    parts, pre = [weight_FD.new_zeros(0, H, S)], [weight_FD.new_zeros(0)]
    for latent, window, position in zip(*(t.split(_AT_ONCE) for t in (latent_M, window_M, position_M)), strict=True):
        reads_MHC = weight_FD[latent].unflatten(-1, (H, -1))
        value_MHSC = seen.value[window].to(like).repeat_interleave(H // seen.value.shape[1], 1)
        pattern_MHS = seen.pattern[window, :, position].to(like)
        parts.append(pattern_MHS * torch.einsum("mhsc,mhc->mhs", value_MHSC, reads_MHC) * like)
        z_MD = torch.einsum("mhs,mhsc->mhc", pattern_MHS, value_MHSC).flatten(1)
        pre.append(dictionary.pre_activations(z_MD).gather(-1, latent[:, None])[:, 0])
    found, pre_M = Attribution(torch.cat(parts), rest_F[latent_M]), torch.cat(pre)
    if bool(((found.pre_M - pre_M).abs() > 1e-2 * (1 + pre_M.abs())).any()):
        raise Unsupported(f"the pre-activations of {dictionary.name} are not W_enc (scale z - b_dec) + b_enc; only that splits over heads and tokens")
    return found
