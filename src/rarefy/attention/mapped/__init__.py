"""Attention by a sparse map from scores to weights: every score formed, few weights above zero."""
