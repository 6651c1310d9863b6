"""The laws that every sparse method keeps, run against one method: yours as well as the catalogue's.

    for result in rarefy.check_method("weights/wanda"):
        assert result.passed, result

A method outside the catalogue brings a Spec, which says how to make one and what to feed it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ._contract import gradients, mathematics, numbers, state, storage
from ._contract.spec import Broken, Case, Law, NotApplicable, Spec
from ._contract.specs import specs_of
from .errors import BadInput

if TYPE_CHECKING:
    from .method import Sparse

__all__ = ["LAWS", "SLOW", "Broken", "Case", "NotApplicable", "Result", "Spec", "check_method"]

LAWS: dict[str, Law] = {**mathematics.LAWS, **numbers.LAWS, **state.LAWS, **storage.LAWS, **gradients.LAWS}
"""Name of each law, such as "L1 forward equals reference", and the function that raises when it is broken."""
SLOW = frozenset({"C13 torch.compile agrees", "C13b torch.export agrees"})
"""Laws left out unless they are asked for by name."""


@dataclass(frozen=True)
class Result:
    """What one law said about one method."""

    law: str
    passed: bool
    message: str = ""
    """Empty, or why the law was broken, is expected to be broken, or does not apply."""


def check_method(method: str | type[Sparse], spec: Spec | None = None, laws: Iterable[str] | None = None) -> list[Result]:
    """Run every law that applies to a method.

    Args:
        method: catalogue name, or the class of a method of your own.
        spec: how to make and feed it; for catalogue names the default is the catalogue's own. A class that names no
            spec is tried with that of the catalogue family its base belongs to.
        laws: names of laws, or their ids ("L1", "C6"); default all but the slow ones.

    Raises:
        BadInput: unknown method or law, or a class of no known family without a spec.
    """
    spec = spec or specs_of(method)[0]
    chosen = [law for law in LAWS if law not in SLOW] if laws is None else [_named(law) for law in laws]
    unknown = [name for name in spec.expected_failures if name not in _ids()]
    if unknown:
        raise BadInput(f"expected_failures names no law: {', '.join(unknown)}; laws are {', '.join(_ids())}")
    return [check_law(law, spec) for law in chosen]


def check_law(law: str, spec: Spec) -> Result:
    """One law, with the global generators and the default settings put back afterwards."""
    reason = spec.expected_failures.get(law.split()[0])
    saved = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            LAWS[law](Case(spec))
    except NotApplicable as why:
        return Result(law, True, f"does not apply: {why}")
    except Exception as error:  # a law is broken by whatever the method raises
        message = f"{type(error).__name__}: {error}"
        return Result(law, reason is not None, f"expected: {reason} ({message})" if reason else message)
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
    if reason is not None:
        return Result(law, False, f"was expected to fail ({reason}) and holds; take it off expected_failures")
    return Result(law, True)


def _ids() -> list[str]:
    return [law.split()[0] for law in LAWS]


def _named(law: str) -> str:
    for known in LAWS:
        if law in (known, known.split()[0]):
            return known
    raise BadInput(f"unknown law {law!r}; known: {', '.join(LAWS)}")
