"""Compiles TileLang kernels in several processes while the weights are read.

vLLM compiles them when the weights are there, in the rank's process, one after the other: for DeepSeek-V4 some forty,
which takes minutes. None depends on weights, and the model registers them while it is made. Here other processes
compile them into TileLang's directory as soon as the model is made, and before its first run the rank waits for the
last; vLLM then finds them there.

The ranks of a host compile the same kernels: one takes the lock, the others wait for it and find the work done. What
could not be compiled is logged, and left to vLLM.

``MEGA_MOE_COMPILE_JOBS``  processes at once, default half of the processors and at most 16; 0 leaves all to vLLM
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import logging
import os
import pickle
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from . import progress

logger = logging.getLogger(__name__)

VARIABLE = "TILELANG_CACHE_DIR"
JOBS = "MEGA_MOE_COMPILE_JOBS"
LIMIT_S = 900.0
_MOST_JOBS = 16  # fewer than three kernels each are not worth another import of vLLM, and its memory
_LOCK = "ahead.lock"
_WORKER = "vllm.model_executor.nvfp4.tilelang_worker"

Work = list[tuple[type, Any]]  # classes of vLLM's kernels, and what each has to compile

_running: list[Ahead] = []


def begin() -> None:
    """Start to compile what the model that was just made has registered, if that is anything and not done already.

    Raises:
        ValueError: MEGA_MOE_COMPILE_JOBS is no number of processes.
    """
    work = _registered()
    if not work or not (jobs := _jobs(len(work))):
        return
    if not (folder := os.environ.get(VARIABLE)):
        logger.info("%d TileLang kernels are compiled one after the other: %s is not set", len(work), VARIABLE)
        return
    ahead = Ahead(work, Path(folder), jobs)
    if ahead.marker.exists():
        return
    _running.append(ahead)
    ahead.start()


def finish() -> None:
    """Wait for what ``begin`` started; what failed of it is logged, and left to vLLM."""
    while _running:
        with progress.wait_beside():
            _running.pop().join()


class Ahead(threading.Thread):
    """One set of kernels; the thread ends when they are compiled, by this rank or by another of the host.

    Attributes:
        marker: exists once these kernels were compiled, or tried.
    """

    def __init__(self, work: Work, folder: Path, jobs: int, limit_s: float = LIMIT_S) -> None:
        super().__init__(name="tilelang-ahead", daemon=True)
        self.folder, self.marker = folder, folder / f"ahead-{_digest(work)}.txt"
        self._work, self._jobs, self._limit_s = work, jobs, limit_s

    def run(self) -> None:
        try:
            with progress.beside(), progress.phase(progress.COMPILE), self._locked():
                if not self.marker.exists():
                    self._compile()
        except Exception as error:
            logger.warning(
                "TileLang kernels are not compiled ahead, vLLM compiles them one after the other: %s: %s",
                type(error).__name__,
                error,
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, too, when the rank dies
            yield

    def _compile(self) -> None:
        logger.info("Compiling %d TileLang kernels in %d processes", len(self._work), self._jobs)
        began = time.perf_counter()
        shares = [self._work[number :: self._jobs] for number in range(self._jobs)]
        compiled, faults = compile_in_processes(shares, self._limit_s)
        seconds = time.perf_counter() - began
        for fault in faults:
            logger.warning("A process that compiled TileLang kernels ahead failed, vLLM compiles the rest: %s", fault)
        note = f"{compiled} of {len(self._work)} TileLang kernels compiled in {seconds:.1f} s by {self._jobs} processes"
        self.marker.write_text("\n".join([note, *faults, ""]))
        logger.info("%s", note)


def compile_in_processes(shares: list[Work], limit_s: float) -> tuple[int, list[str]]:
    """Have a process compile each share; return how many kernels were compiled, and what each that failed says last.

    Raises:
        OSError: there are no more processes, pipes or temporary files.
    """
    deadline = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        read_end, write_end = os.pipe()
        reading = stack.enter_context(os.fdopen(read_end, "rb"))
        writing = stack.enter_context(os.fdopen(write_end, "wb"))
        command = [sys.executable, "-m", _WORKER, str(write_end), str(os.getpid())]
        processes = []
        for share in shares:
            log = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write_end,))
            stack.callback(process.wait)
            stack.callback(process.kill)
            with contextlib.suppress(BrokenPipeError), process.stdin:  # its log says why it ended
                pickle.dump(share, process.stdin)
            processes.append((process, log))
        writing.close()  # the processes have the last ends: the pipe ends with them
        compiled, late = 0, False
        while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (done := os.read(read_end, 4096)):
                break
            compiled += len(done)
        else:
            late = True
            for process, _ in processes:
                process.kill()
        faults = [_fault(process, log) for process, log in processes if process.wait()]
    return compiled, [f"killed after {limit_s:.0f} s"] if late else faults


def _fault(process: subprocess.Popen, log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return f"status {process.returncode}: {lines[-1] if lines else '(it printed nothing)'}"


def _registered() -> Work:
    """The TileLang kernels that vLLM's warm-up would compile for the model that is being loaded."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
    from vllm.model_executor.warmup.jit_warmup_tilelang_helper import VllmTileLangJitKernel

    registry = JitWarmupRegistry._active.get()
    if registry is None or not registry.vllm_config.kernel_config.enable_jit_warmup:
        return []
    work: dict[tuple[type, Any], None] = {}
    for kernel, registrations in registry._registrations.items():
        if not isinstance(kernel, VllmTileLangJitKernel):
            continue
        takes_config = "vllm_config" in inspect.signature(kernel.get_warmup_keys).parameters
        for args, kwargs in registrations:
            if not args and not kwargs and takes_config:  # as the registry itself does
                kwargs = {"vllm_config": registry.vllm_config}
            work.update(dict.fromkeys((type(kernel), key) for key in kernel.get_warmup_keys(*args, **kwargs)))
    return list(work)


def _jobs(kernels: int) -> int:
    most = min(_MOST_JOBS, max(1, len(os.sched_getaffinity(0)) // 2))
    value = os.environ.get(JOBS) or str(most)
    if not value.isdecimal():
        raise ValueError(f"{JOBS}={value!r}: expected a number of processes, 0 for none")
    return min(int(value), kernels)


def _digest(work: Work) -> str:
    """Names these kernels, what compiles them and what for."""
    import torch

    parts = [repr((kind.__module__, kind.__qualname__, key)) for kind, key in work]
    parts += [Path(file).read_text() for file in sorted({inspect.getfile(kind) for kind, _ in work})]
    for package in ("tilelang", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(version(package))
    if torch.cuda.is_available():
        parts.append(repr(torch.cuda.get_device_capability()))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
