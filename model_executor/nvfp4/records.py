"""One phase of a rank's start-up, and which phase the time of a thread is counted to."""

from __future__ import annotations

import time


class Record:
    """One phase: when it began (Unix time), how long it took (s), and what it has done of what it has to do.

    ``skipped`` is what this rank leaves to others.
    """

    __slots__ = ("done", "name", "rate", "seconds", "skipped", "started", "total")

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.time()
        self.seconds = 0.0
        self.done = {"tensors": 0, "layers": 0, "bytes": 0}
        self.total: dict[str, int] = {}
        self.rate: dict[str, float] = {}
        self.skipped: dict[str, int] = {}

    def add(self, **amounts: int) -> None:
        """Count ``amounts`` of tensors, layers or bytes as done."""
        for unit, amount in amounts.items():
            self.done[unit] += amount

    def expect(self, **amounts: int) -> None:
        """Add ``amounts`` of tensors, layers or bytes to what is to be done."""
        for unit, amount in amounts.items():
            self.total[unit] = self.total.get(unit, 0) + amount


class Track:
    """The phases of one thread: the innermost, from when on time is counted to it, and how many it is inside of."""

    __slots__ = ("current", "depth", "since")

    def __init__(self, current: Record | None) -> None:
        self.current = current
        self.since = time.perf_counter()
        self.depth = 0

    def switch(self, record: Record | None) -> Record | None:
        """Count time to ``record`` from now on, to none for None; return the record that it was counted to."""
        now = time.perf_counter()
        previous = self.current
        if previous is not None:
            previous.seconds += now - self.since
        self.since = now
        self.current = record
        return previous
