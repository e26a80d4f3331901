"""Simulated ranks as processes, and the status service's parts and program to watch them with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from status.collector import Collector, Snapshot  # noqa: E402
from status.judge import Health, Limits  # noqa: E402
from status.rank_files import RankFiles  # noqa: E402

RANK = Path(__file__).with_name("simulated_rank.py")
# Time for a process to start and act on a busy machine.
PATIENCE_S = 30.0


class Ranks:
    """Rank processes that report to ``directory``; they end with the context."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start(self, rank: int, ranks: int, *steps: str, run: str = "sim") -> subprocess.Popen[bytes]:
        """Start one rank that goes through ``steps``."""
        environment = os.environ | {"MEGA_MOE_STATUS_DIR": str(self.directory), "MEGA_MOE_RUN_ID": run}
        process = subprocess.Popen([sys.executable, str(RANK), str(rank), str(ranks), *steps], env=environment)
        self.processes.append(process)
        return process

    def wait_for_file(self, rank: int, run: str = "sim") -> Path:
        """Block until ``rank`` has written; return its file."""
        path = self.directory / f"{run}-rank{rank}.json"
        end = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < end, f"{path} was not written"
            time.sleep(0.02)
        return path


def collector(
    directory: Path,
    stall_after: float = 300.0,
    rank_stall_after: float = 1800.0,
    run_id: str | None = None,
    health: Callable[[], Health | None] = lambda: None,
    expected: int | None = None,
) -> Collector:
    """A collector in this process."""
    files = RankFiles(directory, run_id, time.time())
    return Collector(files, Limits(stall_after, rank_stall_after), expected, health)


def look_until(watch: Collector, wanted: Callable[[Snapshot], bool], timeout: float = PATIENCE_S) -> Snapshot:
    """Look until ``wanted`` holds; fail with the last snapshot's sentence."""
    end = time.monotonic() + timeout
    while not wanted(snapshot := watch.look()):
        assert time.monotonic() < end, f"still {snapshot.verdict.state}: {snapshot.verdict.reason}"
        time.sleep(0.05)
    return snapshot


def look_for(watch: Collector, seconds: float) -> list[Snapshot]:
    """Look for ``seconds``; return all snapshots."""
    end = time.monotonic() + seconds
    snapshots = []
    while time.monotonic() < end:
        snapshots.append(watch.look())
        time.sleep(0.05)
    return snapshots


def state_is(state: str) -> Callable[[Snapshot], bool]:
    return lambda snapshot: snapshot.verdict.state == state


def phase_is(rank: int, phase: str) -> Callable[[Snapshot], bool]:
    return lambda snapshot: any(status.rank == rank and status.phase == phase for status, _ in snapshot.ranks)


class Service:
    """The program itself, listening on a port of its own choice."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        end = time.monotonic() + PATIENCE_S
        while "listening on" not in self.log():
            assert process.poll() is None and time.monotonic() < end, f"the service did not start: {self.log()}"
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self.log().split(' port ')[1].split(',')[0]}"

    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of ``path``."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get_until(self, path: str, code: int) -> str:
        """Body of ``path`` once its status is ``code``."""
        end = time.monotonic() + PATIENCE_S
        while (answer := self.get(path))[0] != code:
            assert time.monotonic() < end, f"{path} still answers {answer}"
            time.sleep(0.05)
        return answer[1]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE_S)


@contextmanager
def service(directory: Path, log: Path, *options: str) -> Iterator[Service]:
    """Run scripts/startup_status.py on ``directory`` with fast settings."""
    command = [sys.executable, str(SCRIPTS / "startup_status.py"), "--dir", str(directory), "--host", "127.0.0.1"]
    command += ["--port", "0", "--interval", "0.1", *options]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, text=True)
    try:
        yield Service(process, log)
    finally:
        process.kill()
        process.wait()
