"""A start that ends before it has ranks: why is told, until the next start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.simulated_rank import configuration, progress
from tests.startup_cases import Ranks, collector, look_until, state_is

WHY = "layers.1.ffn.experts.5.w3.input_scale: the tensor is missing"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", str(tmp_path / "status"))
    (tmp_path / "status").mkdir()
    return tmp_path / "status"


def test_a_refusal_is_a_failure_until_the_next_start(directory: Path) -> None:
    watch = collector(directory)
    assert watch.look().verdict.state == "progressing"
    progress.announce_refusal(configuration(2), WHY)
    verdict = watch.look().verdict
    assert (verdict.state, verdict.code) == ("failed", 500)
    assert verdict.reason == f"the server refused to start: {WHY}"
    progress.withdraw_refusals()
    assert watch.look().verdict.state == "progressing"


def test_a_refusal_counts_over_the_ranks_before_it_and_not_over_those_after_it(directory: Path) -> None:
    with Ranks(directory) as ranks:
        ranks.start(0, 1, "ready", run="first")
        watch = collector(directory)
        look_until(watch, state_is("ready"))
        progress.announce_refusal(configuration(1, run="second"), WHY)
        assert watch.look().verdict.state == "failed"
        time.sleep(0.05)
        ranks.start(0, 1, "ready", run="third")
        assert look_until(watch, state_is("ready")).ranks[0][0].run == "third"


def test_a_refusal_before_the_service_started_and_of_another_run_says_nothing(directory: Path) -> None:
    progress.announce_refusal(configuration(1, run="old"), WHY)
    time.sleep(0.05)
    watch = collector(directory)
    assert watch.look().verdict.state == "progressing"
    named = collector(directory, run_id="mine")
    progress.announce_refusal(configuration(1, run="other"), WHY)
    assert watch.look().verdict.state == "failed"
    assert named.look().verdict.state == "progressing"


def test_a_broken_refusal_is_reported(directory: Path) -> None:
    watch = collector(directory)
    (directory / "sim.refused").write_text("{")
    snapshot = watch.look()
    assert snapshot.verdict.state == "progressing"
    assert any("sim.refused" in problem for problem in snapshot.problems)


def test_switched_off_nothing_is_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", "0")
    monkeypatch.chdir(directory)
    progress.announce_refusal(configuration(1), WHY)
    progress.withdraw_refusals()
    assert not list(directory.iterdir())
