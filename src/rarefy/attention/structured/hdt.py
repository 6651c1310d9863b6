"""HDT (He et al. 2024, arXiv 2407.08330): attention along the tree of a document, whose mask is another one for every document.

    a token sees tokens under the same anchor and its anchor; an anchor sees its siblings, what is under it, and its own anchor
Read in the order of the text the mask has its anchors scattered about. Sorted by level - documents, sections, sentences, tokens - anchors lie
together, and tiles that join sections to other sections' sentences or sentences to other sentences' tokens are empty and skipped.

Shape letters: B = batch, H = heads, L = positions, D = head width, W = width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...kernels.block_attention import BlockMask, block_attention
from ...method import positive
from ..patterns.zoo.documents import hdt
from .encoder import Layer, waves
from .trees import NOTHING, SECTION, SENTENCE, TOKEN, Tree


class Walk:
    """A batch of trees made ready for a kernel: an order of positions and the blocks to visit in it.

    Args:
        trees: [B, L] of `together`, or one [L].
        block: positions of a tile.
        by_level: sort positions by level; else they stay in the order of the text.
    """

    def __init__(self, trees: Tree, block: int = 32, *, by_level: bool = True) -> None:
        level = trees.level if trees.level.ndim == 2 else trees.level[None]
        B, L = level.shape
        positive("block", block)
        place = torch.arange(L).expand(B, L)
        self.order_BL = level.argsort(dim=1, stable=True) if by_level else place
        self.back_BL = torch.empty_like(self.order_BL).scatter_(1, self.order_BL, place)
        tables = {name: table.view(B, L).gather(1, self.order_BL) for name, table in trees.tables.items()}
        self.mask: BlockMask = hdt().block_mask(L, L, block=block, query_block=block, causal=False, tables=tables)

    def tiles(self) -> int:
        """Tiles visited for a head, all documents."""
        return int(self.mask.blocks.sum())

    def attend(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        """[B, H, L, D] with scale 1 / sqrt(D); queries and keys in the order of the text.

        Raises:
            BadInput: other sizes than the trees have.
        """
        B, L = self.order_BL.shape
        if q_BHLD.shape[0] != B or q_BHLD.shape[2] != L:
            raise BadInput(f"{B} trees of {L} positions, and queries {list(q_BHLD.shape)}")
        if self.mask.blocks.device != q_BHLD.device:
            self.mask = _moved(self.mask, q_BHLD.device)
        q, k, v = (_taken(x, self.order_BL) for x in (q_BHLD, k_BHLD, v_BHLD))
        size, scale = self.mask.block, q_BHLD.shape[-1] ** -0.5
        return _taken(block_attention(q, k, v, self.mask, block=size, query_block=size, scale=scale, causal=False), self.back_BL)


def _moved(mask: BlockMask, device: torch.device) -> BlockMask:
    partial, tiles = (None if x is None else x.to(device) for x in (mask.partial, mask.tiles))
    return BlockMask(mask.blocks.to(device), partial, tiles, mask.block, mask.query_block)


def _taken(x_BHLD: Tensor, index_BL: Tensor) -> Tensor:
    return x_BHLD.gather(2, index_BL.to(x_BHLD.device)[:, None, :, None].expand(x_BHLD.shape))


class HDT(nn.Module):
    """Layers along the tree: tokens' embeddings in, states of all positions out, anchors' among them.

    Positions are told level by level, by waves of the rank under each anchor on the way up. Departure: a learned map adds the levels up, since
    the plain sum is the same for sentence 2 of section 3 and sentence 3 of section 2.

    Args:
        width: W. heads, layers: of the stack. block: tile of the kernel.
        wide: hidden units of the feed-forward nets, 4 W unless told. seed: of the initial weights.
    """

    def __init__(self, width: int, heads: int, layers: int = 2, block: int = 32, wide: int | None = None, seed: int = 0) -> None:
        super().__init__()
        positive("layers", layers)
        self.block = positive("block", block)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.anchor_3W = nn.Parameter(0.02 * torch.randn(3, width))
            self.turn = nn.Linear(3 * width, width, bias=False)
            nn.init.normal_(self.turn.weight, std=0.02)
            self.layers = nn.ModuleList([Layer(width, heads, wide) for _ in range(layers)])

    def embed(self, x_BLW: Tensor, trees: Tree) -> Tensor:
        """[B, L, W]: tokens' embeddings, anchors' own vectors, and where each stands in the tree."""
        level = trees.level.to(x_BLW.device)
        anchor = self.anchor_3W[level.clamp_max(SENTENCE)]
        x = torch.where((level < TOKEN)[..., None], anchor, x_BLW)
        place = torch.cat([waves(p.to(x.device), x.shape[-1]) for p in ranks(trees)], -1).to(x.dtype)
        # Of norm 1: a step of Adam moves every weight alike, and through waves of size 1 it would move places past all that tokens say.
        return x + self.turn(place * (1.5 * x.shape[-1]) ** -0.5)

    def forward(self, x_BLW: Tensor, trees: Tree, walk: Walk | None = None) -> Tensor:
        """[B, L, W].

        Args:
            x_BLW: embeddings of `trees.ids`; what stands at anchors is not read.
            walk: made of these trees before, where they are read more than once.
        """
        if x_BLW.shape[:2] != trees.level.shape:
            raise BadInput(f"trees of {list(trees.level.shape)} positions and embeddings {list(x_BLW.shape)}")
        walk = walk or Walk(trees, self.block)
        x = self.embed(x_BLW, trees)
        for layer in self.layers:
            x = layer(x, walk.attend)
        return x


def ranks(trees: Tree) -> tuple[Tensor, Tensor, Tensor]:
    """([B, L] number of the section, of the sentence in it, of the token in that), from 1; 0 where a position is above that level."""
    level, rank = trees.level, trees.rank
    out, at = [], torch.arange(level.shape[-1]).expand_as(level)
    for which in (SECTION, SENTENCE, TOKEN):
        latest = torch.where(level == which, at, -1).cummax(-1).values          # anchors stand before what is under them
        here = (level >= which) & (level < NOTHING) & (latest >= 0)
        out.append(torch.where(here, rank.gather(-1, latest.clamp_min(0)) + 1, 0))
    return out[0], out[1], out[2]
