"""Othello against rules written square by square; what codes hold of a board against counting."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from rarefy.errors import BadInput
from rarefy.tasks.board_state import SHARES, auroc, held_state, probed
from rarefy.tasks.codes import Codes
from rarefy.tasks.othello import games, labels, legal_moves, played, start

WAYS = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]


def runs(board, row, column):
    """The other's discs that a disc here would turn, way by way."""
    size, turned = len(board), []
    for down, right in WAYS:
        y, x, run = row + down, column + right, []
        while 0 <= y < size and 0 <= x < size and board[y][x] == -1:
            run.append((y, x))
            y, x = y + down, x + right
        turned += run if 0 <= y < size and 0 <= x < size and board[y][x] == 1 else []
    return turned


def legal_by_hand(board):
    size = len(board)
    return {r * size + c for r in range(size) for c in range(size) if not board[r][c] and runs(board, r, c)}


def seen_by_the_other(board):
    return [[-v for v in row] for row in board]


@pytest.mark.parametrize("size", [4, 6, 8])
def test_games_follow_the_rules(size):
    made, squares = games(12, size=size, seed=size), size * size
    for n in range(12):
        board = start(1, size)[0].tolist()
        for t, token in enumerate(made.input_ids[n].tolist()):
            if t == 0:
                assert token == squares
            elif token < squares:
                row, column = divmod(token, size)
                assert token in legal_by_hand(board)
                for y, x in [*runs(board, row, column), (row, column)]:
                    board[y][x] = 1
                board = seen_by_the_other(board)
            legal = legal_by_hand(board)
            if not legal and legal_by_hand(seen_by_the_other(board)):
                board = seen_by_the_other(board)
                legal = legal_by_hand(board)
            assert legal == set(made.legal[n, t].nonzero()[:, 0].tolist())
            assert made.live[n, t] == bool(legal)
            if legal:
                assert made.board[n, t].tolist() == sum(board, [])
            elif t + 1 < made.input_ids.shape[1]:
                assert made.input_ids[n, t + 1] == squares + 1


def test_moves_are_drawn_evenly_and_games_differ_by_seed():
    first = games(4000, seed=3).input_ids[:, 1]
    share = torch.bincount(first, minlength=36)[legal_moves(start(1))[0].flatten()] / 4000
    assert len(share) == 4 and (share - 0.25).abs().max() < 0.03
    assert not torch.equal(games(5, seed=1).input_ids, games(5, seed=2).input_ids)
    assert torch.equal(games(5, seed=1).input_ids, games(5, seed=1).input_ids)


def test_labels_say_whose_disc_lies_where():
    made = games(3, size=4)
    told, names = labels(made)
    assert told.shape[-1] == len(names) == 48 and (told.sum(-1) == 16).all()
    at = names.index("other c2")
    assert torch.equal(told[..., at], made.board[..., 1 * 4 + 2] == -1)


def test_a_board_of_odd_size_is_refused():
    with pytest.raises(BadInput, match="size=5 must be even"):
        games(2, size=5)


def planted(n=900, c=6, g=9):
    """Latent i is label i at varying strength for i < 3, label 3 with misses, noise elsewhere."""
    made = torch.Generator().manual_seed(0)
    truth = torch.rand(n, c, generator=made) < 0.3
    codes = torch.zeros(n, g)
    codes[:, :3] = truth[:, :3] * (0.5 + torch.rand(n, 3, generator=made))
    codes[:, 3] = truth[:, 3] * (torch.rand(n, generator=made) < 0.5)
    codes[:, 4:] = torch.rand(n, g - 4, generator=made) * (torch.rand(n, g - 4, generator=made) < 0.2)
    choose = torch.arange(n) % 2 == 0
    return codes, truth, choose


def test_coverage_is_the_best_f1_chosen_on_one_half_and_measured_on_the_other():
    codes, truth, choose = planted()
    got = held_state(Codes.of(codes), truth, choose)
    most = codes[choose].amax(0)
    for c in range(truth.shape[1]):
        tried = {
            (h, g): f1_score(truth[choose, c], (codes[choose, g] > share * most[g]) & (codes[choose, g] > 0))
            for h, share in enumerate(SHARES) for g in range(codes.shape[1])
        }
        best = max(tried.values())
        h, g = next(key for key, value in tried.items() if value == best)
        want = f1_score(truth[~choose, c], (codes[~choose, g] > SHARES[h] * most[g]) & (codes[~choose, g] > 0))
        assert float(got.f1_C[c]) == pytest.approx(want, abs=1e-6)
    assert got.coverage == pytest.approx(float(got.f1_C.mean()))
    assert got.latent_C[:4].tolist() == [0, 1, 2, 3] and got.f1_C[:3].min() == 1


def test_only_precise_latents_vote_in_the_reconstruction():
    codes, truth, choose = planted()
    got = held_state(Codes.of(codes), truth, choose)
    said = torch.zeros_like(truth)
    said[:, :4] = codes[:, :4] > 0                                      # 4 is as precise as the first three, and misses half
    rows = [f1_score(truth[n], said[n], zero_division=0) for n in (~choose).nonzero()[:, 0].tolist()]
    assert got.reconstruction == pytest.approx(sum(rows) / len(rows), abs=1e-6)


def test_auroc_is_scikit_learns_with_ties():
    made = torch.Generator().manual_seed(1)
    score = (torch.rand(200, 3, generator=made) * 5).round()
    truth = torch.rand(200, 3, generator=made) < 0.4
    want = [roc_auc_score(truth[:, c], score[:, c]) for c in range(3)]
    assert auroc(score, truth).tolist() == pytest.approx(want, abs=1e-6)
    assert torch.isnan(auroc(score, torch.ones_like(truth))).all()


def test_a_probe_reads_what_is_linear_and_nothing_else():
    made = torch.Generator().manual_seed(2)
    x = torch.randn(2000, 10, generator=made)
    choose = torch.arange(2000) % 2 == 0
    assert probed(x, (x[:, :2] > 0.3), choose) > 0.98
    assert abs(probed(x, torch.rand(2000, 2, generator=made) < 0.5, choose) - 0.5) < 0.05


def test_rows_of_one_kind_are_refused():
    codes, truth, choose = planted()
    with pytest.raises(BadInput, match="choose needs rows of both kinds"):
        held_state(Codes.of(codes), truth, torch.ones_like(choose))
    with pytest.raises(BadInput, match="do not fit together"):
        held_state(Codes.of(codes), truth[:5], choose)


def test_one_move_turns_every_run_and_no_more():
    board = torch.zeros(1, 6, 6, dtype=torch.int8)
    board[0, 2] = torch.tensor([0, -1, -1, 1, 0, 0])
    board[0, 3, 1], board[0, 4, 2], board[0, 3, 0] = -1, 1, -1
    after = played(board, torch.tensor([12]))[0]
    assert after[2].tolist() == [1, 1, 1, 1, 0, 0] and after[3, 1] == 1 and after[3, 0] == -1
