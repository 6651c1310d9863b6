"""One self-contained HTML file with the page's scripts, its style and the report: opens from disk, needs no network.

The scripts are the server's own modules, joined in order of import with their import and export words taken off
(so no two modules may use one top-level name). The content policy allows exactly this script and style, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..store.atomic import write_atomic
from ..store.sealed import seal_page
from .report import dumps, tidy

ENTRY = "main.js"
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class)\b)", re.MULTILINE)


def static(name: str) -> str:
    """Text of one file of the page."""
    return (files("rarefy.ui") / "static" / name).read_text(encoding="utf-8")


def module_order(entry: str = ENTRY) -> list[str]:
    """Modules that `entry` needs, each after those it imports."""
    order: list[str] = []

    def visit(name: str) -> None:
        for needed in _IMPORT.findall(static(name)):
            if needed not in order:
                visit(needed)
        if name not in order:
            order.append(name)

    visit(entry)
    return order


def bundle() -> str:
    """All modules as one script."""
    return "".join(_EXPORT.sub("", _IMPORT.sub("", static(name))) for name in module_order())


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(report: Mapping[str, Any]) -> str:
    """The page as HTML text. Raises BadInput for a report that `validate` refuses."""
    report = tidy(report)
    # `<` is written as an escape so that no token can close the element or open a comment.
    data = dumps(report).replace("<", "\\u003c")
    script, style = "\n" + bundle(), "\n" + static("style.css")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    title = escape(report["title"].encode("utf-8", "replace").decode())
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="page" aria-busy="true"><p class="wait">Reading the report …</p></main>
<noscript><p class="wait">This page draws itself with JavaScript; its numbers are in the data block.</p></noscript>
<script type="application/json" id="report">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""
    return seal_page(page.encode("utf-8")).decode("utf-8")


def export(report: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path`, whole or not at all; returns the path. Raises BadInput as `validate`."""
    path = Path(path)
    text = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode("utf-8"))
    return path
