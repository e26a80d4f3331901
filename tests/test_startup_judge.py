"""The judgement, the estimate and the log line, from statuses made by hand and a clock of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.startup_cases import collector  # it puts scripts/ on the path

# isort: split
from status import judge as judging
from status.estimate import History, phase_remaining_s, rate_per_s
from status.judge import Health, Limits, judge, slowest
from status.movement import Movement
from status.phases import CAPTURE, COMPILE, KV_CACHE, MODEL, PREPARE, READ, READY, START, STOPPED, UPLOAD, WAITING
from status.processes import Sample, sample
from status.rank_files import Phase, RankStatus
from status.server import Server
from status.text import amount, duration, line

LIMITS = Limits(stall_after_s=100, rank_stall_after_s=500, first_report_after_s=1000)


def rank(number: int, phase: str, *phases: Phase, ranks: int = 2, owner: int | None = 1, error: str | None = None):
    seen = phases or (Phase(phase, 0.0, 1.0, {}, {}, {}),)
    return RankStatus("r", number, ranks, ranks, "host", 100 + number, 0.0, 0.0, phase, error, 0.0, seen, owner)


def load(done: int, total: int, seconds: float, rate: float = 0.0) -> tuple[Phase, ...]:
    """A load that read and uploaded ``done`` of ``total`` bytes, half of ``seconds`` in each."""
    rates = {"bytes": rate} if rate else {}
    return tuple(Phase(name, 0.0, seconds / 2, {"bytes": done}, {"bytes": total}, rates) for name in (READ, UPLOAD))


def verdict(now: float, *ranks: tuple[RankStatus, float], health: Health | None = None, expected: int | None = None):
    return judge(now, 0.0, [(status, Movement(moved)) for status, moved in ranks], expected, health, LIMITS)


def test_before_the_first_report() -> None:
    assert verdict(999).code == 503
    assert verdict(1001).code == 500
    assert judge(1e6, 0.0, [], None, None, dataclasses.replace(LIMITS, first_report_after_s=0)).code == 503
    assert verdict(5, health=Health("u", 200, "", 0)).code == 200, "a server that answers is ready without reports too"


def test_a_stall_of_all_counts_from_the_last_movement_of_any_working_rank() -> None:
    assert verdict(199, (rank(0, UPLOAD), 100), (rank(1, UPLOAD), 0)).code == 503
    assert verdict(200, (rank(0, UPLOAD), 100), (rank(1, UPLOAD), 0)).code == 500
    # Ready and waiting ranks do not move, and are no reason to call the start-up stalled while another works.
    assert verdict(1000, (rank(0, READY), 0), (rank(1, COMPILE), 950)).code == 503
    assert verdict(1000, (rank(0, WAITING), 0), (rank(1, COMPILE), 950)).code == 503
    assert verdict(1000, (rank(0, WAITING), 990), (rank(1, COMPILE), 800)).code == 500
    assert verdict(1000, (rank(0, READY), 0), (rank(1, WAITING), 800)).code == 500
    assert verdict(1e6, (rank(0, READY), 0), (rank(1, READY), 0)).code == 200, "idle serving is no stall"


def test_one_silent_rank_has_its_own_limit() -> None:
    assert verdict(499, (rank(0, COMPILE), 498), (rank(1, COMPILE), 0)).code == 503
    late = verdict(500, (rank(0, COMPILE), 499), (rank(1, COMPILE), 0))
    assert late.code == 500 and "rank 1" in late.reason


def test_a_stopped_process_is_a_stall_in_every_phase() -> None:
    for phase in (UPLOAD, WAITING, READY):
        frozen = (rank(1, phase), Movement(149.0, stopped_since=50.0))
        others = (rank(0, READY), Movement(149.0))
        assert judge(149, 0.0, [others, frozen], None, None, LIMITS).state != judging.STALLED
        assert judge(151, 0.0, [others, frozen], None, None, LIMITS).state == judging.STALLED


def test_the_first_cause_is_named_and_not_its_consequences() -> None:
    reason = verdict(
        10,
        (rank(0, UPLOAD, owner=None), 9),
        (rank(1, STOPPED, owner=None), 9),
    ).reason
    assert "rank 0 (pid 100 on host) died in phase upload" in reason and "rank 1" not in reason
    both = verdict(10, (rank(0, WAITING, error="model construction: OSError: x"), 9), (rank(1, STOPPED, owner=None), 9))
    assert both.code == 500 and "rank 1" not in both.reason and "OSError: x" in both.reason


def test_after_the_ranks_the_servers_health_decides() -> None:
    ready = ((rank(0, READY), 50.0), (rank(1, READY), 60.0))
    refused = Health("url", None, "connection refused", bad_since=0.0)
    early = verdict(159, *ready, health=refused)
    assert early.code == 503 and "connection refused" in early.reason
    assert verdict(160, *ready, health=refused).code == 500, "counted from when the last rank became ready"
    assert verdict(160, *ready, health=Health("url", 200, "", 0.0)).code == 200
    assert verdict(1000, *ready, health=Health("url", 503, "", bad_since=990.0)).code == 503


def test_missing_ranks_take_part_in_a_stall() -> None:
    present = rank(0, READY, ranks=4)
    assert verdict(90, (present, 0)).reason == "1 of 4 ranks have reported: 1, 2, 3 missing"
    assert verdict(90, (present, 0), expected=1).code == 200
    stuck = verdict(101, (rank(0, START, ranks=4), 0))
    assert stuck.code == 500 and "missing" in stuck.reason


def test_the_slowest_rank_is_the_one_with_most_to_do() -> None:
    behind, ahead = rank(0, UPLOAD, *load(10, 100, 1)), rank(1, UPLOAD, *load(90, 100, 1))
    assert slowest([ahead, behind]) is behind
    assert slowest([rank(0, CAPTURE), rank(1, COMPILE), rank(2, READY)]).rank == 1
    waiting = rank(3, WAITING, Phase(MODEL, 0, 1, {}, {}, {}))
    assert slowest([rank(0, COMPILE), waiting]) is waiting, "it waits after an earlier phase"


def test_movement_by_cpu_needs_a_share_and_by_io_an_amount() -> None:
    status = rank(0, COMPILE)
    movement = Movement(0.0)
    for second in range(11):
        movement.update(float(second), status, Sample(cpu_s=0.01 * second, io_bytes=100 * second, state="S"))
    assert movement.moved_at == 0.0, "1 % of a processor and 100 bytes a second are a rank's own idle threads"
    movement.update(11.0, status, Sample(0.3, 1000, "R"))
    assert (movement.moved_at, movement.moved_by) == (11.0, "CPU time")
    movement.update(12.0, status, Sample(0.3, 2 << 20, "D"))
    assert (movement.moved_at, movement.moved_by) == (12.0, "I/O")
    movement.update(13.0, status, Sample(0.2, 2 << 20, "T"))
    assert (movement.moved_at, movement.stopped_since) == (12.0, 13.0), "a child that ended takes its time along"
    movement.update(14.0, dataclasses.replace(status, phase=KV_CACHE), Sample(0.2, 2 << 20, "S"))
    assert (movement.moved_by, movement.stopped_since) == ("progress", None)
    waiting = dataclasses.replace(status, phase=WAITING)
    movement.update(15.0, waiting, Sample(0.2, 2 << 20, "R"))
    movement.update(16.0, waiting, Sample(5.0, 9 << 20, "R"))
    assert movement.moved_at == 15.0, "spinning while waiting is no movement"


def test_movement_out_of_sight_goes_by_the_ranks_own_account() -> None:
    status = rank(0, COMPILE, owner=0)
    movement = Movement(0.0)
    movement.update(1.0, status, None)
    for now in (2.0, 3.0, 9.0):
        movement.update(now, status, None)
    assert movement.moved_at == 0.0
    movement.update(10.0, dataclasses.replace(status, heartbeat=5.0, cpu_s=0.1), None)
    assert movement.moved_at == 0.0
    movement.update(11.0, dataclasses.replace(status, heartbeat=10.0, cpu_s=4.9), None)
    assert (movement.moved_at, movement.moved_by) == (11.0, "CPU time")


def test_a_process_that_does_not_exist_has_no_sample() -> None:
    assert sample([2**22 + 1]) == {} and sample([]) == {}


def test_the_estimate_follows_the_measured_rate() -> None:
    lately = rank(0, UPLOAD, *load(400, 1000, 10, rate=100))
    assert phase_remaining_s(lately) == pytest.approx(6.0)
    on_average = rank(0, READ, *load(400, 1000, 10))
    assert rate_per_s(on_average, on_average.current(), "bytes") == pytest.approx(40)
    assert phase_remaining_s(on_average) == pytest.approx(15)
    assert phase_remaining_s(rank(0, COMPILE)) is None
    assert phase_remaining_s(rank(0, READ, *load(0, 1000, 10))) is None, "no rate before the first byte"


def test_the_history_fills_in_the_phases_to_come(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "history.json"
    past = (
        Phase(MODEL, 0, 5, {}, {}, {}),
        *load(1000, 1000, 50),
        Phase(PREPARE, 0, 10, {}, {}, {}),
        Phase(COMPILE, 0, 100, {}, {}, {}),
        Phase(CAPTURE, 0, 20, {}, {}, {}),
    )
    History(path).save([rank(0, READY, *past), rank(1, READY, *load(1, 1, 1))])
    history = History(path)
    assert history.remaining_s(rank(0, START)) == pytest.approx(5 + 50 + 10 + 100 + 20)
    assert history.remaining_s(rank(0, UPLOAD, *load(500, 1000, 10, rate=100))) == pytest.approx(5 + 10 + 100 + 20)
    compiling = (Phase(MODEL, 0, 1, {}, {}, {}), *load(1, 1, 3), Phase(COMPILE, 0, 30, {}, {}, {}))
    assert history.remaining_s(rank(0, COMPILE, *compiling)) == pytest.approx(70 + 20), "a faster load leaves no rest"
    assert History(None).remaining_s(rank(0, START)) is None
    path.write_text("{")
    assert History(path).remaining_s(rank(0, START)) is None


def test_amounts_and_durations_in_words() -> None:
    assert [amount(value, "bytes") for value in (12, 1234, 109.2e9, 5e15)] == [
        "12 B",
        "1.2 kB",
        "109.2 GB",
        "5000.0 TB",
    ]
    assert amount(287962, "tensors") == "287,962"
    assert [duration(value) for value in (0, 89, 90, 723, 3900, 7260)] == [
        "0 s", "89 s", "1 min 30 s", "12 min 03 s", "65 min 00 s", "2 h 01 min",
    ]  # fmt: skip


def test_the_log_line_names_the_last_rank_and_the_silent_ones(tmp_path: Path) -> None:
    snapshot = collector(tmp_path).look()
    ranks = [(rank(0, UPLOAD, *load(400, 1000, 10, rate=100)), Movement(90.0)), (rank(1, CAPTURE), Movement(10.0))]
    snapshot = dataclasses.replace(snapshot, monotonic=100.0, ranks=tuple(ranks), expected=2, eta_s=130.0, elapsed_s=42)
    assert line(snapshot) == (
        "progressing after 42 s: 0 of 2 ranks ready; rank 0 is last: upload, 400 B of 1.0 kB, 100 B/s, "
        "6 s left in this phase; ready in about 2 min 10 s; rank 1 silent for 1 min 30 s"
    )


def test_a_service_that_no_longer_looks_says_so(tmp_path: Path) -> None:
    watch = collector(tmp_path)
    server = Server("127.0.0.1", 0, watch)
    try:
        assert server.answers["/startupz"]()[0] == 503 and server.answers["/livez"]()[0] == 200
        watch.snapshot = dataclasses.replace(watch.snapshot, monotonic=watch.snapshot.monotonic - 60)
        for path in ("/startupz", "/livez"):
            code, _, body = server.answers[path]()
            assert code == 500 and b"has not looked" in body
    finally:
        server.server_close()
