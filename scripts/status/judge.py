"""One answer from what is known of all ranks: ready, progressing (and why not ready yet), stalled or failed."""

from __future__ import annotations

from dataclasses import dataclass

from .movement import Movement
from .phases import ENDED, ORDER, PASSIVE, READY
from .rank_files import RankStatus
from .server_files import ServerStatus

PROGRESSING = "progressing"
STALLED = "stalled"
FAILED = "failed"
ENDED_STATE = "stopped"
STATES = (READY, PROGRESSING, STALLED, FAILED, ENDED_STATE)

_CODES = {READY: 200, PROGRESSING: 503, STALLED: 500, FAILED: 500, ENDED_STATE: 503}


@dataclass(frozen=True)
class Limits:
    """After how many seconds silence is a stall: of every rank, of one rank, and before the first report."""

    stall_after_s: float = 300.0
    rank_stall_after_s: float = 1800.0
    first_report_after_s: float = 1800.0


@dataclass(frozen=True)
class Health:
    """The last answer of the server's own /health: status code, or None and the error; since when it is not 200."""

    url: str
    code: int | None
    error: str
    bad_since: float


@dataclass(frozen=True)
class Verdict:
    """The state, and the sentence that explains it."""

    state: str
    reason: str

    @property
    def code(self) -> int:
        """The HTTP status of /startupz."""
        return _CODES[self.state]


def judge(
    now: float,
    started: float,
    ranks: list[tuple[RankStatus, Movement]],
    expected: int | None,
    health: Health | None,
    limits: Limits,
    ending: bool = False,
    refusal: str | None = None,
    servers: tuple[ServerStatus, ...] = (),
    at: float = 0.0,
) -> Verdict:
    """Judge at monotonic time ``now``, which is the Unix time ``at``.

    ``started`` is since when there are no ranks, if there are none, ``expected`` how many ranks this host should have,
    ``ending`` whether the server was told to end, ``refusal`` why a newer start ended before it had ranks or during its
    warm-up, and ``servers`` what the entrypoints tell.
    """
    if refusal is not None:
        return Verdict(FAILED, f"the server refused to start: {refusal}")
    if not ranks:
        return _without_ranks(now, started, health, limits)
    return (
        _failure([status for status, _ in ranks], ending)
        or _end([status for status, _ in ranks], ending)
        or _freeze(now, ranks, limits)
        or _missing(now, ranks, expected, limits)
        or _stall(now, ranks, limits)
        or _warm_up(at, ranks, servers, limits)
        or _readiness(now, ranks, health, limits)
    )


def name(status: RankStatus) -> str:
    """How a rank is called in sentences."""
    return f"rank {status.rank} (pid {status.pid} on {status.host})"


def slowest(ranks: list[RankStatus]) -> RankStatus:
    """The rank that is furthest behind."""

    def key(status: RankStatus) -> tuple[int, float]:
        position = ORDER.index(status.phase) if status.phase in ORDER else len(ORDER)
        if status.phase not in ORDER and status.phase not in {READY, *ENDED}:
            # A waiting rank is as far as the last phase it went through.
            position = max((ORDER.index(p.name) for p in status.phases if p.name in ORDER), default=0) + 0.5
        current = status.current()
        return position, (current and current.fraction()) or 0.0

    return min(ranks, key=key)


def _without_ranks(now: float, started: float, health: Health | None, limits: Limits) -> Verdict:
    if health is not None and health.code == 200:
        return Verdict(READY, f"{health.url} answers 200; no rank reports (MEGA_MOE_STATUS_DIR)")
    waited = now - started
    reason = f"no rank has reported in {waited:.0f} s"
    if limits.first_report_after_s and waited > limits.first_report_after_s:
        return Verdict(STALLED, f"{reason}: the server has not come to its workers, or MEGA_MOE_STATUS_DIR differs")
    return Verdict(PROGRESSING, f"{reason}: the server is importing and configuring itself")


def _failure(ranks: list[RankStatus], ending: bool) -> Verdict | None:
    failed = [f"{name(status)} failed in {status.error}" for status in ranks if status.error]
    # A server that was told to end kills its ranks unless it has been given time (--shutdown-timeout).
    dead = [status for status in ranks if not status.alive and not status.error and not ending]
    # After a death the others are ended on purpose: the first cause is the one that did not say good-bye.
    died = [f"{name(status)} died in phase {status.phase}" for status in dead if status.phase not in ENDED]
    early = [f"{name(status)} ended before it was ready" for status in dead if not status.was_in(READY)]
    reasons = failed + died or early
    return Verdict(FAILED, "; ".join(reasons)) if reasons else None


def _end(ranks: list[RankStatus], ending: bool) -> Verdict | None:
    ended = [status for status in ranks if status.phase in ENDED or not status.alive]
    if not ended and not ending:
        return None
    return Verdict(ENDED_STATE, f"the server is ending: {len(ended)} of {len(ranks)} ranks have")


def _freeze(now: float, ranks: list[tuple[RankStatus, Movement]], limits: Limits) -> Verdict | None:
    for status, movement in ranks:
        if movement.stopped_since is not None and (silent := now - movement.stopped_since) >= limits.stall_after_s:
            return Verdict(STALLED, f"{name(status)} has been stopped by a signal for {silent:.0f} s: kill -CONT it")
    return None


def _missing(
    now: float, ranks: list[tuple[RankStatus, Movement]], expected: int | None, limits: Limits
) -> Verdict | None:
    first = ranks[0][0]
    expected = max(len(ranks), first.ranks_here if expected is None else expected)
    if len(ranks) == expected:
        return None
    here = {status.rank for status, _ in ranks}
    missing = sorted(set(range(first.ranks)) - here) if expected == first.ranks else []
    which = f": {', '.join(map(str, missing))} missing" if missing else ""
    reason = f"{len(ranks)} of {expected} ranks have reported{which}"
    stall = _stall(now, ranks, limits)
    return Verdict(STALLED, f"{reason}; {stall.reason}") if stall else Verdict(PROGRESSING, reason)


def _stall(now: float, ranks: list[tuple[RankStatus, Movement]], limits: Limits) -> Verdict | None:
    unready = [(status, movement) for status, movement in ranks if status.phase != READY]
    if not unready:
        return None
    working = [(status, movement) for status, movement in unready if status.phase not in PASSIVE] or unready
    status, movement = max(working, key=lambda pair: pair[1].moved_at)
    if (silent := now - movement.moved_at) >= limits.stall_after_s:
        nothing = f"has not moved for {silent:.0f} s (no progress, I/O or CPU time)"
        if len(working) == 1:
            return Verdict(STALLED, f"{name(status)} {nothing} in phase {status.phase}")
        return Verdict(STALLED, f"every rank {nothing}; the last was {name(status)} in phase {status.phase}")
    status, movement = min(working, key=lambda pair: pair[1].moved_at)
    if (silent := now - movement.moved_at) >= limits.rank_stall_after_s:
        return Verdict(STALLED, f"{name(status)} has not moved for {silent:.0f} s in phase {status.phase}, others have")
    return None


def _warm_up(
    at: float, ranks: list[tuple[RankStatus, Movement]], servers: tuple[ServerStatus, ...], limits: Limits
) -> Verdict | None:
    """Ready ranks serve nobody before the warm-up requests are answered; until then /health is not 200 on purpose.

    The entrypoint bounds every request and the whole. It is trusted for as long as its heart beats.
    """
    pending = [server for server in servers if server.pending]
    if not pending or any(status.phase != READY for status, _ in ranks):
        return None
    server = min(pending, key=lambda each: each.heartbeat)
    reason = f"all {len(ranks)} ranks are ready; {server.progress()}"
    if (silent := at - server.heartbeat) >= limits.stall_after_s:
        return Verdict(STALLED, f"{reason}, but the entrypoint has not reported for {silent:.0f} s")
    return Verdict(PROGRESSING, reason)


def _readiness(now: float, ranks: list[tuple[RankStatus, Movement]], health: Health | None, limits: Limits) -> Verdict:
    waiting = [status for status, _ in ranks if status.phase != READY]
    if waiting:
        behind = slowest(waiting)
        current = behind.current()
        fraction = current and current.fraction()
        percent = "" if fraction is None else f" {100 * fraction:.0f} %"
        of = f"{len(ranks) - len(waiting)} of {len(ranks)} ranks are ready; " if len(ranks) > 1 else ""
        return Verdict(PROGRESSING, f"{of}rank {behind.rank} is in phase {behind.phase}{percent}")
    if health is None or health.code == 200:
        return Verdict(READY, f"all {len(ranks)} ranks are ready" + (f", {health.url} answers 200" if health else ""))
    answer = f"{health.url} answers {health.code}" if health.code else f"{health.url}: {health.error}"
    # Before its ranks are ready a server does not answer; the last rank's last movement was to become ready.
    silent = now - max(health.bad_since, *(movement.moved_at for _, movement in ranks))
    state = STALLED if silent >= limits.stall_after_s else PROGRESSING
    return Verdict(state, f"all {len(ranks)} ranks are ready, but {answer}, for {silent:.0f} s")
