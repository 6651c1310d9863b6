"""Static patterns as an algebra: `window(256) | sinks(4)`, `block(64) & ~strided(8)`."""

from .algebra import Pattern, block, sinks, strided, window

__all__ = ["Pattern", "block", "sinks", "strided", "window"]
