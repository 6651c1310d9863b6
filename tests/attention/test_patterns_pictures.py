"""Pictures of patterns, in SVG and in the terminal, and `rarefy draw`, against the masks they show."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from rarefy.attention.patterns import parse
from rarefy.attention.patterns.draw import SIDE, members, panels, svg, terminal
from rarefy.attention.patterns.zoo import EXAMPLES
from rarefy.cli import main
from rarefy.errors import BadInput

NS = "{http://www.w3.org/2000/svg}"


def painted(panel: ET.Element, length: int) -> torch.Tensor:
    """[T, S] colour number of each cell, 0 where none, by the boxes of the panel's paths."""
    cell, out = SIDE / length, torch.zeros(length, length, dtype=torch.long)
    for n, path in enumerate(panel.findall(f"{NS}path"), 1):
        for x, y, w, h in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.get("d") or ""):
            x, y, w, h = (round(float(v) / cell) for v in (x, y, w, h))
            assert not out[y : y + h, x : x + w].any()                      # nothing is painted twice
            out[y : y + h, x : x + w] = n
    return out


@pytest.mark.parametrize("text, heads, causal", [
    ("window(5) | sinks(2)", 1, True), ("heads(window(3), strided(4)) | tokens(0)", 4, False), ("blocks(4, around(1) | tokens(0))", 1, False),
])
def test_a_picture_paints_the_pairs_each_in_the_colour_of_its_member(text: str, heads: int, causal: bool) -> None:
    pattern, length = parse(text), 28
    tree = ET.fromstring(svg(pattern, length, heads=heads, causal=causal))
    shown = panels(pattern, heads, 1)
    drawn = tree.findall(f"{NS}g")
    assert len(drawn) == len(shown)
    for panel, group in zip(shown, drawn, strict=True):
        cells, taken = painted(group, length), torch.zeros(length, length, dtype=torch.bool)
        assert torch.equal(cells > 0, panel.one.mask(length, length, causal=causal))
        for n, member in enumerate(members(panel.one), 1 + causal):         # the first path of a causal panel is what may be seen
            mask = member.mask(length, length, causal=causal) & ~taken
            assert torch.equal(cells == n, mask)
            taken |= mask


def test_panels_are_the_distinct_heads_and_layers() -> None:
    pattern = parse("on_layers([1], full(), heads(window(2), window(2), own(), own()))")
    assert [(p.title, str(p.one)) for p in panels(pattern, 4, 3)] == [
        ("layer 0, 2, head 0-1", "window(2)"), ("layer 0, 2, head 2-3", "own()"), ("layer 1", "full()")]
    assert [p.title for p in panels(parse("window(3)"), 4, 3)] == [""]
    assert "and 4 more" in svg(parse("shards(12)"), 16, heads=12)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_can_be_drawn(name: str) -> None:
    one = EXAMPLES[name]
    tree = ET.fromstring(svg(one.at(64), 64, heads=one.heads, layers=one.layers, causal=one.causal, tables=one.tables(64)))
    assert tree.findall(f"{NS}g") and (tree.findtext(f"{NS}title") or "") == str(one.at(64))
    words = " ".join(t.text or "" for t in tree.findall(f"{NS}text"))
    assert len(words) > 5 and float(tree.get("height") or 0) < 900


def test_text_in_a_picture_is_escaped() -> None:
    out = svg(parse("window(3)"), 8, title="<script>alert(1)</script> & more")
    assert "<script>" not in out and ET.fromstring(out) is not None


def test_a_terminal_picture_has_two_queries_a_line_and_shrinks() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    assert terminal(mask) == "█▄ \n ▀▀"
    long = terminal(torch.ones(200, 200, dtype=torch.bool).tril())
    assert len(long.splitlines()) == 25 and all(len(line) == 50 for line in long.splitlines())


def test_lengths_that_cannot_be_drawn() -> None:
    for length in (1, 513):
        with pytest.raises(BadInput, match=f"length={length}"):
            svg(parse("window(3)"), length)


def test_draw_counts_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["draw", "window(4) | sinks(1)", "--length", "20", "--block", "8", "--json", "--out", str(tmp_path / "a.svg")]) == 0
    got = json.loads(capsys.readouterr().out)
    pairs = sum(min(p + 1, 4) + (p >= 4) for p in range(20))
    assert got["density"] == pytest.approx(pairs / 210) and got["pairs"] == pytest.approx(pairs / 20)
    assert got["block_density"] == pytest.approx(6 / 6) and got["flops_per_width"] == pytest.approx(4 * pairs / 20)
    assert ET.parse(tmp_path / "a.svg").getroot().tag == f"{NS}svg"
    assert main(["draw", 'same("row")', "--bind", "row=0,0,1,1", "--length", "4", "--both-ways"]) == 0
    out = capsys.readouterr().out
    assert "██  \n  ██" in out and "density 50.0000% of all pairs" in out
    assert main(["draw", "patterns/mate"]) == 0
    out = capsys.readouterr().out
    assert "head 0\n" in out and "head 1\n" in out


@pytest.mark.parametrize("words, message", [
    (["windw(3)"], "did you mean window"), (["patterns/bigbrd"], "did you mean patterns/bigbird"), (["window(3)", "--bind", "row"], "--bind 'row'"),
    (["same('row')"], "'row', which is not bound"), (["window(3)", "--length", "0"], "length=0"), (["patterns/mate", "--length", "9"], "64 and more"),
    (["window(3)", "--heads", "0"], "heads=0"), (["attention/quest"], "cannot be read|not understood"),
    (["edges('g')", "--bind", "g=0:1,2"], "--bind"),
])
def test_draw_refuses_by_name(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
