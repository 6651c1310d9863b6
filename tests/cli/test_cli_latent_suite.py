"""`rarefy judge --suite latents`: rows of the table, resuming, refusals, the page; and the parts it is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import CONTEXT, Run, refuses

from rarefy.errors import BadInput
from rarefy.fidelity import Interval
from rarefy.jobs.latent_bench import lens_of
from rarefy.jobs.latent_verdict import LEAST, PRACTICAL, PROXIES, Row, agreement, disagreement, grouped, spearman
from rarefy.latents.topk import TopK
from rarefy.method import Sparse
from rarefy.selection import Selection
from rarefy.store.lines import read_lines
from rarefy.ui.export import static

TOKENS = 6000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of Python in packages, enough of them to be held out on both sides."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(150):
        package = folder / f"p{i % 6}"
        package.mkdir(exist_ok=True)
        lines = [f"import path\nfrom tools import Part{i}\n"]
        for n in range(2):
            lines.append(f"def go_{n}(path, other={n}):\n    # note {i}\n    value = self.path(path=other, kind='{n}')[{i}]\n")
            lines.append(f"    return Part{i}(value, (path.name, other))\n\n")
        (package / f"m{i}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def words(tiny: Path, source: Path) -> list[Any]:
    return [
        tiny, "--site", "layers.0.resid_post", "--data", source, "--width", 64, "--k", 4, "--steps", 5, "--batch", 64, "--tokens", 2000,
        "--context", CONTEXT, "--lr", 0.01,
    ]


def fitted(run: Run, words: list[Any], out: Path, *more: Any) -> Path:
    assert run("fit", "latents/topk,latents/relu", *words, "--out", out, *more).code == 0
    return out


@pytest.mark.slow
def test_the_suite_from_two_seeds_to_the_page_and_again(run: Run, words: list[Any], tmp_path: Path) -> None:
    runs = [fitted(run, words, tmp_path / f"s{s}", "--seed", s) for s in (0, 1)]
    out = tmp_path / "suite"
    first = run("judge", *runs, "--suite", "latents", "--tokens", TOKENS, "--out", out, "--json")
    assert first.code == 0, first.err
    answer = first.json
    points = {p["method"]: p for p in answer["points"]}
    assert list(points) == ["raw neurons", "PCA", "latents/random", "supervised means", "supervised least squares", "latents/topk", "latents/relu"]
    assert [points[m]["role"] for m in ("PCA", "supervised means", "latents/topk")] == ["baseline", "baseline", "method"]
    assert points["latents/topk"]["note"] == "2 seeds"
    for name in ("fvu", "probe_1", "absorption_kinds", "removal", "perturbation", "senses", "unlearn_selective"):
        assert name in points["latents/topk"]["metrics"], (name, answer["left_out"])
    assert points["raw neurons"]["metrics"]["fvu"]["mean"] == 0
    skyline = points["supervised means"]["metrics"]
    assert skyline["match_f1"]["mean"] == pytest.approx(1)
    # Not 1: the rule of the mean difference looks at sizes, and may take a concept that a smaller one implies for the smaller one.
    assert skyline["probe_1"]["mean"] > max(0.97, *(points[m]["metrics"]["probe_1"]["mean"] for m in points if "supervised" not in m))
    assert "unlearn_selective" not in points["supervised means"]["metrics"]
    page = (out / "report.html").read_text()
    assert "Latents in use" in page and "supervised least squares" in page

    # The same dictionary on the same text, by the other way to judge.
    judged = run("judge", runs[0], "--tokens", TOKENS, "--json").json
    (plain,) = (p for p in judged["points"] if p["method"] == "latents/topk")
    lines = [r for r in read_lines(out / "suite.jsonl") if r["name"] == "latents/topk" and r["test"] == "fidelity"]
    assert lines[0]["metrics"]["fvu"]["mean"] == pytest.approx(plain["metrics"]["fvu"]["mean"], rel=1e-5)
    assert lines[0]["metrics"]["loss_recovered"]["mean"] == pytest.approx(plain["metrics"]["loss_recovered"]["mean"], rel=1e-4)

    # Killed in the middle of a line: what is whole stays, the rest is made again, and comes out the same.
    results = out / "suite.jsonl"
    whole = results.read_bytes()
    kept = whole.splitlines(keepends=True)
    results.write_bytes(b"".join(kept[:9]) + kept[9][:20])
    again = run("judge", *runs, "--suite", "latents", "--tokens", TOKENS, "--out", out, "--json")
    assert again.json["points"] == answer["points"] and results.read_bytes() == whole


def test_runs_that_cannot_stand_beside_each_other_are_refused(run: Run, words: list[Any], tmp_path: Path) -> None:
    one = fitted(run, words, tmp_path / "one")
    other = fitted(run, ["layers.1.resid_post" if w == "layers.0.resid_post" else w for w in words], tmp_path / "other")
    refuses(run("judge", one, other, "--suite", "latents", "--out", tmp_path / "no"), "site ['layers.1.resid_post']", "one model, site and context")
    assert run("fit", "latents/topk", *words, "--target", "layers.1.resid_post", "--out", tmp_path / "across").code == 0
    refuses(run("judge", tmp_path / "across", "--suite", "latents", "--out", tmp_path / "no"), "transcoders", "give autoencoders")
    assert not (tmp_path / "no").exists()


def test_text_that_is_not_python_is_refused_and_leaves_nothing(run: Run, words: list[Any], tmp_path: Path) -> None:
    one = fitted(run, words, tmp_path / "one")
    for i in range(30):
        (tmp_path / "prose").mkdir(exist_ok=True)
        (tmp_path / "prose" / f"{i}.txt").write_text("there is no code in here, only words (\n" * 9)
    refuses(run("judge", one, "--suite", "latents", "--data", tmp_path / "prose", "--tokens", 500, "--out", tmp_path / "no"), "Python source")
    assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------------------------------------- the lens


def test_a_lens_holds_what_the_dictionary_adds_up() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 12) * 3 + 1
    method = TopK(12, 40, k=5)
    method.initialise(x)
    lens = lens_of(method.eval(), x)
    rest = method(x) - lens.codes.rows(torch.arange(3000)) @ lens.decoder_FD
    assert (rest - rest[0]).abs().max() < 1e-4 and lens.codes.l0 <= 5


class _Signed(Sparse):
    """Channels with their signs; `squared` adds what no sum of directions gives."""

    name, unit = "latents/signed", "latent"

    def __init__(self, width: int = 6, squared: bool = False) -> None:
        super().__init__()
        self.squared, self.W_dec_FD = squared, torch.eye(width)

    def select(self, x: torch.Tensor) -> Selection:
        return Selection(x.shape[-1], x, mask_=torch.ones_like(x, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x**2 if self.squared else x


def test_codes_of_both_signs_are_latents_of_opposite_directions() -> None:
    x = torch.randn(100, 6)
    lens = lens_of(_Signed(), x)
    assert lens.codes.width == 12 and bool((lens.codes.value_M > 0).all())
    torch.testing.assert_close(lens.codes.rows(torch.arange(100)) @ lens.decoder_FD, x)


def test_what_is_no_sum_of_directions_is_refused() -> None:
    with pytest.raises(BadInput, match="weighted sum"):
        lens_of(_Signed(squared=True), torch.randn(100, 6))


# ------------------------------------------------------------------------------------------------------------ the verdict


def at(mean: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(mean, mean if low is None else low, mean if high is None else high)


def test_seeds_become_a_mean_with_its_range_and_lone_rows_keep_their_interval() -> None:
    rows = [Row("a", "method", 0.1, 10, "a", {"l0": at(2), "fvu": at(v, 0, 9)}) for v in (1.0, 2.0, 6.0)]
    alone = Row("b", "baseline", 1.0, 10, "b", {"l0": at(5), "fvu": at(4, 3, 5)})
    one, other = grouped([rows[0], alone, *rows[1:]])
    assert (one.metrics["fvu"], one.note, one.density) == (Interval(3, 1, 6), "3 seeds", 0.2)
    assert (other.metrics["fvu"], other.note, other.density) == (Interval(4, 3, 5), "", 0.5)


def test_spearman_is_scipys_also_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(5, (2, 9), generator=generator).tolist()
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_the_page_knows_which_way_is_better() -> None:
    text = static("format.js")
    high = set(re.findall(r'"(\w+)"', text[text.index("const HIGH") : text.index("]);", text.index("const HIGH"))]))
    for name, way in {**PROXIES, **PRACTICAL}.items():
        assert (name in high) == (way == "high"), name


def test_disagreement_names_the_metric_and_the_dictionaries() -> None:
    """FVU falls as L0 rises; one metric follows it, one runs against it, and absorption is better when lower."""
    rows = [
        Row(f"m{i}", "method", 0.1, 10, f"m{i}", {"l0": at(10 * i), "fvu": at(1 - i / 10), "probe_1": at(i), "absorption": at(i)})
        for i in range(1, 5)
    ]
    base = Row("base", "baseline", 1, 10, "base", {name: at(0) for name in rows[0].metrics})
    points = grouped([*rows, base])
    assert agreement(points)["fvu"] == {"probe_1": pytest.approx(1), "absorption": pytest.approx(-1)}
    said = disagreement(points)
    assert "absorption -1.00; m4 (L0 40) is best by fvu, m1 (L0 10) by absorption" in said and "probe_1" not in said
    assert disagreement(points[: LEAST - 1]) == ""
    flat = [Row(r.name, r.role, r.budget, r.width, r.group, {k: v for k, v in r.metrics.items() if k != "absorption"}) for r in rows]
    assert disagreement(grouped(flat)) == "No practical metric ranks the 4 dictionaries (L0 10 to 40) against fvu (least rho +1.00)."
