"""What goes into a run: model and text by hash and revision (U5), and no secret of who ran it (U6)."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy
from rarefy.store.run import read_run

sys.path.insert(0, str(Path(__file__).parent))
from real_run import make_model, make_text, request  # noqa: E402

CANARY = "hf_canaryCANARY0123456789abcdef"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GITHUB_TOKEN")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`rarefy fit` and `rarefy judge` as commands, with every kind of secret in the environment and the token in its file."""
    base = tmp_path_factory.mktemp("secret")
    make_model(base / "model")
    make_text(base / "text")
    (base / "home" / ".cache" / "huggingface").mkdir(parents=True)
    (base / "home" / ".cache" / "huggingface" / "token").write_text(CANARY)
    env = {**os.environ, **dict.fromkeys(SECRETS, CANARY), "HOME": str(base / "home"), "PYTHONPATH": str(Path(rarefy.__file__).parents[1])}
    asked = request(base)
    fit = ["fit", *asked.methods, asked.model, "--store"]
    for name in ("site", "data", "out", "width", "k", "steps", "batch", "context", "tokens"):
        fit += [f"--{name}", str(getattr(asked, name))]
    said = ""
    for words in (fit, ["judge", str(asked.out), "--against", "dense,latents/random", "--tokens", "600"]):
        done = subprocess.run([sys.executable, "-m", "rarefy", *words], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    return base, said


@pytest.mark.slow
def test_no_secret_or_host_is_kept_or_printed(made):
    base, said = made
    kept = b"".join(p.read_bytes() for p in sorted((base / "run").rglob("*")) if p.is_file())
    assert len(kept) > 100_000
    for text in (kept, said.encode()):
        assert CANARY.encode() not in text
    own = [w for w in (socket.gethostname(), socket.getfqdn()) if len(w) > 3 and w not in str(base)]
    assert [w for w in own if w.encode() in kept] == []


@pytest.mark.slow
def test_model_and_text_are_named_by_what_they_are(made):
    base, said = made
    digest = hashlib.sha256((base / "model" / "model.safetensors").read_bytes()).hexdigest()
    record = read_run(base / "run")["made"]
    assert record["model"]["sha256"] == digest and record["model"]["revision"] == "" and record["request"]["data"] == str(base / "text")
    assert json.loads((base / "run" / "report.json").read_text())["model"]["sha256"] == digest
    for word in ("model", str(base / "text"), digest[:12]):
        assert word in said
