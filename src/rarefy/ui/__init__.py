"""The page of a run: one JSON report, one renderer, shown by a local server or exported as a single HTML file."""

from __future__ import annotations

from .export import export, render
from .report import read_report, tidy, write_report
from .schema import SCHEMA, Report, validate
from .server import make_app, serve

__all__ = [
    "SCHEMA",
    "Report",
    "export",
    "make_app",
    "read_report",
    "render",
    "serve",
    "tidy",
    "validate",
    "write_report",
]
