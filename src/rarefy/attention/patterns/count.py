"""Pairs that exist, and pairs that a block mask keeps."""

from __future__ import annotations

from ...kernels.block_attention.pairs import kept_pairs, visible_pairs

__all__ = ["kept_pairs", "visible_pairs"]
