"""The status service against simulated ranks: progress, readiness, stalls, deaths, earlier runs, broken files."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.startup_cases import (
    SCRIPTS,
    Limits,
    Ranks,
    collector,
    look_for,
    look_until,
    phase_is,
    service,
    state_is,
)

# isort: split
from status import rank_files

STALL_S = 1.5


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "status"
    path.mkdir()
    return path


def test_two_ranks_from_first_report_to_ready(directory: Path, tmp_path: Path) -> None:
    """A slow load is 503 with numbers all along, logged at the set pace, and 200 once both ranks are ready."""
    with Ranks(directory) as ranks, service(directory, tmp_path / "log", "--log-every", "1") as status:
        assert status.get("/startupz")[0] == 503
        assert "no rank has reported" in status.get("/startupz")[1]
        for rank in (0, 1):
            ranks.start(rank, 2, f"load:20:{0.1 + 0.05 * rank}", "prepare:3:0.1", "spin:0.5", "ready")
            ranks.wait_for_file(rank)
        fractions = []
        while status.get("/startupz")[0] != 200:
            code, text = status.get("/startupz")
            assert code in (200, 503), text
            body = json.loads(status.get("/startup")[1])
            assert body["code"] in (200, 503)
            fractions += [rank["fraction"] for rank in body["ranks"] if rank["phase"] == "upload"]
            time.sleep(0.1)
        assert len(set(fractions)) >= 5 and min(fractions) < 0.5 < max(fractions) <= 1
        body = json.loads(status.get("/startup")[1])
        assert body["state"] == "ready" and body["run"] == "sim" and body["ranks_expected"] == 2
        load = next(phase for phase in body["ranks"][1]["phases"] if phase["name"] == "upload")
        assert load["done"]["tensors"] == load["total"]["tensors"] == 20
        assert load["done"]["bytes"] == 20 * 37_000_000
        read_s = next(phase["seconds"] for phase in body["phases"] if phase["name"] == "checkpoint read")
        assert 3.0 <= read_s <= 6.0, "the simulated load sleeps inside the iterator, 20 times 0.15 s on the slower rank"
        assert status.get("/livez")[0] == 200
        lines = status.log().splitlines()
        progress = [line for line in lines if "progressing" in line]
        assert any("of 20 tensors" in line and "MB/s" in line and "740.0 MB" in line for line in progress), lines
        assert "ready after" in lines[-1] and "checkpoint read 3 s" in lines[-1].replace("4 s", "3 s")
        assert len(progress) >= 4


def test_metrics_page_and_unknown_paths(directory: Path, tmp_path: Path) -> None:
    with Ranks(directory) as ranks, service(directory, tmp_path / "log") as status:
        ranks.start(0, 1, "prepare:2:0.05", "spin:60")
        ranks.wait_for_file(0)
        while "compile" not in status.get("/startupz")[1]:
            time.sleep(0.05)
        families = {family.name: family for family in text_string_to_metric_families(status.get("/metrics")[1])}
        states = {sample.labels["state"]: sample.value for sample in families["mega_moe_startup_state"].samples}
        assert states == {"ready": 0, "progressing": 1, "stalled": 0, "failed": 0, "stopped": 0}
        assert families["mega_moe_startup_rank_up"].samples[0].value == 1
        done = {(s.labels["phase"], s.labels["unit"]): s.value for s in families["mega_moe_startup_rank_done"].samples}
        assert done["weight preparation", "layers"] == 2
        assert families["mega_moe_startup_rank_phase"].samples[0].labels["phase"] == "compile and warm-up"
        code, page = status.get("/")
        assert code == 200 and "<title>Start-up</title>" in page
        assert "//" not in page.replace("://", "").split("<script>")[0], (
            "the page must not load anything from elsewhere"
        )
        with socket.create_connection(("127.0.0.1", int(status.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"HEAD /startup HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.0 200") and answer.endswith(b"\r\n\r\n"), "HEAD has no body"
        assert status.get("/nothing")[0] == 404


def test_a_stopped_rank_is_a_stall_until_it_continues(directory: Path) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 2, "load:3000:0.02")
        frozen = ranks.start(1, 2, "load:3000:0.02")
        watch = collector(directory, stall_after=STALL_S)
        look_until(watch, phase_is(1, "upload"))  # what the simulated rank writes from; reads begin between writes
        frozen.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        verdict = look_until(watch, state_is("stalled")).verdict
        assert STALL_S - 0.2 <= time.monotonic() - began <= STALL_S + 5
        assert (
            verdict.code == 500
            and f"rank 1 (pid {frozen.pid}" in verdict.reason
            and "stopped by a signal" in verdict.reason
        )
        frozen.send_signal(signal.SIGCONT)
        assert look_until(watch, state_is("progressing")).verdict.code == 503


@pytest.mark.parametrize("steps", [("load:3000:0.02",), ("ready",)], ids=["loading", "serving"])
def test_a_killed_rank_is_named(directory: Path, steps: tuple[str, ...]) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 2, *steps)
        victim = ranks.start(1, 2, *steps)
        watch = collector(directory)
        look_until(watch, lambda snapshot: len(snapshot.ranks) == 2 and snapshot.ranks[1][0].phase != "start")
        victim.kill()  # not waited for: it stays a zombie, which is dead all the same
        verdict = look_until(watch, state_is("failed")).verdict
        assert verdict.code == 500
        assert (
            f"rank 1 (pid {victim.pid}" in verdict.reason
            and "died" in verdict.reason
            and "rank 0" not in verdict.reason
        )


@pytest.mark.parametrize("step", ["spin:60", "child:60", "read-file:{file}:60"], ids=["spins", "child spins", "reads"])
def test_a_silent_rank_that_works_is_not_a_stall(directory: Path, tmp_path: Path, step: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(bytes(4 << 20))
    with Ranks(directory) as ranks:
        ranks.start(0, 1, step.format(file=data))
        watch = collector(directory, stall_after=STALL_S)
        look_until(watch, phase_is(0, "compile and warm-up"))
        snapshots = look_for(watch, 2.5 * STALL_S)
        assert {snapshot.verdict.state for snapshot in snapshots} == {"progressing"}
        # On a busy machine a look may come before the next MiB has been read, and see processor time alone.
        by = "I/O" if "read" in step else "CPU time"
        look_until(watch, lambda snapshot: snapshot.ranks[0][1].moved_by == by)


def test_a_silent_rank_that_does_nothing_is_a_stall(directory: Path) -> None:
    with Ranks(directory) as ranks:
        process = ranks.start(0, 1, "sleep:60")
        watch = collector(directory, stall_after=STALL_S)
        look_until(watch, phase_is(0, "compile and warm-up"))
        verdict = look_until(watch, state_is("stalled"), timeout=STALL_S + 10).verdict
        assert f"rank 0 (pid {process.pid}" in verdict.reason and "compile and warm-up" in verdict.reason


def test_spinning_while_waiting_does_not_hide_a_stall(directory: Path) -> None:
    """vLLM's workers spin on their message queue: a rank that waits so must not count as moving."""
    with Ranks(directory) as ranks:
        ranks.start(0, 2, "wait-spin:60")
        ranks.start(1, 2, "sleep:60")
        watch = collector(directory, stall_after=STALL_S)
        look_until(watch, phase_is(0, "waiting"))
        look_until(watch, phase_is(1, "compile and warm-up"))
        verdict = look_until(watch, state_is("stalled"), timeout=STALL_S + 10).verdict
        assert "rank 1" in verdict.reason


def test_one_silent_rank_beside_working_ones_has_a_limit_of_its_own(directory: Path) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 2, "spin:60")
        ranks.start(1, 2, "sleep:60")
        watch = collector(directory, stall_after=STALL_S, rank_stall_after=2 * STALL_S)
        look_until(watch, phase_is(1, "compile and warm-up"))
        began = time.monotonic()
        verdict = look_until(watch, state_is("stalled")).verdict
        assert time.monotonic() - began >= 1.5 * STALL_S, "the limit for all ranks was applied to one"
        assert "rank 1" in verdict.reason and "others have" in verdict.reason


def test_a_rank_that_fails_says_why(directory: Path) -> None:
    with Ranks(directory) as ranks:
        process = ranks.start(0, 1, "fail:tensor w1 has shape [3], expected [4]")
        watch = collector(directory)
        verdict = look_until(watch, state_is("failed")).verdict
        assert "model construction: ValueError: tensor w1 has shape [3], expected [4]" in verdict.reason
        process.wait()
        assert look_until(watch, state_is("failed")).verdict == verdict


@pytest.mark.parametrize("steps, state", [(("ready", "stop"), "stopped"), (("stop",), "failed")])
def test_an_orderly_end_is_a_failure_only_before_readiness(directory: Path, steps: tuple[str, ...], state: str) -> None:
    with Ranks(directory) as ranks:
        process = ranks.start(0, 1, *steps)
        watch = collector(directory)
        process.wait()
        verdict = look_until(watch, state_is(state)).verdict
        assert verdict.code == (503 if state == "stopped" else 500)


def test_a_rank_that_dies_before_another_begins_is_dead_and_not_missing(directory: Path) -> None:
    with Ranks(directory) as ranks:
        first = ranks.start(0, 2, "load:3000:0.05")
        ranks.wait_for_file(0)
        first.kill()
        first.wait()
        ranks.start(1, 2, "load:3000:0.05")
        watch = collector(directory)
        assert "rank 0" in look_until(watch, state_is("failed")).verdict.reason


def test_ranks_killed_by_a_server_that_was_told_to_end_have_not_crashed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --shutdown-timeout 0, its default, vLLM kills its workers at SIGTERM."""
    monkeypatch.setattr(rank_files, "RESTART_S", 0.0)
    with Ranks(directory) as ranks:
        processes = [ranks.start(1, 2, "ready")]
        ranks.wait_for_file(1)
        processes.append(ranks.start(0, 2, "ready", "told-to-end"))
        watch = collector(directory)
        look_until(watch, state_is("stopped"))
        for process in processes:
            process.kill()
            process.wait()
        verdict = watch.look().verdict
        assert (verdict.state, verdict.reason) == ("stopped", "the server is ending: 2 of 2 ranks have")
        ranks.start(0, 2, "ready", run="sim")
        assert look_until(watch, state_is("progressing")).verdict.reason == "1 of 2 ranks have reported: 1 missing"


@pytest.mark.parametrize("before, ending", [(0.01, True), (1.0, False)])
def test_a_files_clock_may_lag_by_a_tick(directory: Path, before: float, ending: bool) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 1, "ready")
        ranks.wait_for_file(0)
        files = rank_files.RankFiles(directory, None, time.time() - 60)
        (rank,) = files.read()
        announced = directory / f"{rank.run}.ending"
        announced.touch()
        os.utime(announced, (rank.process_started - before,) * 2)
        files.read()
        assert files.ending is ending


def test_missing_ranks_are_named(directory: Path) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 4, "ready")
        ranks.start(2, 4, "ready")
        watch = collector(directory, stall_after=STALL_S)
        verdict = look_until(
            watch, lambda snapshot: len(snapshot.ranks) == 2 and phase_is(2, "ready")(snapshot)
        ).verdict
        assert (verdict.state, verdict.reason) == ("progressing", "2 of 4 ranks have reported: 1, 3 missing")
        assert look_until(collector(directory, expected=2), state_is("ready")).verdict.code == 200


def test_an_earlier_run_is_ignored(directory: Path) -> None:
    """What a run left that ended before the service started says nothing about the run to come."""
    with Ranks(directory) as ranks:
        old = [ranks.start(rank, 2, "load:3000:0.05", run="old") for rank in (0, 1)]
        for rank in (0, 1):
            ranks.wait_for_file(rank, run="old")
        for process in old:
            process.kill()
            process.wait()
        (directory / "old-rank0.tmp").write_text("killed in the middle of a write")
        time.sleep(0.05)
        watch = collector(directory)
        snapshot = watch.look()
        assert snapshot.verdict.state == "progressing" and "no rank has reported" in snapshot.verdict.reason
        assert snapshot.other_runs == ("old",)
        ranks.start(0, 2, "ready", run="new")
        ranks.start(1, 2, "ready", run="new")
        snapshot = look_until(watch, state_is("ready"))
        assert {status.run for status, _ in snapshot.ranks} == {"new"}
        assert not list(directory.glob("old-*")), "a new rank removes what a dead one left"


def test_a_run_that_dies_while_watched_is_a_failure_until_the_next(directory: Path) -> None:
    with Ranks(directory) as ranks:
        first = ranks.start(0, 1, "load:3000:0.05", run="first")
        watch = collector(directory)
        look_until(watch, phase_is(0, "checkpoint read"))
        first.kill()
        look_until(watch, state_is("failed"))
        ranks.start(0, 1, "ready", run="second")
        assert look_until(watch, state_is("ready")).ranks[0][0].run == "second"


def test_the_next_start_is_waited_for_anew(directory: Path) -> None:
    """The entrypoint removes what an ended start left; how long the service watched that one does not count."""
    with Ranks(directory) as ranks:
        first = ranks.start(0, 1, "load:3000:0.05", run="first")
        watch = collector(directory)
        look_until(watch, phase_is(0, "checkpoint read"))
        rank_files.remove_ended(directory)
        assert watch.look().ranks, "a living rank's files stay"
        first.kill()
        first.wait()
        (directory / "first.ending").touch()
        look_until(watch, lambda snapshot: snapshot.verdict.state != "progressing")
        rank_files.remove_ended(directory)
        assert not list(directory.iterdir())
        # Longer than the service has waited for ranks, shorter than it runs.
        watch._limits = Limits(first_report_after_s=0.5)
        assert watch.look().verdict.state == "progressing"
        look_until(watch, state_is("stalled"))


def test_a_runs_name_may_be_used_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_files, "RESTART_S", 0.0)
    with Ranks(directory) as ranks:
        first = [ranks.start(rank, 2, "load:3000:0.05") for rank in (0, 1)]
        watch = collector(directory)
        look_until(watch, lambda snapshot: len(snapshot.ranks) == 2)
        for process in first:
            process.kill()
            process.wait()
        look_until(watch, state_is("failed"))
        ranks.start(0, 2, "load:3000:0.05")
        snapshot = look_until(watch, state_is("progressing"))
        assert snapshot.verdict.reason == "1 of 2 ranks have reported: 1 missing"


def test_of_two_live_runs_the_newest_counts_unless_one_is_named(directory: Path) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 1, "ready", run="a")
        ranks.wait_for_file(0, run="a")
        ranks.start(0, 1, "load:3000:0.05", run="b")
        ranks.wait_for_file(0, run="b")
        snapshot = look_until(collector(directory), phase_is(0, "checkpoint read"))
        assert snapshot.ranks[0][0].run == "b" and snapshot.other_runs == ("a",)
        assert look_until(collector(directory, run_id="a"), state_is("ready")).other_runs == ("b",)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "Expecting value"),
        ('{"format": 1, "run": "sim"', "delimiter"),
        ("[]", "incomplete"),
        ("null", "incomplete"),
        ('{"format": 99}', "differ in version"),
        ('{"format": 1}', "incomplete"),
        ("\x00" * 64, "Expecting value"),
    ],
)
def test_a_broken_file_is_reported_and_the_last_good_one_kept(directory: Path, content: str, complaint: str) -> None:
    with Ranks(directory) as ranks:
        process = ranks.start(0, 2, "ready")
        other = ranks.start(1, 2, "ready")
        watch = collector(directory)
        look_until(watch, state_is("ready"))
        for each in (process, other):
            each.send_signal(signal.SIGSTOP)
        path = directory / "sim-rank0.json"
        path.write_text(content)
        snapshot = watch.look()
        assert snapshot.verdict.state == "ready" and [status.rank for status, _ in snapshot.ranks] == [0, 1]
        assert snapshot.problems[0].startswith("sim-rank0.json") and complaint in snapshot.problems[0]
        fresh = collector(directory).look()
        assert fresh.verdict.reason == "1 of 2 ranks have reported: 0 missing"
        process.kill()
        assert "rank 0" in look_until(watch, state_is("failed")).verdict.reason, "a broken file hides no death"


def test_readiness_follows_the_servers_health(directory: Path, tmp_path: Path) -> None:
    answer = {"code": 503}

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["code"])
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    backend = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{backend.server_address[1]}/health"
    options = ("--health-url", url, "--stall-after", "3")
    with Ranks(directory) as ranks, service(directory, tmp_path / "log", *options) as status:
        ranks.start(0, 1, "ready")
        ranks.wait_for_file(0)
        while "all 1 ranks are ready, but" not in status.get("/startupz")[1]:
            assert status.get("/startupz")[0] == 503
            time.sleep(0.05)
        assert "answers 503" in status.get("/startupz")[1]
        answer["code"] = 200
        assert "answers 200" in status.get_until("/startupz", 200)
        answer["code"] = 503
        status.get_until("/startupz", 503)
        assert status.get("/livez")[0] == 200
        assert "answers 503" in status.get_until("/startupz", 500)
        assert status.get("/livez")[0] == 500
    backend.shutdown()
    backend.server_close()


def test_sigterm_ends_the_service_with_status_0(directory: Path, tmp_path: Path) -> None:
    with service(directory, tmp_path / "log") as status:
        began = time.monotonic()
        assert status.end() == 0
        assert time.monotonic() - began < 5
        assert status.log().rstrip().endswith("ended")


def test_a_taken_port_is_said_and_fails(directory: Path, tmp_path: Path) -> None:
    with service(directory, tmp_path / "log") as status:
        port = status.url.rpartition(":")[2]
        command = [sys.executable, str(SCRIPTS / "startup_status.py"), "--dir", str(directory), "--host", "127.0.0.1"]
        second = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "choose another --port" in second.stdout


def test_the_service_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, startup_status; print(sorted({'torch', 'vllm', 'numpy'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_service_in_another_pid_namespace_sees_life_progress_and_death(directory: Path, tmp_path: Path) -> None:
    """As in a sidecar container: the ranks' processes are out of sight, their locks and files are not."""
    enter = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    try:
        works = subprocess.run([*enter, "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        works = False
    if not works:
        pytest.skip("this host allows no new PID namespace")
    code = (
        "import sys, json, time; sys.path.insert(0, sys.argv[1])\n"
        "from tests.startup_cases import collector; from pathlib import Path\n"
        "watch = collector(Path(sys.argv[2]), stall_after=8)\n"
        "while True: print(json.dumps(watch.look().as_json()), flush=True); time.sleep(0.3)\n"
    )
    with Ranks(directory) as ranks:
        victim = ranks.start(0, 2, "spin:60")
        ranks.start(1, 2, "sleep:60")
        for rank in (0, 1):
            ranks.wait_for_file(rank)
        command = [*enter, sys.executable, "-c", code, str(SCRIPTS.parent), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                seen = []
                end = time.monotonic() + 12
                while time.monotonic() < end:
                    seen.append(json.loads(process.stdout.readline()))
                assert {body["state"] for body in seen} == {"progressing"}, seen[-1]["reason"]
                assert [rank["alive"] for rank in seen[-1]["ranks"]] == [True, True]
                assert [rank["in_sight"] for rank in seen[-1]["ranks"]] == [False, False]
                assert seen[-1]["ranks"][0]["moved_by"] == "CPU time"
                assert seen[-1]["ranks"][1]["silent_s"] > 8
                victim.kill()
                end = time.monotonic() + 10
                while (body := json.loads(process.stdout.readline()))["state"] != "failed":
                    assert time.monotonic() < end, body["reason"]
                assert "rank 0" in body["reason"] and "rank 1" not in body["reason"]
            finally:
                os.killpg(process.pid, signal.SIGKILL)
