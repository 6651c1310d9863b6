"""The command line run in this process, on a tiny model folder and a folder of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import CONTEXT, Answer, Run, build_tiny, save_byte_tokenizer, words

from rarefy.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line: words, Paths and numbers."""

    def call(*words: Any) -> Answer:
        capsys.readouterr()
        code = main([str(w) for w in words])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny().save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with .txt, .py and .jsonl, also in a subfolder."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "inner").mkdir()
    for i in range(10):
        (folder / f"a{i}.txt").write_text(words(i, 40))
        (folder / "inner" / f"b{i}.py").write_text("".join(f"def f{n}(x):\n    return x + {n}  # {i}\n" for n in range(12)))
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": words(100 + i, 30)}) + "\n" for i in range(10)))
    return folder


@pytest.fixture
def fit_words(tiny: Path, corpus: Path, tmp_path: Path) -> list[Any]:
    """A small `rarefy fit`, from the model on; runs go to tmp_path/run."""
    return [
        tiny, "--site", "layers.0.resid_post", "--data", corpus, "--width", 64, "--k", 4, "--steps", 6, "--batch", 64, "--tokens", 4000,
        "--context", CONTEXT, "--lr", 0.01, "--out", tmp_path / "run",
    ]
