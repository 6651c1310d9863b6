"""FDGATII (Kulatilleke et al. 2021, arXiv 2110.11464): graph attention over edges only, in stacks that stay deep without washing nodes out.

    e_ij = a . LeakyReLU(L h_i + R h_j),   alpha_i = softmax over the edges into i,   g_i = sum_j alpha_ij R h_j      (GATv2's attention)
    s = (1 - alpha) g + alpha h_0,         h' = ReLU(theta_l s W_l + (1 - theta_l) s),   theta_l = log(lambda / l + 1)
the second line from GCNII: a share of the first features comes back in every layer, and W stays near the identity in deep ones. `form="static"`
is GAT's score, LeakyReLU(a_1 . W h_i + a_2 . W h_j), under which all nodes rank their neighbours alike. The authors' code applies a to
LeakyReLU(W h_i) beside LeakyReLU(W h_j), which adds up to a term of i and a term of j and is static as well; here it is the sum of both that
passes through LeakyReLU, as GATv2 has it.

Shape letters: V = nodes, E = edges, F = features in, W = width, H = heads, D = width of a head, C = classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from ...errors import BadInput
from ...method import fraction, not_negative, positive

FORMS = ("dynamic", "static")
SLOPE = 0.2


def edge_softmax(score_EH: Tensor, into_E: Tensor, nodes: int) -> Tensor:
    """[E, H]: exp(score) over its sum among the edges into the same node; every score counts against its node's largest."""
    at = into_E[:, None].expand_as(score_EH)
    top = score_EH.new_full((nodes, score_EH.shape[1]), -torch.inf).scatter_reduce(0, at, score_EH.detach(), "amax")
    weight = (score_EH - top[into_E]).exp()
    return weight / weight.new_zeros(nodes, weight.shape[1]).index_add(0, into_E, weight)[into_E]


class EdgeAttention(nn.Module):
    """Each node attends to the nodes that have an edge to it.

    Args:
        features: F. heads, d_head: H and D; outputs lie side by side. form: "dynamic" (GATv2) or "static" (GAT).

    Raises:
        BadInput: an unknown form; edges that are no [2, E] of whole numbers, or name a node that is not there.
    """

    def __init__(self, features: int, heads: int, d_head: int, form: str = "dynamic") -> None:
        super().__init__()
        if form not in FORMS:
            raise BadInput(f"no form {form!r}; there are {', '.join(FORMS)}")
        self.form, self.heads, self.d_head = form, positive("heads", heads), positive("d_head", d_head)
        self.ask = nn.Linear(positive("features", features), heads * d_head, bias=False)
        self.give = nn.Linear(features, heads * d_head, bias=False) if form == "dynamic" else self.ask
        self.weigh_2HD = nn.Parameter(torch.empty(2 if form == "static" else 1, heads, d_head))
        nn.init.xavier_normal_(self.weigh_2HD)

    def _sides(self, h_VF: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(side(h_VF).unflatten(-1, (self.heads, self.d_head)) for side in (self.ask, self.give))  # type: ignore[return-value]

    def _score(self, ask_HD: Tensor, give_HD: Tensor) -> Tensor:
        if self.form == "dynamic":
            return (leaky_relu(ask_HD + give_HD, SLOPE) * self.weigh_2HD[0]).sum(-1)
        return leaky_relu((ask_HD * self.weigh_2HD[0]).sum(-1) + (give_HD * self.weigh_2HD[1]).sum(-1), SLOPE)

    def forward(self, h_VF: Tensor, edges_2E: Tensor) -> Tensor:
        """[V, H D]; zeros for a node without edges.

        Args:
            edges_2E: (from, to) of every edge; an edge listed twice counts twice. Work and memory go with E, never with V^2.
        """
        source, into = checked(edges_2E, len(h_VF))
        ask, give = self._sides(h_VF)
        weight = edge_softmax(self._score(ask[into], give[source]), into, len(h_VF))
        return torch.zeros_like(give).index_add(0, into, weight[..., None] * give[source]).flatten(1)

    def reference(self, h_VF: Tensor, edges_2E: Tensor) -> Tensor:
        """What `forward` must return: all V^2 scores, those without an edge left out; for edges that are listed once."""
        source, into = checked(edges_2E, len(h_VF))
        ask, give = self._sides(h_VF)
        keep = torch.zeros(len(h_VF), len(h_VF), dtype=torch.bool, device=h_VF.device)
        keep[into, source] = True
        score = self._score(ask[:, None], give[None]).masked_fill(~keep[..., None], -torch.inf)
        weight = torch.where(keep.any(1)[:, None, None], score, 0.0).softmax(1) * keep[..., None]
        return torch.einsum("ijh,jhd->ihd", weight, give).flatten(1)


def checked(edges_2E: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """(from, to) of edges that fit."""
    if edges_2E.ndim != 2 or edges_2E.shape[0] != 2 or edges_2E.dtype != torch.long:
        raise BadInput(f"edges must be int64 [2, E], (from, to), not {edges_2E.dtype} {list(edges_2E.shape)}")
    if edges_2E.numel() and not 0 <= int(edges_2E.min()) <= int(edges_2E.max()) < nodes:
        raise BadInput(f"edges name nodes {int(edges_2E.min())} .. {int(edges_2E.max())}; there are {nodes}")
    return edges_2E[0], edges_2E[1]


class FDGATII(nn.Module):
    """A deep graph network for classes of nodes.

    Args:
        features: F. classes: C. width: W, a multiple of heads. layers: of attention.
        alpha: share of the first features in every layer; 0 leaves the initial residual out.
        lam: lambda of the identity mapping; None leaves it out (theta = 1).
        form: of the attention. With alpha=0, lam=None and form="static" this is a plain GAT with a map behind every layer.
        dropout: before every map, while training. seed: of the initial weights.
    """

    def __init__(self, features: int, classes: int, width: int = 64, layers: int = 8, heads: int = 1, alpha: float = 0.1,
                 lam: float | None = 0.5, form: str = "dynamic", dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if positive("width", width) % positive("heads", heads):
            raise BadInput(f"width {width} is no multiple of {heads} heads")
        self.alpha, self.lam = fraction("alpha", alpha) if alpha else 0.0, None if lam is None else not_negative("lam", lam)
        positive("classes", classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter, self.leave, self.drop = nn.Linear(features, width), nn.Linear(width, classes), nn.Dropout(dropout)
            self.attention = nn.ModuleList([EdgeAttention(width, heads, width // heads, form) for _ in range(positive("layers", layers))])
            self.maps = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def states(self, x_VF: Tensor, edges_2E: Tensor) -> list[Tensor]:
        """[V, W] before the first layer and behind each."""
        first = torch.relu(self.enter(self.drop(x_VF)))
        out = [first]
        for number, (attend, change) in enumerate(zip(self.attention, self.maps, strict=True), 1):
            mixed = (1 - self.alpha) * attend(self.drop(out[-1]), edges_2E) + self.alpha * first
            theta = 1.0 if self.lam is None else math.log(self.lam / number + 1)
            out.append(torch.relu(theta * change(mixed) + (1 - theta) * mixed))
        return out

    def forward(self, x_VF: Tensor, edges_2E: Tensor) -> Tensor:
        """[V, C] logits. Give every node an edge to itself where its own state shall count in the attention."""
        return self.leave(self.drop(self.states(x_VF, edges_2E)[-1]))


def spread(h_VW: Tensor) -> float:
    """How far nodes differ, 0 where all are alike: |h - mean|^2 over |h|^2, nodes added up; feature collapse drives it to 0."""
    total = float(h_VW.square().sum())
    return float((h_VW - h_VW.mean(0)).square().sum()) / total if total else 0.0
