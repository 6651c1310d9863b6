"""CSR (Zhang et al. 2024): each cached key and value as a few atoms of a dictionary that was fitted beforehand.

Shape letters: B = batch, G = key heads, R = query heads of a key head, T = tokens, S = tokens in the store, D = head width,
N = rows, A = atoms, K = atoms of a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...kernels import native
from ...kernels.coded_attention import code_attention
from ...method import positive
from .base import Cache
from .compressed import CompressedLayer
from .policy import Policy


def pursue(x_ND: Tensor, atoms_AD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit in float64: (index [N, K], weight [N, K]) over unit atoms.

    At each step the atom that the residual points along most, then all weights anew by least squares. A residual of
    nothing (1e-9 of the row) takes no further atom: its weights are 0.
    """
    x, atoms = x_ND.double(), atoms_AD.double()
    index = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    weight = torch.zeros(len(x), k, dtype=torch.float64, device=x.device)
    if native.serves(x, atoms):
        from ...kernels.coded_attention.pursuit import pursuit

        native.spread(pursuit, len(x), native.array(x), native.array(atoms), index.numpy(), weight.numpy())
        return index, weight
    used = torch.zeros(len(x), len(atoms), dtype=torch.bool, device=x.device)
    rest, active = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    size = x.norm(dim=-1)
    for step in range(k):
        active = active & (rest.norm(dim=-1) > 1e-9 * size)
        if not bool(active.any()):
            break
        best = (rest @ atoms.T).abs().masked_fill(used, -1.0).argmax(-1)
        index[:, step] = torch.where(active, best, index[:, step])
        used[torch.arange(len(x), device=x.device), best] |= active
        chosen = atoms[index[active, : step + 1]]
        gram = chosen @ chosen.mT + 1e-12 * torch.eye(step + 1, dtype=torch.float64, device=x.device)
        weight[active, : step + 1] = torch.linalg.solve(gram, (chosen @ x[active, :, None]))[..., 0]
        rest = rest.clone()
        rest[active] = x[active] - (weight[active, : step + 1, None] * chosen).sum(1)
    return index, weight


def fit_atoms(x_ND: Tensor, atoms: int, k: int, rounds: int, seed: int) -> Tensor:
    """[A, D] unit atoms for `k`-sparse codes: pursuit and the least-squares dictionary in turn (method of optimal directions).

    An atom that no row uses becomes the row that is coded worst.
    """
    x = x_ND.double()
    generator = torch.Generator().manual_seed(seed)
    if len(x) < atoms:
        raise BadInput(f"{len(x)} calibration rows cannot start {atoms} atoms; give more text or fewer atoms")
    unit = lambda a: a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # noqa: E731
    made = unit(x[torch.randperm(len(x), generator=generator)[:atoms].to(x.device)])
    for _ in range(rounds):
        index, weight = pursue(x, made, k)
        code = torch.zeros(len(x), atoms, dtype=torch.float64, device=x.device).scatter_add_(1, index, weight)
        gram = code.T @ code
        made = torch.linalg.solve(gram + 1e-8 * gram.diagonal().mean() * torch.eye(atoms, dtype=torch.float64, device=x.device), code.T @ x)
        idle = (code != 0).sum(0) == 0
        error = (x - code @ made).norm(dim=-1)
        made[idle] = x[error.topk(int(idle.sum())).indices]
        made = unit(made)
    return made.to(x_ND.dtype)


class _Layer(CompressedLayer):
    policy: CSR

    def _atoms(self) -> tuple[Tensor, Tensor]:
        if self.index >= len(self.policy.atoms_of):
            raise BadInput(f"{self} has no dictionary yet; call cache.fit(model, input_ids) first")
        return self.policy.atoms_of[self.index]

    def pack(self, k_BGTD: Tensor, v_BGTD: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, x, atoms_AD in zip("kv", (k_BGTD, v_BGTD), self._atoms(), strict=True):
            index, weight = pursue(x.flatten(0, 2), atoms_AD, max(1, round(self.budget * x.shape[-1])))
            short = torch.int16 if len(atoms_AD) <= 2**15 else torch.int32
            out[f"{name} index"], out[name] = index.to(short).unflatten(0, x.shape[:3]), weight.to(x.dtype).unflatten(0, x.shape[:3])
        return out

    def decode(self, q_BH1D: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert self.far.count_B is not None
        far, (k_atoms, v_atoms) = self.far, (atoms.to(q_BH1D.dtype) for atoms in self._atoms())
        return code_attention(q_BH1D, far["k index"], far["k"], far["v index"], far["v"], k_atoms, v_atoms, self.far.count_B, scale=scale)

    def scores(self, q_BGRTD: Tensor) -> Tensor:
        """q . atom once for every atom, then each key's few sums."""
        B, G, R, T, _ = q_BGRTD.shape
        on_A = q_BGRTD @ self._atoms()[0].to(q_BGRTD.dtype).T
        index_BGSK, weight_BGSK = self.far["k index"].long(), self.far["k"]
        flat = index_BGSK.flatten(2)[:, :, None, None].expand(B, G, R, T, -1)
        return (on_A.gather(-1, flat).unflatten(-1, index_BGSK.shape[2:]) * weight_BGSK[:, :, None, None]).sum(-1)

    def mix(self, p_BGRTS: Tensor) -> Tensor:
        """Weights summed on atoms first, then one product with the dictionary."""
        atoms_AD = self._atoms()[1].to(p_BGRTS.dtype)
        share = (p_BGRTS[..., None] * self.far["v"][:, :, None, None]).flatten(-2)
        index = self.far["v index"].long().flatten(2)[:, :, None, None].expand(share.shape)
        return p_BGRTS.new_zeros(*p_BGRTS.shape[:-1], len(atoms_AD)).scatter_add_(-1, index, share) @ atoms_AD


class CSR(Policy):
    """Keys and values behind a window of exact ones are (atom, weight) pairs, max(1, round(budget * D)) of them each.

    A layer has one dictionary for keys and one for values, which its heads share. Codes come from orthogonal matching
    pursuit; `fit` makes the dictionaries by the method of optimal directions, where the paper's NeuralDict descends the same
    error by gradients. An atom number takes 2 bytes (4 above 32768 atoms), a weight what the model's numbers take. The
    dictionaries serve every request and are not among `bytes()`; `dictionary_bytes()` says what they take.

    Args:
        recent: newest tokens that are kept exactly.
        atoms: size of each dictionary.
        rounds: of pursuit and update in `fit`.
        seed: of the rows that the atoms start from.
    """

    name = "cache/csr"
    unit = "atom of a cached key or value"
    layer = _Layer

    def __init__(self, budget: float | list[float] = 0.25, recent: int = 32, atoms: int = 256, rounds: int = 5, seed: int = 0) -> None:
        super().__init__(budget)
        self.recent, self.atoms, self.rounds = positive("recent", recent), positive("atoms", atoms), positive("rounds", rounds)
        self.seed = seed
        self.atoms_of: list[tuple[Tensor, Tensor]] = []
        """(keys', values') unit atoms [A, D] of each layer."""

    @torch.no_grad()
    def fit(self, model: nn.Module, input_ids: Tensor | Iterable[Tensor]) -> CSR:
        """Fit the dictionaries to the keys and values that the dense model makes of calibration text.

        Args:
            input_ids: [B, T], or several such.

        Raises:
            BadInput: fewer keys than atoms.
        """
        rows: list[list[list[Tensor]]] = []
        for ids in [input_ids] if isinstance(input_ids, Tensor) else input_ids:
            held = Cache()
            model(input_ids=ids, past_key_values=held, use_cache=True)
            for n, layer in enumerate(held.layers):
                if n == len(rows):
                    rows.append([[], []])
                for kind, x in enumerate((layer.keys, layer.values)):       # type: ignore[union-attr]
                    assert x is not None
                    rows[n][kind].append(x.flatten(0, 2))
        self.atoms_of = []
        for n, both in enumerate(rows):
            k, v = (torch.cat(part) for part in both)
            keep = max(1, round(self.budget_of(n) * k.shape[-1]))
            self.atoms_of.append((fit_atoms(k, self.atoms, keep, self.rounds, self.seed), fit_atoms(v, self.atoms, keep, self.rounds, self.seed)))
        return self

    def dictionary_bytes(self) -> int:
        """Bytes of the dictionaries of all layers."""
        return sum(x.numel() * x.element_size() for both in self.atoms_of for x in both)
