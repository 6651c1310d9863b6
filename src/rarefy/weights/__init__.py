"""Weights: which entries of a linear layer are kept."""
