"""Reads the ranks' status files, and who of them still lives, from one directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
# Ranks of one start begin within seconds of each other, and beat every five; a server takes longer to start again.
RESTART_S = 15.0
# A file's time is the kernel's coarse clock: up to a tick, 10 ms, behind what a process read before it wrote the file.
TICK_S = 0.05
UNITS = ("tensors", "layers", "bytes")

# struct flock of Linux on 64-bit processors: type, whence, start, length, process
_FLOCK = "hhqqi0q"


@dataclass(frozen=True)
class Phase:
    """One phase of one rank: start (Unix time), duration (s), amounts done, to do, and per second, by unit."""

    name: str
    started: float
    seconds: float
    done: dict[str, int]
    total: dict[str, int]
    rate: dict[str, float]

    def unit(self) -> str | None:
        """The unit that says best how far this phase is, or None without a total."""
        return next((unit for unit in ("bytes", "layers", "tensors") if self.total.get(unit)), None)

    def fraction(self) -> float | None:
        """How much of the phase is done, 0 to 1."""
        unit = self.unit()
        return None if unit is None else min(1.0, self.done.get(unit, 0) / self.total[unit])


@dataclass(frozen=True)
class RankStatus:
    """What one rank wrote last. ``owner``: its process as seen here, 0 if it lives out of sight, None if it is dead."""

    run: str
    rank: int
    ranks: int
    ranks_here: int
    host: str
    pid: int
    process_started: float
    heartbeat: float
    phase: str
    error: str | None
    cpu_s: float
    phases: tuple[Phase, ...]
    owner: int | None = field(default=None, compare=False)

    @property
    def alive(self) -> bool:
        return self.owner is not None

    def current(self) -> Phase | None:
        """The record of the phase that the rank is in."""
        return next((phase for phase in self.phases if phase.name == self.phase), None)

    def was_in(self, name: str) -> bool:
        return any(phase.name == name for phase in self.phases)


def parse(text: str, owner: int | None) -> RankStatus:
    """Return the status that ``text`` holds.

    Raises:
        ValueError: it is not complete, or of another format.
    """
    with complete(text, FORMAT, "the server") as data:
        phases = tuple(
            Phase(
                str(item["name"]),
                float(item["started"]),
                float(item["seconds"]),
                {unit: int(item["done"].get(unit, 0)) for unit in UNITS},
                {unit: int(amount) for unit, amount in item["total"].items()},
                {unit: float(amount) for unit, amount in item["rate"].items()},
            )
            for item in data["phases"]
        )
        numbers = {name: int(data[name]) for name in ("rank", "ranks", "ranks_here", "pid")}
        times = {name: float(data[name]) for name in ("process_started", "heartbeat", "cpu_s")}
        texts = {name: str(data[name]) for name in ("run", "host", "phase")}
        return RankStatus(**numbers, **times, **texts, error=data["error"], phases=phases, owner=owner)


@contextlib.contextmanager
def complete(text: str, expected: int, writer: str) -> Iterator[dict[str, Any]]:
    """Yield the content of a status file of format ``expected`` to a block that takes what it needs from it.

    Raises:
        ValueError: it is no JSON, of another format, or the block misses something in it.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        if data["format"] != expected:
            raise ValueError(
                f"format {data['format']!r}, expected {expected}: {writer} and this service differ in version"
            )
        yield data
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"incomplete: {type(error).__name__}: {error}") from error


def lock_owner(path: Path) -> int | None:
    """Return the process that holds a record lock on ``path``: 0 if out of sight, None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else max(0, pid)


def _of_this_start(members: list[RankStatus]) -> list[RankStatus]:
    """Leave out ranks that were long silent before the first living one began: a run's name may be used again."""
    began = min((member.process_started for member in members if member.alive), default=float("-inf"))
    return [member for member in members if member.alive or member.heartbeat >= began - RESTART_S]


def remove_ended(directory: Path) -> None:
    """Remove what earlier starts left in ``directory``; the files of a run of which a rank lives stay, and those of a
    living entrypoint.

    Raises:
        OSError: a file cannot be removed.
    """
    held = [path.stem for path in directory.glob("*.lock") if lock_owner(path) is not None]
    living = {name.rpartition("-rank")[0] or name for name in held}
    for suffix in (".json", ".lock", ".tmp", ".ending", ".refused", ".hold"):
        for path in directory.glob(f"*{suffix}"):
            if path.stem.rpartition("-rank")[0] not in living and path.stem not in living:
                path.unlink(missing_ok=True)


class RankFiles:
    """The newest run in ``directory``, or run ``run_id`` only.

    A run of which every process was dead and silent before this service started is of the past and is left out.
    """

    def __init__(self, directory: Path, run_id: str | None, started: float) -> None:
        self.directory = directory
        self._run_id = run_id
        self._started = started
        self._last_good: dict[Path, RankStatus] = {}
        self.problems: list[str] = []
        self.other_runs: list[str] = []
        self.ending = False
        self.refusal: str | None = None

    def read(self) -> list[RankStatus]:
        """Return the ranks of the run, by rank.

        ``ending`` tells whether its server was told to end, ``refusal`` why a newer start ended before it had ranks;
        ``problems`` and ``other_runs`` say what was left out.
        """
        self.problems = []
        found = {path: status for path in sorted(self.directory.glob("*-rank*.json")) if (status := self._one(path))}
        self._last_good = found
        runs: dict[str, list[RankStatus]] = {}
        for status in found.values():
            runs.setdefault(status.run, []).append(status)
        past = {run for run, members in runs.items() if not any(map(self._of_now, members))}
        eligible = [run for run in runs if run not in past and self._run_id in (None, run)]
        chosen = max(eligible, key=lambda run: max(member.process_started for member in runs[run]), default=None)
        self.other_runs = sorted(run for run in runs if run != chosen)
        members = _of_this_start(runs[chosen]) if chosen is not None else []
        self.ending = chosen is not None and self._is_ending(chosen, members)
        self.refusal = self._newest_refusal(members)
        return sorted(members, key=lambda status: status.rank)

    def _is_ending(self, run: str, members: list[RankStatus]) -> bool:
        try:
            announced = (self.directory / f"{run}.ending").stat().st_mtime
        except OSError:
            return False
        return announced + TICK_S >= max(member.process_started for member in members)

    def _newest_refusal(self, members: list[RankStatus]) -> str | None:
        """Why a start after ``members`` began, and after this service did, was refused."""
        after = max((member.process_started for member in members), default=self._started)
        found = []
        for path in self.directory.glob(f"{self._run_id or '*'}.refused"):
            try:
                found.append((path.stat().st_mtime, json.loads(path.read_text())["why"]))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.problems.append(f"{path.name}: {error}")
        at, why = max(found, default=(0.0, None))
        return why if at + TICK_S >= max(after, self._started) else None

    def _of_now(self, status: RankStatus) -> bool:
        return status.alive or status.heartbeat >= self._started

    def _one(self, path: Path) -> RankStatus | None:
        owner = lock_owner(path.with_suffix(".lock"))
        try:
            return parse(path.read_text(), owner)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.problems.append(f"{path.name}: {error}")
            last = self._last_good.get(path)
            return last and RankStatus(**{**vars(last), "owner": owner})
