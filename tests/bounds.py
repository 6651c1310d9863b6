"""A bound on what reading something hostile may cost."""

from __future__ import annotations

import resource
import time
import tracemalloc


class Bounds:
    """Context in which at most so many seconds and bytes may be used. Tracing slows allocation by a few times; allow for it.

    Args:
        traced: bytes that Python allocates at once. grown: bytes by which the process grows.
    """

    def __init__(self, seconds: float, traced: float, grown: float = float("inf")) -> None:
        self.seconds, self.traced, self.grown = seconds, traced, grown

    def __enter__(self) -> None:
        tracemalloc.start()
        self.began, self.before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        seconds, traced = time.perf_counter() - self.began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) * 1024
        assert seconds < self.seconds and traced < self.traced and grown < self.grown, (seconds, traced, grown)
