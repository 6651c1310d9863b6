"""Every catalogue entry and its variants, every law."""

import pytest

from rarefy import catalogue
from rarefy._contract.specs import specs_of, variants
from rarefy.contract import LAWS, SLOW, check_law

CASES = [
    pytest.param(entry.name, number, law, id=f"{variant}-{law.split()[0]}", marks=[pytest.mark.slow] if law in SLOW else [])
    for entry in catalogue.ENTRIES
    for number, variant in enumerate(variants(entry.name))
    for law in LAWS
]


@pytest.mark.parametrize(("name", "number", "law"), CASES)
def test_law(name, number, law):
    result = check_law(law, specs_of(name)[number])
    assert result.passed, result.message
    if result.message.startswith("does not apply"):
        pytest.skip(result.message)
