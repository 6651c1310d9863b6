"""Where in depth the latents of one dictionary for all layers are active (Lawson et al. 2024, arXiv 2409.04185).

A latent's activations, summed over text, are a distribution over layers; its mean is the latent's layer, and by the law of
total variance Var[l] = E[Var[l | token]] + Var[E[l | token]]: the spread over layers at one token, and how far that moves
from token to token. The same with prompts for tokens.

Shape letters: M = activations, F = latents, L = layers, P = pairs of a latent and a token (or prompt).
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerSpread:
    """Sums of activations by layer, taken in piece by piece, in float64.

    Args:
        width: latents F. layers: L, numbered in the order of the sites.
    """

    def __init__(self, width: int, layers: int) -> None:
        self.width, self.layers = width, layers
        self.mass_FL = torch.zeros(width, layers, dtype=torch.float64)
        """Activation of each latent at each layer."""
        self.count_FL = torch.zeros(width, layers, dtype=torch.long)
        self._square = {by: torch.zeros(width, dtype=torch.float64) for by in ("token", "prompt")}

    def add(self, latent_M: Tensor, value_M: Tensor, layer_M: Tensor, token_M: Tensor, prompt_M: Tensor) -> None:
        """Take in activations of some prompts: all layers of a prompt's tokens must come in one call.

        Args:
            latent_M, layer_M: int64. value_M: weights, of which the size counts. token_M, prompt_M: int64, numbered within the call.
        """
        mass_M, at_M = value_M.double().abs(), latent_M * self.layers + layer_M
        self.mass_FL.view(-1).index_add_(0, at_M, mass_M)
        self.count_FL.view(-1).index_add_(0, at_M, torch.ones_like(at_M))
        for by, group_M in (("token", token_M), ("prompt", prompt_M)):
            key_P, pair_M = (latent_M + self.width * group_M).unique(return_inverse=True)
            total_P, moment_P = (torch.zeros(len(key_P), dtype=torch.float64) for _ in range(2))
            total_P.index_add_(0, pair_M, mass_M)
            moment_P.index_add_(0, pair_M, mass_M * layer_M)
            self._square[by].index_add_(0, key_P % self.width, moment_P.square() / total_P.clamp_min(1e-300))

    @property
    def share_FL(self) -> Tensor:
        """[F, L] share of each latent's activation at each layer; zeros for one that never fired."""
        return self.mass_FL / self.mass_FL.sum(-1, keepdim=True).clamp_min(1e-300)

    @property
    def layer_F(self) -> Tensor:
        """[F] expected layer."""
        return self.share_FL @ torch.arange(self.layers, dtype=torch.float64)

    @property
    def variance_F(self) -> Tensor:
        """[F] variance of the layer over all activations."""
        return self.share_FL @ torch.arange(self.layers, dtype=torch.float64).square() - self.layer_F.square()

    @property
    def entropy_F(self) -> Tensor:
        """[F] entropy of the distribution over layers, in nats: 0 for one layer, log L for all alike."""
        return torch.special.entr(self.share_FL).sum(-1)

    def between(self, by: str) -> Tensor:
        """[F] variance of the expected layer from one token ("token") or prompt ("prompt") to another, each weighted by its activation."""
        return (self._square[by] / self.mass_FL.sum(-1).clamp_min(1e-300) - self.layer_F.square()).clamp_min(0)

    def within(self, by: str) -> Tensor:
        """[F] mean variance of the layer within a token or prompt."""
        return (self.variance_F - self.between(by)).clamp_min(0)

    def summary(self) -> dict[str, float]:
        """Means over latents that fired, each weighted by its activation."""
        weight_F = self.mass_FL.sum(-1) / self.mass_FL.sum().clamp_min(1e-300)
        parts = {"variance": self.variance_F, "within_token": self.within("token"), "within_prompt": self.within("prompt"), "entropy": self.entropy_F}
        return {name: float(weight_F @ value_F) for name, value_F in parts.items()}
