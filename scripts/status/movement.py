"""Tells a rank that works from one that does not: progress, I/O and CPU time count, a heartbeat alone does not."""

from __future__ import annotations

from dataclasses import dataclass

from .phases import PASSIVE
from .processes import Sample
from .rank_files import RankStatus

# Idle threads of a rank (heartbeat, watchdogs) stay far below this share of a processor.
CPU_SHARE = 0.05
IO_BYTES = 1 << 20
# Shorter spans than this make too few clock ticks for a share.
_MIN_SPAN_S = 0.5


@dataclass
class Movement:
    """When a rank moved last (monotonic time), by what, and since when its process is stopped by a signal."""

    moved_at: float
    moved_by: str = "start"
    stopped_since: float | None = None
    _signature: object = None
    _cpu_at: float = 0.0
    _cpu_s: float | None = None
    _io_bytes: int | None = None
    _in_sight: bool | None = None

    def update(self, now: float, status: RankStatus, sample: Sample | None) -> None:
        """Take in what is known at monotonic time ``now``; ``sample`` is None for a process out of sight."""
        if sample is not None and sample.state == "T":
            self.stopped_since = now if self.stopped_since is None else self.stopped_since
        else:
            self.stopped_since = None
        signature = (status.phase, [phase.done for phase in status.phases])
        if signature != self._signature:
            if self._signature is not None:
                self._move(now, "progress")
            self._signature = signature
        worked = self._worked(now, status, sample)
        if worked and status.phase not in PASSIVE:
            self._move(now, worked)

    def _worked(self, now: float, status: RankStatus, sample: Sample | None) -> str | None:
        in_sight = sample is not None
        if in_sight != self._in_sight:
            self._in_sight, self._cpu_s, self._io_bytes = in_sight, None, None
        by_io = False
        if sample is not None and (self._io_bytes is None or sample.io_bytes - self._io_bytes >= IO_BYTES):
            by_io = self._io_bytes is not None
            self._io_bytes = sample.io_bytes
        # Out of sight, the rank's own heartbeats tell its CPU time and when that was.
        at, cpu_s = (now, sample.cpu_s) if sample is not None else (status.heartbeat, status.cpu_s)
        by_cpu = False
        if self._cpu_s is None:
            self._cpu_at, self._cpu_s = at, cpu_s
        elif (span := at - self._cpu_at) >= _MIN_SPAN_S:
            by_cpu = cpu_s - self._cpu_s >= CPU_SHARE * span
            self._cpu_at, self._cpu_s = at, cpu_s
        return "I/O" if by_io else "CPU time" if by_cpu else None

    def _move(self, now: float, by: str) -> None:
        self.moved_at, self.moved_by = now, by
