"""The base of every method: what it remembers of its constructor, what it refuses, and check_method for third parties."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from rarefy.contract import LAWS, SLOW, Spec
from rarefy.cost import Cost
from rarefy.errors import BadInput, Unsupported
from rarefy.method import Loss, Sparse, fraction, positive
from rarefy.selection import check_finite, kept, top_k


class Loudest(Sparse):
    """A method as somebody else might write it: keep the inputs largest in magnitude, then a fixed scale."""

    name, unit = "mine/loudest", "input"

    def __init__(self, d: int, budget: float = 0.5, scale: float = 2.0) -> None:
        super().__init__()
        self.d, self._budget = positive("d", d), fraction("budget", budget)
        self.scale = nn.Parameter(torch.full((d,), float(scale)))

    @property
    def budget(self) -> float:
        return self._budget

    def select(self, x):
        check_finite(x, f"input of {self.name}")
        return top_k(x.detach().abs(), kept(self._budget, self.d))

    def forward(self, x):
        return x * self.select(x).mask * self.scale

    def reference(self, x):
        return torch.where(self.select(x).mask, x * self.scale, 0)

    def cost(self, density=None):
        return Cost(self.d * (density or self._budget), 4 * self.d * (density or self._budget))

    def dense_cost(self):
        return Cost(0, 4 * self.d)


def spec(cls=Loudest, **changes):
    return Spec(**{
        "make": lambda budget: cls(12, budget), "budgets": (0.25, 0.5, 1.0),
        "inputs": lambda batch, seed: (torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed)),),
        "bad_arguments": (({"budget": 0.0}, "budget"), ({"d": 0}, "d")), "sound_arguments": {"d": 12}, **changes,
    })


def broken(cls, **changes):
    return {r.law.split()[0] for r in rarefy.check_method(cls, spec(cls, **changes)) if not r.passed}


class Free(Loudest):
    def cost(self, density=None):
        return Cost(1e-9, 1e-9)

    def dense_cost(self):
        return Cost(1e-9, 4 * self.d)


def test_a_third_party_method_is_checked():
    results = rarefy.check_method(Free, spec(Free))
    assert [r.law for r in results] == [law for law in LAWS if law not in SLOW]
    assert [r for r in results if not r.passed] == []


class _Wrong:
    """Ways to break a law, and the law that must say so."""

    class L1(Free):
        def reference(self, x):
            return x * self.scale

    class L3(Free):
        def select(self, x):
            check_finite(x, f"input of {self.name}")
            return top_k(-x.abs() if self._budget == 0.5 else x.abs(), kept(self._budget, self.d))

    class L4(Free):
        def select(self, x):
            check_finite(x, f"input of {self.name}")
            return top_k(x.abs(), max(1, kept(self._budget, self.d) - 1))

    class L5(Free):
        def forward(self, x):
            return super().forward(x) + 0 * x.sum() + x.mean()

        reference = forward

    class C3(Free):
        def forward(self, x):
            return super().forward(x).float()

    class C4(Free):
        def __init__(self, d: int, budget: float = 0.5) -> None:
            super().__init__(d, budget)
            self.table = torch.ones(3)

    class C6(Free):
        def forward(self, x):
            return x * self.scale

        reference = forward

        def select(self, x):
            return top_k(torch.nan_to_num(x).abs(), kept(self._budget, self.d))

    class C7(Free):
        def forward(self, x):
            torch.rand(1)
            return super().forward(x)

    class C8(Free):
        def __init__(self, d: int, budget: float = 0.5) -> None:
            super().__init__(d, budget)
            self.noise = nn.Parameter(torch.randn(3))

    class C10(Free):
        def __init__(self, d: int, budget: float = 0.5) -> None:
            super().__init__(d, budget or 0.1)

    class M3(Free):
        def forward(self, x):
            return x * self.select(x).mask * self.scale.detach() + 0 * self.scale


@pytest.mark.parametrize("law", [k for k in vars(_Wrong) if not k.startswith("_")])
def test_a_broken_law_is_found(law):
    assert law in broken(getattr(_Wrong, law))


def test_an_expected_failure_that_holds_is_a_failure():
    assert broken(Free, expected_failures={"L1": "no reason"}) == {"L1"}
    assert broken(_Wrong.L1, expected_failures={"L1": "its reference is another"}) <= {"M3"}
    with pytest.raises(BadInput, match="L99"):
        rarefy.check_method(Free, spec(expected_failures={"L99": "?"}))


def test_laws_by_id_and_unknown_names():
    assert [r.law for r in rarefy.check_method("weights/wanda", laws=["L2", "C11"])] == ["L2 budget 1 is dense", "C11 unfitted use raises"]
    with pytest.raises(BadInput, match="unknown law"):
        rarefy.check_method("weights/wanda", laws=["L77"])
    with pytest.raises(BadInput, match="pass a Spec"):
        rarefy.check_method(Loudest)
    with pytest.raises(BadInput, match="weights/wanda"):
        rarefy.check_method("weights/wandaa")


def test_arguments_of_the_outermost_constructor_are_kept():
    class Fixed(Loudest):
        def __init__(self, d: int) -> None:
            super().__init__(d, budget=0.25)

    class Heir(Loudest):
        pass

    assert Fixed(8).arguments == {"d": 8}
    assert Heir(8, scale=3.0).arguments == {"d": 8, "budget": 0.5, "scale": 3.0}
    assert copy.deepcopy(Fixed(8)).arguments == {"d": 8}
    assert Fixed.__init__.__wrapped__ is not Loudest.__init__


def test_a_method_without_the_rest_says_so():
    class Bare(Sparse):
        name = "mine/bare"

    with pytest.raises(Unsupported, match="mine/bare does not stand in for a Conv2d"):
        Bare.for_module(nn.Conv2d(1, 1, 1))
    bare = Bare.__new__(Bare)
    nn.Module.__init__(bare)
    for call in (lambda: bare.observe(torch.ones(1)), bare.finish):
        with pytest.raises(Unsupported, match="mine/bare is not calibrated"):
            call()
    with pytest.raises(Unsupported, match="mine/bare is not trained"):
        bare.loss(torch.ones(1), torch.ones(1))
    for call in (bare.select, bare.forward, bare.reference, bare.cost, bare.dense_cost, lambda: bare.budget):
        with pytest.raises(NotImplementedError):
            call()
    assert bare.before_step() is None and bare.after_step(1) is None


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_positive(value):
    with pytest.raises(BadInput, match=r"k=.* must be a whole number >= 1"):
        positive("k", value)
    assert positive("k", 3, 3) == 3
    with pytest.raises(BadInput, match=r"k=4 must be a whole number in 1\.\.3"):
        positive("k", 4, 3)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, True, "0.5", None, float("nan"), float("inf")])
def test_fraction(value):
    with pytest.raises(BadInput, match=r"budget=.* must be in \(0, 1\]"):
        fraction("budget", value)
    assert fraction("budget", 1) == 1.0


def test_loss_parts_default_to_none():
    assert Loss(torch.zeros(())).parts == {}
