"""A process that reports like a rank, through the product's own rank side. Usage: simulated_rank.py RANK RANKS STEP...

Steps, run in order: load:TENSORS:SECONDS (each), prepare:LAYERS:SECONDS (each), sleep:SECONDS and spin:SECONDS (in the
compile phase), child:SECONDS (a child spins), wait-spin:SECONDS (spins while waiting), read-file:PATH:SECONDS (reads it
over and over), ready, fail:MESSAGE, told-to-end, stop. Then sleeps until it is killed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "model_executor"))

from nvfp4 import progress

SPIN = "import time, sys; end = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


def configuration(ranks: int, run: str = "sim") -> SimpleNamespace:
    """What the rank side reads of vLLM's configuration."""
    parallel = SimpleNamespace(world_size=ranks, data_parallel_rank=0, data_parallel_size=1)
    parallel.data_parallel_size_local, parallel.local_world_size = 1, ranks
    return SimpleNamespace(instance_id=run, parallel_config=parallel)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def weights(count: int, seconds: float) -> Iterator[tuple[str, SimpleNamespace]]:
    for index in range(count):
        time.sleep(seconds)
        yield f"layers.{index}.weight", SimpleNamespace(nbytes=37_000_000)


def load(count: int, seconds: float) -> None:
    with progress.phase(progress.MODEL):
        for name in ("checkpoint read", "upload"):
            progress._reporter.record(name).expect(tensors=count, bytes=37_000_000 * count)
        for _ in progress.read_weights(weights(count, seconds), []):
            progress._reporter.file.write()


def prepare(count: int, seconds: float) -> None:
    with progress.phase(progress.PREPARE, layers=count) as record:
        for _ in range(count):
            time.sleep(seconds)
            record.add(layers=1)
            progress._reporter.file.write()


def read_file(path: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    with progress.phase(progress.COMPILE):
        while time.monotonic() < end:
            Path(path).read_bytes()
            time.sleep(0.2)


def step(text: str) -> None:
    name, *values = text.split(":")
    match name:
        case "load":
            load(int(values[0]), float(values[1]))
        case "prepare":
            prepare(int(values[0]), float(values[1]))
        case "sleep":
            with progress.phase(progress.COMPILE):
                time.sleep(float(values[0]))
        case "spin":
            with progress.phase(progress.COMPILE):
                spin(float(values[0]))
        case "child":
            with progress.phase(progress.COMPILE):
                subprocess.run([sys.executable, "-c", SPIN, values[0]], check=True)
        case "wait-spin":
            with progress.phase(progress.MODEL):
                pass
            spin(float(values[0]))
        case "read-file":
            read_file(values[0], float(values[1]))
        case "ready":
            with progress.phase(progress.COMPILE, then=progress.READY):
                pass
        case "fail":
            with progress.phase(progress.MODEL):
                raise ValueError(values[0])
        case "stop":
            with progress.phase(progress.STOPPING, then=progress.STOPPED):
                pass
            sys.exit(0)
        case "told-to-end":
            progress.announce_end(configuration(1))
        case _:
            raise ValueError(f"unknown step {text!r}")


if __name__ == "__main__":
    progress.start(configuration(int(sys.argv[2])), int(sys.argv[1]))
    for each in sys.argv[3:]:
        step(each)
    time.sleep(3600)
