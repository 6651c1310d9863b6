from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample import sample_report  # noqa: E402

_SMALL = sample_report(111)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report():
    return copy.deepcopy(_SMALL)


@pytest.fixture
def dump(tmp_path):
    """Run a page in headless Chromium; gives the document as HTML after scripts, and the console's lines."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")

    def run(url: str, width: int = 1400, wait_ms: int = 5000) -> tuple[str, str]:
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
            " --disable-background-networking --disable-component-update --disable-sync"
        )
        done = subprocess.run(
            [
                CHROMIUM,
                *flags.split(),
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={width},1200",
                f"--virtual-time-budget={wait_ms}",
                "--enable-logging=stderr",
                "--v=0",
                "--dump-dom",
                url,
            ],
            capture_output=True,
            timeout=90,
            check=True,
        )
        log = done.stderr.decode("utf-8", "replace")
        return done.stdout.decode("utf-8", "replace"), "\n".join(line for line in log.splitlines() if "CONSOLE" in line)

    return run
