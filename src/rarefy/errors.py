"""What rarefy raises. Each message names the offending thing, what is allowed and what to try."""


class RarefyError(ValueError):
    """Base of every error that a user can cause or meet."""


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
