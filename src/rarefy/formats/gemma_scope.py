"""Gemma Scope: a folder with params.npz and no config: JumpReLU without b_dec taken from the input.

W_enc is [D, F], W_dec [F, E]. The file does not say whether it holds a transcoder; widths that differ do.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import Unsupported
from .files import npz, take
from .plain import Plain, recentred

WEIGHTS = "params.npz"
_SHAPES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FE", "b_dec": "E", "threshold": "F"}


def recognises(path: Path) -> bool:
    """The folder, or the file."""
    return path.suffix == ".npz" or (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Plain, dict[str, Any]]:
    """The dictionary in a folder or an .npz file."""
    path = path / WEIGHTS if path.is_dir() else path
    tensors = take(path, npz(path), _SHAPES, {})
    W_enc_FD = tensors["W_enc"].T.contiguous()
    transcodes = W_enc_FD.shape[1] != tensors["W_dec"].shape[1]
    plain = Plain("jumprelu", W_enc_FD, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], False, transcodes, theta=tensors["threshold"])
    return plain, {"model": None, "site": None}


def write(plain: Plain, made: dict[str, Any]) -> dict[str, bytes]:
    """The one file. ReLU is a JumpReLU with thresholds 0."""
    import numpy as np

    if plain.kind not in ("relu", "jumprelu", "batch_topk", "matryoshka"):
        raise Unsupported(f"Gemma Scope's layout holds JumpReLU only, not {plain.kind}; convert to it first (rarefy.latents.convert.to_jumprelu)")
    if plain.W_skip_ED is not None:
        raise Unsupported("Gemma Scope's layout has no skip connection; use the saelens, sparsify or circuit-tracer layout")
    plain = recentred(plain, False)
    file = io.BytesIO()
    arrays: dict[str, Any] = {"W_enc": plain.W_enc_FD.T, "W_dec": plain.W_dec_FE, "b_enc": plain.b_enc_F, "b_dec": plain.b_dec_E}
    arrays["threshold"] = plain.theta_F
    np.savez(file, allow_pickle=False, **{name: value.contiguous().numpy() for name, value in arrays.items()})
    return {WEIGHTS: file.getvalue()}
