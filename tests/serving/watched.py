"""The demo server under the status service, for tests that break it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.startup_cases import Service, service

from .support import REPOSITORY, free_port

TIMEOUT_S = 600


class Watched(NamedTuple):
    """A server that may still be starting, where it will answer, its log, and the service that watches it."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    watcher: Service


@contextlib.contextmanager
def entrypoint(
    model: Path,
    directory: Path,
    *flags: str,
    settings: Mapping[str, str] | None = None,
    status_options: tuple[str, ...] = (),
) -> Iterator[tuple[subprocess.Popen[bytes], Service, Path]]:
    """The image's entrypoint, the status service beside it, and its log; both end with the block."""
    status, log = directory / "status", directory / "server.log"
    status.mkdir(parents=True)
    variables = {"MEGA_MOE_STATUS_DIR": str(status), "MEGA_MOE_CACHE_DIR": str(directory / "cache")}
    # The CPU has no GPU for the preflight to find; its tests are elsewhere.
    variables |= {"MEGA_MOE_PREFLIGHT": "off", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = os.environ | variables | (settings or {})
    command = [sys.executable, "scripts/entrypoint.py", str(model), *flags]
    with log.open("wb") as stream, service(status, directory / "status.log", *status_options) as watcher:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process, watcher, log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def watched_server(
    model: Path,
    directory: Path,
    *vllm_arguments: str,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Watched]:
    """Start the demo server on ``model``; it and the service end with the block.

    ``prefix`` is put before the server's command line, ``environment`` added to this process's.
    """
    status, port = directory / "status", free_port()
    command = [*prefix, sys.executable, "scripts/serve_cpu.py", "--model", str(model), "--port", str(port)]
    command += ["--ranks", str(ranks), "--", *vllm_arguments]
    variables = os.environ | {"MEGA_MOE_STATUS_DIR": str(status), "MEGA_MOE_RUN_ID": "real"} | (environment or {})
    base_url, log = f"http://127.0.0.1:{port}", directory / "server.log"
    options = ("--health-url", f"{base_url}/health", "--log-every", "5", "--stall-after", "20")
    with log.open("wb") as stream, service(status, directory / "status.log", *options) as watcher:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            yield Watched(process, base_url, log, watcher)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def follow(watcher: Service, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Ask /startup until ``until`` holds for an answer; return all of them."""
    end = time.monotonic() + TIMEOUT_S
    answers = [json.loads(watcher.get("/startup")[1])]
    while not until(answers[-1]):
        assert time.monotonic() < end, answers[-1]["reason"]
        time.sleep(0.1)
        answers.append(json.loads(watcher.get("/startup")[1]))
    return answers


def follow_to_ready(watcher: Service) -> None:
    """Wait until the server serves; any answer but progress on the way fails."""
    last = follow(watcher, lambda answer: answer["code"] != 503)[-1]
    assert last["state"] == "ready", last["reason"]
