"""What this rank is doing while it starts, in one small file that a separate process can read at any time.

``MEGA_MOE_STATUS_DIR``  directory of the files, default /dev/shm/mega-moe-status; 0 switches reporting off
``MEGA_MOE_RUN_ID``      name of this start of the server, default vLLM's instance id

The file is written at every change of phase, at every 256th weight, after every decoder layer, and every five seconds
by a thread. docs/startup.md describes it and its readers. Without a running reporter every function here does nothing,
and iterators are returned as they came.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import status_file
from .records import Record
from .reporter import (
    CAPTURE,
    COMPILE,
    KV_CACHE,
    LAYER_TEST,
    MODEL,
    PREPARE,
    READY,
    START,
    STOPPED,
    STOPPING,
    Reporter,
)
from .status_file import StatusFile

if TYPE_CHECKING:
    import torch
    from nvfp4_megamoe.checkpoint.read_plan import ReadPlan
    from nvfp4_megamoe.checkpoint.reader import ReadCounters
    from vllm.config import VllmConfig

__all__ = ["CAPTURE", "COMPILE", "KV_CACHE", "LAYER_TEST", "MODEL", "PREPARE", "READY", "START", "STOPPED", "STOPPING"]

logger = logging.getLogger(__name__)

_DEFAULT_DIRECTORY = "/dev/shm/mega-moe-status"

_reporter: Reporter | None = None


def start(vllm_config: VllmConfig, rank: int) -> None:
    """Begin to report for ``rank`` of this data-parallel replica; a directory that cannot be used is warned of."""
    global _reporter
    stop()
    if (directory := _directory()) is None:
        return
    parallel = vllm_config.parallel_config
    replica = parallel.world_size
    identity = {
        "ranks": parallel.data_parallel_size * replica,
        "ranks_here": max(1, parallel.data_parallel_size_local) * parallel.local_world_size,
    }
    try:
        file = StatusFile(directory, _run(vllm_config), parallel.data_parallel_rank * replica + rank, identity)
    except OSError as error:
        logger.warning("start-up progress is not reported: %s. Set MEGA_MOE_STATUS_DIR to a writable directory", error)
    else:
        _reporter = Reporter(file)


def announce_end(vllm_config: VllmConfig) -> None:
    """Say that the server ends by order: it may then kill its ranks, which is no crash."""
    if (directory := _directory()) is not None:
        with contextlib.suppress(OSError):
            (directory / f"{_run(vllm_config)}.ending").touch()


def announce_refusal(vllm_config: VllmConfig, why: str) -> None:
    """Say that this start ends before it has ranks, and why; the next start withdraws it."""
    if (directory := _directory()) is not None:
        with contextlib.suppress(OSError):
            status_file.write_refusal(directory, _run(vllm_config), why)


def withdraw_refusals() -> None:
    """Forget why earlier starts ended before they had ranks."""
    if (directory := _directory()) is not None:
        with contextlib.suppress(OSError):
            status_file.withdraw_refusals(directory)


def stop() -> None:
    """End reporting."""
    global _reporter
    if _reporter is not None:
        _reporter.file.close()
    _reporter = None


@contextlib.contextmanager
def phase(name: str, then: str | None = None, **totals: int) -> Iterator[Record]:
    """Report phase ``name`` inside a ``with`` block or a decorated function, and ``then`` after the outermost one.

    ``totals`` (tensors, layers, bytes) are what the phase has to do; the yielded record's ``add`` counts what is done.
    """
    if _reporter is None:
        yield Record(name)
    else:
        with _reporter.phase(name, then, totals) as record:
            yield record


def read_weights(
    weights: Iterable[tuple[str, torch.Tensor]], files: list[str], local_expert_ids: set[int] | None = None
) -> Iterable[tuple[str, torch.Tensor]]:
    """Count (name, tensor) pairs read from ``files``; weights of experts not in ``local_expert_ids`` are not read."""
    return weights if _reporter is None else _reporter.read_weights(weights, files, local_expert_ids)


def stream_weights(
    weights: Iterable[tuple[str, torch.Tensor]], plan: ReadPlan, counters: ReadCounters
) -> Iterable[tuple[str, torch.Tensor]]:
    """Count (name, tensor) pairs of ``plan`` that a reader fetches ahead, and what it has fetched."""
    return weights if _reporter is None else _reporter.stream_weights(weights, plan, counters)


def beside() -> contextlib.AbstractContextManager[None]:
    """Inside a ``with`` block the calling thread works beside the rank's, and its phases do not end the rank's."""
    return contextlib.nullcontext() if _reporter is None else _reporter.beside()


def wait_beside() -> contextlib.AbstractContextManager[None]:
    """Inside a ``with`` block the rank waits for a thread that works beside it, whose phases are the rank's."""
    return contextlib.nullcontext() if _reporter is None else _reporter.wait_beside()


def prepare_modules(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterable[tuple[str, torch.nn.Module]]:
    """Count a model's named modules while the consumer prepares their weights."""
    return modules if _reporter is None else _reporter.prepare_modules(modules)


def _directory() -> Path | None:
    directory = os.environ.get("MEGA_MOE_STATUS_DIR", _DEFAULT_DIRECTORY)
    return None if directory == "0" else Path(directory)


def _run(vllm_config: VllmConfig) -> str:
    # A data-parallel replica's instance id may carry the replica's number; the run is the same.
    return os.environ.get("MEGA_MOE_RUN_ID") or re.sub(r"_dp\d+$", "", vllm_config.instance_id) or "run"


def _forget() -> None:
    global _reporter
    _reporter = None


os.register_at_fork(after_in_child=_forget)
