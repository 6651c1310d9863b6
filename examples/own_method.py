"""A method of your own: keep the inputs of a linear layer whose magnitude is furthest from the row's mean magnitude.

Write the selection; forward, reference, cost, saving and putting in come from the family. Then let the laws judge it,
and measure it beside another method.

    python examples/own_method.py
"""

import rarefy
from rarefy.neurons.linear import InputSparseLinear
from rarefy.selection import Selection, kept, top_k


class Unusual(InputSparseLinear):
    """Inputs whose |x| differs most from the row's mean |x|: small ones count as much as large ones."""

    name = "neurons/unusual"

    def select(self, x):
        size = x.detach().abs()
        index = top_k((size - size.mean(-1, keepdim=True)).abs(), kept(self.budget, self.d_in)).index
        return Selection(self.d_in, x.gather(-1, index), index=index)


def main() -> None:
    for result in rarefy.check_method(Unusual):
        print("holds " if result.passed else "BROKEN", result.law, result.message)

    model, tokenizer, _ = rarefy.open_model("builtin")
    text = rarefy.text("stdlib", tokenizer, context=256, fit_tokens=2_000, judge_tokens=4_000)
    layers = rarefy.sites(model, "layers.*.down_proj")
    for cls in (Unusual, rarefy.entry("neurons/wina").load()):
        plan = {name: cls.for_module(model.get_submodule(site.module_path), budget=0.5) for name, site in layers.items()}
        point = rarefy.measure(model, plan, text.judge, budget=0.5)
        print(f"{point.method}: {point.density:.0%} of the inputs kept, CE increase {point.metrics['ce_increase']}")


if __name__ == "__main__":
    main()
