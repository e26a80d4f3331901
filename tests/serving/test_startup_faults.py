"""A real server of two ranks under the status service: what is reported of its start, and of a rank that dies."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.startup_cases import Service, service

from . import checkpoints
from .support import NAME, REPOSITORY, free_port, post

TIMEOUT_S = 600


@pytest.fixture(scope="module")
def two_rank_checkpoint(directory: Path) -> Path:
    """The demo's model with experts whose shared part divides over two ranks in whole blocks of FP8 scales."""
    return checkpoints.make(directory / "two-ranks", "--intermediate", "256")


@contextlib.contextmanager
def starting_server(model: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Service]]:
    """The demo server with two ranks and the service that watches it; both end with the block."""
    status, port = directory / "status", free_port()
    command = [sys.executable, "scripts/serve_cpu.py", "--model", str(model), "--port", str(port), "--ranks", "2"]
    environment = os.environ | {"MEGA_MOE_STATUS_DIR": str(status), "MEGA_MOE_RUN_ID": "real"}
    health = f"http://127.0.0.1:{port}/health"
    with (
        (directory / "server.log").open("wb") as log,
        service(
            status, directory / "status.log", "--health-url", health, "--log-every", "5", "--stall-after", "20"
        ) as watcher,
    ):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process, port, watcher
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


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_start_is_followed_and_a_frozen_and_a_dead_rank_are_told_apart(
    two_rank_checkpoint: Path, tmp_path: Path
) -> None:
    with safe_open(next(two_rank_checkpoint.glob("*.safetensors")), framework="pt") as shard:
        tensors = len(shard.keys())
    with starting_server(two_rank_checkpoint, tmp_path) as (process, port, watcher):
        answers = follow(watcher, lambda answer: answer["code"] != 503)
        ready = answers[-1]
        assert ready["state"] == "ready", ready["reason"]
        assert {answer["state"] for answer in answers[:-1]} == {"progressing"}
        assert [rank["rank"] for rank in ready["ranks"]] == [0, 1]
        for rank in ready["ranks"]:
            phases = {phase["name"]: phase for phase in rank["phases"]}
            order = ["start", "model construction", "checkpoint read", "upload", "weight preparation"]
            order += ["compile and warm-up", "KV cache", "ready"]
            starts = [phases[name]["started"] for name in order]
            assert starts == sorted(starts), phases
            assert phases["upload"]["done"]["tensors"] == phases["upload"]["total"]["tensors"] == tensors
            prepared = phases["weight preparation"]
            assert prepared["done"]["layers"] == prepared["total"]["layers"] == 4
        stamps = [line.split(" INFO")[0] for line in watcher.log().splitlines() if "progressing" in line]
        seconds = [time.mktime(time.strptime(stamp.split(",")[0], "%Y-%m-%d %H:%M:%S")) for stamp in stamps]
        gaps = [later - earlier for earlier, later in itertools.pairwise(seconds)]
        assert max(gaps) <= 10, "silence in the log"

        victim = ready["ranks"][1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        assert "stopped by a signal" in watcher.get_until("/startupz", 500)
        os.kill(victim, signal.SIGCONT)
        watcher.get_until("/startupz", 200)
        body = {"model": NAME, "prompt": "hello", "max_tokens": 2, "temperature": 0}
        assert post(f"http://127.0.0.1:{port}/v1/completions", body)["choices"]

        os.kill(victim, signal.SIGKILL)
        reason = watcher.get_until("/startupz", 500)
        assert f"rank 1 (pid {victim}" in reason and "died in phase ready" in reason and "rank 0" not in reason
        # vLLM takes a dead rank for a reason to shut down in order: status 0, which a restart policy must not trust.
        assert process.wait(120) == 0, "docs/startup.md tells this status"


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_rank_killed_while_it_loads_is_named_and_ends_the_server(two_rank_checkpoint: Path, tmp_path: Path) -> None:
    with starting_server(two_rank_checkpoint, tmp_path) as (process, _, watcher):
        begun = {"model construction", "checkpoint read", "upload", "weight preparation"}
        loading = follow(watcher, lambda answer: len(answer["ranks"]) == 2 and answer["ranks"][1]["phase"] in begun)[-1]
        victim = loading["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        reason = watcher.get_until("/startupz", 500)
        assert f"rank 1 (pid {victim}" in reason and "died in phase" in reason
        assert process.wait(120) != 0, "docs/startup.md tells this status"
