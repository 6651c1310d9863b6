"""What rarefy raises. Each message names the offending thing, what is allowed and what to try."""


def printable(text: str) -> str:
    """`text` as one line for a terminal: line ends, escape sequences and lone surrogates are written out.

    File names, tensor names and tokens come from outside and may hold any of them.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RarefyError(ValueError):
    """Base of every error that a user can cause or meet."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadInput(RarefyError):
    """An argument, name or piece of data that cannot be used."""


class Damaged(RarefyError):
    """A file that is truncated, altered, foreign or incomplete."""


class Unsupported(RarefyError):
    """A valid request that this method, model or machine cannot serve."""


class Halted(Exception):
    """SIGINT or SIGTERM came during training; a checkpoint was written first. Not an error of the input."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step, self.signum = step, signum
