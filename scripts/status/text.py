"""The log line: what the slowest rank is doing, how far, how fast, how long still, and what is unusual."""

from __future__ import annotations

from .collector import Snapshot
from .estimate import phase_remaining_s, rate_per_s
from .judge import PROGRESSING, slowest
from .movement import Movement
from .phases import READY
from .rank_files import RankStatus

_PREFIXES = ("", "k", "M", "G", "T")
# A rank silent for less than this needs no mention.
_QUIET_S = 30.0


def amount(value: float, unit: str) -> str:
    """``value`` in words: bytes as 1.2 GB, counts as 12,345."""
    if unit != "bytes":
        return f"{value:,.0f}"
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{1 if power else 0}f} {_PREFIXES[power]}B"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 12 min 03 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def line(snapshot: Snapshot) -> str:
    """The log line for ``snapshot``."""
    unready = [pair for pair in snapshot.ranks if pair[0].phase != READY]
    if snapshot.verdict.state == PROGRESSING and unready and len(snapshot.ranks) == snapshot.expected:
        parts = _starting(snapshot, unready)
    elif snapshot.verdict.state == READY:
        parts = [snapshot.verdict.reason, _timings(snapshot), compiled(snapshot)]
    else:
        parts = [snapshot.verdict.reason]
    parts += [f"trouble: {problem}" for problem in snapshot.problems]
    return f"{snapshot.verdict.state} after {duration(snapshot.elapsed_s)}: {'; '.join(filter(None, parts))}"


def compiled(snapshot: Snapshot) -> str | None:
    """What was compiled this start, by server where there are several; None where no entrypoint tells."""
    texts = [(server.port, text) for server in snapshot.servers if (text := server.compiled_text()) is not None]
    if len(texts) < 2:
        return f"compiled this start: {texts[0][1]}" if texts else None
    return "compiled this start: " + ", ".join(f"port {port}: {text}" for port, text in texts)


def _starting(snapshot: Snapshot, unready: list[tuple[RankStatus, Movement]]) -> list[str]:
    last = slowest([status for status, _ in unready])
    parts = [f"{len(snapshot.ranks) - len(unready)} of {len(snapshot.ranks)} ranks ready"]
    parts.append(f"rank {last.rank} is last: {_progress(last)}")
    if snapshot.eta_s is not None:
        parts.append(f"ready in about {duration(snapshot.eta_s)}")
    silent = {status.rank: snapshot.monotonic - movement.moved_at for status, movement in unready}
    quiet = [f"rank {rank} silent for {duration(seconds)}" for rank, seconds in silent.items() if seconds >= _QUIET_S]
    return parts + quiet[:3] + ([f"{len(quiet) - 3} more ranks silent"] if len(quiet) > 3 else [])


def _progress(status: RankStatus) -> str:
    current = status.current()
    if current is None:
        return status.phase
    done = [
        f"{amount(current.done.get(unit, 0), unit)} of {amount(total, unit)}{'' if unit == 'bytes' else f' {unit}'}"
        for unit, total in current.total.items()
        if total
    ]
    unit = current.unit()
    if unit == "bytes" and (rate := rate_per_s(status, current, unit)):
        done.append(f"{amount(rate, unit)}/s")
    if (left := phase_remaining_s(status)) is not None:
        done.append(f"{duration(left)} left in this phase")
    return f"{status.phase}, {', '.join(done)}" if done else f"{status.phase} for {duration(current.seconds)}"


def _timings(snapshot: Snapshot) -> str:
    phases = snapshot.as_json()["phases"]
    return ", ".join(f"{phase['name']} {phase['seconds']:.0f} s" for phase in phases if phase["seconds"] >= 0.5)
