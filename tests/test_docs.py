"""What the README and the docs say is so: tables match the catalogue, links lead somewhere, snippets run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "SECURITY.md"]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = [(page, body) for page in PAGES if page.exists() for kind, body in FENCED.findall(page.read_text(encoding="utf-8")) if kind == "python"]

sys.path.insert(0, str(ROOT / "scripts"))


def test_the_table_of_methods_is_the_catalogue():
    from make_docs import between, methods, table

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert between(text, "methods", methods()) == text, "run scripts/make_docs.py"
    assert (ROOT / "docs/methods.md").read_text(encoding="utf-8") == table(), "run scripts/make_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def environment(folder):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PYTHON)), ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_snippets_run(number, tmp_path):
    got = subprocess.run(
        [sys.executable, "-c", PYTHON[number][1]], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert got.returncode == 0, got.stderr[-3000:]


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path):
    """Word for word, but for fewer training steps, less text and fewer budgets, which cost minutes."""
    blocks = [body for kind, body in FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8")) if kind == "sh"]
    lines = [line for body in blocks for line in body.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) >= 8
    for line in lines:
        words = [w.replace("400", "20").replace("0.3:0.9", "0.5,0.9") for w in shlex.split(line)]
        if words[1] in ("fit", "judge", "sweep"):
            words += ["--tokens", "70000" if words[1] == "fit" else "6000"]
        got = subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
        assert got.returncode == 0, f"{line}\n{got.stdout[-2000:]}\n{got.stderr[-2000:]}"
    assert (tmp_path / "sae.html").stat().st_size > 100_000 and (tmp_path / "pruned" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(script, tmp_path):
    got = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert got.returncode == 0 and "BROKEN" not in got.stdout, got.stdout[-2000:] + got.stderr[-3000:]
