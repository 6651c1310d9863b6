"""Transcoder adapters: what fine-tuning did to a model's MLPs, as sparse branches beside the base model's
("Transcoder Adapters for Reasoning-Model Diffing").

The adapted model is the fine-tuned one with every MLP exchanged for the base model's and a dictionary beside it,

    MLP_l(x) = MLP_base,l(x) + branch_l(x),    branch_l = dec(select(enc(x)))

and only the branches learn. With h_l what enters the fine-tuned model's MLP l, p its output distribution and q_S that of the
run in which the layers S have base and branch and the others keep their own MLP,

    L = nmse * sum_l mean_N || MLP_l(h_l) - MLP_tuned,l(h_l) ||^2 / || MLP_tuned,l(h_l) ||^2
      + kl * KL(p || q_all) + bridge * (KL(p || q_{l < s}) + KL(p || q_{l >= s})) + each branch's own sparsity,

s drawn anew each step: hybrid runs that go over from adapter to target and from target to adapter (bridging). Any dictionary
class can be the branch, as in end_to_end.py: a branch's own `loss` is given, for each run it took part in, what it gave plus
the pseudo-residual of L there, so that the gradient of its squared error is that of L through the later layers, their branches
among them, while selections, surrogate gradients, penalties and counters stay its own.

Departures: one switch a hybrid run; the squared error is normalised row by row, so that the first token's huge activations
weigh no more than another's.

Shape letters: B = windows, T = tokens, N = B * T rows, D = width of the stream, F = latents of a branch, V = vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, Unsupported
from ..method import Loss, Sparse, not_negative
from ..places import all_sites
from ..selection import Selection
from ..site import replaced
from ..streams import weights_digest
from .dictionary import Dictionary
from .end_to_end import kl_of_logits, refuse_other_losses

_SMALL = 0.1
"""Of the encoder as it is drawn: what a branch gives at first is small beside what the MLP gives."""


class Adapters(Sparse):
    """The branches with the two models they are trained between; `train` reads token windows (TensorStream of ids [contexts, T]).

    What is trained and checkpointed is `branches` alone, one a layer: save each with `rarefy.save`, put them in with
    `adapted`. The models are neither moved nor changed, and no gradient reaches them. A branch counts the rows of every run
    that it takes part in, at most three a step (`dead_after`).

    Args:
        branches: a transcoder (d_out given) for each layer, that reads and writes rows of the stream's width.
        base, tuned: models in eval mode of one architecture.
        nmse, kl, bridge: weights of the parts of the loss; a part of weight 0 is not computed.

    Raises:
        BadInput: models or branches that do not fit each other, models in training mode, a branch whose loss is more than one
            reconstruction's error, no part with a weight.
        Unsupported: an architecture whose MLP is not one module.
    """

    unit = "latent"
    fitted = "trained"

    def __init__(
        self, branches: Sequence[Dictionary], base: nn.Module, tuned: nn.Module, *, nmse: float = 1.0, kl: float = 1.0, bridge: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = {"nmse": not_negative("nmse", nmse), "kl": not_negative("kl", kl), "bridge": not_negative("bridge", bridge)}
        if not any(self.weights.values()):
            raise BadInput("nmse, kl and bridge are all 0, so there is nothing to learn; give one of them a weight")
        _refuse_misfits(branches, base, tuned)
        for branch in branches:
            refuse_other_losses(branch)
        self.branches = nn.ModuleList(branches)
        self.row_counters = tuple(f"branches.{n}.{name}" for n, b in enumerate(branches) for name in b.row_counters)  # pyright: ignore[reportAttributeAccessIssue]
        self._held, self._named = (base, tuned), ("", "")      # a tuple, so that the models are no part of what is trained and saved

    @property
    def base(self) -> nn.Module:
        """The frozen base model."""
        return self._held[0]

    @property
    def tuned(self) -> nn.Module:
        """The frozen fine-tuned model."""
        return self._held[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """The branches' own, and what they are trained on; a run taken up again must agree with all of it."""
        if not all(self._named):
            self._named = tuple(weights_digest(m) for m in self._held)
        own = [{"dictionary": b.name, **b.arguments} for b in self._all()]
        return {"base": self._named[0], "tuned": self._named[1], **self.weights, "branches": own, "width": own[0]["width"]}

    @property
    def budget(self) -> float:
        """The branches' mean."""
        return sum(b.budget for b in self._all()) / len(self.branches)

    def _all(self) -> list[Dictionary]:
        return list(self.branches)  # type: ignore[arg-type]

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale each branch by what enters and leaves the fine-tuned MLP under the first windows [B, T], so that one weight of
        a penalty means the same at layers that changed much and at layers that changed little. A branch begins small: near the base model."""
        read, made, _ = self._dense(x)
        for branch, x_BTD, y_BTD in zip(self._all(), read, made, strict=True):
            branch.initialise(_rows(branch, x_BTD), _rows(branch, y_BTD))
            branch.b_dec_D.zero_()
            if not branch.tied:
                branch.W_enc_FD.mul_(_SMALL)

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """nmse + kl + bridge + sparsity of token windows [B, T]; `l0` is active latents a token and layer, over all runs.

        Raises:
            BadInput: no windows of token ids, or activations that are not finite.
        """
        if x.ndim != 2 or x.is_floating_point():
            raise BadInput(f"adapters are trained on token windows [contexts, tokens]; got {list(x.shape)} {x.dtype}")
        with torch.no_grad():
            read, made, logits_BTV = self._dense(x)
        used: list[list[_Use]] = [[] for _ in self.branches]
        parts: dict[str, Tensor] = {}
        if self.weights["nmse"]:
            parts["nmse"] = self._local(read, made, used)
        runs = [("kl", range(len(self.branches)))] if self.weights["kl"] else []
        if self.weights["bridge"] and len(self.branches) > 1:
            switch = int(torch.randint(1, len(self.branches), ()))
            runs += [("bridge", range(switch)), ("bridge", range(switch, len(self.branches)))]
        for part, layers in runs:
            value = self._through(x, logits_BTV, self.weights[part], layers, used)
            parts[part] = parts[part] + value if part in parts else value
        total, own, l0 = sum(parts.values(), logits_BTV.new_zeros(())), [], []
        for branch, uses in zip(self._all(), used, strict=True):
            for use in uses:
                learnt = branch.loss(use.x_ND, use.target(branch, len(uses)))
                own.append((learnt.total - learnt.parts["mse"].detach()) / len(uses))
                l0.append(learnt.parts.get("l0", torch.zeros(())))
        sparsity = torch.stack(own).sum()                      # its gradient is that of L whole, its value that of the penalties
        return Loss(total + sparsity, {**parts, "sparsity": sparsity.detach(), "l0": torch.stack(l0).mean()})

    def _dense(self, ids_BT: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What enters and leaves each MLP of the fine-tuned model [B, T, D], and its logits [B, T, V]."""
        read, made = ({} for _ in range(2))
        plan = {f"layers.{n}.mlp.{side}": _note(got, n) for n in range(len(self.branches)) for side, got in (("in", read), ("out", made))}
        with replaced(self.tuned, plan):
            logits_BTV = _logits(self.tuned, ids_BT)
        return list(read.values()), list(made.values()), logits_BTV

    def _local(self, read: list[Tensor], made: list[Tensor], used: list[list[_Use]]) -> Tensor:
        """Normalised error of each layer at the fine-tuned model's own activations, weighted, summed over layers."""
        parts = []
        for branch, mlp, x_BTD, y_BTD, uses in zip(self._all(), _mlps(self.base), read, made, used, strict=True):
            with torch.no_grad():
                rest_ND = _rows(branch, y_BTD - _first(mlp(x_BTD.to(next(mlp.parameters())))).to(y_BTD))
            x_ND, y_ND = _rows(branch, x_BTD), _rows(branch, y_BTD)
            with torch.enable_grad():                          # training selects by the batch only where gradients are on
                leaf_ND = branch(x_ND).detach().to(x_ND.dtype).requires_grad_()
                error_N = (leaf_ND - rest_ND).pow(2).sum(-1) / y_ND.pow(2).sum(-1).clamp_min(1e-12)
                part = self.weights["nmse"] * error_N.mean()
                (pull_ND,) = torch.autograd.grad(part, leaf_ND)
            uses.append(_Use(x_ND, leaf_ND.detach(), pull_ND))
            parts.append(part.detach())
        return torch.stack(parts).sum()

    def _through(self, ids_BT: Tensor, dense_BTV: Tensor, weight: float, layers: range, used: list[list[_Use]]) -> Tensor:
        """Weighted KL of the run with base and branch at `layers`; notes what L asks of the branch of each."""
        taken: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def beside(n: int, x_ND: Tensor) -> Tensor:
            y_ND = self._all()[n](x_ND).to(x_ND.dtype)
            leaf_ND = torch.zeros_like(y_ND, requires_grad=True)   # y keeps its path to x: earlier branches are pulled through later ones
            taken[n] = (x_ND.detach(), y_ND.detach(), leaf_ND)
            return y_ND + leaf_ND

        with torch.enable_grad(), _spliced(self.tuned, self.base, {n: self._all()[n] for n in layers}, beside):
            part = weight * kl_of_logits(dense_BTV, _logits(self.tuned, ids_BT))
            pulls = torch.autograd.grad(part, [leaf for *_, leaf in taken.values()])
        for (n, (x_ND, y_ND, _)), pull_ND in zip(taken.items(), pulls, strict=True):
            used[n].append(_Use(x_ND, y_ND, pull_ND))
        return part.detach()

    @torch.no_grad()
    def codes(self, ids_BT: Tensor) -> list[Selection]:
        """What each layer's branch selects [B, T, ...] when the adapted model reads token windows."""
        seen: dict[int, Selection] = {}

        def beside(n: int, x_ND: Tensor) -> Tensor:
            chosen = self._all()[n].select(x_ND)
            at = [None if t is None else t.unflatten(0, tuple(ids_BT.shape)) for t in (chosen.weight, chosen.index, chosen.mask_)]
            seen[n] = Selection(chosen.n, at[0], index=at[1], mask_=at[2])  # type: ignore[arg-type]
            return self._all()[n](x_ND)

        with _spliced(self.tuned, self.base, dict(enumerate(self._all())), beside):
            _logits(self.tuned, ids_BT)
        return [seen[n] for n in range(len(self.branches))]

    def shard(self, shards: Any) -> Sparse:
        """Unsupported: every process runs the whole model, and with it all branches."""
        raise Unsupported("adapters are whole on every process; train them with shards=1")

    def before_step(self) -> None:
        """The branches'."""
        for branch in self._all():
            branch.before_step()

    def after_step(self, step: int) -> None:
        """The branches'."""
        for branch in self._all():
            branch.after_step(step)


class _Use:
    """What a branch read and gave in one run, and the gradient of L by what it gave; each [N, D]."""

    def __init__(self, x_ND: Tensor, y_ND: Tensor, pull_ND: Tensor) -> None:
        self.x_ND, self.y_ND, self.pull_ND = x_ND, y_ND, pull_ND

    def target(self, branch: Dictionary, runs: int) -> Tensor:
        """That of which the squared error, a mean over elements and then over `runs`, has L's gradient."""
        return self.y_ND - runs * self.pull_ND.numel() / 2 / branch.scale_out**2 * self.pull_ND


@contextlib.contextmanager
def adapted(
    tuned: nn.Module, base: nn.Module, branches: Sequence[Dictionary], *, off: Mapping[int, Collection[int]] | None = None,
) -> Iterator[nn.Module]:
    """Exchange the fine-tuned model's MLPs for the base model's with their branches for the length of a `with` block.

    Args:
        off: layer -> latents that are held at zero there.

    Raises:
        BadInput: models or branches that do not fit each other, or a latent that is not there.
    """
    _refuse_misfits(branches, base, tuned)
    gone = {n: torch.zeros(b.width, dtype=torch.bool, device=b.b_enc_F.device) for n, b in enumerate(branches)}
    for n, latents in (off or {}).items():
        if n not in gone or any(not 0 <= f < branches[n].width for f in latents):
            raise BadInput(f"off names {sorted(latents)[:8]} of layer {n}; there are {len(branches)} layers of {branches[0].width} latents")
        gone[n][list(latents)] = True

    def beside(n: int, x_ND: Tensor) -> Tensor:
        branch, chosen = branches[n], branches[n].select(x_ND)
        weight = chosen.weight.masked_fill(gone[n] if chosen.index is None else gone[n][chosen.index], 0)
        return branch.beside(branch.decode(Selection(chosen.n, weight, index=chosen.index, mask_=chosen.mask_)), x_ND)

    with _spliced(tuned, base, dict(enumerate(branches)), beside):
        yield tuned


@contextlib.contextmanager
def _spliced(
    tuned: nn.Module, base: nn.Module, branches: Mapping[int, Dictionary], beside: Callable[[int, Tensor], Tensor],
) -> Iterator[None]:
    """The fine-tuned model with base MLP and `beside(layer, rows [N, D])` at the layers of `branches`."""
    mlps, read, plan = _mlps(base), {}, {}

    def put(n: int) -> Callable[[Tensor], Tensor]:
        def at(y_BTD: Tensor) -> Tensor:
            x_BTD, mlp = read.pop(n), mlps[n]
            from_base = _first(mlp(x_BTD.to(next(mlp.parameters())))).to(y_BTD)
            return from_base + beside(n, _rows(branches[n], x_BTD)).view(y_BTD.shape).to(y_BTD)

        return at

    for n in branches:
        plan |= {f"layers.{n}.mlp.in": _note(read, n), f"layers.{n}.mlp.out": put(n)}
    with replaced(tuned, plan):
        yield


def _note(got: dict[int, Tensor], n: int) -> Callable[[Tensor], Tensor]:
    def take(value: Tensor) -> Tensor:
        got[n] = value
        return value

    return take


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _rows(branch: Dictionary, value_BTD: Tensor) -> Tensor:
    """[N, D] in the branch's dtype and on its device."""
    return value_BTD.flatten(0, 1).to(branch.scale)


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    out = model(input_ids=ids_BT.to(next(model.parameters()).device), **more)
    if getattr(out, "logits", None) is None:
        raise BadInput(f"a {type(model).__name__} gives no logits to compare; adapters need a language model with its head")
    return out.logits


def _mlps(model: nn.Module) -> list[nn.Module]:
    """The MLP of each layer. Raises Unsupported where it is not one module."""
    known, found = all_sites(model), []
    while (start := known.get(f"layers.{len(found)}.mlp.in")) is not None:
        end = known[f"layers.{len(found)}.mlp.out"]
        if start.module_path != end.module_path:
            raise Unsupported(f"the MLPs of a {type(model).__name__} are not one module each ({start.module_path} to {end.module_path})")
        found.append(model.get_submodule(start.module_path))
    return found


def _refuse_misfits(branches: Sequence[Dictionary], base: nn.Module, tuned: nn.Module) -> None:
    """Raise BadInput unless models and branches fit each other."""
    widths = [(len(_mlps(m)), all_sites(m)["layers.0.mlp.in"].d) for m in (base, tuned)]
    if widths[0] != widths[1]:
        (a, b), (c, d) = widths
        raise BadInput(f"the base model has {a} layers of width {b} and the fine-tuned one {c} of {d}; give two models of one architecture")
    for what, model in (("base", base), ("fine-tuned", tuned)):
        if model.training:
            raise BadInput(f"the {what} model is in training mode, where dropout alone would move its outputs; call model.eval() first")
    layers, width = widths[0]
    if len(branches) != layers:
        raise BadInput(f"{len(branches)} branches for {layers} layers; give one for each")
    for n, branch in enumerate(branches):
        if not isinstance(branch, Dictionary) or not branch.transcodes or (branch.d_in, branch.d_out) != (width, width):
            raise BadInput(f"the branch of layer {n} must be a transcoder of rows of {width} to rows of {width}: give d_in={width}, d_out={width}")
