"""Progress on a terminal with rich, as plain lines without one; the only place, with the CLI, that prints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import printable

Update = Callable[[str], None]


class Screen:
    """Stages with a live line each.

    Args:
        quiet: keep standard output for the result (--json): stages are shown on standard error, if that is a terminal.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.stream = sys.stderr if quiet else sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet and not self.live
        self.stages: list[dict[str, Any]] = []
        self._console: Any = None

    @property
    def console(self) -> Any:
        """The rich console, made on first use."""
        if self._console is None:
            from rich.console import Console

            width = None if self.live else 150                  # a pipe has no edge to wrap at
            self._console = Console(file=self.stream, markup=False, highlight=False, quiet=self.quiet, width=width)
        return self._console

    def say(self, text: str) -> None:
        """One line, never broken: what it says may be copied."""
        self.console.print(printable(text), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Update]:
        """A named stage; call what is given with a short note to show how far it is."""
        began, last = time.perf_counter(), ""
        if self.live:
            from rich.text import Text

            with self.console.status(Text(name)) as status:
                def update(note: str) -> None:
                    nonlocal last
                    last = note
                    status.update(Text(printable(f"{name}  {note}")))

                yield update
        else:
            shown = began

            def update(note: str) -> None:
                nonlocal last, shown
                last = note
                if time.perf_counter() - shown > 10:
                    shown = time.perf_counter()
                    self.say(f"  {name}: {note}")

            yield update
        seconds = time.perf_counter() - began
        self.stages.append({"name": name, "seconds": round(seconds, 1), "note": last})
        self.say(f"{seconds:6.1f} s  {name}{'  ' + last if last else ''}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the rest numbers."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        self.console.print()


def silent() -> Screen:
    """One that shows nothing, for processes beside the first."""
    screen = Screen(quiet=True)
    screen.live, screen.quiet = False, True
    return screen


def points_table(screen: Screen, title: str, points: Sequence[Any], extra: Sequence[str] = ()) -> None:
    """Points as rows: budget, density, CE increase with its interval, KL, agreement, and `extra` metrics."""
    rows = []
    for p in points:
        ce, kl, top1 = (p.metrics.get(m) for m in ("ce_increase", "kl", "top1"))
        rows.append([
            p.method, "-" if p.unit == "latent" and p.role != "dense" and p.budget == 1 else f"{p.budget:.3g}", f"{p.density:.3g}",
            f"{ce.mean:+.4f} [{ce.low:+.4f}, {ce.high:+.4f}]" if ce else "-", f"{kl.mean:.4f}" if kl else "-",
            f"{top1.mean:.1%}" if top1 else "-", *(f"{p.metrics[m].mean:.4g}" if m in p.metrics else "-" for m in extra),
        ])
    screen.table(title, ["method", "budget", "density", "CE increase [95 %]", "KL", "top-1", *extra], rows)
