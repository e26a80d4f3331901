"""The disk under a checkpoint: what of it is in memory, and how fast it can be read from front to back."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from nvfp4_megamoe.checkpoint.page_cache import is_cached

REQUEST_BYTES = 4 << 20


class CacheError(RuntimeError):
    """The page cache cannot be brought into the state that a measurement needs."""


def make_cold(files: list[Path]) -> None:
    """Put the files out of the page cache.

    Raises:
        CacheError: parts of them stay.
    """
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if (left := cached_fraction(files)) > 0.01:
        raise CacheError(
            f"{left:.0%} of the checkpoint stays in the page cache: another process maps it. End that, or as root "
            "run: sync; echo 1 > /proc/sys/vm/drop_caches"
        )


def make_warm(files: list[Path]) -> None:
    """Read the files into the page cache.

    Raises:
        CacheError: they do not stay there.
    """
    buffer = memoryview(mmap.mmap(-1, REQUEST_BYTES))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    if (share := cached_fraction(files)) < 0.98:
        raise CacheError(
            f"only {share:.0%} of the checkpoint fits the page cache: free memory, or measure a smaller checkpoint"
        )


def cached_fraction(files: list[Path]) -> float:
    """Share of the files' requests of REQUEST_BYTES that are wholly in memory."""
    requests = cached = 0
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for offset in range(0, size, REQUEST_BYTES):
                requests += 1
                cached += is_cached(file.fileno(), offset, min(REQUEST_BYTES, size - offset))
    return cached / requests


def sequential_rate(files: list[Path], direct: bool) -> float:
    """Bytes a second of one thread that reads the files from front to back into one buffer.

    Args:
        direct: past the page cache (O_DIRECT), else through it.
    """
    buffer = memoryview(mmap.mmap(-1, REQUEST_BYTES))
    done = 0
    began = time.perf_counter()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            if not direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            offset = 0
            while got := os.preadv(descriptor, [buffer], offset):
                offset += got
                if got % mmap.PAGESIZE:
                    break
            done += offset
        finally:
            os.close(descriptor)
    return done / (time.perf_counter() - began)
