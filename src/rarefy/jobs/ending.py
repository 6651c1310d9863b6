"""How a command ends: in one line and an exit code, whatever stopped it. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from ..errors import Halted, RarefyError, printable

GOES_ON = ("demo", "fit", "sweep", "track")
"""Commands that take up what an interrupted run of the same command left."""
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""ClickException, wherever this version of typer has it from."""


class _Terminated(BaseException):
    """SIGTERM came outside of training; an exception, so that what is half-written is cleared away."""


def guarded(app: Callable[..., Any], arguments: Sequence[str], *, debug: bool) -> int:
    """Run a typer application; returns its exit code.

    Args:
        debug: let errors through, with their traceback.
    """
    with _surroundings(debug):
        try:
            code = app(list(arguments), prog_name="rarefy", standalone_mode=False)
            sys.stdout.flush()
            return _interrupted(arguments, 130) if code == 130 else code if isinstance(code, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted(arguments, 130)
        except _Terminated:
            return _interrupted(arguments, 143)
        except Halted as halt:
            return _stop(str(halt), 128 + halt.signum)
        except _CLICK_ERROR as error:
            return _misused(error)
        except RarefyError as error:
            if debug:
                raise
            return _stop(str(error), 2)
        except OSError as error:
            if debug:
                raise
            return _refused(error)
        except Exception as error:
            if debug:
                raise
            return _failed(error)


@contextlib.contextmanager
def _surroundings(debug: bool) -> Iterator[None]:
    """Warnings as lines, SIGTERM as an exception, and no output encoding that a name could break."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if debug or (category is UserWarning and f"{os.sep}rarefy{os.sep}" in filename):
            _say(str(message))

    def end(signum: int, frame: Any) -> None:
        raise _Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, end) if main_thread else None
    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.filterwarnings("always", category=UserWarning, module=r"rarefy\.")
        try:
            yield
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def _say(message: str) -> None:
    typer.echo(printable(f"rarefy: {message}"), err=True)


def _stop(message: str, code: int) -> int:
    _say(message)
    return code


def _interrupted(arguments: Sequence[str], code: int) -> int:
    command = next((a for a in arguments if not a.startswith("-")), "")
    return _stop("stopped" + ("; the same command goes on with what is there" if command in GOES_ON else ""), code)


def _misused(error: Any) -> int:
    """A command line that is none."""
    said = " ".join(error.format_message().split()).rstrip(".") if type(error).__name__ != "NoArgsIsHelpError" else ""
    if not said:
        error.show()
        return 2
    context = getattr(error, "ctx", None)
    return _stop(f"{said} ({context.command_path if context else 'rarefy'} --help shows how)", 2)


def _refused(error: OSError) -> int:
    """Errors of the operating system that no part of rarefy has put into words."""
    if isinstance(error, BrokenPipeError):                  # the reader of our output has gone, as `head` does: end without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    hint = "; free some space" if error.errno == errno.ENOSPC else ""
    return _stop(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{hint}", 2)


def _failed(error: Exception) -> int:
    """A failure of rarefy's own, or of memory."""
    said = str(error).strip().partition("\n")[0][:300]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in said)):
        return _stop("not enough memory for that; take a smaller width, batch or context, or fewer tokens", 2)
    return _stop(f"a fault of rarefy itself: {type(error).__name__}: {said}; --debug shows where", 1)
