"""Shared memory, locked memory, RAM, and the directories that the server writes to."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from .finding import FAIL, GIB, NOTE, OK, SKIPPED, Finding, gib

# NCCL and vLLM's message queues take a few hundred MiB a rank; below 1 GiB a rank start-ups die with bus errors.
_SHM_PER_RANK = GIB
_CACHE_FAIL, _CACHE_NOTE = GIB, 10 * GIB


def check(ranks: int, gpu: bool, cache: Path, status: str) -> list[Finding]:
    """Judge the host for ``ranks`` ranks; ``cache`` keeps compiled kernels, ``status`` the start-up status files."""
    findings = [shared_memory(Path("/dev/shm"), ranks), locked_memory(ranks, gpu), writable("cache directory", cache)]
    if status != "0":
        findings.append(writable("status directory", Path(status), needed=0, wanted=0))
    return findings


def shared_memory(path: Path, ranks: int) -> Finding:
    """Size of the shared-memory file system."""
    try:
        size = shutil.disk_usage(path)
    except OSError as error:
        return Finding("shared memory", FAIL, f"{path}: {error.strerror}", "mount a tmpfs there")
    needed = _SHM_PER_RANK * ranks
    if size.total < needed and ranks > 1:
        remedy = "docker: --shm-size or ipc: host; Kubernetes: an emptyDir in memory"
        return Finding("shared memory", FAIL, f"{gib(size.total)}, expected {gib(needed)}", remedy)
    return Finding("shared memory", OK, f"{gib(size.free)} free of {gib(size.total)}")


def locked_memory(ranks: int, gpu: bool) -> Finding:
    """Limit of locked memory, which pinned buffers need."""
    if not gpu:
        return Finding("locked memory", SKIPPED, "no GPU")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "unlimited")
    text = f"limited to {gib(limit)}"
    return (
        Finding("locked memory", NOTE, text, "ulimits: memlock: -1, if NCCL uses InfiniBand")
        if ranks > 1
        else (Finding("locked memory", OK, text))
    )


def writable(name: str, path: Path, needed: int = _CACHE_FAIL, wanted: int = _CACHE_NOTE) -> Finding:
    """Whether ``path`` can be written, by its nearest existing parent, and has room."""
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, FAIL, f"{path}: {existing} is not a directory that can be written", "correct its owner")
    free = shutil.disk_usage(existing).free
    text = f"{path}, {gib(free)} free"
    if free < needed:
        return Finding(name, FAIL, text, f"expected {gib(needed)}: free space or mount a larger volume")
    if free < wanted:
        return Finding(name, NOTE, text, f"compiled kernels can take {gib(wanted)}")
    return Finding(name, OK, text)


def available_memory() -> int:
    """Bytes of RAM that this process may still use: what the kernel calls available, and the cgroup's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        available = min(available, max(0, left))
    return available
