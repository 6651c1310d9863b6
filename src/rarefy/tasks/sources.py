"""Which library is this file from? Long-document classification on source that every Python has (Dai et al. 2022, "Revisiting
Transformer-based Models for Long Document Classification": local windows, global tokens and hierarchies compared).

`documents_of` makes labelled token sequences from packages of the standard library, whole files on one side. `Reader` is a
small encoder on frozen token vectors whose attention is a mask, trained here in well under a minute: "full" attention, a
"window" of neighbours, a window with "global" tokens that see and are seen by all, or "hierarchical", in which a segment's
tokens see their segment and one summary a segment sees the other summaries. "bag" has no attention at all.

Shape letters: B = documents, T = tokens, D = width, E = width of the token vectors, C = classes, S = segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ..errors import BadInput
from ..fidelity import Interval, ratio_interval
from ..method import positive

PACKAGES = ("asyncio", "email", "multiprocessing", "tkinter", "unittest", "distutils", "ctypes", "xml")
KINDS = ("bag", "window", "global", "hierarchical", "full")


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

    def __init__(self, vectors_VE: Tensor, classes: int, kind: str, *, length: int, window: int = 64, width: int = 64, heads: int = 4, seed: int = 0):
        super().__init__()
        if kind not in KINDS:
            raise BadInput(f"no reader {kind!r}; there are {', '.join(KINDS)}")
        self.kind, self.heads, self.window = kind, heads, window
        self.register_buffer("vectors_VE", vectors_VE.detach().float().clone())
        self.mask_TT = None if kind == "bag" else reading_mask(kind, length, window=window)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(vectors_VE.shape[1], width)
            self.place_TD = nn.Parameter(0.02 * torch.randn(length, width))
            layers = 0 if kind == "bag" else 2
            self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(layers)])
            self.out = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
            self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
            self.leave = nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, C] logits."""
        x = self.enter(self.vectors_VE[ids_BT])  # type: ignore[index]
        x = x if self.kind == "bag" else x + self.place_TD
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=True):
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv(norm(x)).chunk(3, -1))
            x = x + out(scaled_dot_product_attention(q, k, v, attn_mask=self.mask_TT).transpose(1, 2).flatten(2))
        return self.leave(torch.relu(x[:, :: self.window] if self.kind == "hierarchical" else x).mean(1))


def train_reader(reader: Reader, sources: Sources, *, steps: int = 300, batch: int = 16, seed: int = 0) -> Reader:
    """AdamW at 2e-3 with a linear decay, on the pieces that are not held out."""
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
def reading_accuracy(reader: nn.Module, sources: Sources) -> Interval:
    """Share of held-out pieces given to their package, with an interval over files; chance is about 1 in the number of packages."""
    held = sources.held_B
    right = torch.cat([reader(ids).argmax(-1) for ids in sources.ids_BT[held].split(32)]) == sources.label_B[held]
    _, file = sources.file_B[held].unique(return_inverse=True)
    total = torch.zeros(int(file.max()) + 1, dtype=torch.float64).index_add_(0, file, right.double())
    return ratio_interval(total, torch.bincount(file))
