"""AbsTopK sparse autoencoder (Zhu, Khalili & Zhu 2025, arXiv 2510.00404): latents of either sign.

f = H_k(W_enc (x - b_dec) + b_enc), H_k the projection onto vectors with at most k entries that are not zero: it keeps the k
largest in absolute value, with their sign. It is the proximal operator of the l0 constraint without TopK's demand that
latents be positive, so that one latent serves both poles of a direction. The paper's loss is the squared error alone;
here AuxK comes on top of it as in TopK, with signed dead latents, and aux_alpha = 0 leaves it out.
"""

from __future__ import annotations

from torch import Tensor

from .topk import TopK


class AbsTopK(TopK):
    """The k pre-activations of each row that are largest in absolute value, with their sign. Arguments as for TopK."""

    name = "latents/abs_topk"
    absolute = True

    def weigh(self, pre: Tensor) -> Tensor:
        """The pre-activation itself."""
        return pre
