"""Circuits of transcoder latents (Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits", arXiv 2406.11944, sec. 4).

A latent j of layer m reads x = gain * r * stream, r the norm's scale at that token, and an earlier latent i wrote value_i * W_dec,i
into that stream, so that the edge between them splits into what depends on the input and what does not,

    value_i(t) * r_m(t) * w_ij,        w_ij = W_dec,i / scale_out . (gain_m * scale * W_enc,j)                  (eqs. 7 to 9)

An attention head h with its pattern A held hands a direction u at token t on to token s as A[h, t, s] gain r(s) W_V^T W_O^T u.
With patterns and norms' scales held everything from a latent's input back to the embedding is linear, and its pre-activation is,
without remainder, the sum of what all earlier latents, all MLP outputs that no latent explains, the embeddings and the biases give it.

Shape letters: T = tokens, S = source tokens, D = width of the stream, F = latents of a layer, M = pairs of token and latent,
L = layers, H = heads, G = key heads, C = width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput, Unsupported
from ..families import family_of
from ..latents.dictionary import Dictionary
from ..latents.head_attribution import _Patterns
from ..method import positive
from ..places import all_sites
from ..site import capture, replaced


@dataclass(frozen=True)
class Edge:
    """One source of a latent's pre-activation."""

    kind: str
    """latent, error (what a layer's MLP writes that no latent explains), embedding; in a path also head."""
    layer: int
    """-1 for the embedding."""
    token: int
    """Where the source is read; of a head, the token that it attends to."""
    index: int
    """Number of the latent or head; -1 where there is none."""
    value: float
    """What it gives; in a path, what it gives the path's target through all steps between."""


@dataclass(frozen=True)
class Path:
    """Sources of sources, from the latent asked about (its pre-activation) backwards."""

    steps: tuple[Edge, ...]

    @property
    def value(self) -> float:
        """What the last step gives the first through those between."""
        return self.steps[-1].value


@dataclass(frozen=True)
class Edges:
    """A latent's pre-activation at a token as a sum over sources, each through all ways that lead there by attention alone."""

    latent_LM: dict[int, tuple[Tensor, Tensor, Tensor]]
    """Layer -> (token [M], latent [M], what it gives [M]) of each latent of an earlier layer that gives anything."""
    error_LT: Tensor
    embedding_T: Tensor
    bias: Tensor
    """Of the latent, of decoders and of attention."""
    pre: Tensor
    """The pre-activation as the dictionary computes it."""

    @property
    def total(self) -> Tensor:
        """Sum of all parts: `pre`, up to rounding."""
        return sum((v.sum() for *_, v in self.latent_LM.values()), self.error_LT.sum() + self.embedding_T.sum() + self.bias)

    def strongest(self, count: int = 10) -> list[Edge]:
        """Largest by absolute value, over latents, errors and embeddings."""
        found = [Edge("latent", n, t, f, v) for n, kept in self.latent_LM.items() for t, f, v in zip(*(k.tolist() for k in kept), strict=True)]
        found += [Edge("error", n, t, -1, v) for n, row in enumerate(self.error_LT.tolist()) for t, v in enumerate(row) if v]
        found += [Edge("embedding", -1, t, -1, v) for t, v in enumerate(self.embedding_T.tolist()) if v]
        return sorted(found, key=lambda edge: -abs(edge.value))[: positive("count", count)]


class Trace:
    """One prompt's pass through a model of Llama's family with its transcoders beside it, and everything held that makes it linear.

    The model's own MLPs run; what they write is split into latents, decoder biases and errors.

    Args:
        transcoders: layer -> transcoder from layers.N.mlp.in to layers.N.mlp.out. A layer without one is all error.
        ids_T: token ids of one prompt.

    Raises:
        BadInput: token ids of another shape, a layer that is not there, a dictionary that is no transcoder of the stream's width.
        Unsupported: another family, sliding windows, a norm that is no rescaling, or latents whose value is not their
            pre-activation (gated).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, transcoders: Mapping[int, Dictionary], ids_T: Tensor) -> None:
        self.maps = maps(model)
        self.transcoders = dict(transcoders)
        _refuse_misfits(self.transcoders, self.maps)
        if ids_T.ndim != 1 or ids_T.is_floating_point() or not len(ids_T):
            raise BadInput(f"a trace is of the token ids of one prompt, [tokens]; got {list(ids_T.shape)} {ids_T.dtype}")
        here, layers = next(model.parameters()).device, range(len(self.maps))
        seen = [_Patterns() for _ in layers]
        names = [f"layers.{n}.{place}" for n in layers for place in ("resid_pre", "resid_mid", "attn.in", "mlp.in", "mlp.out")]
        with replaced(model, {f"layers.{n}.attn": seen[n] for n in layers}):
            got = {k: v[0] for k, v in capture(model, names, input_ids=ids_T[None].to(here)).items()}
        self.pattern_LHTS = [p.pattern[0] for p in seen]
        self.embedding_TD = got["layers.0.resid_pre"]
        self.heard_LTD = [got[f"layers.{n}.attn.in"] for n in layers]
        self.read_LTD = [got[f"layers.{n}.mlp.in"] for n in layers]
        self.attn_scale_LT = [_held(got[f"layers.{n}.resid_pre"], self.heard_LTD[n], self.maps[n].attn_gain_D) for n in layers]
        self.mlp_scale_LT = [_held(got[f"layers.{n}.resid_mid"], self.read_LTD[n], self.maps[n].mlp_gain_D) for n in layers]
        self.code_LTF: dict[int, Tensor] = {}
        self.error_LTD = [got[f"layers.{n}.mlp.out"] for n in layers]
        for n, transcoder in self.transcoders.items():
            self.code_LTF[n] = _codes(transcoder, self.read_LTD[n].to(transcoder.scale)).to(self.embedding_TD)
            always_D = (transcoder.b_dec_D / transcoder.scale_out).to(self.embedding_TD)
            self.error_LTD[n] = self.error_LTD[n] - self.code_LTF[n] @ _writes(transcoder).to(self.embedding_TD) - always_D

    def place(self, layer: int, latent: int, token: int) -> None:
        """Raise BadInput unless such a latent and token are there."""
        if layer not in self.transcoders:
            raise BadInput(f"layer {layer} has no transcoder; those given are of layers {sorted(self.transcoders)}")
        for name, value, most in (("latent", latent, self.transcoders[layer].width), ("token", token, len(self.embedding_TD))):
            if not 0 <= value < most:
                raise BadInput(f"{name}={value} must be in 0..{most - 1}")

    def asks(self, layer: int, latent: int, token: int) -> Tensor:
        """[D] the direction of the stream before a layer's MLP along which a latent's pre-activation grows."""
        return self.mlp_scale_LT[layer][token] * _reads(self.transcoders[layer], self.maps[layer], latent).to(self.embedding_TD)

    def back(self, layer: int, u_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(directions [S, D] of the stream before a layer that its attention turns into directions `u_TD` after it, what its biases give)."""
        own = self.maps[layer]
        u_THC = (u_TD @ own.W_O_DHC.flatten(1)).unflatten(-1, own.W_O_DHC.shape[1:])
        u_SHC = torch.einsum("hts,thc->shc", self.pattern_LHTS[layer], u_THC)
        u_SGC = u_SHC.unflatten(1, (own.W_V_GCD.shape[0], -1)).sum(2)
        bias = (u_SGC * own.b_V_GC).sum() + (u_TD * own.b_O_D).sum()
        return torch.einsum("sgc,gcd->sd", u_SGC, own.W_V_GCD) * own.attn_gain_D * self.attn_scale_LT[layer][:, None], bias


@dataclass(frozen=True)
class Maps:
    """The linear maps of a layer that lie between latents."""

    attn_gain_D: Tensor
    mlp_gain_D: Tensor
    W_V_GCD: Tensor
    b_V_GC: Tensor
    W_O_DHC: Tensor
    b_O_D: Tensor


@torch.no_grad()
def invariant_edges(model: nn.Module, transcoders: Mapping[int, Dictionary], layer: int, latent: int) -> dict[int, Tensor]:
    """w_ij of every latent i of each earlier layer into one latent, at the same token through the residual stream: layer -> [F].

    The same for every input: at a token where latent i has value v and the norm before the reading MLP the scale r, it gives v * r * w_ij.

    Raises:
        BadInput, Unsupported: as for Trace.
    """
    layers = maps(model)
    _refuse_misfits(transcoders, layers)
    if layer not in transcoders or not 0 <= latent < transcoders[layer].width:
        raise BadInput(f"there is no latent {latent} of layer {layer}; transcoders are given for layers {sorted(transcoders)}")
    reads_D = _reads(transcoders[layer], layers[layer], latent)
    return {n: _writes(transcoders[n]).to(reads_D) @ reads_D for n in sorted(transcoders) if n < layer}


@torch.no_grad()
def edges(trace: Trace, layer: int, latent: int, token: int) -> Edges:
    """Split the pre-activation of a latent at a token over all that comes before it.

    Raises:
        BadInput: no such layer, latent or token.
    """
    trace.place(layer, latent, token)
    transcoder, like = trace.transcoders[layer], trace.embedding_TD
    u_TD = torch.zeros_like(like)
    u_TD[token] = trace.asks(layer, latent, token)
    bias, found, error_LT = transcoder.b_enc_F.detach()[latent].to(like), {}, like.new_zeros(len(trace.maps), len(like))
    for n in range(layer, -1, -1):
        if n < layer:                                           # u is of the stream after layer n
            error_LT[n] = (trace.error_LTD[n] * u_TD).sum(-1)
            if n in trace.transcoders:
                own, code_TF = trace.transcoders[n], trace.code_LTF[n]
                gives_TF = code_TF * (u_TD @ _writes(own).to(like).T)
                at_M, latent_M = gives_TF.nonzero().unbind(-1)
                found[n] = (at_M, latent_M, gives_TF[at_M, latent_M])
                bias = bias + (u_TD @ (own.b_dec_D / own.scale_out).detach().to(like)).sum()
        through_TD, more = trace.back(n, u_TD)
        u_TD, bias = u_TD + through_TD, bias + more
    pre = transcoder.pre_activations(trace.read_LTD[layer][token].to(transcoder.scale))[latent]
    return Edges(dict(sorted(found.items())), error_LT, (u_TD * like).sum(-1), bias, pre)


@dataclass(frozen=True)
class _Open:
    """A path with the direction that its last step asks of the stream at a token, after the attention of `heads` and the MLPs of `mlps` layers."""

    steps: tuple[Edge, ...]
    u_D: Tensor
    token: int
    heads: int
    mlps: int


@torch.no_grad()
def paths(trace: Trace, layer: int, latent: int, token: int, *, width: int = 10, depth: int = 4) -> list[Path]:
    """Strongest paths into a latent at a token, found greedily: of all paths, each extended by its `width` largest sources, the `width`
    largest are kept, `depth` times (sec. 4.2). A source is a latent, a head at one token, an embedding or an error at the same token.

    A path ends at an embedding or an error, or where `depth` does. What a step gives is a part of what the step before it gives; biases
    make up the rest. Largest first.

    Raises:
        BadInput: no such layer, latent or token; width or depth out of range.
    """
    trace.place(layer, latent, token)
    width, depth = positive("width", width), positive("depth", depth)
    transcoder = trace.transcoders[layer]
    pre = float(transcoder.pre_activations(trace.read_LTD[layer][token].to(transcoder.scale))[latent])
    kept: list[Path | _Open] = [
        _Open((Edge("latent", layer, token, latent, pre),), trace.asks(layer, latent, token), token, layer + 1, layer)
    ]
    for _ in range(depth):
        longer: list[Path | _Open] = []
        for path in kept:
            longer += [path] if isinstance(path, Path) else [_onward(trace, path, edge) for edge in _sources(trace, path, width)]
        kept = sorted(longer, key=lambda path: -abs(path.steps[-1].value))[:width]
    return [Path(path.steps) for path in kept]


def _sources(trace: Trace, path: _Open, count: int) -> list[Edge]:
    """Largest sources of what a path asks of the stream."""
    t, u_D, found = path.token, path.u_D, []

    def take(kind: str, layer: int, value_AS: Tensor, token: int = -1) -> None:
        """Of values by number and token read, or of one token."""
        at = value_AS.flatten().abs().topk(min(count, value_AS.numel())).indices
        for i, v in zip(at.tolist(), value_AS.flatten()[at].tolist(), strict=True):
            index, source = divmod(i, value_AS.shape[-1])
            if v:
                found.append(Edge(kind, layer, source if token < 0 else token, index if kind in ("latent", "head") else -1, v))

    take("embedding", -1, (trace.embedding_TD[t] @ u_D).view(1, 1), t)
    for n in range(path.mlps):
        take("error", n, (trace.error_LTD[n][t] @ u_D).view(1, 1), t)
        if n in trace.transcoders:
            take("latent", n, (trace.code_LTF[n][t] * (_writes(trace.transcoders[n]).to(u_D) @ u_D))[:, None], t)
    for n in range(path.heads):
        u_HC, u_HD = _through_heads(trace.maps[n], u_D)
        b_HC = trace.maps[n].b_V_GC.repeat_interleave(len(u_HC) // len(trace.maps[n].b_V_GC), 0)
        take("head", n, trace.pattern_LHTS[n][:, t] * (u_HD @ trace.heard_LTD[n].T + (u_HC * b_HC).sum(-1, keepdim=True)))
    return sorted(found, key=lambda edge: -abs(edge.value))[:count]


def _onward(trace: Trace, path: _Open, edge: Edge) -> Path | _Open:
    """The path with one more step."""
    steps, n = (*path.steps, edge), edge.layer
    if edge.kind == "latent":
        gives = _writes(trace.transcoders[n])[edge.index].to(path.u_D) @ path.u_D
        return _Open(steps, gives * trace.asks(n, edge.index, path.token), path.token, n + 1, n)
    if edge.kind == "head":
        _, u_HD = _through_heads(trace.maps[n], path.u_D)
        held = trace.pattern_LHTS[n][edge.index, path.token, edge.token] * trace.attn_scale_LT[n][edge.token]
        return _Open(steps, held * trace.maps[n].attn_gain_D * u_HD[edge.index], edge.token, n, n)
    return Path(steps)


def _through_heads(own: Maps, u_D: Tensor) -> tuple[Tensor, Tensor]:
    """(W_O,h^T u [H, C], W_V,h^T W_O,h^T u [H, D]): what a direction asks of each head's values, and of what it reads."""
    u_HC = torch.einsum("dhc,d->hc", own.W_O_DHC, u_D)
    return u_HC, torch.einsum("gkc,gcd->gkd", u_HC.unflatten(0, (len(own.W_V_GCD), -1)), own.W_V_GCD).flatten(0, 1)


def _held(before_TD: Tensor, after_TD: Tensor, gain_D: Tensor) -> Tensor:
    """[T] by how much a norm scaled each token. Raises Unsupported where that and its gain are not all it did."""
    turned_TD = before_TD * gain_D
    scale_T = (after_TD * turned_TD).sum(-1) / turned_TD.pow(2).sum(-1).clamp_min(1e-30)
    if ((after_TD - scale_T[:, None] * turned_TD).abs() > 1e-2 * after_TD.abs().amax(-1, keepdim=True)).any():
        raise Unsupported("a norm of this model does more than scale the stream and its channels; edges are linear only where it does not")
    return scale_T


def _codes(transcoder: Dictionary, x_TD: Tensor) -> Tensor:
    """[T, F] latents' values. Raises Unsupported where an active one's is not its pre-activation."""
    code_TF, pre_TF = transcoder.select(x_TD).dense, transcoder.pre_activations(x_TD)
    if ((code_TF != 0) & ((code_TF - pre_TF).abs() > 1e-3 * (1 + pre_TF.abs()))).any():
        raise Unsupported(f"the value of a latent of {transcoder.name} is not its pre-activation, so edges into it do not sum to it")
    return code_TF


def _writes(transcoder: Dictionary) -> Tensor:
    """[F, D] what a latent of value 1 writes into the stream."""
    return transcoder.W_dec_FD.detach() / transcoder.scale_out


def _reads(transcoder: Dictionary, own: Maps, latent: int) -> Tensor:
    """[D] a latent's encoder row with the norm's gain and the input's scale, in the dictionary's dtype."""
    row_D = transcoder.W_enc_FD.detach()[latent] * transcoder.scale
    return row_D * own.mlp_gain_D.to(row_D)


def maps(model: nn.Module) -> list[Maps]:
    """The linear maps of each layer of a model of Llama's family. Raises Unsupported for others."""
    family, found = family_of(model), []
    if family.name != "llama":
        raise Unsupported(f"circuits are traced through models of Llama's family (llama, mistral, qwen2, qwen3, gemma), not through {family.name}")
    known = all_sites(model)
    while (site := known.get(f"layers.{len(found)}.resid_pre")) is not None:
        layer = model.get_submodule(site.module_path)
        v, o = (layer.get_submodule(family.linears[name]) for name in ("v_proj", "o_proj"))
        C = layer.get_submodule(family.attn).head_dim
        W_O_DHC = o.weight.detach().unflatten(1, (-1, C))  # type: ignore[union-attr,operator]
        W_V_GCD = v.weight.detach().unflatten(0, (-1, C))  # type: ignore[union-attr,operator]
        b_V = torch.zeros_like(W_V_GCD[..., 0]) if v.bias is None else v.bias.detach().view(W_V_GCD.shape[:2])  # type: ignore[union-attr,operator]
        b_O = torch.zeros_like(W_O_DHC[:, 0, 0]) if o.bias is None else o.bias.detach()  # type: ignore[union-attr,operator]
        before, between = (_gain(layer.get_submodule(name), site.d) for name in ("input_layernorm", "post_attention_layernorm"))
        found.append(Maps(before, between, W_V_GCD, b_V, W_O_DHC, b_O))
    return found


@torch.no_grad()
def _gain(norm: nn.Module, width: int) -> Tensor:
    """[D] a norm's factors on the channels: what it makes of a row of ones, whose scale is 1 but for epsilon."""
    return norm(torch.ones(1, width).to(next(norm.parameters())))[0]


def _refuse_misfits(transcoders: Mapping[int, Dictionary], layers: list[Maps]) -> None:
    width = len(layers[0].mlp_gain_D)
    if not transcoders:
        raise BadInput("no transcoders are given; give layer -> transcoder from layers.N.mlp.in to layers.N.mlp.out")
    for n, one in transcoders.items():
        if not isinstance(one, Dictionary) or not one.transcodes or (one.d_in, one.d_out) != (width, width) or not 0 <= n < len(layers):
            said = f"a transcoder of rows of {width} to rows of {width}, at layers 0..{len(layers) - 1}"
            raise BadInput(f"layer {n} is given {getattr(one, 'name', '') or type(one).__name__}; a circuit needs {said}")
