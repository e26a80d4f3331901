"""Looks at all ranks once per interval and keeps what was seen: the snapshot that every output is made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .estimate import History, phase_remaining_s, phase_seconds, rate_per_s
from .judge import Health, Limits, Verdict, judge
from .movement import Movement
from .phases import ORDER, READY, WAITING, WARM_UP
from .processes import sample
from .rank_files import RankFiles, RankStatus
from .server_files import ServerStatus
from .server_files import read as read_servers


@dataclass(frozen=True)
class Snapshot:
    """What was seen at Unix time ``at`` (``monotonic``: the same instant for comparing); all durations in seconds."""

    at: float
    monotonic: float
    started: float
    elapsed_s: float
    eta_s: float | None
    verdict: Verdict
    ranks: tuple[tuple[RankStatus, Movement], ...]
    expected: int | None
    problems: tuple[str, ...]
    other_runs: tuple[str, ...]
    health: Health | None
    limits: Limits
    servers: tuple[ServerStatus, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The body of /startup."""
        statuses = [status for status, _ in self.ranks]
        seconds = {name: phase_seconds(statuses, name) for name in (*ORDER, WAITING)}
        seconds[WARM_UP] = max((each.warm_up.seconds for each in self.servers if each.warm_up), default=None)
        return {
            "state": self.verdict.state,
            "reason": self.verdict.reason,
            "code": self.verdict.code,
            "run": statuses[0].run if statuses else None,
            "time": self.at,
            "started": self.started,
            "elapsed_s": round(self.elapsed_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "stall_after_s": self.limits.stall_after_s,
            "ranks_expected": self.expected,
            "phases": [
                {"name": name, "seconds": round(longest, 1)} for name, longest in seconds.items() if longest is not None
            ],
            "ranks": [self._rank_json(status, movement) for status, movement in self.ranks],
            "servers": [server.as_json() for server in self.servers],
            "health": self.health and {"url": self.health.url, "code": self.health.code, "error": self.health.error},
            "problems": list(self.problems),
            "other_runs": list(self.other_runs),
        }

    def _rank_json(self, status: RankStatus, movement: Movement) -> dict[str, Any]:
        current = status.current()
        unit = current and current.unit()
        return {
            "rank": status.rank,
            "host": status.host,
            "pid": status.pid,
            "alive": status.alive,
            "in_sight": bool(status.owner),
            "stopped_by_signal": movement.stopped_since is not None,
            "phase": status.phase,
            "fraction": current and current.fraction(),
            "done": current.done if current else {},
            "total": current.total if current else {},
            "per_second": {unit: rate_per_s(status, current, unit)} if current and unit else {},
            "phase_eta_s": phase_remaining_s(status),
            "silent_s": round(self.monotonic - movement.moved_at, 1),
            "moved_by": movement.moved_by,
            "heartbeat_age_s": round(self.at - status.heartbeat, 1),
            "error": status.error,
            "phases": [
                {"name": phase.name, "started": phase.started, "seconds": round(phase.seconds, 1)}
                | {"done": phase.done, "total": phase.total}
                for phase in status.phases
            ],
        }


class Collector:
    """Makes a snapshot at each ``look``; ``snapshot`` is the newest, and may be read from any thread."""

    def __init__(
        self,
        files: RankFiles,
        limits: Limits,
        expected: int | None = None,
        health: Callable[[], Health | None] = lambda: None,
        history: History | None = None,
    ) -> None:
        self._files = files
        self._limits = limits
        self._expected = expected
        self._health = health
        self._history = history or History(None)
        # Since when there are no ranks, monotonic and Unix time.
        self._waiting_since = time.monotonic(), time.time()
        self._movements: dict[tuple[str, int, float], Movement] = {}
        self._ready_at: tuple[str | None, float] | None = None
        self._warming_at = float("-inf")
        self.snapshot = self.look()

    def look(self) -> Snapshot:
        """Read the files and /proc, and judge."""
        ranks = self._files.read()
        samples = sample(status.owner for status in ranks if status.owner)
        now = time.monotonic()
        if ranks:
            self._waiting_since = now, time.time()
        movements = {}
        for status in ranks:
            key = (status.run, status.rank, status.process_started)
            movement = movements[key] = self._movements.get(key) or Movement(moved_at=now)
            movement.update(now, status, samples.get(status.owner or 0))
        self._movements = movements
        # A copy of each: the outputs read a snapshot while the next one is being made.
        seen = [
            (status, Movement(**vars(movement))) for status, movement in zip(ranks, movements.values(), strict=True)
        ]
        health = self._health()
        problems = list(self._files.problems)
        servers = read_servers(self._files.directory, problems)
        problems += [server.warm_up.error for server in servers if server.warm_up and server.warm_up.error]
        if any(server.pending for server in servers):
            self._warming_at = now
        if health is not None:
            # Until the warm-up is over, /health is bad on purpose.
            health = replace(health, bad_since=max(health.bad_since, self._warming_at))
        at = time.time()
        verdict = judge(
            now,
            self._waiting_since[0],
            seen,
            self._expected,
            health,
            self._limits,
            ending=self._files.ending,
            refusal=self._files.refusal,
            servers=servers,
            at=at,
        )
        started = min((status.process_started for status in ranks), default=self._waiting_since[1])
        self.snapshot = Snapshot(
            at=at,
            monotonic=now,
            started=started,
            elapsed_s=self._elapsed(ranks, verdict, started),
            eta_s=0.0 if verdict.state == READY else self._eta(ranks),
            verdict=verdict,
            ranks=tuple(seen),
            expected=self._expected or (max(len(ranks), ranks[0].ranks_here) if ranks else None),
            problems=tuple(problems),
            other_runs=tuple(self._files.other_runs),
            health=health,
            limits=self._limits,
            servers=servers,
        )
        return self.snapshot

    def _elapsed(self, ranks: list[RankStatus], verdict: Verdict, started: float) -> float:
        """Seconds since the run began, counted until it was ready for the first time."""
        run = ranks[0].run if ranks else None
        if verdict.state == READY and (self._ready_at is None or self._ready_at[0] != run):
            self._ready_at = (run, time.time())
            if ranks:
                self._history.save(ranks)
        ready_at = self._ready_at[1] if self._ready_at is not None and self._ready_at[0] == run else time.time()
        return max(0.0, ready_at - started)

    def _eta(self, ranks: list[RankStatus]) -> float | None:
        estimates = [self._history.remaining_s(status) for status in ranks]
        return max((estimate for estimate in estimates if estimate is not None), default=None)
