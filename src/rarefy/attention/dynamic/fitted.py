"""Methods fitted offline to what flows through attention: sums over calibration text in, buffers out.

Shape letters as in scores.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ..block import BlockAttention


class Fitted(BlockAttention):
    """A method with buffers whose sizes follow from the heads it is shown.

    A subclass names its buffers (`shapes`), says what it adds up over calibration data (`gather`) and how buffers come of the
    sums (`settle`). `heads_3` = (H, G, D) is kept beside them, so that a file says what model it fits.
    """

    fitted = "calibrated"
    heads_3: Tensor

    def __init__(self, budget: float = 0.25, block: int = 16, query_block: int = 1) -> None:
        super().__init__(budget, block, query_block)
        self.register_buffer("heads_3", torch.zeros(3, dtype=torch.long))
        self._sums: dict[str, Tensor] = {}
        self._seen_heads = (0, 0, 0)
        for name in self.shapes(0, 0, 0):
            self.register_buffer(name, torch.zeros(0))

    def shapes(self, H: int, G: int, D: int) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each fitted buffer, for H query heads and G key heads of width D."""
        raise NotImplementedError

    def gather(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Mapping[str, Tensor]:
        """Statistics of a batch that add up over batches; queries' logits are q k / sqrt(D)."""
        raise NotImplementedError

    def settle(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Buffers of the sums."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, q_BHTD: Tensor, k_BGSD: Tensor | None = None, v_BGSD: Tensor | None = None) -> None:
        """Take in attention's queries, keys and values of whole sequences, without padding."""
        if k_BGSD is None or v_BGSD is None:
            raise BadInput(f"{self.name} is fitted to queries, keys and values; give all three")
        for what, x in (("queries", q_BHTD), ("keys", k_BGSD), ("values", v_BGSD)):
            self._refuse(x, what)
        seen = (q_BHTD.shape[1], k_BGSD.shape[1], q_BHTD.shape[-1])
        if self._sums and seen != self._seen_heads:
            raise BadInput(f"{self.name} saw (query heads, key heads, width) {self._seen_heads} before and now {seen}: one method serves one layer")
        if not q_BHTD.numel():
            return
        self._seen_heads = seen
        for name, value in self.gather(q_BHTD, k_BGSD, v_BGSD).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @torch.no_grad()
    def finish(self) -> None:
        """Set the buffers."""
        if not self._sums:
            if not self.ready:
                raise BadInput(f"{self.name} saw no data; pass it through rarefy.calibrate or call observe first")
            return
        shapes = self.shapes(*self._seen_heads)
        for name, value in self.settle(self._sums).items():
            held = self._buffers[name]
            assert held is not None
            self._buffers[name] = value.reshape(shapes[name]).to(held)
        self.heads_3 = torch.tensor(self._seen_heads, device=self.heads_3.device)

    @property
    def ready(self) -> bool:
        """Whether it was fitted."""
        return bool(self.heads_3.any())

    def choose(self, q_BHTD: Tensor, k_BGSD: Tensor, causal: bool) -> Tensor:
        """[B, H, Q, N] bool. Raises BadInput before fitting, and for heads other than those it was fitted to."""
        self._fits(q_BHTD, k_BGSD)
        return super().choose(q_BHTD, k_BGSD, causal)

    def _fits(self, q_BHTD: Tensor, k_BGSD: Tensor) -> None:
        if not self.ready:
            raise BadInput(f"{self.name} is calibrated and saw no data; pass it through rarefy.calibrate first")
        given, fitted = (q_BHTD.shape[1], k_BGSD.shape[1], q_BHTD.shape[-1]), tuple(self.heads_3.tolist())
        if given != fitted:
            raise BadInput(f"{self.name} was fitted to (query heads, key heads, width) {fitted}, not {given}: one method serves one layer")

    def take_sizes(self, tensors: Mapping[str, Tensor]) -> None:
        """Buffers in the sizes of the heads that the file names; what does not fit those is refused by name."""
        heads = tensors.get("heads_3")
        if heads is not None and heads.shape == (3,) and not heads.is_floating_point():
            sizes = [int(n) for n in heads.tolist()]
            if all(0 <= n <= 1 << 16 for n in sizes):
                for name, shape in self.shapes(*sizes).items():
                    held = self._buffers[name]
                    assert held is not None
                    self._buffers[name] = held.new_empty(shape if any(sizes) else (0,))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.take_sizes({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)
