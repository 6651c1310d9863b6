"""End-to-end training of a dictionary (Braun et al. 2024, arXiv 2405.12241): what it gives back goes through the frozen model.

    L_e2e            = KL(p || p_spliced) + the dictionary's own sparsity                                       (eq. 2)
    L_e2e+downstream = L_e2e + downstream * sum over later sites of || a - a_spliced ||^2                        (eq. 3)

Any dictionary is trained so, with no class of its own. For a squared error over N elements, dL/dy_hat = -(2 / N) (y - y_hat),
so the residual y - y_hat is -(N / 2) dL/dy_hat; for any other loss that expression is its pseudo-residual (Friedman 2001).
The dictionary's own `loss` is given the target y_hat + pseudo-residual: the gradient of its squared error is then exactly
that of L through the model, and whatever else it looks at the residual for (AuxK's dead latents, a gate's own
reconstruction) looks at what the model wants changed. Selections, surrogate gradients, penalties and counters are its own.

Departures: KL and distances are means over tokens; each later site's distance is divided by the variance of the
original activations there in the batch (an FVU), so that one weight serves every site and model.

Shape letters: B = windows, T = tokens, S = positions left out, N = B * (T - S) rows, D = width read, E = width given back, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ..errors import BadInput, Unsupported
from ..families import config_of
from ..method import Loss, Sparse, not_negative
from ..places import known_sites, sites
from ..site import replaced
from ..streams import weights_digest
from .dictionary import Dictionary

SKIP = 1
"""Positions at the start of each window where the model keeps its own activations, as when a dictionary is judged."""


class EndToEnd(Sparse):
    """A dictionary with the model that it is trained in; `train` reads token windows (TensorStream of ids [contexts, T]).

    What is trained, checkpointed and saved is `dictionary` alone: save and judge that. The model is neither moved nor
    changed, and no gradient reaches it.

    Args:
        dictionary: any Dictionary whose loss has one squared error of one reconstruction, its part "mse".
        model: a language model in eval mode. site: stream site that is read; target: where the reconstruction goes, default the same.
        downstream: weight of the distance at later sites; 0 is e2e alone.

    Raises:
        BadInput: a model in training mode or without logits; downstream at a site with nothing after it; a dictionary
            whose loss is more than one reconstruction's error (nested prefixes, several layers).
    """

    unit = "latent"
    fitted = "trained"

    def __init__(self, dictionary: Dictionary, model: nn.Module, site: str, *, target: str = "", downstream: float = 0.0) -> None:
        super().__init__()
        self.dictionary, self.downstream = dictionary, not_negative("downstream", downstream)
        self.site = _one(model, site)
        self.target = _one(model, target) if target else self.site
        self.later = later_sites(model, self.target) if downstream else []
        if model.training:
            raise BadInput("the model is in training mode, where dropout alone would move its outputs; call model.eval() first")
        self.row_counters = tuple(f"dictionary.{name}" for name in dictionary.row_counters)  # pyright: ignore[reportAttributeAccessIssue]
        self._held, self._named = (model,), ""      # a tuple, so that the model is no part of what is trained and saved
        refuse_other_losses(dictionary)

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self._held[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """The dictionary's own, and what it is trained on; a run taken up again must agree with all of it."""
        if not self._named:
            self._named = weights_digest(self.model)
        mine = {"objective": "e2e", "model": self._named, "site": self.site, "target": self.target, "downstream": self.downstream}
        return {**self.dictionary.arguments, **mine, "dictionary": self.dictionary.name}

    @property
    def budget(self) -> float:
        """The dictionary's."""
        return self.dictionary.budget

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Scale and centre the dictionary by what flows at its sites under the first windows [B, T]."""
        seen = self._through({}, x)
        self.dictionary.initialise(self._rows(seen[self.site]), self._rows(seen[self.target]))

    def loss(self, x: Tensor, y: Tensor) -> Loss:
        """kl + downstream + the dictionary's own parts, of token windows [B, T]; `fvu` is of the true activations.

        Raises:
            BadInput: windows too short, or activations that are not finite.
        """
        if x.ndim != 2 or x.is_floating_point() or x.shape[1] <= SKIP:
            raise BadInput(f"end-to-end training reads token windows [contexts, tokens > {SKIP}]; got {list(x.shape)} {x.dtype}")
        with torch.no_grad():
            dense = self._through({}, x)
        read_ND, y_NE = (self._rows(dense[name]) for name in (self.site, self.target))
        with torch.enable_grad():                              # training selects by the batch only where gradients are on
            y_hat_NE = self.dictionary(read_ND).detach().to(read_ND.dtype)
        kl, far, pull_NE = self._pull(x, dense, y_hat_NE)
        residual_NE = -(y_hat_NE.numel() / 2) / self.dictionary.scale_out**2 * pull_NE
        own = self.dictionary.loss(read_ND, y_hat_NE + residual_NE)
        mse = own.parts["mse"]
        total = kl + far + (own.total - mse.detach())          # the value of L; its gradient is own.total's
        spread = (y_NE - y_NE.mean(0)).pow(2).sum().clamp_min(1e-12)
        parts = {"kl": kl, **({"downstream": far} if self.later else {}), **{k: v for k, v in own.parts.items() if k != "mse"}}
        return Loss(total, {**parts, "fvu": (y_NE - y_hat_NE).pow(2).sum() / spread})

    def _pull(self, ids_BT: Tensor, dense: Mapping[str, Tensor], y_hat_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL, weighted distance at later sites, and the gradient of their sum by the reconstruction [N, E]."""
        leaf_NE = y_hat_NE.requires_grad_()
        rows_BTE = leaf_NE.view(len(ids_BT), -1, leaf_NE.shape[-1])

        def put(y_BTE: Tensor) -> Tensor:
            return torch.cat([y_BTE[:, :SKIP].detach(), rows_BTE.to(y_BTE.dtype)], 1)

        with torch.enable_grad():
            there = self._through({self.target: put}, ids_BT)
            kl = kl_of_logits(dense["logits"][:, SKIP:], there["logits"][:, SKIP:])
            far = kl.new_zeros(())
            for name in self.later:
                far = far + distance(self._rows(dense[name]), self._rows(there[name]))
            far = self.downstream * far
            (pull_NE,) = torch.autograd.grad(kl + far, leaf_NE)
        return kl.detach(), far.detach(), pull_NE

    def _through(self, put: Mapping[str, Callable[[Tensor], Tensor]], ids_BT: Tensor) -> dict[str, Tensor]:
        """One pass: what flows at the sites read, given back and later, and the logits [B, T, V]."""
        got: dict[str, Tensor] = {}

        def tap(name: str) -> Callable[[Tensor], Tensor]:
            def take(value: Tensor) -> Tensor:
                got[name] = put[name](value) if name in put else value
                return got[name]

            return take

        with replaced(self.model, {name: tap(name) for name in dict.fromkeys((self.site, self.target, *self.later))}):
            more = {"use_cache": False} if hasattr(config_of(self.model), "use_cache") else {}
            out = self.model(input_ids=ids_BT.to(next(self.model.parameters()).device), **more)
        if getattr(out, "logits", None) is None:
            raise BadInput(f"a {type(self.model).__name__} gives no logits to compare; end-to-end training needs a language model with its head")
        return {**got, "logits": out.logits}

    def _rows(self, value_BTD: Tensor) -> Tensor:
        """[N, D] in the dictionary's dtype and on its device, without the positions left out."""
        like = self.dictionary.scale
        return value_BTD[:, SKIP:].flatten(0, 1).to(device=like.device, dtype=like.dtype)

    def shard(self, shards: Any) -> Sparse:
        """Unsupported: every process runs the whole model, and with it the whole dictionary."""
        raise Unsupported("a dictionary trained end to end is whole on every process; train it with shards=1")

    def before_step(self) -> None:
        """The dictionary's."""
        self.dictionary.before_step()

    def after_step(self, step: int) -> None:
        """The dictionary's."""
        self.dictionary.after_step(step)


def kl_of_logits(dense_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """KL(dense || other) in nats, mean over tokens."""
    wide = torch.promote_types(dense_BTV.dtype, torch.float32)
    log_p, log_q = dense_BTV.to(wide).log_softmax(-1), other_BTV.to(wide).log_softmax(-1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def distance(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Squared distance of rows b from rows a over a's variance."""
    return (a_ND - b_ND).pow(2).sum() / (a_ND - a_ND.mean(0)).pow(2).sum().clamp_min(1e-12)


def later_sites(model: nn.Module, site: str) -> list[str]:
    """Outputs of the layers that come after a site. Raises BadInput where there is none, or the site has no place in the table."""
    order = list(known_sites(model))
    if site not in order:
        raise BadInput(f"{site} is a raw module path, with no known place in the model; for the downstream objective give a site of `rarefy sites`")
    later = [name for name in order[order.index(site) + 1 :] if name.endswith(".resid_post")]
    if not later:
        raise BadInput(f"no layer's output comes after {site}, so there is nothing downstream to compare; use the e2e objective, or an earlier site")
    return later


def refuse_other_losses(dictionary: Dictionary) -> None:
    """Raise BadInput unless the part "mse" of the dictionary's loss is its `error` of its own reconstruction.

    Tried on a few random rows; counters and the random generator are as before afterwards.
    """
    if not isinstance(dictionary, Dictionary) or dictionary.fitted != "trained":
        name = getattr(dictionary, "name", "") or type(dictionary).__name__
        raise BadInput(f"{name} is not a dictionary that is trained; the end-to-end objective needs one")
    if len(dictionary.parts_in) > 1 or len(dictionary.parts_out) > 1 or dictionary.reads_gradients:
        kind = "reads the model's gradients" if dictionary.reads_gradients else "reads or gives back several sites"
        raise BadInput(f"{dictionary.name} {kind}; end-to-end training puts the reconstruction of one site's rows through the model")
    like, was = dictionary.scale, dictionary.training
    before = {name: buffer.clone() for name, buffer in dictionary.named_buffers()}
    made = torch.Generator().manual_seed(0)
    x_ND, y_NE = (torch.randn(8, d, generator=made).to(like) for d in (dictionary.d_in, dictionary.d_out))
    y_NE = y_NE if dictionary.transcodes else x_ND
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            expected = dictionary.train().error(dictionary(x_ND), y_NE)
            mse = dictionary.loss(x_ND, y_NE).parts.get("mse")
    except (AttributeError, RuntimeError) as error:
        raise Unsupported(f"{dictionary.name} does not read rows of one site, so it cannot be trained end to end ({error})") from None
    finally:
        dictionary.train(was)
        with torch.no_grad():
            for name, buffer in dictionary.named_buffers():
                buffer.copy_(before[name])
    if mse is None or not torch.allclose(mse, expected, rtol=1e-3, atol=1e-6):
        raise BadInput(
            f"{dictionary.name} is trained on more than the error of one reconstruction, and only that can be put through a model; "
            "use --objective local, or another method"
        )


def _one(model: nn.Module, name: str) -> str:
    """Canonical name of the one stream site that `name` means."""
    found = sites(model, name)
    if len(found) > 1:
        raise BadInput(f"{name} names {len(found)} sites; a dictionary is trained at one")
    (site,) = found.values()
    if site.kind != "stream":
        raise BadInput(f"{site.name} is a {site.kind} site; a dictionary is trained at a stream site, such as layers.0.resid_post")
    return site.name
