"""The exported page: whole, self-contained, and, in Chromium, drawn without running anything a report says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter

import pytest
from sample import sample_report

from rarefy.ui import export, render, serve, write_report
from rarefy.ui.export import bundle, module_order, static

HOSTILE = [
    "<img src=x onerror=\"document.title='OWNED'\">",
    "</script><script>document.title='OWNED'</script>",
    "<!--<script>",
    "javascript:document.title='OWNED'",
    "\u202eevil\u202c",
    "zero\u200bwidth",
    "\ud800",
    "\x00\x07",
    "]]>",
    "&lt;b&gt;",
    "\u2028",
    "A" * 1_048_576,
    "__proto__",
    "constructor",
]


def hostile_report():
    report = sample_report(63)
    report["latents"]["tokens"][: len(HOSTILE)] = HOSTILE
    report["latents"]["concepts"][:6] = HOSTILE[:6]
    report["title"] = HOSTILE[1]
    report["notes"] = HOSTILE
    report["made"]["command"] = HOSTILE[0]
    for unit in report["units"]:
        unit["verdict"] = unit["question"] = HOSTILE[0]
        unit["points"][1]["method"] = HOSTILE[0]
        unit["points"][2]["metrics"]["__proto__x<b>"] = {"mean": 1.0}
    report["curves"][0]["method"] = HOSTILE[1]
    report["costs"][0]["what"] = HOSTILE[2]
    return report


def test_modules_join_into_one_script():
    order = module_order()
    assert order[-1] == "main.js" and order.index("dom.js") < order.index("page.js")
    names = Counter(re.findall(r"^(?:async )?(?:const|let|function|class) (\w+)", bundle(), re.MULTILINE))
    assert [n for n, k in names.items() if k > 1] == []
    assert not re.search(r"^(import|export)\b", bundle(), re.MULTILINE)


def test_scripts_have_no_way_to_parse_html_or_reach_out():
    text = "".join(static(n) for n in module_order())
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "srcdoc",
        "http://",
        "https://",
    ):
        found = text.replace('"http://www.w3.org/2000/svg"', "")
        assert word not in found, word
    assert "url(" not in static("style.css") and "@import" not in static("style.css")


def test_policy_allows_exactly_what_is_inside(report):
    page = render(report)
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL).group(1)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    for text, kind in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in page
    assert "unsafe" not in page.split("</head>")[0].split("<style>")[0]


def test_data_block_cannot_be_left():
    page = render(hostile_report())
    assert page.count("<script") == 2 and page.count("</script>") == 2
    data = re.search(r'id="report">(.*?)</script>', page, re.DOTALL).group(1)
    assert "<" not in data and json.loads(data)["latents"]["tokens"][: len(HOSTILE)] == HOSTILE


def test_export_is_whole(report, tmp_path):
    path = export(report, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render(report) and [p.name for p in path.parent.iterdir()] == [
        "report.html"
    ]


@pytest.mark.browser
def test_draws_every_part(report, tmp_path, dump):
    dom, console = dump(export(report, tmp_path / "r.html").as_uri())
    assert console == ""
    for title in (
        "Latents",
        "Weights",
        "Neurons",
        "Attention",
        "Training",
        "Latent browser",
        "Cost",
        "Notes",
        "How it was made",
    ):
        assert re.search(rf"<h2[^>]*>{title}</h2>", dom), title
    points = sum(
        1 for u in report["units"] for p in u["points"] if p["role"] != "dense" and u["y"]["key"] in p["metrics"]
    )
    assert len(re.findall(r'<g class="point"', dom)) >= points
    assert dom.count('class="tok') >= 4 * 32 and 'class="contexts"' in dom and "NaN" not in dom.split('id="report"')[0]


@pytest.mark.browser
def test_of_a_crowd_those_on_the_front_stand_out(report, tmp_path, dump):
    """Twelve methods: m0 is best everywhere, the others are grey, unnamed in the picture, and can be brought out."""
    unit, methods = report["units"][0], [f"weights/m{i}" for i in range(12)]
    dense = next(p for p in unit["points"] if p["role"] == "dense")
    name = unit["y"]["key"]
    metric = lambda mean: {name: {"mean": mean, "low": mean - 0.001, "high": mean + 0.001}}  # noqa: E731
    made = [
        {"method": m, "role": "method", "budget": b, "density": b, "metrics": metric(i + 1 - b), "cost": {}}
        for i, m in enumerate(methods) for b in (0.2, 0.5)
    ]
    for few in (False, True):
        unit["points"] = [dense, *(p for p in made if not few or p["method"] in methods[:3])]
        report.update(units=[unit], tables=[{"title": "T", "note": "", "verdict": "m0 wins.", "head": ["a"], "rows": [["b"]]}])
        dom, console = dump(export(report, tmp_path / f"{few}.html").as_uri())
        shown = dom.split('<script type="application/json"')[0]
        names = re.findall(r'<text[^>]*class="label c\d"[^>]*>([^<]*)</text>', shown)
        back = shown.count('class="point back"')
        assert console == "" and '<p class="verdict">m0 wins.</p>' in shown
        assert (sorted(set(names)), back) == ((methods[:3], 0) if few else (["weights/m0"], 22)), names
        assert ("11 more, in grey" in shown and "Bring out" in shown) != few


@pytest.mark.browser
def test_hostile_text_is_text(tmp_path, dump):
    dom, console = dump(export(hostile_report(), tmp_path / "r.html").as_uri())
    shown = dom.split('<script type="application/json"')[0] + dom.split("</script>")[-1]
    assert console == "" and "<title>OWNED" not in dom and "<img" not in shown and "<!--" not in shown
    assert "<script" not in shown
    assert (
        "&lt;img src=x onerror=" in shown
        and "⟨U+202E⟩evil⟨U+202C⟩" in shown
        and "⟨U+D800⟩" in shown
        and "(1,048,576 characters)" in shown
    )
    assert len(shown) < 3_000_000


@pytest.mark.browser
def test_empty_report(report, tmp_path, dump):
    report.update(units=[], curves=[], latents=None, costs=[], notes=[], steps=[])
    dom, console = dump(export(report, tmp_path / "r.html").as_uri())
    assert console == "" and "How it was made" in dom and "aria-busy" not in dom.split("<script")[0]


@pytest.mark.browser
@pytest.mark.slow
def test_16k_latents_list_is_virtual(tmp_path, dump):
    dom, console = dump(export(sample_report(16384), tmp_path / "r.html").as_uri())
    assert console == "" and "16,384 of 16,384 latents" in dom and dom.count('role="option"') < 80


@pytest.mark.browser
def test_names_for_assistive_technology(report, tmp_path, dump):
    dom, _ = dump(export(report, tmp_path / "r.html").as_uri(), width=500)
    head = dom.split('<script type="application/json"')[0]
    assert re.search(r'<g class="point" tabindex="0" role="img" aria-label="[^"]+"', head)
    assert (
        head.count('role="listbox"') == 1
        and 'aria-activedescendant="latent-0"' in head
        and 'aria-expanded="false"' in head
    )
    for tag in re.findall(r"<(?:svg)(?=[^>]*viewBox)[^>]*>", head):
        assert "aria-label" in tag or 'aria-hidden="true"' in tag, tag


@pytest.mark.browser
def test_served_page_is_the_same_page(report, tmp_path, dump):
    ready, address = threading.Event(), []
    write_report(tmp_path / "run", report)
    threading.Thread(
        target=serve,
        args=(tmp_path / "run", 0),
        kwargs={"on_ready": lambda a: (address.append(a), ready.set())},
        daemon=True,
    ).start()
    assert ready.wait(10)
    served, console = dump(address[0])
    exported, _ = dump(export(report, tmp_path / "r.html").as_uri())
    main = re.compile(r"<main.*?</main>", re.DOTALL)
    assert console == "" and main.search(served).group() == main.search(exported).group()
