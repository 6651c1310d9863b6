"""Claims belong to a card, give a verdict of the list, figures, and a file that exists."""

import re
from collections import Counter
from pathlib import Path

import pytest

from rarefy.catalogue import CARDS, CLAIMS, VERDICTS, in_full

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.card}: {c.says[:40]}")
def test_a_claim_can_be_followed(claim):
    assert claim.card in {card.name for card in CARDS}
    assert claim.verdict in VERDICTS
    assert (ROOT / claim.by).is_file()
    assert claim.verdict == "not tested" or re.search(r"\d", claim.measured), "a verdict needs figures"
    assert claim.says in in_full(next(card for card in CARDS if card.name == claim.card))


def test_no_claim_stands_twice():
    assert [c for c, n in Counter((c.card, c.says) for c in CLAIMS).items() if n > 1] == []
