"""Two ranks that load in simulated time, and what the status service and the server answer about them then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from .render import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from status.judge import ENDED_STATE, PROGRESSING, Health, Limits, Verdict, judge
from status.movement import Movement
from status.phases import READ, READY
from status.rank_files import Phase, RankStatus

_URL = "http://127.0.0.1:8000/health"


@dataclass
class Start:
    """One start of the server at time ``began``: ranks report after ``import_s`` and are ready after ``load_s``.

    ``moves_every``: seconds between two tensors. ``stalls_at``: when the ranks stop. ``dies_at``: when rank 1 dies.
    """

    import_s: float = 60.0
    load_s: float = 2400.0
    moves_every: float = 10.0
    stalls_at: float = float("inf")
    dies_at: float = float("inf")
    unhealthy_at: float = float("inf")
    began: float = 0.0

    def ranks(self, now: float) -> list[RankStatus]:
        """What the ranks' files say at ``now``."""
        age = now - self.began
        if age < self.import_s:
            return []
        ready = self.load_s <= min(age, self.stalls_at)
        done = int(min(age, self.stalls_at, self.load_s) / self.moves_every)
        reading = Phase(READ, self.began, age, {"tensors": done}, {"tensors": 10**9}, {})
        phases = (reading, Phase(READY, self.began + self.load_s, 0.0, {}, {}, {})) if ready else (reading,)
        return [
            RankStatus(
                "run",
                rank,
                2,
                2,
                "host",
                100 + rank,
                self.began,
                now,
                READY if ready else READ,
                None,
                0.0,
                phases,
                owner=None if rank == 1 and age >= self.dies_at else 0,
            )
            for rank in (0, 1)
        ]

    def healthy(self, now: float) -> bool:
        """Whether the server answers /health with 200."""
        age = now - self.began
        return self.load_s <= min(age, self.stalls_at, self.dies_at) and age < self.unhealthy_at


@dataclass
class World:
    """The starts of one pod, the next one at each restart.

    ``service_away``: whether the status service is silent. ``forgets``: whether the entrypoint removes the files of the
    start before, as it does unless MEGA_MOE_RUN_ID is set.
    """

    starts: list[Start]
    limits: Limits = field(default_factory=Limits)
    service_away: Callable[[float], bool] = lambda now: False
    forgets: bool = True
    _current: int = 0
    _movements: dict[tuple[int, float], Movement] = field(default_factory=dict)
    _seen: tuple[float, Verdict] | None = None
    _bad_since: float | None = None

    def restart(self, now: float) -> None:
        self._current = min(self._current + 1, len(self.starts) - 1)
        self.starts[self._current].began = now

    def answer(self, port: int | str, path: str, now: float) -> bool:
        """Whether a probe of ``path`` succeeds."""
        verdict = self.verdict(now)
        if path == "/health":
            return self.starts[self._current].healthy(now)
        if self.service_away(now):
            return False
        if path == "/startupz":
            return verdict.state == READY
        assert path == "/livez", path
        return verdict.state in (READY, PROGRESSING, ENDED_STATE)

    def verdict(self, now: float) -> Verdict:
        """The judgement of scripts/status/judge.py, with the files of the start before until this one's are there."""
        if self._seen is not None and self._seen[0] == now:
            return self._seen[1]
        start = self.starts[self._current]
        ranks = start.ranks(now)
        if not ranks and self._current and not self.forgets:
            before = self.starts[self._current - 1].ranks(start.began)
            ranks = [RankStatus(**(vars(status) | {"owner": None})) for status in before]
        moved = []
        for status in ranks:
            movement = self._movements.setdefault((status.rank, status.process_started), Movement(moved_at=now))
            movement.update(now, status, None)
            moved.append((status, movement))
        if start.healthy(now):
            self._bad_since, health = None, Health(_URL, 200, "", 0.0)
        else:
            self._bad_since = now if self._bad_since is None else self._bad_since
            health = Health(_URL, None, "connection refused", self._bad_since)
        verdict = judge(now, start.began, moved, None, health, self.limits)
        self._seen = (now, verdict)
        return verdict
