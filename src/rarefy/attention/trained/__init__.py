"""Attention whose choice or whose form is trained: made for a layer, put into its model, trained there. Design: base.py."""

from .in_model import Distilled, Trained

__all__ = ["Distilled", "Trained"]
