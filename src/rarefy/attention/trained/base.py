"""What trained attention shares: how a method is made for a layer, what it is given there, and how it is trained.

Made. The constructor takes the sizes it needs by name (`hidden`, `heads`, `key_heads`, `d_head`, `layer`), so that it is saved
like any method; `for_module(attention_module, **arguments)` reads them from a Hugging Face layer. `rarefy.plan("attention/nsa",
model)` does so for every layer. Parameters are drawn from `seed`.

Given. `attend` receives queries, keys and values after rotation, as every attention method does. A method that reads more names
it in `wants`: ("hidden",) brings `hidden_BTD`, what the layer was given for these T queries. What a decision needs of *keys* it
takes from keys and values, since those are all that a cache holds: so what is chosen while decoding is what prefill chose.

Trained. Both ways run through `fit.train` on a stream of token windows (`TensorStream(ids_NT, size)`), resumable, many at once:
    Distilled(plan, model): the model is frozen and runs dense; at each layer of the plan the method's `distil` compares its own
        estimate with the dense map of that layer. Only methods are trained and kept in checkpoints.
    Trained(plan, model): the model runs with the methods in place and both learn from its next-token loss (or, with
        `train_model=False`, the methods alone); forward and backward are sparse.

Shape letters: B = batch, H = query heads, G = key heads (H is a multiple of G), T = queries, S = keys, D = head width, E = hidden width.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...cost import Cost
from ...errors import BadInput, Unsupported
from ...kernels.block_attention import block_attention, blocks_of, key_lists, token_attention
from ...method import Loss, Sparse, positive
from ...selection import Selection, check_finite
from ..block import highest
from ..counted import Counted
from ..heads import real_places

SIZES = ("hidden", "heads", "key_heads", "d_head", "layer")
"""Constructor arguments that `for_module` fills in."""


def sizes_of(module: nn.Module) -> dict[str, int]:
    """SIZES of a Hugging Face attention module. Raises Unsupported where its config does not say them."""
    config = getattr(module, "config", None)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        raise Unsupported(f"a {type(module).__name__} does not tell its hidden size and heads; give the attention module of a Hugging Face model")
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    d_head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or hidden // heads
    return {"hidden": hidden, "heads": heads, "key_heads": key_heads, "d_head": d_head, "layer": getattr(module, "layer_idx", None) or 0}


def drawn(generator: torch.Generator, *shape: int, std: float) -> nn.Parameter:
    """A parameter of normal values."""
    return nn.Parameter(torch.randn(*shape, generator=generator) * std)


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """[T, S] bool: key s is not later than query t, which stands at S - T + t."""
    return torch.arange(S, device=device) <= torch.arange(S - T, S, device=device)[:, None]


def dense_map(q_BHTD: Tensor, k_BGSD: Tensor, scale: float, causal: bool) -> Tensor:
    """[B, H, T, S] softmax over all keys seen: what distillation compares with."""
    score = q_BHTD @ k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1).mT * scale
    if causal:
        score = score.masked_fill(~causal_mask(*score.shape[2:], score.device), -torch.inf)
    return score.float().softmax(-1).to(score.dtype) if score.element_size() < 4 else score.softmax(-1)


def top_share(score_BHTS: Tensor, seen_TS: Tensor, budget: float) -> Tensor:
    """[B, H, T, S] bool: of what each query sees, the budget's share with the highest scores, at least one; of equal ones the earlier."""
    keep = torch.tensor([max(1, round(budget * n)) for n in seen_TS.sum(-1).tolist()], device=score_BHTS.device)[:, None]
    return highest(score_BHTS.masked_fill(~seen_TS, -torch.inf), keep) & seen_TS


class Made(Sparse):
    """A method made for layers of one shape, with parameters of its own."""

    fitted = "trained"
    heads: int
    key_heads: int
    d_head: int

    @classmethod
    def for_module(cls, module: nn.Module, **arguments: Any) -> Self:
        """For a Hugging Face attention module, in its dtype and on its device; `arguments` are the method's own."""
        wanted, sizes = inspect.signature(cls.__init__).parameters, sizes_of(module)
        made = cls(**{**{name: sizes[name] for name in SIZES if name in wanted}, **arguments})
        like = next(module.parameters(), None)
        return made if like is None else made.to(device=like.device, dtype=like.dtype)

    def sized(self, heads: int, key_heads: int, d_head: int, seed: int) -> torch.Generator:
        """Keep the sizes; the generator that parameters are drawn from."""
        self.heads, self.key_heads, self.d_head = positive("heads", heads), positive("key_heads", key_heads), positive("d_head", d_head)
        if heads % key_heads:
            raise BadInput(f"heads={heads} must be a multiple of key_heads={key_heads}")
        return torch.Generator().manual_seed(seed)

    def refuse_other_sizes(self, q_BHTD: Tensor, k_BGSD: Tensor) -> None:
        """Raise BadInput for a layer of another shape than the method was made for, or in another dtype than its parameters."""
        got, mine = (q_BHTD.shape[1], k_BGSD.shape[1], q_BHTD.shape[3]), (self.heads, self.key_heads, self.d_head)
        if got != mine:
            words = "{} query heads, {} key heads, width {}".format
            raise BadInput(f"{self.name} was made for {words(*mine)} and is given {words(*got)}; make it with for_module of this layer")
        held = next((p.dtype for p in self.parameters()), q_BHTD.dtype)
        if held != q_BHTD.dtype and not torch.is_autocast_enabled(q_BHTD.device.type):
            raise BadInput(f"{self.name} is in {held} and its layer in {q_BHTD.dtype}: convert it with method.to({q_BHTD.dtype})")

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """Unsupported: attention is trained where it stands."""
        raise Unsupported(f"{self.name} is trained inside its model: train rarefy.attention.trained.Distilled(plan, model) or Trained(plan, model)")

    def distil(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool, hidden_BTD: Tensor | None = None) -> Loss:
        """How far the method's own estimate is from the dense attention of this layer. Unsupported where the paper trains end to end."""
        raise Unsupported(f"{self.name} has no dense map to be distilled from; train it with rarefy.attention.trained.Trained(plan, model)")


class PairAttention(Made, Counted):
    """Attention over chosen (query, key) pairs: write `choice`; `mix` (sparse) and `naive` (dense and masked) where it is not one softmax."""

    wants: ClassVar[tuple[str, ...]] = ()

    def choice(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, S] bool: pairs attended to."""
        raise NotImplementedError

    def mix(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """[B, H, T, D], computed on the mask's pairs; here one softmax over the listed keys."""
        return token_attention(q, k, v, key_lists(mask), scale=scale)

    def naive(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        """The same from whole score matrices."""
        return masked_softmax(q, k, mask, scale) @ v.repeat_interleave(self.heads // self.key_heads, 1)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, causal: bool = True,
        padding_BS: Tensor | None = None, layer: int = 0, hidden_BTD: Tensor | None = None,
    ) -> Tensor:
        """[B, H, T, D]; query t stands at position S - T + t.

        Args:
            padding_BS: True at real keys; rows are worked through without their padding, and padded queries give zeros.
        """
        self._refuse(layer, queries=q_BHTD, keys=k_BGSD, values=v_BGSD, hidden=hidden_BTD)
        self.refuse_other_sizes(q_BHTD, k_BGSD)
        if padding_BS is None:
            return self._attend(q_BHTD, k_BGSD, v_BGSD, hidden_BTD, scale, causal)
        rows = list(torch.zeros_like(q_BHTD))
        for b, keys, at in real_places(padding_BS, q_BHTD.shape[2], causal):
            hidden = None if hidden_BTD is None else hidden_BTD[b : b + 1, at]
            got = self._attend(q_BHTD[b : b + 1, :, at], k_BGSD[b : b + 1, :, keys], v_BGSD[b : b + 1, :, keys], hidden, scale, causal)
            rows[b] = rows[b].index_copy(1, at, got[0])
        return torch.stack(rows) if rows else torch.zeros_like(q_BHTD)

    def _refuse(self, layer: int | None = None, **given: Tensor | None) -> None:
        for what, x in given.items():
            if x is not None:
                check_finite(x, f"{what} of {self.name}{'' if layer is None else f' in layer {layer}'}")
        if "hidden" in self.wants and given.get("hidden") is None and "queries" in given:
            raise BadInput(f"{self.name} reads what its layer was given; pass hidden_BTD, or put it into a model with rarefy.replaced")
        hidden, mine = given.get("hidden"), self.arguments.get("hidden")
        if hidden is not None and mine is not None and hidden.shape[-1] != mine:
            raise BadInput(f"{self.name} was made for a model {mine} wide and is given one of {hidden.shape[-1]}; make it with for_module")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, causal: bool) -> Tensor:
        if not q.numel():
            return torch.zeros_like(q)
        mask = self.choice(q, k, v, hidden, scale, causal)
        self._shape = (q.shape[1], q.shape[3], k.shape[2], q.shape[2])
        self.count(mask, q.shape[2], k.shape[2], causal)
        return self.mix(mask, q, k, v, hidden, scale, causal)

    @torch.no_grad()
    def count(self, mask: Tensor, T: int, S: int, causal: bool) -> None:
        """Add to the pairs kept and the pairs visible."""
        self._kept += float(mask.sum())
        self._seen += mask.shape[0] * mask.shape[1] * (T * S - T * (T - 1) / 2 if causal else T * S)

    def select(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Selection:
        """Pairs of causal attention, mask form [B, H, T, S]."""
        self._refuse(queries=q_BHTD, keys=k_BGSD, values=v_BGSD, hidden=hidden_BTD)
        mask = self.choice(q_BHTD, k_BGSD, v_BGSD, hidden_BTD, q_BHTD.shape[3] ** -0.5, True)
        return Selection(mask.shape[-1], mask.to(q_BHTD.dtype), mask_=mask)

    def forward(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Tensor:
        """Causal attention with scale 1 / sqrt(D)."""
        return self.attend(q_BHTD, k_BGSD, v_BGSD, scale=q_BHTD.shape[3] ** -0.5, hidden_BTD=hidden_BTD)

    def reference(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, hidden_BTD: Tensor | None = None) -> Tensor:
        """Dense scores, unchosen pairs at minus infinity."""
        if not q_BHTD.numel():
            return torch.zeros_like(q_BHTD)
        scale = q_BHTD.shape[3] ** -0.5
        mask = self.choice(q_BHTD, k_BGSD, v_BGSD, hidden_BTD, scale, True)
        return self.naive(mask, q_BHTD, k_BGSD, v_BGSD, hidden_BTD, scale, True)

    def own_flops(self, heads: int, width: int, keys: float) -> float:
        """Work of choosing and gating, a query."""
        return 0.0

    def cost(self, density: float | None = None) -> Cost:
        """Per query at the context of the last call, all heads, choosing included; bytes are keys and values in float32."""
        H, D, S = self.dims()
        density = self.budget if density is None else density
        return Cost(4 * H * D * S * density + self.own_flops(H, D, S), 8 * H * D * S * density)



def masked_softmax(q_BHTD: Tensor, k_BGSD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, H, T, S] softmax over a mask's pairs, zeros in a row without any; the dense definition that `naive` is written with."""
    score = q_BHTD @ k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], 1).mT * scale
    some = mask.any(-1, keepdim=True)
    score = score.masked_fill(~mask & some, -torch.inf)
    return torch.where(mask, score.softmax(-1), score.new_zeros(()))


def near_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int, *, block: int, scale: float, causal: bool, first: int = 0) -> Tensor:
    """[B, H, T, D] attention to the keys less than `window` away and to the `first` ones, in blocks of `block`."""
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    Q, N = blocks_of(T, S, block, block)
    row, n = torch.arange(Q, device=q_BHTD.device)[:, None] + (S - T) // block, torch.arange(N, device=q_BHTD.device)
    band = ((n + 1) * block - 1 > row * block - window) & (n * block < (row + 1) * block - 1 + (1 if causal else window))
    band = band | (n * block < first) & (n <= row if causal else n >= 0)

    def near(at_q: Tensor, at_k: Tensor) -> Tensor:
        return ((at_q - at_k).abs() < window) | (at_k < first)

    return block_attention(q_BHTD, k_BGSD, v_BGSD, band[None, None], block=block, query_block=block, scale=scale, causal=causal, allowed=near)
