"""Maps from a row of scores to weights, many of which are exactly zero. Pure functions along any dim, with exact gradients.

Scores may be -inf (never any weight); a row of nothing else gives zeros. NaN and +inf are refused. float16 and bfloat16 are
worked in float32 and returned in their own dtype. Gradients can be differentiated again.
"""

from .entmax import entmax, entmax15, entmax_loss, sparsemax, sparsemax_loss
from .extrapolated import pladis
from .monotonic import expected_alignment, hard_alignment
from .rectified import relu, sigmoid
from .softmax import softmax
from .top import soft_top_k, statistical_top_k, top_k_softmax

__all__ = [
    "entmax", "entmax15", "entmax_loss", "expected_alignment", "hard_alignment", "pladis", "relu", "sigmoid", "soft_top_k", "softmax",
    "sparsemax", "sparsemax_loss", "statistical_top_k", "top_k_softmax",
]
