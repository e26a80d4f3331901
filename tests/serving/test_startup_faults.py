"""A real server of two ranks under the status service: what is reported of its start, and of a rank that dies."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from . import checkpoints
from .support import NAME, post
from .watched import TIMEOUT_S, follow, watched_server


@pytest.fixture(scope="module")
def two_rank_checkpoint(directory: Path) -> Path:
    """The demo's model with experts whose shared part divides over two ranks in whole blocks of FP8 scales."""
    return checkpoints.make(directory / "two-ranks", "--intermediate", "256")


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_start_is_followed_and_a_frozen_and_a_dead_rank_are_told_apart(
    two_rank_checkpoint: Path, tmp_path: Path
) -> None:
    with safe_open(next(two_rank_checkpoint.glob("*.safetensors")), framework="pt") as shard:
        names = list(shard.keys())
    with watched_server(two_rank_checkpoint, tmp_path, ranks=2) as (process, base_url, _, watcher):
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
            tensors = sum(checkpoints.is_of_rank(name, rank["rank"], 2) for name in names)
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
        assert post(f"{base_url}/v1/completions", body)["choices"]

        os.kill(victim, signal.SIGKILL)
        reason = watcher.get_until("/startupz", 500)
        assert f"rank 1 (pid {victim}" in reason and "died in phase ready" in reason and "rank 0" not in reason
        # vLLM takes a dead rank for a reason to shut down in order: status 0, which a restart policy must not trust.
        assert process.wait(120) == 0, "docs/startup.md tells this status"


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_rank_frozen_and_then_killed_while_it_loads_is_named_and_ends_the_server(
    two_rank_checkpoint: Path, tmp_path: Path
) -> None:
    with watched_server(two_rank_checkpoint, tmp_path, ranks=2) as (process, _, _, watcher):
        begun = {"model construction", "checkpoint read", "upload", "weight preparation"}
        loading = follow(watcher, lambda answer: len(answer["ranks"]) == 2 and answer["ranks"][1]["phase"] in begun)[-1]
        victim = loading["ranks"][1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        reason = watcher.get_until("/startupz", 500)
        assert f"rank 1 (pid {victim}" in reason
        # On a busy machine it may have stood still before: that is told first.
        follow(watcher, lambda answer: "stopped by a signal" in answer["reason"])
        os.kill(victim, signal.SIGCONT)
        watcher.get_until("/startupz", 503)
        os.kill(victim, signal.SIGKILL)
        reason = watcher.get_until("/startupz", 500)
        assert f"rank 1 (pid {victim}" in reason and "died in phase" in reason
        assert process.wait(120) != 0, "docs/startup.md tells this status"
