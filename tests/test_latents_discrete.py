"""Discretised codes against counting by hand."""

import math

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.latents.abs_topk import AbsTopK
from rarefy.latents.discrete import SILENT, discrete_codes, peculiar, place_scores
from rarefy.latents.relu import ReLU


def identity(cls, **kw):
    """Latents are the coordinates; the last decoder row is ten times as long."""
    made = cls(4, 4, **kw).eval()
    with torch.no_grad():
        made.W_enc_FD.copy_(torch.eye(4))
        made.W_dec_FD.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 10.0])))
    return made


def test_the_code_is_the_latent_that_writes_most():
    x = torch.tensor([[3.0, 1, 0, 0], [3, 1, 0, 0.5], [-5, 1, 0, 0], [-1, -2, -3, -4], [2, 2, 0, 0]])
    assert discrete_codes(identity(ReLU), x).tolist() == [0, 3, 1, SILENT, 0]
    assert discrete_codes(identity(AbsTopK, k=2), x).tolist() == [0, 0, 0, 3, 0]      # of row 1 the half is not among the two kept
    assert discrete_codes(identity(ReLU), x[:0]).shape == (0,)


def test_places_are_scored_by_codes_that_only_positive_prompts_have():
    positive = [torch.tensor([4, 4, 7, 9, SILENT]), torch.tensor([1, 2]), torch.tensor([SILENT])]
    negative = [torch.tensor([9, 3]), torch.tensor([2, 1, 1]), torch.tensor([5])]
    assert peculiar(positive[0], negative[0]).tolist() == [4, 7]
    weight = [math.exp(2), 1, 1]
    assert place_scores(positive, negative).tolist() == pytest.approx([w / sum(weight) for w in weight])


def test_places_without_a_partner_are_refused():
    with pytest.raises(BadInput, match="2 places on positive and 1 on negative"):
        place_scores([torch.tensor([1]), torch.tensor([2])], [torch.tensor([1])])
