"""Layers prepared on a thread of their own: in order, with the loader's modes; its errors end the load."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.simulated_rank import configuration  # puts model_executor/ on the path
from tests.startup_cases import PATIENCE_S

# isort: split
from nvfp4 import progress, reporter
from nvfp4.preparer import LayerPreparer


def no_thread() -> bool:
    return not any(thread.name == "layer-preparation" for thread in threading.enumerate())


def test_layers_are_prepared_one_at_a_time_in_order_while_the_block_goes_on() -> None:
    began, go_on, done = threading.Event(), threading.Event(), []

    def prepare(layer: str) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        done.append((layer, threading.current_thread().name))

    with LayerPreparer(prepare) as preparer:
        preparer.submit("a")
        preparer.submit("b")
        assert began.wait(PATIENCE_S) and not done, "submitting does not wait"
        go_on.set()
    assert done == [("a", "layer-preparation"), ("b", "layer-preparation")], "the block's end waits for both"
    assert preparer.seconds > 0 and no_thread()


def test_the_thread_has_the_loaders_device_and_modes() -> None:
    found = []

    def prepare(_: str) -> None:
        made = torch.empty(1)
        found.append((made.device.type, torch.is_grad_enabled(), made.is_inference()))

    for inference in (False, True):
        with torch.device("meta"), torch.inference_mode(inference), LayerPreparer(prepare) as preparer:
            preparer.submit("a")
    with torch.no_grad(), LayerPreparer(prepare) as preparer:
        preparer.submit("a")
    assert found == [("meta", True, False), ("meta", False, True), ("cpu", False, False)]


@pytest.mark.parametrize("gives_way", [False, True])
def test_the_loader_has_a_processor_to_itself_until_all_is_loaded(gives_way: bool) -> None:
    before, found, loaded = torch.get_num_threads(), [], threading.Event()

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def prepare(layer: str) -> None:
        found.append((layer, torch.get_num_threads(), priority()))
        assert layer == "b" or loaded.wait(PATIENCE_S)

    try:
        torch.set_num_threads(4)
        own = priority()
        with LayerPreparer(prepare, gives_way) as preparer:
            assert torch.get_num_threads() == 1
            preparer.submit("a")
            while not found:
                time.sleep(0.001)
            preparer.submit("b")
            threading.Timer(0.2, loaded.set).start()  # the block ends, and waits, before
        assert torch.get_num_threads() == 4 and priority() == own
        theirs = min(own + 10, 19) if gives_way else own
        assert found == [("a", 3, theirs), ("b", 4, theirs)]
    finally:
        torch.set_num_threads(before)


def test_an_error_ends_the_stream_with_itself_and_drops_the_layers_behind() -> None:
    wrong, done = ValueError("layer b is wrong"), []

    def prepare(layer: str) -> None:
        if layer == "b":
            raise wrong
        done.append(layer)

    def tensors() -> Iterator[int]:
        for index in range(10**6):
            time.sleep(0.001)
            yield index

    with pytest.raises(ValueError, match="layer b is wrong") as caught, LayerPreparer(prepare) as preparer:
        for layer in "abc":
            preparer.submit(layer)
        for index in preparer.watch(tensors()):
            assert index < PATIENCE_S * 1000, "the stream goes on after the error"
    assert caught.value is wrong and done == ["a"] and no_thread()


def test_an_error_in_the_last_layer_is_raised_at_the_end_of_the_block() -> None:
    def prepare(_: str) -> None:
        time.sleep(0.05)
        raise MemoryError("no scratch")

    with pytest.raises(MemoryError, match="no scratch"), LayerPreparer(prepare) as preparer:
        preparer.submit("last")
    assert no_thread()


def test_a_cancelled_load_waits_for_the_layer_at_hand_and_drops_the_others() -> None:
    began, done = threading.Event(), []

    def prepare(layer: str) -> None:
        began.set()
        time.sleep(0.1)
        done.append(layer)

    with pytest.raises(KeyboardInterrupt), LayerPreparer(prepare) as preparer:
        preparer.submit("a")
        preparer.submit("b")
        assert began.wait(PATIENCE_S)
        raise KeyboardInterrupt
    assert done == ["a"] and no_thread()


def test_the_ranks_phase_is_the_loaders_until_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGA_MOE_STATUS_DIR", str(tmp_path))
    monkeypatch.delenv("MEGA_MOE_RUN_ID", raising=False)
    progress.start(configuration(1), 0)
    testing, go_on = threading.Event(), threading.Event()

    def state() -> dict:
        progress._reporter.file.write()
        return json.loads((tmp_path / "sim-rank0.json").read_text())

    def prepare(_: str) -> None:
        with progress.phase(reporter.PREPARE), progress.phase(reporter.LAYER_TEST):
            testing.set()
            assert go_on.wait(PATIENCE_S)
            time.sleep(0.1)
            raise ValueError("layer 7 differs")

    def release_when_it_waits() -> None:
        end = time.monotonic() + PATIENCE_S
        while (found := state()["phase"]) == reporter.MODEL and time.monotonic() < end:
            time.sleep(0.01)
        waited_in.append(found)
        go_on.set()

    waited_in: list[str] = []
    observer = threading.Thread(target=release_when_it_waits)
    try:
        with (
            pytest.raises(ValueError, match="layer 7"),
            progress.phase(reporter.MODEL),
            LayerPreparer(prepare) as preparer,
        ):
            preparer.submit("layer")
            assert testing.wait(PATIENCE_S)
            assert state()["phase"] == reporter.MODEL, "what runs beside the rank is not its phase"
            time.sleep(0.1)
            observer.start()
        observer.join()
        assert waited_in == [reporter.LAYER_TEST]
        after = state()
        seconds = {phase["name"]: phase["seconds"] for phase in after["phases"]}
        assert seconds[reporter.LAYER_TEST] >= 0.2, "counted while it ran beside the model and while that waited"
        assert 0.1 <= seconds[reporter.MODEL] < seconds[reporter.LAYER_TEST], "waiting is counted once"
        assert after["error"] == f"{reporter.MODEL}: ValueError: layer 7 differs"
        assert after["phase"] == reporter.WAITING
    finally:
        progress.stop()
