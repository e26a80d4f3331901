"""The rank's side of start-up progress: phases, counts, the file, its lock, and doing nothing when switched off."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.simulated_rank import configuration  # these put model_executor/ and scripts/ on the path
from tests.startup_cases import PATIENCE_S

# isort: split
from nvfp4 import progress, reporter, status_file
from status import phases
from status.rank_files import lock_owner, parse


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", str(tmp_path / "status"))
    monkeypatch.delenv("MEGA_MOE_RUN_ID", raising=False)
    yield tmp_path / "status"
    progress.stop()


def state(directory: Path, rank: int = 0, run: str = "sim") -> dict[str, Any]:
    """The rank's file, written now."""
    progress._reporter.file.write()
    return json.loads((directory / f"{run}-rank{rank}.json").read_text())


def records(directory: Path) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in state(directory)["phases"]}


def tensors(count: int, size: int = 4) -> Iterator[tuple[str, SimpleNamespace]]:
    return ((f"layers.{index}.weight", SimpleNamespace(nbytes=size)) for index in range(count))


def safetensors(path: Path, sizes: dict[str, int]) -> str:
    """Write a file whose header names tensors of ``sizes`` bytes; the data is left out, nothing reads it here."""
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return str(path)


def wait_for_total(directory: Path) -> dict[str, int]:
    end = time.monotonic() + PATIENCE_S
    while not (total := records(directory).get("upload", {}).get("total")):
        assert time.monotonic() < end, "the heartbeat's thread did not count the headers"
        time.sleep(0.02)
    return total


def test_both_sides_know_the_same_phases() -> None:
    names = {name: value for name, value in vars(phases).items() if isinstance(value, str) and name.isupper()}
    assert names.pop("WARM_UP") not in vars(reporter).values(), "the server's phase, not a rank's"
    assert names == {name: vars(reporter)[name] for name in names}
    assert set(phases.ORDER) | phases.PASSIVE | phases.ENDED == set(names.values())


def test_phases_nest_and_time_goes_to_the_innermost(directory: Path) -> None:
    progress.start(configuration(2), 1)
    with progress.phase(progress.MODEL):
        time.sleep(0.1)
        with progress.phase(progress.PREPARE, layers=3) as record:
            record.add(layers=2)
            time.sleep(0.3)
            inside = state(directory, 1)
        assert state(directory, 1)["phase"] == progress.MODEL
    after = state(directory, 1)
    assert inside["phase"] == progress.PREPARE
    assert after["phase"] == reporter.WAITING
    by_name = {phase["name"]: phase for phase in after["phases"]}
    assert 0.1 <= by_name[progress.MODEL]["seconds"] < 0.3 <= by_name[progress.PREPARE]["seconds"]
    assert by_name[progress.PREPARE]["done"]["layers"] == 2 and by_name[progress.PREPARE]["total"] == {"layers": 3}
    assert (after["rank"], after["ranks"], after["ranks_here"]) == (1, 2, 2)


def test_a_decorated_function_reports_each_call_and_what_follows_the_outermost(directory: Path) -> None:
    @progress.phase(progress.COMPILE, then=progress.READY)
    def warm_up(depth: int) -> str:
        return warm_up(depth - 1) if depth else state(directory)["phase"]

    assert warm_up.__name__ == "warm_up"
    progress.start(configuration(1), 0)
    assert warm_up(2) == progress.COMPILE
    assert state(directory)["phase"] == progress.READY
    assert warm_up(0) == progress.COMPILE
    assert state(directory)["phase"] == progress.READY


def test_only_an_exception_that_leaves_the_outermost_phase_is_the_ranks_failure(directory: Path) -> None:
    progress.start(configuration(1), 0)
    with progress.phase(progress.MODEL):
        with pytest.raises(ValueError), progress.phase(progress.LAYER_TEST):
            raise ValueError("handled by a fallback")
        assert state(directory)["error"] is None
    assert state(directory)["error"] is None
    with pytest.raises(RuntimeError), progress.phase(progress.COMPILE, then=progress.READY):
        raise RuntimeError("\nout of memory\nand more lines")
    assert state(directory)["error"] == "compile and warm-up: RuntimeError: out of memory"
    assert state(directory)["phase"] == reporter.WAITING, "a failed warm-up must not become ready"


def test_weights_are_counted_and_timed_on_both_sides_of_the_iterator(directory: Path) -> None:
    progress.start(configuration(1), 0)

    def slow() -> Iterator[tuple[str, SimpleNamespace]]:
        for item in tensors(5, size=100):
            time.sleep(0.04)
            yield item

    seen = []
    with progress.phase(progress.MODEL):
        for name, _ in progress.read_weights(slow(), []):
            seen.append((name, state(directory)["phase"]))
            time.sleep(0.01)
    assert seen == [(f"layers.{index}.weight", "upload") for index in range(5)]
    read, upload = records(directory)["checkpoint read"], records(directory)["upload"]
    assert read["done"] == upload["done"] == {"tensors": 5, "layers": 0, "bytes": 500}
    assert 0.2 <= read["seconds"] < 0.4 and 0.05 <= upload["seconds"] < 0.19


def test_the_file_is_written_at_least_every_256_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress.start(configuration(1), 0)
    written = []
    monkeypatch.setattr(progress._reporter.file, "write", lambda: written.append(done["tensors"]))
    done = progress._reporter.record("checkpoint read").done
    for _ in progress.read_weights(tensors(3000), []):
        pass
    assert max(later - earlier for earlier, later in itertools.pairwise(written)) <= 256


def test_the_file_is_written_by_the_clock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_file.HEARTBEAT_S <= 10
    monkeypatch.setattr(status_file, "HEARTBEAT_S", 0.05)
    progress.start(configuration(1), 0)
    path = directory / "sim-rank0.json"
    before = json.loads(path.read_text())["heartbeat"]
    time.sleep(0.5)
    assert json.loads(path.read_text())["heartbeat"] > before


def test_totals_come_from_the_headers_of_what_this_rank_reads(directory: Path, tmp_path: Path) -> None:
    files = [
        safetensors(tmp_path / "a.safetensors", {"embed.weight": 10, "layers.0.ffn.experts.3.w1.weight": 20}),
        safetensors(tmp_path / "b.safetensors", {"layers.0.ffn.experts.4.w1.weight": 40, "norm.weight": 80}),
    ]
    progress.start(configuration(1), 0)
    weights = progress.read_weights(tensors(4), files)
    next(weights)
    assert wait_for_total(directory) == {"tensors": 4, "bytes": 150}
    list(weights)
    assert records(directory)["upload"]["total"] == {"tensors": 4, "bytes": 16}, "in the end the total is what came"


def test_weights_of_other_ranks_experts_are_not_in_the_total(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vllm.model_executor.model_loader.ep_weight_filter"
    if (vllm := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vLLM is not installed")
    # From its file: importing the package takes half a minute.
    spec = importlib.util.spec_from_file_location(name, Path(vllm.origin).parents[1] / f"{name.replace('.', '/')}.py")
    filter_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(filter_module)
    monkeypatch.setitem(sys.modules, name, filter_module)
    sizes = {f"layers.0.ffn.experts.{e}.w1.{kind}": 10 for e in range(4) for kind in ("weight", "weight_scale")}
    files = [safetensors(tmp_path / "a.safetensors", sizes)]
    progress.start(configuration(1), 0)
    weights = progress.read_weights(tensors(6), files, {0, 1})
    next(weights)
    assert wait_for_total(directory) == {"tensors": 6, "bytes": 60}


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, struct.pack("<Q", 9) + b'{"a": ', struct.pack("<Q", 2) + b"[]"]
)
def test_a_broken_checkpoint_file_leaves_the_total_unknown(directory: Path, tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content)
    progress.start(configuration(1), 0)
    for _ in progress.read_weights(tensors(3), [str(broken)]):
        time.sleep(0.1)
    assert any(thread.name == "startup-progress" for thread in threading.enumerate()), "the heartbeat has ended"
    assert records(directory)["upload"]["total"] == {} and records(directory)["upload"]["done"]["tensors"] == 3


def test_an_abandoned_iterator_does_not_disturb_a_later_phase(directory: Path) -> None:
    progress.start(configuration(1), 0)
    weights = progress.read_weights(tensors(5), [])
    with progress.phase(progress.MODEL):
        next(weights)
    with progress.phase(progress.COMPILE):
        weights.close()
        assert state(directory)["phase"] == progress.COMPILE


def test_modules_are_counted_by_decoder_layer(directory: Path) -> None:
    def module(size: int) -> SimpleNamespace:
        return SimpleNamespace(parameters=lambda recurse: [SimpleNamespace(nbytes=size)])

    progress.start(configuration(1), 0)
    named = [("", module(0)), ("model.embed", module(5))]
    named += [(f"model.layers.{layer}.{part}", module(10)) for layer in range(3) for part in ("attn", "ffn.experts")]
    done = []
    with progress.phase(progress.PREPARE):
        for _ in progress.prepare_modules(named):
            done.append(records(directory)[progress.PREPARE]["done"]["layers"])
    assert done == [0, 0, 0, 0, 1, 1, 2, 2]
    after = records(directory)[progress.PREPARE]
    assert after["done"] == {"tensors": 0, "layers": 3, "bytes": 65} and after["total"] == {"layers": 3, "bytes": 65}


def test_the_other_side_can_read_it_and_sees_the_lock(directory: Path) -> None:
    progress.start(configuration(1), 0)
    path = directory / "sim-rank0.json"
    lock = path.with_suffix(".lock")
    question = "import sys; from status.rank_files import lock_owner; from pathlib import Path\n"
    question += "print(lock_owner(Path(sys.argv[1])))"
    scripts = Path(__file__).parents[1] / "scripts"
    command = [sys.executable, "-c", question, str(lock)]
    answer = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True, timeout=60).stdout
    assert answer.strip() == str(os.getpid())
    status = parse(path.read_text(), os.getpid())
    assert (status.rank, status.phase, status.pid) == (0, "start", os.getpid())
    progress.stop()
    answer = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True, timeout=60).stdout
    assert answer.strip() == "None"
    assert lock_owner(directory / "no such file") is None


def test_a_second_living_process_with_the_same_rank_is_refused(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import sys, time; from tests.simulated_rank import configuration, progress\n"
    code += "progress.start(configuration(1), 0); print(flush=True); time.sleep(60)"
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        content = (directory / "sim-rank0.json").read_text()
        with caplog.at_level(logging.WARNING):
            progress.start(configuration(1), 0)
        assert "is not reported" in caplog.text and progress._reporter is None
        assert json.loads(content)["pid"] == json.loads((directory / "sim-rank0.json").read_text())["pid"] == first.pid
        first.kill()


def test_a_forked_child_does_not_write_in_its_parents_name(directory: Path) -> None:
    progress.start(configuration(1), 0)
    child = os.fork()
    if child == 0:
        with progress.phase(progress.COMPILE):
            os._exit(0 if progress._reporter is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert state(directory)["phase"] == "start"


def test_the_run_is_the_same_for_all_data_parallel_replicas(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(2, run="ab3f1_dp1")
    config.parallel_config.data_parallel_rank, config.parallel_config.data_parallel_size = 1, 4
    config.parallel_config.data_parallel_size_local = 4
    progress.start(config, 1)
    assert (state(directory, 3, "ab3f1")["ranks"], state(directory, 3, "ab3f1")["ranks_here"]) == (8, 8)
    monkeypatch.setenv("MEGA_MOE_RUN_ID", "mine")
    progress.start(config, 1)
    assert state(directory, 3, "mine")["run"] == "mine"


def test_a_full_disk_is_warned_of_once_and_does_not_stop_the_rank(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    progress.start(configuration(1), 0)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status_file.os, "write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with progress.phase(progress.MODEL):
                pass
    assert caplog.text.count("No space left on device") == 1


def test_an_unusable_directory_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", "/proc/nowhere")
    with caplog.at_level(logging.WARNING):
        progress.start(configuration(1), 0)
    assert "start-up progress is not reported" in caplog.text and "MEGA_MOE_STATUS_DIR" in caplog.text


def test_the_announcement_of_the_end_bears_the_runs_name(directory: Path) -> None:
    progress.announce_end(configuration(1))
    assert not directory.exists(), "without ranks there is nobody to tell"
    progress.start(configuration(1), 0)
    progress.announce_end(configuration(1))
    assert (directory / "sim.ending").exists()
    progress.start(configuration(1, run="next"), 0)
    assert not (directory / "sim.ending").exists(), "a new run removes what a dead one left"


def test_switched_off_it_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", "0")
    monkeypatch.chdir(tmp_path)
    progress.start(configuration(1), 0)
    progress.announce_end(configuration(1))
    weights, modules = iter([]), iter([])
    assert progress.read_weights(weights, []) is weights and progress.prepare_modules(modules) is modules
    with progress.phase(progress.MODEL, layers=3) as record:
        record.add(layers=1)
    assert progress._reporter is None and not list(tmp_path.iterdir())


def test_it_costs_little(directory: Path) -> None:
    """A checkpoint of 288 000 tensors must load at most 1 % slower: 1.7 us per tensor are 0.5 s of a 50 s load.

    Measured as processor time of this thread, best of five, against the same iterator untracked; the bound leaves room
    for slower machines.
    """
    count = 20_000

    def consume(weights: Iterator[tuple[str, SimpleNamespace]]) -> float:
        began = time.thread_time()
        for _ in weights:
            pass
        return time.thread_time() - began

    untracked = min(consume(tensors(count)) for _ in range(5))
    progress.start(configuration(1), 0)
    tracked = min(consume(progress.read_weights(tensors(count), [])) for _ in range(5))
    per_tensor_us = (tracked - untracked) / count * 1e6
    print(f"{per_tensor_us:.2f} us of processor time per tensor")
    assert per_tensor_us < 6
