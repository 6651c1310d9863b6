"""One query a head over keys and values that stay in the form they are stored in: pruned rows as bitmaps, or few atoms of a dictionary.

Each gives (out, lse), so that `block_attention.merge` joins it with attention over keys that are stored whole.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), S = keys in the store, D = head width, C = channels kept,
E = ceil(D / 8) bytes of bitmap, A = atoms, K = atoms of a key or value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadInput
from .. import native
from .reference import bitmap_attention_reference, code_attention_reference, prune_rows_reference, unpack_rows

__all__ = [
    "bitmap_attention", "bitmap_attention_reference", "code_attention", "code_attention_reference", "prune_rows",
    "prune_rows_reference", "unpack_rows",
]


_UNKNOWN = "a code names an atom that the dictionary has not"


def prune_rows(x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(bitmap [..., E] uint8, values [..., keep] in order of channel) of the `keep` largest magnitudes of each row of finite numbers.

    Raises:
        BadInput: more channels asked for than there are, or none.
    """
    if not 1 <= keep <= x.shape[-1]:
        raise BadInput(f"keep={keep} must lie within 1 .. {x.shape[-1]} channels")
    if not native.serves(x, dtypes=(torch.float32,)):
        return prune_rows_reference(x, keep)
    from .cpu import prune

    bits, values = torch.zeros(*x.shape[:-1], -(-x.shape[-1] // 8), dtype=torch.uint8), x.new_empty(*x.shape[:-1], keep)
    rows = x.shape[:-1].numel()
    native.spread(prune, rows, native.array(x).reshape(rows, -1), bits.view(rows, -1).numpy(), values.view(rows, -1).numpy())
    return bits, values


def bitmap_attention(
    q_BH1D: Tensor, k_bits_BGSE: Tensor, k_BGSC: Tensor, v_bits_BGSE: Tensor, v_BGSC: Tensor, count_B: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, 1, D], lse [B, H, 1] float32): softmax(q k^T scale) v over the first count[b] keys of each row; none gives 0 and -inf.

    A key or value has bit d % 8 of byte d // 8 set where channel d is kept, and its kept channels in order. Compiled loops write a few rows
    at a time out into the nearest cache (one vector instruction for 16 channels with AVX-512); elsewhere all are unpacked.

    Raises:
        BadInput: shapes that do not fit.
    """
    B, H, T, D = q_BH1D.shape
    _check(q_BH1D, k_BGSC, v_BGSC, count_B)
    want = (*k_BGSC.shape[:3], -(-D // 8))
    if k_bits_BGSE.shape != want or v_bits_BGSE.shape != want or k_bits_BGSE.dtype != torch.uint8 or v_bits_BGSE.dtype != torch.uint8:
        raise BadInput(f"bitmaps must be uint8 {list(want)}, not {list(k_bits_BGSE.shape)} and {list(v_bits_BGSE.shape)}")
    if not native.serves(q_BH1D, k_BGSC, v_BGSC, dtypes=(torch.float32,)):
        return bitmap_attention_reference(q_BH1D, k_bits_BGSE, k_BGSC, v_bits_BGSE, v_BGSC, count_B, scale=scale)
    from .cpu import bitmaps, run

    return run(bitmaps, q_BH1D, count_B, scale, k_bits_BGSE, k_BGSC, v_bits_BGSE, v_BGSC)


def code_attention(
    q_BH1D: Tensor, k_index_BGSK: Tensor, k_BGSK: Tensor, v_index_BGSK: Tensor, v_BGSK: Tensor, k_atoms_AD: Tensor, v_atoms_AD: Tensor,
    count_B: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, 1, D], lse [B, H, 1] float32) as `bitmap_attention`, of keys and values that are sums of K weighted atoms.

    q . atom is worked out once for every atom and gathered; probabilities are summed on atoms, which meet the dictionary once at the end.

    Raises:
        BadInput: shapes that do not fit, an atom that the dictionary has not.
    """
    _check(q_BH1D, k_BGSK, v_BGSK, count_B)
    D = q_BH1D.shape[-1]
    for what, index, weight, atoms in (("keys", k_index_BGSK, k_BGSK, k_atoms_AD), ("values", v_index_BGSK, v_BGSK, v_atoms_AD)):
        if index.shape != weight.shape or index.is_floating_point() or atoms.ndim != 2 or atoms.shape[1] != D:
            raise BadInput(f"{what}: numbers {list(index.shape)}, weights {list(weight.shape)}, atoms {list(atoms.shape)} do not fit width {D}")
    some = k_index_BGSK.shape[3] and v_index_BGSK.shape[3]                          # the loops take at least one atom a row
    if not some or not native.serves(q_BH1D, k_BGSK, v_BGSK, k_atoms_AD, v_atoms_AD, dtypes=(torch.float32,)):
        k_index, v_index = (_known(i, len(atoms), count_B) for i, atoms in ((k_index_BGSK, k_atoms_AD), (v_index_BGSK, v_atoms_AD)))
        return code_attention_reference(q_BH1D, k_index, k_BGSK, v_index, v_BGSK, k_atoms_AD, v_atoms_AD, count_B, scale=scale)
    from .cpu import codes, run

    on_BHA = (q_BH1D[:, :, 0] @ k_atoms_AD.T)[:, :, None]
    held = (k_index_BGSK, k_BGSK, v_index_BGSK, v_BGSK)
    out, lse = run(codes, on_BHA, count_B, scale, *held, width=len(v_atoms_AD), atoms=(len(k_atoms_AD), len(v_atoms_AD)))
    if bool(lse.isnan().any()):
        raise BadInput(_UNKNOWN)
    return out @ v_atoms_AD, lse


def _known(index_BGSK: Tensor, atoms: int, count_B: Tensor) -> Tensor:
    """int64 numbers of atoms, 0 behind each row's last, where anything may stand."""
    there = (torch.arange(index_BGSK.shape[2], device=index_BGSK.device) < count_B[:, None])[:, None, :, None]
    index = torch.where(there, index_BGSK.long(), 0)
    if bool(((index < 0) | (index >= max(1, atoms))).any()):
        raise BadInput(_UNKNOWN)
    return index


def _check(q_BH1D: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, count_B: Tensor) -> None:
    B, H, T, _ = q_BH1D.shape
    fits = k_BGSC.ndim == v_BGSC.ndim == 4 and k_BGSC.shape[:3] == v_BGSC.shape[:3] and len(k_BGSC) == B and k_BGSC.shape[1] > 0
    if T != 1 or not fits or H % k_BGSC.shape[1] or count_B.shape != (B,):
        given = f"{list(k_BGSC.shape)}, {list(v_BGSC.shape)} and counts {list(count_B.shape)}"
        raise BadInput(f"one query a head {list(q_BH1D.shape)} does not fit {given}")
    if B and not 0 <= int(count_B.min()) <= int(count_B.max()) <= k_BGSC.shape[2]:
        raise BadInput(f"counts {int(count_B.min())} .. {int(count_B.max())} do not lie within {k_BGSC.shape[2]} stored keys")
