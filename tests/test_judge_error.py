"""Where a dictionary's error lies, and its parts in the running model, against hooks put in by hand and sums by loops.

Shape letters: B = windows, T = tokens, N = rows, D = width.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rarefy.frontier import Judge
from rarefy.jobs.dictionaries import Spliced
from rarefy.jobs.judge_error import PartOfError, error_parts
from rarefy.latents.topk import TopK
from rarefy.site import capture, replaced
from rarefy.tasks.dark_matter import LinearMap
from site_models import VOCAB, build

SITE, D = "layers.0.resid_post", 32


class Text:
    def __init__(self, seed: int, windows: int = 6, tokens: int = 24) -> None:
        self.input_ids = torch.randint(0, VOCAB, (windows, tokens), generator=torch.Generator().manual_seed(seed))
        self.doc, self.attention_mask = torch.arange(windows)[:, None].expand(windows, tokens), None


def trained_a_little(model, text, target: str = SITE) -> TopK:
    x = capture(model, [SITE, target], input_ids=text.input_ids)
    m = TopK(D, 64, k=6, d_out=0 if target == SITE else D, seed=1)
    m.initialise(x[SITE][:, 1:].flatten(0, 1), x[target][:, 1:].flatten(0, 1))
    return m.eval()


def by_hand(model, method, fit, judged, target: str) -> dict[str, float]:
    """R^2 and CE increases with torch.linalg.lstsq and forward hooks on the layer itself."""
    layer = model.get_submodule({"layers.0.resid_post": "model.layers.0", "layers.1.resid_post": "model.layers.1"}[target])

    def rows(text):
        got = capture(model, {SITE, target}, input_ids=text.input_ids)
        y = got[target][:, 1:].flatten(0, 1).double()
        return y, method(got[SITE][:, 1:]).flatten(0, 1).double()

    def affine(y):
        return torch.cat([y, torch.ones(len(y), 1, dtype=y.dtype)], 1)

    y, y_hat = rows(fit)
    weight = torch.linalg.lstsq(affine(y), y - y_hat).solution
    y, y_hat = rows(judged)
    error = y - y_hat
    out = {"share": float(1 - (error - affine(y) @ weight).square().sum() / (error - error.mean(0)).square().sum())}

    def ce(part: str) -> float:
        held = {}

        def hook(module, inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            rest = value[:, 1:].double()
            linear = affine(rest.flatten(0, 1)) @ weight
            made = held["made"].double().flatten(0, 1)
            new = {"none": rest.flatten(0, 1), "linear": rest.flatten(0, 1) - linear, "nonlinear": made + linear, "all": made}[part]
            value = torch.cat([value[:, :1], new.view_as(rest).to(value)], 1)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        held["made"] = method(capture(model, [SITE], input_ids=judged.input_ids)[SITE][:, 1:])
        handle = layer.register_forward_hook(hook)
        try:
            logits = model(input_ids=judged.input_ids).logits
        finally:
            handle.remove()
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), judged.input_ids[:, 1:].flatten()))

    return out | {part: ce(part) - ce("none") for part in ("all", "linear", "nonlinear")}


@pytest.mark.parametrize("target", [SITE, "layers.1.resid_post"])
@torch.no_grad()
def test_parts_of_the_error_are_those_of_hooks_by_hand(target):
    model, fit, judged = build("llama").eval(), Text(0, 24), Text(1)
    method = trained_a_little(model, fit, target)
    judge = Judge(model, [judged])
    whole = judge.measure(Spliced(method, SITE, target).plan(), method="it", unit="latent").metrics["ce_increase"]
    found = error_parts(judge, [fit], SITE, method, whole, target="" if target == SITE else target)
    want = by_hand(model, method, fit, judged, target)
    assert found.shares is not None and found.shares.linear == pytest.approx(want["share"], abs=1e-3)
    got = {name: v.mean for name, v in found.increase.items()}
    assert got == pytest.approx({name: want[name] for name in got}, abs=2e-5) and set(got) == {"all", "linear", "nonlinear"}
    assert abs(want["all"]) > 1e-4, "the dictionary must move the model for the test to see anything"


@torch.no_grad()
def test_fvu_by_position_and_norm_is_that_of_loops():
    model, fit, judged = build("llama").eval(), Text(0, 24), Text(1)
    method = trained_a_little(model, fit)
    found = error_parts(Judge(model, [judged]), [fit], SITE, method, None)  # type: ignore[arg-type]
    x = capture(model, [SITE], input_ids=judged.input_ids)[SITE][:, 1:].double()
    error, spread = (x - method(x.float())).square().sum(-1), (x - x.flatten(0, 1).mean(0)).square().sum(-1)
    want = {"1": [1], "2-3": [2, 3], "4-7": range(4, 8), "8-15": range(8, 16), "16-31": range(16, 24)}
    for name, places in want.items():
        at = [p - 1 for p in places]
        assert found.by_position[name] == pytest.approx(float(error[:, at].sum() / spread[:, at].sum()), rel=1e-5)
    assert list(found.by_position) == list(want) and len(found.by_norm) == 10
    order = x.flatten(0, 1).norm(dim=1).argsort()
    first = order[: math.ceil(len(order) / 10)]
    assert found.by_norm[0] == pytest.approx(float(error.flatten()[first].sum() / spread.flatten()[first].sum()), rel=1e-4)


@torch.no_grad()
def test_the_parts_put_together_are_the_input_again():
    """y less one part and y less the other add up to y and y_hat: no error is lost or counted twice."""
    model, text = build("llama").eval(), Text(0)
    method = trained_a_little(model, text)
    y = capture(model, [SITE], input_ids=text.input_ids)[SITE]
    to_error = LinearMap(torch.randn(D, D, dtype=torch.float64) / 9, torch.randn(D, dtype=torch.float64))
    parts = []
    for part in ("linear", "nonlinear"):
        (put,) = PartOfError(method, SITE, "", to_error, part).plan().values()
        parts.append(put(y))
        assert torch.equal(parts[-1][:, :1], y[:, :1])
    torch.testing.assert_close((parts[0] + parts[1])[:, 1:], y[:, 1:] + method(y[:, 1:]))


@torch.no_grad()
def test_a_text_too_short_for_the_maps_still_has_fvu():
    model, few = build("llama").eval(), Text(0, 1)
    method = trained_a_little(model, Text(2))
    judge = Judge(model, [Text(1)])
    whole = judge.measure(Spliced(method, SITE).plan(), method="it", unit="latent").metrics["ce_increase"]
    found = error_parts(judge, [few], SITE, method, whole)
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert found.shares is None and set(record) == {"ce_increase", "fvu_by_norm", "fvu_by_position"} and set(record["ce_increase"]) == {"all"}
    assert "linear" not in found.told("it") and "FVU" in found.told("it")


def test_replaced_model_is_left_as_it_was():
    model, text = build("llama").eval(), Text(0)
    method = trained_a_little(model, text)
    with torch.no_grad():
        before = model(input_ids=text.input_ids).logits
        zero = LinearMap(torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64))
        with replaced(model, PartOfError(method, SITE, "", zero, "linear").plan()):
            torch.testing.assert_close(model(input_ids=text.input_ids).logits, before)
        assert torch.equal(model(input_ids=text.input_ids).logits, before)
