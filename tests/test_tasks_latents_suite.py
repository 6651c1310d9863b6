"""The planted suite: dictionaries at one L0, every line kept, a killed run taken up, tables and pictures; all of it small."""

import json
import math
import os
import signal
import xml.etree.ElementTree as ET

import pytest
import torch

from rarefy.catalogue import entry
from rarefy.errors import BadInput, Halted
from rarefy.jobs import suite as suite_module
from rarefy.jobs import suite_plan
from rarefy.jobs.screen import Screen
from rarefy.jobs.suite import BASELINES, Cell, SuiteRequest, suite
from rarefy.jobs.suite_measures import MEASURES, fixed, measures, shared
from rarefy.jobs.suite_plan import FINE, MORE, Search, between, beyond, build, knob, nearest, usable
from rarefy.jobs.suite_result import figure, spread
from rarefy.latents.topk import TopK
from rarefy.plots import grid_svg
from rarefy.tasks.learned import perfect, read
from rarefy.tasks.planted_kinds import Truth, plant

SMALL = {"d": 8, "features": 16, "l0": 2.0, "steps": 12, "batch": 32, "rows": 400, "judged": 200, "seeds": 2}


def request(out, methods=("latents/topk",), kinds=("independent", "contained"), **more):
    return SuiteRequest(list(methods), out, kinds=list(kinds), **{**SMALL, **more})


def quiet():
    return Screen(quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("suites") / "run"
    return out, suite(request(out, ["latents/topk", "latents/relu"]), screen=quiet())


# --------------------------------------------------------------------------------------------------------- one L0


@pytest.mark.parametrize(("steep", "passes"), [(10, [8, FINE]), (0.5, [8, len(MORE), FINE]), (1e6, [8, len(MORE), FINE])])
def test_penalties_are_found_by_bracketing(steep, passes, monkeypatch):
    """L0 as a function of the penalty that is known, 40 / (1 + steep * penalty); 4 is within the first grid, above it, or below it."""
    class Fake:
        def __init__(self, value):
            self.value = value

    calls, l0 = [], lambda value: 40 / (1 + steep * value)
    search = Search(lambda card, own, seed: Fake(own["l1"]), lambda plan, what: calls.append(len(plan)), torch.zeros(1, 1), 4.0)
    monkeypatch.setattr(suite_plan, "read", lambda method, x: type("L", (), {"codes": type("C", (), {"l0": l0(method.value)})}))
    name, value, got = search.run([entry("latents/relu")], {})["latents/relu"]
    assert name == "l1" and got == l0(value) and calls == passes
    assert 4 / 1.3 < got < 4 * 1.3                                          # the grid's own step: 4 ** (1 / 5)


def test_values_between_and_nearest():
    assert between({1.0: 10.0, 4.0: 3.0, 16.0: 1.0}, 5.0) == pytest.approx([4 ** (i / 5) for i in range(1, 5)])
    assert between({1.0: 10.0, 4.0: 8.0}, 5.0) == [] == beyond({1.0: 10.0, 4.0: 3.0}, 5.0)
    assert beyond({1.0: 10.0, 4.0: 8.0}, 5.0) == [16, 64, 256, 1024] and beyond({1.0: 4.0, 4.0: 2.0}, 5.0) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert nearest({1.0: 10.0, 4.0: 3.0}, 5.0) == 4.0 and nearest({1.0: 0.0, 2.0: 900.0}, 3.0) == 2.0


def test_methods_that_take_k_get_it_and_no_search(tmp_path):
    cell = Cell("independent", 16, 3.0)
    made = request(tmp_path).make(entry("latents/batch_topk"), {"momentum": 0.5}, 1, cell)
    assert made.arguments["k"] == 3 and made.arguments["momentum"] == 0.5 and made.arguments["dead_after"] == 12 * 32 // 40
    assert knob(entry("latents/topk"), {}) == "" and knob(entry("latents/jumprelu"), {}) == "sparsity"
    assert knob(entry("latents/relu"), {}) == "l1" and knob(entry("latents/relu"), {"l1": 0.1}) == ""


def test_a_short_run_shortens_schedules_unless_told_otherwise():
    of = lambda **own: build(entry("latents/jumprelu"), own, d=8, width=16, k=2, seed=0, steps=100, batch=32).arguments
    assert of()["bandwidth"] == 0.1 and of(bandwidth=0.3)["bandwidth"] == 0.3


@pytest.mark.parametrize(("name", "named"), [("latents/random", "trained"), ("weights/wanda", "dictionary")])
def test_methods_that_cannot_be_judged_so_are_refused(name, named):
    with pytest.raises(BadInput, match=named):
        usable(entry(name))


# ----------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("kind", ["independent", "contained", "antipodal", "circles"])
def test_the_truth_has_every_measure_at_its_best(kind):
    t = plant(kind, 4000, 16, 32, 3.0, noise=0.02)
    got = measures(perfect(t.codes, t.dictionary), t, signed=kind == "antipodal")
    assert set(got) == set(MEASURES) - {"shared"} - ({"absorbed"} if kind != "contained" else set())
    for name in ("mcc", "mmcs", "unique", "span", "size"):
        assert got[name] == pytest.approx(1, abs=1e-5), name
    noise = float((t.x - t.signal).square().sum() / (t.x - t.x.mean(0)).square().sum())
    assert got["l0"] == pytest.approx(3, rel=0.05) and got["fvu"] == pytest.approx(noise, rel=1e-3)
    assert got["dead"] == got["double"] == got.get("absorbed", 0) == 0 and abs(got["linear"]) < 0.05
    assert got["f1"] > (0.5 if kind == "circles" else 0.999)


def test_shrunk_codes_are_told_by_size_and_by_linear_error():
    t = plant("independent", 4000, 16, 32, 3.0, noise=0.0)
    got = measures(perfect(0.7 * t.codes, t.dictionary), t, signed=False)
    assert got["size"] == pytest.approx(0.7, abs=1e-4) and got["linear"] == pytest.approx(1, abs=1e-4)
    assert 0.1 > got["fvu"] > 0.09
    codes = torch.rand(500, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    codes = codes * (codes >= codes.topk(3).values[:, -1:])
    t = Truth(codes, codes, torch.eye(16), torch.full((16,), -1), torch.arange(16), codes)
    got = measures(perfect(0.7 * codes, torch.eye(16)), t, signed=False)
    assert got["fvu"] > 0.09 and got["pursued"] < 1e-9                    # the directions are right: solved anew, codes are not shrunk


def test_signs_matter_only_where_they_are_no_feature():
    t = plant("antipodal", 3000, 16, 32, 3.0)
    flip = torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)
    turned = perfect(t.codes * flip, t.dictionary * flip[:, None])
    assert measures(turned, t, signed=True)["mcc"] == pytest.approx(1)
    flat = plant("independent", 3000, 16, 32, 3.0)
    assert measures(perfect(flat.codes, flat.dictionary * flip[:, None]), flat, signed=False)["mcc"] < 0.8
    signs = perfect(flat.codes * flip, flat.dictionary * flip[:, None])     # a dictionary that signs its latents
    assert measures(signs, flat, signed=False)["mcc"] == pytest.approx(1)


def test_components_and_coordinates_give_their_best_k_terms():
    g = torch.Generator().manual_seed(0)
    t = plant("independent", 600, 8, 16, 2.0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    x = (torch.randn(600, 8, generator=g) * torch.tensor([5, 3, 1, 0.5, 0.2, 0.1, 0.1, 0.05])) @ turn + 3
    t = type(t)(x, t.codes, t.dictionary, t.parent, t.block, x)
    for name in ("pca", "neurons"):
        got = fixed(name, x, t, 3)
        centred = (x - x.mean(0)).double()
        basis = torch.linalg.svd(centred, full_matrices=False).Vh if name == "pca" else torch.eye(8).double()
        y = centred @ basis.T
        naive = torch.where(y.abs() >= y.abs().topk(3).values[:, -1:], y, 0.0) @ basis + x.mean(0)
        torch.testing.assert_close(got.x_hat.double(), naive, atol=1e-4, rtol=0)
        assert got.codes.l0 == 3


def test_sharing_is_averaged_over_the_other_seeds():
    eye = torch.eye(4)
    a, b = (perfect(torch.ones(2, 4), rows) for rows in (eye, torch.cat([eye[:2], -eye[2:]])))
    assert shared([a, a, b]) == [pytest.approx(0.75), pytest.approx(0.75), pytest.approx(0.5)] and shared([a]) == []


# ----------------------------------------------------------------------------------------------------------- the job


def test_every_cell_has_a_line_of_each_method_and_baseline(done):
    out, result = done
    for cell in ("independent-16-2", "contained-16-2"):
        lines = {line["method"]: line for line in result.of(cell)}
        assert set(lines) == {*BASELINES, "latents/topk", "latents/relu"}
        for name, line in lines.items():
            assert len(line["seeds"]) == (1 if name in ("truth", "pca", "neurons") else 2)
            assert ("absorbed" in line["seeds"][0]) == (cell.startswith("contained"))
            assert ("shared" in line["seeds"][0]) == (len(line["seeds"]) > 1)
        assert [a["seed"] for a in lines["latents/topk"]["arguments"]] == [0, 1]
        assert len({a["l1"] for a in lines["latents/relu"]["arguments"]}) == 1     # one penalty for all seeds
        assert lines["truth"]["seeds"][0]["mcc"] == pytest.approx(1)
    assert not (out / "training").exists()
    json.dumps(result.as_json(), allow_nan=False)


def test_pictures_and_tables(done, capsys):
    out, result = done
    tree = ET.parse(out / "mcc.svg")
    words = {e.text for e in tree.iter() if e.text}
    assert {"independent", "contained", "topk", "truth", "1.00"} <= words
    result.show(out)
    shown = capsys.readouterr().out
    assert "independent-16-2" in shown and "absorbed" in shown and "mean matched cosine" in shown
    assert figure({"seeds": [{"mcc": 0.5}, {"mcc": 0.7}]}, "mcc") == "0.60±.14" and figure({"seeds": [{}]}, "mcc") == "-"
    assert math.isnan(spread({"seeds": [{"mcc": 0.5}]}, "mcc")[1])


def test_lines_there_are_kept_and_methods_and_kinds_may_be_added(done, tmp_path):
    out, result = done
    before = (out / "results.jsonl").read_bytes()
    more = suite(request(out, ["latents/topk", "latents/gated"], ["independent"]), screen=quiet())
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before) and after[len(before) :].count(b"\n") == 1
    assert {line["method"] for line in more.of("independent-16-2")} == {*BASELINES, "latents/topk", "latents/relu", "latents/gated"}
    with pytest.raises(BadInput, match="other settings"):
        suite(request(out, steps=13), screen=quiet())


def test_a_run_cut_off_goes_on_to_the_same_lines(tmp_path, monkeypatch):
    """By SIGTERM in the middle of training: the checkpoint is taken up, and no bit of the results differs."""
    whole = suite(request(tmp_path / "a", kinds=["contained"], steps=24), screen=quiet())
    train = suite_module.train

    def cut(plan, stream, recipe, run, *, on_log):
        def log(record):
            if record.get("step") == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            on_log(record)

        return train(plan, stream, recipe, run, on_log=log)

    monkeypatch.setattr(suite_module, "train", cut)
    with pytest.raises(Halted):
        suite(request(tmp_path / "b", kinds=["contained"], steps=24), screen=quiet())
    monkeypatch.setattr(suite_module, "train", train)
    steps = []
    monkeypatch.setattr(suite_module, "train", lambda *a, on_log, **k: train(*a, **k, on_log=lambda r: (steps.append(r["step"]), on_log(r))))
    again = suite(request(tmp_path / "b", kinds=["contained"], steps=24), screen=quiet())
    assert again.lines == whole.lines and len(again.lines) == len(BASELINES) + 1
    assert min(steps) > 12                          # the first pass began where it was cut off


def test_the_phase_diagram_is_a_grid_of_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_module, "GRID", {"l0": (1.0, 12.0), "ratio": (1, 2)})
    result = suite(request(tmp_path / "run", kinds=[], suite="phase", seeds=1), screen=quiet())
    assert [cell.name for cell in result.cells] == ["independent-8-1", "independent-16-1", "independent-16-12"]    # 12 of 8 cannot be
    tree = ET.parse(tmp_path / "run" / "phase-latents__topk.svg")
    words = [e.text for e in tree.iter() if e.text]
    assert {"8", "16", "L0 1", "L0 12"} <= set(words) and len([e for e in tree.iter() if e.tag.endswith("rect")]) == 3


@pytest.mark.parametrize(("more", "named"), [
    ({"methods": []}, "no method"), ({"methods": ["latents/nothing"]}, "unknown method"), ({"suite": "all"}, "all"),
    ({"kinds": ["squares"]}, "squares"), ({"kinds": ["noisy", "noisy"]}, "twice"), ({"seeds": 0}, "seeds"), ({"batch": 500}, "batch"),
    ({"features": 18, "kinds": ["contained"]}, "features"),
    ({"settings": {"nothing": 1}}, "nothing"), ({"steps": 0}, "steps"), ({"width": 1}, "k=2"), ({"methods": ["neurons/teal"]}, "dictionary"),
    ({"settings": {"d_out": 4}}, "d_out"),
])
def test_requests_that_cannot_be_served_leave_nothing(tmp_path, more, named):
    with pytest.raises(BadInput, match=named):
        suite(request(tmp_path / "run", **more), screen=quiet())
    assert not (tmp_path / "run").exists()


def test_a_dictionary_of_another_shape_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(SuiteRequest, "make", lambda self, card, own, seed, cell: TopK(8, 16, k=2, d_out=5))
    with pytest.raises(BadInput, match="W_dec_FD of width 8"):
        suite(request(tmp_path / "run"), screen=quiet())
    assert not (tmp_path / "run").exists()


def test_a_grid_needs_values_for_its_labels():
    svg = grid_svg("a < b", ["x"], ["y", "z"], [[0.5], [math.nan]])
    assert "a &lt; b" in svg and svg.count("<rect") == 1
    for values in ([], [[0.1]], [[0.1], [0.1, 0.2]]):
        with pytest.raises(BadInput, match="grid"):
            grid_svg("t", ["x"], ["y", "z"], values)


def test_reading_a_trained_dictionary_counts_its_latents():
    t = plant("independent", 300, 8, 16, 2.0)
    method = build(entry("latents/topk"), {}, d=8, width=16, k=2, seed=0, steps=10, batch=32).eval()
    method.initialise(t.x)
    assert read(method, t.x).codes.l0 <= 2


def test_the_command_line_trains_judges_and_goes_on(tmp_path, capsys):
    from rarefy.cli import main

    words = ["judge", "latents/topk,latents/batch_topk", "--suite", "planted", "--kinds", "independent", "--steps", "2", "--seeds", "1", "--json"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [line["method"] for line in first["lines"]] == [*BASELINES, "latents/topk", "latents/batch_topk"]
    assert main(["judge", "latents/topk", *words[2:], "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == first["lines"]
    assert main(["judge", "latents/topk", "--suite", "nothing", "--out", str(tmp_path / "other")]) == 2
    assert "no suite 'nothing'" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["judge", "a", "b"]) == 2
    assert "one run folder" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "run")]) == 2
    assert "no page yet; a planted suite has pictures" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_trained_dictionaries_absorb_parents_and_prefixes_absorb_fewer(tmp_path):
    """Chanin et al. 2024: autoencoders told only to be sparse fold parents into children. Bussmann et al. 2025: nested ones hardly do."""
    asked = SuiteRequest(["latents/batch_topk", "latents/matryoshka"], tmp_path / "run", kinds=["contained"], seeds=2, steps=600)
    result = suite(asked, screen=quiet())
    absorbed = {name: result.mean("contained-64-4", name, "absorbed") for name in ("truth", "latents/batch_topk", "latents/matryoshka")}
    assert absorbed["truth"] == 0 and absorbed["latents/matryoshka"] < 0.15 < absorbed["latents/batch_topk"], absorbed
