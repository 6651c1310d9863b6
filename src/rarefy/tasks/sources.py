"""Which library is this file from? Long-document classification on source that every Python has (Dai et al. 2022, "Revisiting
Transformer-based Models for Long Document Classification": local windows, global tokens and hierarchies compared).

`documents_of` makes labelled token sequences from packages of the standard library, whole files on one side. `Reader` is a
small encoder on frozen token vectors whose attention is a mask, trained here in well under a minute: "full" attention, a
"window" of neighbours, a window with "global" tokens that see and are seen by all, or "hierarchical", in which a segment's
tokens see their segment and one summary a segment sees the other summaries. "bag" has no attention at all. `SegmentReader` is the
hierarchy as the paper has it: segments that may overlap, read apart, pooled to a vector each, and a layer over those vectors.
`scattered` plants evidence where no window is wide enough.

Shape letters: B = documents, T = tokens, D = width, E = width of the token vectors, C = classes, N = segments, K = tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive

PACKAGES = ("asyncio", "email", "multiprocessing", "tkinter", "unittest", "distutils", "ctypes", "xml")
KINDS = ("bag", "window", "global", "hierarchical", "full")
POOLS = ("first", "mean", "max", "attentive")
R = TypeVar("R", bound=nn.Module)


class Named(Protocol):
    """A text with its name, such as `builtin.corpus.Document`."""

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Sources:
    """Pieces of files with the package each is from."""

    ids_BT: Tensor
    label_B: Tensor
    file_B: Tensor
    """Number of the file each piece was cut from: what intervals are over."""
    held_B: Tensor
    """bool: pieces to judge on; a file is whole on one side."""
    packages: tuple[str, ...]


def documents_of(
    docs: Sequence[Named], tokenizer: object, length: int, *, packages: Sequence[str] = PACKAGES, most: int = 80, each: int = 4
) -> Sources:
    """Pieces of `length` tokens, at most `each` a file and `most` a package and side, from files named stdlib/PACKAGE/...

    Every fourth file is held out.

    Import statements and the file's name do not count as evidence: lines that begin with "import" or "from" are left out.

    Raises:
        BadInput: a package of which no file is long enough on one of the sides.
    """
    positive("length", length)
    positive("most", most)
    rows, labels, files, held = [], [], [], []
    for label, package in enumerate(packages):
        mine = sorted((d for d in docs if d.name.startswith(f"stdlib/{package}/")), key=lambda d: d.name)
        count = [0, 0]
        for number, document in enumerate(mine):
            text = "".join(line for line in document.text.splitlines(True) if not line.lstrip().startswith(("import ", "from ")))
            ids, side = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], int(number % 4 == 0)  # type: ignore[operator]
            for start in range(0, len(ids) - length + 1, length)[:each]:
                if count[side] < most:
                    count[side] += 1
                    rows.append(ids[start : start + length])
                    labels.append(label)
                    files.append(label * 1000 + number)
                    held.append(bool(side))
        if not all(count):
            raise BadInput(f"package {package!r} has no file of {length} tokens on one of the sides; give a smaller length or other packages")
    return Sources(torch.tensor(rows), torch.tensor(labels), torch.tensor(files), torch.tensor(held), tuple(packages))


def scattered(documents: int, length: int, *, gap: int, kinds: int = 2, words: int = 16, seed: int = 0) -> Sources:
    """Documents of random words with two pieces of evidence at random places at least `gap` apart, which tell the class together only.

    Evidence a is one of the words 0 .. kinds - 1, evidence b one of kinds .. 2 kinds - 1; the class is (a + b) mod kinds. Words 2 kinds and
    up mean nothing. Each document counts as a file; every fourth is held out.

    Raises:
        BadInput: a gap that does not fit into the length.
    """
    for name, value, least in (("documents", documents, 4), ("length", length, 2), ("gap", gap, 1), ("kinds", kinds, 2), ("words", words, 1)):
        if value < least:
            raise BadInput(f"{name}={value} must be at least {least}")
    if gap >= length:
        raise BadInput(f"evidence cannot be {gap} apart in {length} tokens")
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2 * kinds, 2 * kinds + words, (documents, length), generator=generator)
    a_B, b_B = torch.randint(kinds, (2, documents), generator=generator)
    apart_B = gap + (torch.rand(documents, generator=generator) * (length - gap)).long()
    first_B = (torch.rand(documents, generator=generator) * (length - apart_B)).long()
    swap_B = torch.rand(documents, generator=generator) < 0.5                  # which of the two comes first tells nothing
    at_B = torch.arange(documents)
    ids_BT[at_B, torch.where(swap_B, first_B + apart_B, first_B)] = a_B
    ids_BT[at_B, torch.where(swap_B, first_B, first_B + apart_B)] = kinds + b_B
    return Sources(ids_BT, (a_B + b_B) % kinds, at_B, at_B % 4 == 0, tuple(str(n) for n in range(kinds)))


def reading_mask(kind: str, T: int, *, window: int = 64, marks: int = 4) -> Tensor:
    """[T, T] bool: which tokens each token sees. Not causal.

    window: neighbours at most window // 2 away. global: that, and `marks` evenly spread tokens that see and are seen by all.
    hierarchical: segments of `window` tokens; a segment's first token sees the other segments' first tokens too.

    Raises:
        BadInput: an unknown kind; "bag" has no mask.
    """
    at = torch.arange(T)
    near = (at[:, None] - at).abs() <= window // 2
    if kind == "full":
        return torch.ones(T, T, dtype=torch.bool)
    if kind == "window":
        return near
    if kind == "global":
        mark = torch.zeros(T, dtype=torch.bool)
        mark[torch.arange(marks) * T // marks] = True
        return near | mark[:, None] | mark
    if kind == "hierarchical":
        first = at % window == 0
        return (at[:, None] // window == at // window) | (first[:, None] & first)
    raise BadInput(f"no attention {kind!r}; there are {', '.join(KINDS[1:])}")


class Reader(nn.Module):
    """Two layers of masked attention on frozen token vectors, a mean over tokens and a linear classifier.

    Hierarchical reads its segments' first tokens alone at the end, which is where the segments met.
    """

    def __init__(self, vectors_VE: Tensor, classes: int, kind: str, *, length: int, window: int = 64, marks: int = 4, width: int = 64,
                 heads: int = 4, seed: int = 0):
        super().__init__()
        if kind not in KINDS:
            raise BadInput(f"no reader {kind!r}; there are {', '.join(KINDS)}")
        self.kind, self.window = kind, window
        self.register_buffer("vectors_VE", vectors_VE.detach().float().clone())
        self.mask_TT = None if kind == "bag" else reading_mask(kind, length, window=window, marks=marks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(vectors_VE.shape[1], width)
            self.place_TD = nn.Parameter(0.02 * torch.randn(length, width))
            layers = 0 if kind == "bag" else 2
            self.layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])
            self.leave = nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, C] logits."""
        x = self.enter(self.vectors_VE[ids_BT])  # type: ignore[index]
        x = x if self.kind == "bag" else x + self.place_TD
        for layer in self.layers:
            x = layer(x, self.mask_TT)
        return self.leave(torch.relu(x[:, :: self.window] if self.kind == "hierarchical" else x).mean(1))


class _Layer(nn.Module):
    """Attention beside a residual, after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x_BTD)).chunk(3, -1))
        return x_BTD + self.out(scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2))


class SegmentReader(nn.Module):
    """One layer inside each segment, one vector a segment, one layer over these, their mean and a linear classifier.

    Args:
        segment: K. overlap: tokens that neighbouring segments share, fewer than K.
        pool: how a segment becomes a vector: its "first" token, the "mean" or "max" over its tokens, or "attentive", a mean weighted by
            the softmax of a learned score.

    Raises:
        BadInput: an unknown pool, an overlap of whole segments.
    """

    def __init__(self, vectors_VE: Tensor, classes: int, *, length: int, segment: int = 64, overlap: int = 0, pool: str = "first",
                 width: int = 64, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        if pool not in POOLS:
            raise BadInput(f"no pool {pool!r}; there are {', '.join(POOLS)}")
        positive("length", length)
        positive("segment", segment)
        if not 0 <= overlap < segment:
            raise BadInput(f"overlap={overlap} must be in [0, {segment}): segments of {segment} tokens have to move on")
        self.pool = pool
        self.register_buffer("vectors_VE", vectors_VE.detach().float().clone())
        self.at_NK, self.there_NK = segments_of(length, segment, overlap)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(vectors_VE.shape[1], width)
            self.place_TD = nn.Parameter(0.02 * torch.randn(length, width))
            self.inside, self.across = _Layer(width, heads), _Layer(width, heads)
            self.weigh = nn.Linear(width, 1)
            self.leave = nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, C] logits."""
        x = (self.enter(self.vectors_VE[ids_BT]) + self.place_TD)[:, self.at_NK]  # type: ignore[index]
        B, N, K, _ = x.shape
        keep = self.there_NK.repeat(B, 1)[:, None, None]
        x = self.inside(x.flatten(0, 1), None if bool(self.there_NK.all()) else keep).view(x.shape)
        return self.leave(torch.relu(self.across(self._pooled(x), None)).mean(1))

    def _pooled(self, x_BNKD: Tensor) -> Tensor:
        there = self.there_NK[..., None]
        if self.pool == "first":
            return x_BNKD[:, :, 0]
        if self.pool == "max":
            return x_BNKD.masked_fill(~there, -torch.inf).amax(2)
        score = self.weigh(x_BNKD) if self.pool == "attentive" else torch.zeros_like(x_BNKD[..., :1])
        return (score.masked_fill(~there, -torch.inf).softmax(2) * x_BNKD).sum(2)


def segments_of(length: int, segment: int, overlap: int = 0) -> tuple[Tensor, Tensor]:
    """([N, K] positions of the tokens of each segment, [N, K] bool where there is one): as few segments as reach every token."""
    count = 1 + max(0, -(-(length - segment) // (segment - overlap)))
    at = torch.arange(count)[:, None] * (segment - overlap) + torch.arange(segment)
    return at.clamp_max(length - 1), at < length


def train_reader(reader: R, sources: Sources, *, steps: int = 300, batch: int = 16, seed: int = 0) -> R:
    """AdamW at 2e-3 with a linear decay, on the pieces that are not held out; any module from ids [B, T] to logits [B, C]."""
    generator = torch.Generator().manual_seed(seed)
    fit = (~sources.held_B).nonzero()[:, 0]
    optimiser = torch.optim.AdamW(reader.parameters(), weight_decay=0.01)
    for step in range(positive("steps", steps)):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        some = fit[torch.randint(len(fit), (batch,), generator=generator)]
        with torch.enable_grad():
            loss = cross_entropy(reader(sources.ids_BT[some]), sources.label_B[some])
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return reader.eval()


@torch.no_grad()
def reading_accuracy(reader: nn.Module | Sequence[nn.Module], sources: Sources) -> Interval:
    """Share of held-out pieces given to their package, with an interval over files; chance is about 1 in the number of packages.

    Args:
        reader: or several that differ in their seeds only; each reads every piece.
    """
    held, readers = sources.held_B, [reader] if isinstance(reader, nn.Module) else list(reader)
    _, file = sources.file_B[held].unique(return_inverse=True)
    total = torch.zeros(int(file.max()) + 1, dtype=torch.float64)
    for one in readers:
        right = torch.cat([one(ids).argmax(-1) for ids in sources.ids_BT[held].split(32)]) == sources.label_B[held]
        total.index_add_(0, file, right.double())
    return ratio_interval(total, torch.bincount(file) * len(readers))
