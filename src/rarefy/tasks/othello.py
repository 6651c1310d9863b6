"""Othello: games of random legal moves, whose board a sequence model must keep in mind and nobody tells it.

A token is the square a disc is put on; a model that gives legal next moves has to work out whose disc lies where (Li et al.
2023, arXiv 2210.13382), so its activations hold features with known truth. Boards are given as the player to move sees them
(own, other, empty; Nanda et al. 2023, arXiv 2309.00941), and as a latent may find them: one binary label a square and owner.

Shape letters: N = games, T = moves, Q = squares, S = size of the board.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..method import positive

SIZE = 6
"""Squares a side of the board of the model that is shipped."""
STATES = ("own", "other", "empty")
_STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@dataclass(frozen=True)
class Games:
    """Games as token ids, and the truth after each of them."""

    input_ids: Tensor
    """[N, T] int64: Q where the game begins, then squares 0..Q-1; Q + 1 once it is over."""
    board: Tensor
    """[N, T, Q] int8, after the token: 1 a disc of the player to move next, -1 one of the other, 0 none."""
    legal: Tensor
    """[N, T, Q] bool: squares that may be played next; none once the game is over."""

    @property
    def size(self) -> int:
        """Squares a side."""
        return round(self.board.shape[-1] ** 0.5)

    @property
    def live(self) -> Tensor:
        """[N, T] bool: positions after which somebody can move."""
        return self.legal.any(-1)


def _shift(x_NSS: Tensor, down: int, right: int) -> Tensor:
    """Every square's neighbour in a direction, 0 beyond the edge."""
    size, out = x_NSS.shape[-1], torch.zeros_like(x_NSS)
    to, from_ = (slice(max(0, -d), size - max(0, d)) for d in (down, right)), (slice(max(0, d), size + min(0, d)) for d in (down, right))
    out[(slice(None), *to)] = x_NSS[(slice(None), *from_)]
    return out


def legal_moves(board_NSS: Tensor) -> Tensor:
    """[N, S, S] bool: empty squares from which a straight run of the other's discs (-1) ends at one's own (1)."""
    legal = torch.zeros_like(board_NSS, dtype=torch.bool)
    for step in _STEPS:
        seen, run = _shift(board_NSS, *step), torch.zeros_like(legal)
        alive = torch.ones_like(legal)
        for _ in range(board_NSS.shape[-1] - 1):
            legal |= alive & run & (seen == 1)
            alive &= seen == -1
            run, seen = alive.clone(), _shift(seen, *step)
    return legal & (board_NSS == 0)


def played(board_NSS: Tensor, square_N: Tensor) -> Tensor:
    """The board after the player to move put a disc on a legal square, still as that player sees it."""
    size = board_NSS.shape[-1]
    out = board_NSS.clone()
    row_N, column_N, at_N = square_N // size, square_N % size, torch.arange(len(square_N))
    for down, right in _STEPS:
        steps = torch.arange(1, size)
        rows, columns = row_N[:, None] + down * steps, column_N[:, None] + right * steps
        inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        seen = torch.where(inside, board_NSS[at_N[:, None], rows.clamp(0, size - 1), columns.clamp(0, size - 1)], 0)
        other = (seen == -1).long().cumprod(1)                               # the run of the other's discs from here
        length_N = other.sum(1)
        end_N = seen.gather(1, length_N.clamp(max=size - 2)[:, None])[:, 0]
        turned = (other > 0) & ((end_N == 1) & (length_N < size - 1))[:, None]
        who, step = turned.nonzero(as_tuple=True)
        out[who, rows[who, step], columns[who, step]] = 1
    out[at_N, row_N, column_N] = 1
    return out


def start(n: int, size: int = SIZE) -> Tensor:
    """[n, S, S] int8 the board before the first move."""
    if positive("size", size) % 2 or size < 4:
        raise BadInput(f"size={size} must be even and at least 4: the game begins in the middle of the board")
    board, half = torch.zeros(positive("n", n), size, size, dtype=torch.int8), size // 2
    board[:, half - 1, half], board[:, half, half - 1] = 1, 1
    board[:, half - 1, half - 1], board[:, half, half] = -1, -1
    return board


def games(n: int, *, size: int = SIZE, seed: int = 0) -> Games:
    """Play `n` games to their end, each move drawn evenly from the legal ones. Who cannot move passes, which is no token.

    Raises:
        BadInput: a size that is odd or below 4.
    """
    generator = torch.Generator().manual_seed(seed)
    board, squares = start(n, size), size * size
    tokens, boards, legals = [torch.full((n,), squares)], [], []
    for move in range(squares - 3):
        legal = legal_moves(board)
        stuck = ~legal.flatten(1).any(1)
        other = legal_moves(-board[stuck])
        board[stuck], legal[stuck] = -board[stuck], other                     # a pass; once more changes nothing that matters
        flat = legal.flatten(1)
        boards.append(board.flatten(1).clone())
        legals.append(flat)
        if move == squares - 4:
            break
        over = ~flat.any(1)
        square = torch.multinomial(torch.where(over[:, None], 1.0, flat.float()), 1, generator=generator)[:, 0]
        tokens.append(torch.where(over, squares + 1, square))
        board = torch.where(over[:, None, None], board, -played(board, square))
    return Games(torch.stack(tokens, 1), torch.stack(boards, 1), torch.stack(legals, 1))


def labels(of: Games) -> tuple[Tensor, list[str]]:
    """([N, T, 3Q] bool, names): for each square whether it holds one's own disc, the other's, or none."""
    told = torch.cat([of.board == 1, of.board == -1, of.board == 0], -1)
    names = [f"{state} {chr(97 + q % of.size)}{q // of.size + 1}" for state in STATES for q in range(of.size**2)]
    return told, names
