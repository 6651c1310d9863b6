"""The rows that laws feed to methods of rows."""

from __future__ import annotations

import torch

from .spec import Inputs

D_IN, D_OUT, WIDTH = 60, 37, 111


def rows(batch: int, seed: int) -> Inputs:
    """Rows of unequal channels, some large, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2.0, D_IN)[torch.randperm(D_IN, generator=torch.Generator().manual_seed(99))]
    return (torch.randn(batch, D_IN, generator=generator) * scale + 0.1,)
