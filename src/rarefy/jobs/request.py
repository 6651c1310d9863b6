"""What every command's request shares: the record by which its folder is known again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Request:
    """Base of the dataclasses of what commands were asked for; each has a folder `out` that it goes to."""

    def record(self: DataclassInstance) -> dict[str, Any]:
        """Plain JSON, without that folder: a run may be moved."""
        return {key: value for key, value in asdict(self).items() if key != "out"}
