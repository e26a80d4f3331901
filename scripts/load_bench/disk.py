"""The disk under a checkpoint: what of it is in memory, and how fast it can be read from front to back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvfp4_megamoe.checkpoint.page_cache import is_cached

REQUEST_BYTES = 4 << 20
LOOK_BYTES = 4 << 30
_MAP_LOCKED = 0x2000  # mmap(2), x86-64
_libc = ctypes.CDLL(None, use_errno=True)


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
    """Bring the files into the page cache, where they stay as long as this process lives.

    They are locked into memory (mlock(2)): a kernel that pages out what is not used for some seconds would take the
    first again while the last are read. Then this process reads them once: where a virtual machine's host finds memory
    page by page, the first look at a page that the disk has filled is ten times slower than the next.

    Raises:
        CacheError: they do not fit, or must not be locked.
    """
    _libc.mmap.restype = ctypes.c_void_p
    for path in files:
        with path.open("rb") as file:
            size = ctypes.c_size_t(os.fstat(file.fileno()).st_size)
            mode = mmap.MAP_SHARED | _MAP_LOCKED
            start = _libc.mmap(None, size, mmap.PROT_READ, mode, file.fileno(), ctypes.c_long(0))
        if start == ctypes.c_void_p(-1).value:
            raise CacheError(f"{path} cannot be locked into memory ({os.strerror(ctypes.get_errno())}): ulimit -l")
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


def look(files: list[Path]) -> dict[str, float]:
    """How fast the disk gives the files now, past the page cache, whatever of them is in it; bytes a second.

    ``one``: one thread reads them from front to back, as ``dd iflag=direct bs=4M`` does. ``several``: four threads
    read a quarter of such a request each, into huge pages: as much as the disk has given any reader here.
    """
    return {"one": sequential_rate(files, direct=True), "several": _rate_of_several(files)}


def sequential_rate(files: list[Path], direct: bool) -> float:
    """Bytes a second of one thread that reads up to LOOK_BYTES of the files from front to back into one buffer.

    Args:
        direct: past the page cache (O_DIRECT), else through it.
    """
    buffer = memoryview(mmap.mmap(-1, REQUEST_BYTES))
    with _opened(files, os.O_DIRECT if direct else 0) as opened:
        if not direct:
            for descriptor in opened.values():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        began = time.perf_counter()
        done = sum(os.preadv(opened[path], [buffer], offset) for path, offset in _requests(files, REQUEST_BYTES))
        return done / (time.perf_counter() - began)


def _rate_of_several(files: list[Path], threads: int = 4) -> float:
    size = REQUEST_BYTES // threads
    memory = mmap.mmap(-1, REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(len(memory)))
    buffers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(threads):
        buffers.put(number * size)
    with _opened(files, os.O_DIRECT) as opened, ThreadPoolExecutor(threads) as pool:

        def read(request: tuple[Path, int]) -> int:
            path, offset = request
            start = buffers.get()
            try:
                return os.preadv(opened[path], [memoryview(memory)[start : start + size]], offset)
            finally:
                buffers.put(start)

        began = time.perf_counter()
        done = sum(pool.map(read, _requests(files, size)))
        return done / (time.perf_counter() - began)


@contextlib.contextmanager
def _opened(files: list[Path], flags: int) -> Iterator[dict[Path, int]]:
    with contextlib.ExitStack() as stack:
        opened = {}
        for path in files:
            opened[path] = os.open(path, os.O_RDONLY | flags)
            stack.callback(os.close, opened[path])
        yield opened


def _requests(files: list[Path], size: int) -> list[tuple[Path, int]]:
    """File and offset of each request of ``size`` bytes within the first LOOK_BYTES of the files."""
    requests = [(path, offset) for path in files for offset in range(0, path.stat().st_size, size)]
    return requests[: LOOK_BYTES // size]
