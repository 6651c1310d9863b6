"""Every trained dictionary written densely from its paper, with plain Adam: the oracle that training is held against.

Nothing here calls a method of the dictionary it stands beside, but for its numbers (k, weights of penalties) and the tensors it begins
with. What is shared is what every dictionary is told to share: input scale, clipping, schedule, unit-norm rows.

Shape letters: B = rows, D, E = widths, F = latents, S = layers.
"""

from __future__ import annotations

import itertools
import math

import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import one_hot

from rarefy.fit import Recipe


class Naive:
    """TopK with AuxK, and the ground of the others.

    Args:
        begun: the dictionary, begun and not yet trained, whose numbers and first tensors are taken.
    """

    unit = True
    """Whether decoder rows stay 1 long."""

    def __init__(self, begun) -> None:
        self.m, self.s = begun, begun.scale.detach().clone()
        self.p = {name: p.detach().clone().requires_grad_() for name, p in begun.named_parameters()}
        self.idle, self.step = torch.zeros(begun.width, dtype=torch.long), 0
        self.begin()

    def begin(self) -> None:
        """Further state."""

    # ------------------------------------------------------------------------------------------------ the parts of a dictionary

    @property
    def W(self) -> Tensor:
        return self.p["W_enc_FD"]

    @property
    def V(self) -> Tensor:
        return self.p["W_dec_FD"]

    @property
    def c(self) -> Tensor:
        return self.p["b_dec_D"]

    def pre(self, z: Tensor) -> Tensor:
        return (z - self.c) @ self.W.T + self.p["b_enc_F"]

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.V + self.c

    def rank(self, pre: Tensor) -> Tensor:
        """What latents are ordered by."""
        return pre

    def value(self, pre: Tensor) -> Tensor:
        """What a latent that is kept weighs."""
        return pre.relu()

    def keep(self, pre: Tensor, z: Tensor, learning: bool) -> Tensor:
        return largest(self.rank(pre), self.m.k)

    def code(self, z: Tensor, learning: bool) -> Tensor:
        pre = self.pre(z)
        return self.value(pre) * self.keep(pre, z, learning)

    def needy(self) -> Tensor:
        """[F] bool latents that explain the error."""
        return self.idle > self.m.dead_after

    def aux(self, z: Tensor, error: Tensor) -> Tensor | float:
        needy, alpha = self.needy(), getattr(self.m, "aux_alpha", 0.0)
        if not alpha or not needy.any():
            return 0.0
        pre = self.pre(z)
        on = largest(torch.where(needy, self.rank(pre), -torch.inf), min(self.m.aux_k, int(needy.sum())))
        return alpha * ((self.value(pre) * on) @ self.V - error.detach()).square().mean()

    def penalty(self, f: Tensor, z: Tensor) -> Tensor | float:
        return 0.0

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Of rows and targets in the dictionary's units."""
        f = self.code(z, True)
        y_hat = self.decode(f)
        total = (y_hat - y).square().mean() + self.penalty(f, z) + self.aux(z, y - y_hat)
        self.fired(f)
        return total

    def fired(self, f: Tensor) -> None:
        self.idle += len(f)
        self.idle[(f != 0).any(0)] = 0

    @torch.no_grad()
    def project(self) -> None:
        """After a step."""
        if self.unit:
            self.V.div_(self.V.norm(dim=1, keepdim=True))

    def tangent(self) -> None:
        """Before it: no gradient along unit rows."""
        if self.unit and self.V.grad is not None:
            self.V.grad -= (self.V.grad * self.V).sum(1, keepdim=True) * self.V

    # ------------------------------------------------------------------------------------------------------- training and use

    def train(self, batches, recipe: Recipe) -> None:
        parameters = list(self.p.values())
        adam = torch.optim.Adam(parameters, lr=recipe.lr)
        for self.step in range(recipe.steps):
            x, y = next(batches)
            adam.zero_grad()
            self.loss(*self.read(x, y)).backward()
            with torch.no_grad():
                self.tangent()
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
                for p in parameters:
                    if p.grad is not None and norm > recipe.clip:
                        p.grad *= recipe.clip / norm
                adam.param_groups[0]["lr"] = recipe.lr * recipe.rate(self.step)
                adam.step()
                self.project()
        self.step += 1

    def read(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.s, y * self.s

    @torch.no_grad()
    def use(self, x: Tensor) -> Tensor:
        """Reconstruction of rows, as outside training."""
        return self.decode(self.code(x * self.s, False)) / self.s

    @torch.no_grad()
    def rows(self) -> Tensor:
        """[F, E] directions found."""
        return self.V.detach().clone()


def largest(rank: Tensor, k: int) -> Tensor:
    """Bool: the k largest of each row."""
    return one_hot(rank.argsort(1, descending=True)[:, :k], rank.shape[1]).sum(1).bool()


def largest_of_all(rank: Tensor, count: int) -> Tensor:
    """Bool: the largest of a whole batch, if above 0."""
    on = torch.zeros(rank.numel(), dtype=torch.bool)
    on[rank.flatten().argsort(descending=True)[:count]] = True
    return on.view_as(rank) & (rank > 0)


# -------------------------------------------------------------------------------------------------------------- the TopK family


class AbsTopK(Naive):
    def rank(self, pre):
        return pre.abs()

    def value(self, pre):
        return pre


class GroupMax(Naive):
    def keep(self, pre, z, learning):
        of_group = pre.view(len(pre), self.m.k, -1)
        return one_hot(of_group.argmax(-1), of_group.shape[-1]).bool().flatten(1)


class Annealed(Naive):
    unit = False

    def keep(self, pre, z, learning):
        left = max(0.0, 1 - self.step / self.m.anneal) if learning else 0.0
        return largest(self.rank(pre), round(self.m.k + (self.m.k_begin - self.m.k) * left))

    def rank(self, pre):
        return pre * self.V.detach().norm(dim=1)


class KSparse(Annealed):
    @property
    def V(self):
        return self.W

    def pre(self, z):
        return z @ self.W.T + self.p["b_enc_F"]

    def rank(self, pre):
        return pre

    def value(self, pre):
        return pre


class TopAFA(Naive):
    def keep(self, pre, z, learning):
        score, order = (pre.relu() * self.V.norm(dim=1)).detach().sort(1, descending=True)
        norms = torch.stack([score[:, : k + 1].norm(dim=1) for k in range(score.shape[1])], 1)
        count = (norms - (z - self.c).detach().norm(dim=1, keepdim=True)).abs().argmin(1, keepdim=True) + 1
        return torch.zeros_like(pre, dtype=torch.bool).scatter(1, order, torch.arange(pre.shape[1]) < count)

    def penalty(self, f, z):
        return self.m.afa * ((f * self.V.norm(dim=1)).norm(dim=1) - (z - self.c).norm(dim=1)).square().mean()


class GradientTopK(Naive):
    def read(self, x, y):
        self.g = y[:, x.shape[1] :] * self.m.scale_gradient
        return x * self.s, y[:, : x.shape[1]] * self.s

    def keep(self, pre, z, learning):
        return largest(pre * (1 + self.m.beta * (self.g @ self.V.T).abs()) if learning else pre, self.m.k)


class NestedTopK(Naive):
    def loss(self, z, y):
        pre, total = self.pre(z), 0.0
        for k in self.m.levels:
            f = pre.relu() * largest(pre, k)
            total = total + (self.decode(f) - y).square().mean() / len(self.m.levels)
        total = total + self.aux(z, y - self.decode(f))
        self.fired(f)
        return total


class MutualFeature(Naive):
    def begin(self):
        other = Naive(self.m.others[0])
        for name in other.p:
            other.p[name] = self.p[f"others.0.{name}"]
        self.both = (self, other)

    def loss(self, z, y):
        cosine = (self.V / self.V.norm(dim=1, keepdim=True)) @ (self.both[1].V / self.both[1].V.norm(dim=1, keepdim=True)).T
        alike = (cosine.amax(1).mean() + cosine.amax(0).mean()) / 2
        return super().loss(z, y) + self.both[1].loss(z, y) + self.m.alpha * (1 - alike)

    def tangent(self):
        for one in self.both:
            Naive.tangent(one)

    def project(self):
        for one in self.both:
            Naive.project(one)


class Archetypal(Naive):
    @property
    def V(self):
        return self.p["log_scale"].exp() * (self.p["mix_FP"] @ self.m.point_PE + self.p["relax_FE"])

    def tangent(self):
        pass

    @torch.no_grad()
    def project(self):
        for mix in self.p["mix_FP"]:
            mix.clamp_(min=0).div_(mix.sum())
        for relax in self.p["relax_FE"]:
            relax.mul_(min(1.0, self.m.delta / max(float(relax.norm()), 1e-12)))


# ------------------------------------------------------------------------------------------------------- choices over a batch


class BatchTopK(Naive):
    def begin(self):
        self.tau = None

    def keep(self, pre, z, learning):
        if not learning:
            return pre > self.tau
        on = largest_of_all(pre, self.m.k * len(pre))
        least = float(pre[on].detach().min())
        self.tau = least if self.tau is None else self.m.momentum * self.tau + (1 - self.m.momentum) * least
        return on


class Matryoshka(BatchTopK):
    def loss(self, z, y):
        f = self.code(z, True)
        errors = [((f[:, :n] @ self.V[:n] + self.c) - y).square().mean() for n in self.m.prefixes]
        total = sum(errors) / len(errors) + self.aux(z, y - self.decode(f))
        self.fired(f)
        return total


class MutualChoice(BatchTopK):
    def begin(self):
        super().begin()
        self.rate = torch.full_like(self.s, self.m.k / self.m.width).repeat(self.m.width)

    def needy(self):
        order = self.rate.argsort(descending=True, stable=True)
        zipf = 1 / torch.arange(1, self.m.width + 1, dtype=torch.float64) ** self.m.exponent
        want = capped(zipf, self.m.k)
        return torch.zeros(self.m.width, dtype=torch.bool).scatter(0, order, self.rate[order] < self.m.slack * want)

    def fired(self, f):
        super().fired(f)
        self.rate = self.m.momentum * self.rate + (1 - self.m.momentum) * (f > 0).to(f).mean(0)


class FeatureChoice(BatchTopK):
    def begin(self):
        super().begin()
        self.zipf = capped(1 / torch.arange(1, self.m.width + 1, dtype=torch.float64) ** self.m.exponent, self.m.k)

    def keep(self, pre, z, learning):
        if not learning:
            return pre > torch.tensor(self.tau).to(pre)
        share, on, edges = len(pre) * self.zipf, torch.zeros_like(pre, dtype=torch.bool), []
        ticks = (share.cumsum(0) + self.step * 0.6180339887498949 % 1 + 1e-9).floor().long()
        for f, count in enumerate(ticks.diff(prepend=ticks.new_zeros(1)).tolist()):
            down = [*pre[:, f].detach().relu().sort(descending=True).values.tolist(), 0.0, 0.0]
            edge = [down[0], *((a + b) / 2 for a, b in itertools.pairwise(down))]
            n, part = int(share[f]), float(share[f] % 1)
            edges.append((1 - part) * edge[n] + part * edge[n + 1])
            on[pre[:, f].argsort(descending=True)[:count], f] = True
        self.tau = edges if self.tau is None else [self.m.momentum * a + (1 - self.m.momentum) * b for a, b in zip(self.tau, edges, strict=True)]
        return on & (pre > 0)


def capped(shape: Tensor, total: float) -> Tensor:
    """Rates in proportion to `shape`, none above 1, that add up to `total`: by bisection."""
    low, high = 0.0, total / float(shape[-1])
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * shape).clamp(max=1).sum()) < total else (low, middle)
    return (high * shape).clamp(max=1)


class CrossLayer(BatchTopK):
    unit = False                                                            # rows to all layers together are: see `project`

    def begin(self):
        super().begin()
        self.tables = [self.p[f"W_dec.{m}"] for m in range(self.m.layers)]

    def read(self, x, y):
        return x * self.s, y * self.m.scale_out

    def pre(self, z):
        parts = zip(z.chunk(self.m.layers, 1), self.W.chunk(self.m.layers), strict=True)
        return torch.cat([x @ w.T for x, w in parts], 1) + self.p["b_enc_F"]

    @property
    def V(self):
        """All a latent writes; a layer before its own gets zeros."""
        return torch.cat([torch.cat([t, t.new_zeros(self.m.width - len(t), t.shape[1])]) for t in self.tables], 1)

    @torch.no_grad()
    def tangent(self):
        grads = torch.cat([torch.cat([t.grad, t.new_zeros(self.m.width - len(t), t.shape[1])]) for t in self.tables], 1)
        along = (grads * self.V).sum(1, keepdim=True)
        for t in self.tables:
            t.grad -= along[: len(t)] * t

    @torch.no_grad()
    def project(self):
        norm = self.V.norm(dim=1, keepdim=True)
        for t in self.tables:
            t /= norm[: len(t)]

    @torch.no_grad()
    def use(self, x):
        return self.decode(self.code(x * self.s, False)) / self.m.scale_out


# ------------------------------------------------------------------------------------------------------------------ penalties


class ReLU(Naive):
    unit = False
    p_now, weight = 1.0, 1.0

    def keep(self, pre, z, learning):
        return pre > 0

    def paid(self, f):
        return f * self.V.norm(dim=1)

    def penalty(self, f, z):
        return self.m.l1 * min(1.0, self.step / self.m.warmup) * self.price(self.paid(f)) / z.shape[1]

    def price(self, paid):
        return paid.sum(1).mean()


class Gated(ReLU):
    unit = True

    def paid(self, f):
        return self.gate.relu()

    def code(self, z, learning):
        product = (z - self.c) @ self.W.T
        self.gate, size = product + self.p["b_enc_F"], product * self.p["r_mag_F"].exp() + self.p["b_mag_F"]
        return size.relu() * (self.gate > 0)

    def aux(self, z, error):
        return (self.gate.relu() @ self.V.detach() + self.c.detach() - z).square().mean()


class Annealing(ReLU):
    """p falls in a line; the weight keeps what is paid."""

    def price(self, paid):
        p, after = (1 - (1 - self.m.p_end) * min(1.0, max(0, t - self.m.hold) / self.m.anneal) for t in (self.step, self.step + 1))
        now, then = (((paid + 1e-3) ** q - math.pow(1e-3, q)).sum(1).mean() for q in (p, after))
        price, self.weight = self.weight * now, self.weight * float((now / then).detach()) if after < p else self.weight
        return price


class PAnnealed(Annealing):
    pass


class GatedPAnnealed(Annealing, Gated):
    pass


class Rectangle(torch.autograd.Function):
    """Heaviside(pre - theta), whose derivative by theta is -1/eps within eps/2."""

    @staticmethod
    def forward(ctx, pre, theta, eps):
        ctx.save_for_backward(((pre - theta).abs() < eps / 2) / -eps)
        return (pre > theta).to(pre)

    @staticmethod
    def backward(ctx, grad):
        return None, (ctx.saved_tensors[0] * grad).sum(0), None


class JumpReLU(Naive):
    def code(self, z, learning):
        pre, theta = self.pre(z).relu(), self.p["log_theta_F"].exp()
        self.on = Rectangle.apply(pre, theta, self.m.bandwidth)
        return pre * self.on.detach() + theta.detach() * (self.on - self.on.detach())     # d/dtheta is -theta / eps in the kernel (eq. 11)

    def penalty(self, f, z):
        return self.m.sparsity * min(1.0, self.step / self.m.warmup) * self.on.sum(1).mean() / z.shape[1]


# ------------------------------------------------------------------------------------------------------- solvers as encoders


class MatchingPursuit(Naive):
    def code(self, z, learning):
        left, f = z - self.c, 0.0
        for _ in range(self.m.k):
            inner = left @ self.V.T
            taken = inner * largest(inner, 1)
            left, f = left - taken @ self.V, f + taken
        return f


class OMP(Naive):
    def code(self, z, learning):
        x, atoms = (z - self.c).detach(), self.V.detach()
        support = torch.zeros(len(x), len(atoms), dtype=torch.bool)
        for row, on in zip(x, support, strict=True):
            taken, left = [], row
            for _ in range(self.m.k):
                inner = atoms @ left
                inner[taken] = -torch.inf
                if inner.max() <= 0:
                    break
                taken.append(int(inner.argmax()))
                value, _ = nnls(atoms[taken].T.double().numpy(), row.double().numpy())
                left = row - torch.from_numpy(value).to(row) @ atoms[taken]
            on[[i for i, v in zip(taken, value, strict=True) if v > 0]] = True
        gram = torch.where(support[:, None] & support[:, :, None], self.V @ self.V.T, torch.eye(len(atoms)).to(x))
        return torch.linalg.solve(gram, ((z - self.c) @ self.V.T) * support)              # least squares on the support, differentiable


class SparseCoding(Naive):
    @torch.no_grad()
    def code(self, z, learning):
        """FISTA from zero to the support, on which the code is then in closed form."""
        x, rate = z - self.c, 1 / float(torch.linalg.matrix_norm(self.V, 2)) ** 2
        f = y = torch.zeros(len(x), len(self.V)).to(x)
        for t in range(1, 401):
            new = (y - rate * ((y @ self.V - x) @ self.V.T + self.m.weight)).relu()
            f, y = new, new + (t - 1) / (t + 2) * (new - f)
        on = f > 1e-6
        gram = torch.where(on[:, None] & on[:, :, None], self.V @ self.V.T, torch.eye(len(self.V)).to(x))
        return torch.linalg.solve(gram, (x @ self.V.T - self.m.weight) * on).relu()

    def penalty(self, f, z):
        return 2 * self.m.weight * f.sum(1).mean() / z.shape[1]


ORACLES: dict[str, type[Naive]] = {
    "topk": Naive, "abs_topk": AbsTopK, "group_max": GroupMax, "annealed_topk": Annealed, "top_afa": TopAFA, "gradient_topk": GradientTopK,
    "k_sparse": KSparse, "batch_topk": BatchTopK, "cross_layer": CrossLayer, "jumprelu": JumpReLU, "matryoshka": Matryoshka,
    "nested_topk": NestedTopK, "mutual_choice": MutualChoice, "feature_choice": FeatureChoice, "matching_pursuit": MatchingPursuit,
    "archetypal": Archetypal, "mutual_feature": MutualFeature, "relu": ReLU, "gated": Gated, "p_annealed": PAnnealed,
    "gated_p_annealed": GatedPAnnealed, "sparse_coding": SparseCoding, "omp": OMP,
}
"""Catalogue name after "latents/" -> its oracle."""
