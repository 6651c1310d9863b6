"""The command line among shells, pipes, terminals and signals."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_tools import CONTEXT, Run, refuses, snapshot

from rarefy import catalogue
from rarefy.cli import app
from rarefy.jobs import fit as fit_job
from rarefy.jobs.screen import Screen

COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
"""All there are, so that none is forgotten here."""


def shell(*words: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "rarefy", *map(str, words)], capture_output=True, timeout=120, env={**os.environ, **settings})


def test_no_help_imports_anything_heavy() -> None:
    code = f"""
import sys
from rarefy.cli import main
for words in [["--help"], *([c, "--help"] for c in {COMMANDS!r}), ["methods", "--json"], ["fit"], ["nonsense"]]:
    main(words)
    heavy = {{"torch", "transformers", "numpy", "numba", "safetensors", "rich.console", "starlette"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(run: Run, command: str) -> None:
    got = run(command, "--help")
    assert got.code == 0 and got.out.startswith(f"Usage: rarefy {command}") and "--json" in got.out
    assert command in run("--help").out


def test_words_that_are_no_command_line(run: Run) -> None:
    assert run().code == 2
    refuses(run("fitt"), "No such command 'fitt'", "'fit'", "rarefy --help")
    refuses(run("fit", "a", "b", "--wdith", "3"), "--wdith", "--width", "rarefy fit --help")
    refuses(run("fit", "a", "b", "--width", "wide"), "--width", "rarefy fit --help")
    refuses(run("apply", "weights/wanda", "builtin"), "--out", "rarefy apply --help")
    refuses(run("judge"), "run", "rarefy judge --help")


def test_methods_and_sites(run: Run, tiny: Path) -> None:
    assert [m["name"] for m in run("methods", "--json").json["methods"]] == [e.name for e in catalogue.CARDS]
    plain = run("methods").out.splitlines()
    assert len(plain) == len(catalogue.CARDS) and all(e.name in line and e.title in line for e, line in zip(catalogue.CARDS, plain, strict=True))
    found = run("sites", tiny, "layers.1.*_proj", "--json").json
    assert found["schema"] == 1 and {s["name"].split(".")[-1]: s["d"] for s in found["sites"]} == {
        "q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48, "down_proj": 32,
    }
    assert "layers.0.resid_post" in run("sites", tiny, "layers.*.resid_post").out and len(run("sites", tiny).out.splitlines()) > 30


def test_json_is_all_that_standard_output_holds(run: Run, tiny: Path, corpus: Path, fit_words: list[Any], tmp_path: Path) -> None:
    data = ["--data", corpus, "--context", CONTEXT]
    for words in (
        ["fit", "latents/topk", *fit_words], ["judge", tmp_path / "run", "--tokens", 300], ["check", tmp_path / "run"], ["methods"], ["sites", tiny],
        ["sweep", "neurons/wina", tiny, *data, "--tokens", 300, "--budget", 0.5, "--out", tmp_path / "s"],
        ["apply", "weights/magnitude", tiny, *data, "--calibration", 300, "--out", tmp_path / "a"],
        ["show", tmp_path / "run", "--export", tmp_path / "page.html"],
    ):
        got = run(*words, "--json")
        assert got.code == 0 and got.err == "" and got.json["schema"] == 1, words
    refused = run("judge", tmp_path / "nowhere", "--json")
    assert refused.code == 2 and refused.out == ""


def test_a_server_says_where_it_is_until_interrupted(run: Run, tiny: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [tiny, "--data", corpus, "--context", CONTEXT, "--tokens", 300, "--budget", 0.5, "--out", tmp_path / "s"]
    assert run("sweep", "neurons/wina", *words).code == 0

    def served(self: Any, sockets: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", served)
    got = run("show", tmp_path / "s", "--port", 0)
    assert got.code == 0 and "http://127.0.0.1:" in got.out and "Ctrl-C ends" in got.out
    assert run("show", tmp_path / "s", "--port", 0, "--json").json["url"].startswith("http://127.0.0.1:")


# ----------------------------------------------------------------------------------------------- terminals, pipes


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, {"NO_COLOR": "1", "TERM": "dumb"}, {"COLUMNS": "20"}, {"PYTHONIOENCODING": "cp1252"},
], ids=lambda e: "-".join(e))
def test_any_encoding_and_width(environment: dict[str, str], tmp_path: Path) -> None:
    odd = tmp_path / "caf\u00e9 \u2192 \u65e5\u672c"
    got = shell("check", odd, **environment)
    assert got.returncode == 2 and b"Traceback" not in got.stderr and b"does not exist" in got.stderr and b"caf" in got.stderr
    odd.mkdir()
    (odd / "run.json").write_text("{")
    damaged = shell("check", odd, **environment)            # on standard output, where Python's own default is to fail
    assert damaged.returncode == 1 and damaged.stdout.startswith(b"damaged: ") and b"caf" in damaged.stdout and damaged.stderr == b""
    assert b"\x1b" not in got.stdout + got.stderr + damaged.stdout


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\x1b[31mred"
    got = subprocess.run([sys.executable, "-m", "rarefy", "check", odd], capture_output=True, timeout=60)
    assert got.returncode == 2 and b"Traceback" not in got.stderr and b"\x1b" not in got.stderr and got.stderr.count(b"\n") == 1


def test_a_reader_that_goes_away() -> None:
    with subprocess.Popen([sys.executable, "-m", "rarefy", "methods", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert b"Traceback" not in said and b"Exception" not in said


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, errors="backslashreplace", write_through=True)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", ["12", "200"])
def test_a_live_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str, width: str) -> None:
    stream = Terminal(encoding)
    monkeypatch.setattr("sys.stdout", stream)
    for name, value in {"COLUMNS": width, "LINES": "20", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    assert screen.live
    with screen.stage("read caf\u00e9 [red]") as update:
        update("tokens [bold]\x1b[31m")
    screen.table("t", ["method", "CE [95 %]"], [["weights/wanda", "+0.1 [-0.2, +0.3]"]])
    screen.say("runs/a very long folder name that no line may break/x" * 3)
    shown = stream.bytes.getvalue().decode(encoding)
    assert "[bold]" in shown and "\\x1b[31m" in shown and "runs/a very long folder name that no line may break/x" in shown
    assert [s["name"] for s in screen.stages] == ["read caf\u00e9 [red]"] and screen.stages[0]["note"].startswith("tokens")
    if width == "200":
        assert "+0.1 [-0.2, +0.3]" in shown


def test_with_json_a_terminal_sees_progress_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal("utf-8"), Terminal("utf-8")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with Screen(quiet=True).stage("work"):
        pass
    assert out.bytes.getvalue() == b"" and b"work" in err.bytes.getvalue()


# -------------------------------------------------------------------------------------------------------- signals


def kill_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal when training reports a step."""
    shown = fit_job.progress

    def progress(record: dict[str, Any]) -> str:
        if record["step"] == step:
            os.kill(os.getpid(), signum)
        return shown(record)

    monkeypatch.setattr(fit_job, "progress", progress)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_leaves_a_checkpoint(
    run: Run, fit_words: list[Any], tmp_path: Path, signum: int, code: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*fit_words, "--steps", 60]
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        kill_at(25, signum, patch)
        got = run("fit", "latents/topk", *words)
    stopped = re.fullmatch(r"rarefy: stopped at step (25|26); the same command goes on from there", got.line)
    assert got.code == code and stopped
    assert signal.getsignal(signum) is before
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir()] == [f"step-{int(stopped[1]):012d}"]
    assert not (tmp_path / "run/methods").exists()
    refuses(run("judge", tmp_path / "run"), "to the end first")
    assert run("fit", "latents/topk", *words).code == 0
    assert run("fit", "latents/topk", *words, "--out", tmp_path / "whole").code == 0
    assert snapshot(tmp_path / "run/methods") == snapshot(tmp_path / "whole/methods")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["fit", "sweep", "apply"])
def test_a_signal_at_other_work_leaves_nothing_half_done(
    run: Run, tiny: Path, corpus: Path, tmp_path: Path, command: str, signum: int, code: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [command, "weights/wanda", tiny, "--data", corpus, "--context", CONTEXT, "--budget", 0.5, "--out", tmp_path / "deep/x"]

    def calibrate(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(1)

    with monkeypatch.context() as patch:
        for job in ("fit", "sweep", "apply"):
            patch.setattr(f"rarefy.jobs.{job}.calibrate", calibrate)
        got = run(*words)
    goes_on = "" if command == "apply" else "; the same command goes on with what is there"
    assert got.code == code and got.line == f"rarefy: stopped{goes_on}"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_model_is_saved(run: Run, tiny: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupt)
    got = run("apply", "weights/magnitude", tiny, "--data", corpus, "--context", CONTEXT, "--out", tmp_path / "x")
    assert got.code == 130 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process_and_a_real_signal(run: Run, fit_words: list[Any], tmp_path: Path, signum: int, code: int) -> None:
    words = ["fit", "latents/topk", *fit_words, "--steps", 2500]
    log = tmp_path / "run/log.jsonl"
    command = [sys.executable, "-m", "rarefy", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while not log.exists() and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        refuses(run(*words), f"being written by process {process.pid}")
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code and said.startswith(b"rarefy: stopped at step ") and said.count(b"\n") == 1
    assert run("check", tmp_path / "run").code == 0
    assert run(*words).code == 0
    assert run(*words, "--out", tmp_path / "whole").code == 0
    assert snapshot(tmp_path / "run/methods") == snapshot(tmp_path / "whole/methods")
