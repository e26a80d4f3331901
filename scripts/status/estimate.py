"""How long it will still take: from the rate of the running phase, and for the rest from the start before this one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from .phases import CAPTURE, COMPILE, KV_CACHE, LAYER_TEST, MODEL, ORDER, PREPARE, READ, START, UPLOAD
from .rank_files import Phase, RankStatus


def phase_remaining_s(status: RankStatus) -> float | None:
    """Seconds that the current phase of a rank will still take, or None if nothing tells."""
    current = status.current()
    if current is None or (unit := current.unit()) is None:
        return None
    left = current.total[unit] - current.done.get(unit, 0)
    rate = rate_per_s(status, current, unit)
    return None if left < 0 or not rate else left / rate


def rate_per_s(status: RankStatus, phase: Phase, unit: str) -> float | None:
    """Amount of ``unit`` per second: lately where the rank measured that, else on average."""
    if (lately := phase.rate.get(unit, 0.0)) > 0:
        return lately
    # Reading and uploading alternate tensor by tensor, and share their counts.
    names = (READ, UPLOAD) if phase.name in (READ, UPLOAD) else (phase.name,)
    seconds = sum(each.seconds for each in status.phases if each.name in names)
    return phase.done.get(unit, 0) / seconds if seconds > 0 and phase.done.get(unit) else None


# In the order in which they begin; reading and uploading alternate, and compiling goes on after the KV cache is made.
_GROUPS = ((START,), (MODEL,), (READ, UPLOAD), (PREPARE,), (LAYER_TEST,), (KV_CACHE,), (COMPILE,), (CAPTURE,))


class History:
    """The duration of each phase in the last start that became ready, kept in a file (None: not kept)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
                recorded = json.loads(path.read_text())["phase_seconds"]
                self._seconds = {name: float(recorded[name]) for name in ORDER if name in recorded}

    def remaining_s(self, status: RankStatus) -> float | None:
        """Seconds until ``status`` is ready, or None without a record of an earlier start."""
        if not self._seconds:
            return None
        spent = {phase.name: phase.seconds for phase in status.phases}
        reached = max((index for index, group in enumerate(_GROUPS) if spent.keys() & set(group)), default=0)
        remaining = 0.0
        for index, group in enumerate(_GROUPS):
            expected = max(0.0, sum(self._seconds.get(name, 0.0) - spent.get(name, 0.0) for name in group))
            if status.phase in group:
                measured = phase_remaining_s(status)
                remaining += expected if measured is None else measured
            elif index >= reached:
                remaining += expected
        return remaining

    def save(self, ranks: list[RankStatus]) -> None:
        """Record the longest duration over ``ranks`` of each phase; a failure to write is not worth more than None."""
        if self._path is None:
            return
        seconds = {name: phase_seconds(ranks, name) for name in ORDER}
        temporary = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"phase_seconds": {n: s for n, s in seconds.items() if s is not None}}))
            os.replace(temporary, self._path)


def phase_seconds(ranks: list[RankStatus], name: str) -> float | None:
    """The longest time that a rank has spent in phase ``name``, None if none has been in it."""
    return max((phase.seconds for status in ranks for phase in status.phases if phase.name == name), default=None)
