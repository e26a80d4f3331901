"""Buffers that a checkpoint is read into: aligned, used again, and no more of them than allowed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable

import torch

from nvfp4_megamoe.checkpoint.read_plan import BATCH_BYTES, Batch

ALIGNMENT = 4096  # of offsets, lengths and memory: what O_DIRECT asks for on every common file system and disk
USUAL_BYTES = BATCH_BYTES + 2 * ALIGNMENT


def allocate_pageable(size: int) -> torch.Tensor:
    """Ordinary memory for a buffer, ``size`` bytes, uint8, in huge pages where the system has them.

    A direct read hands the disk one address for each stretch of memory that is physically in one piece.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class BufferPool:
    """Buffers within a limit, the last one used first; one is always given, so that reading goes on.

    A batch that is larger than the usual ones has a buffer of its own, freed after use. For one thread at a time.

    Attributes:
        peak: largest number of bytes of buffers so far.
    """

    def __init__(self, limit: int, allocate: Callable[[int], torch.Tensor]) -> None:
        self.peak = 0
        self._limit = limit
        self._allocate = allocate
        self._free: list[torch.Tensor] = []
        self._bytes = 0

    def take(self, size: int) -> torch.Tensor | None:
        """A buffer of at least ``size`` bytes, or None while the limit forbids it."""
        usual = size <= USUAL_BYTES
        size = USUAL_BYTES if usual else size
        if usual and self._free:
            return self._free.pop()
        if self._in_use() and not self._fits(size):
            return None
        while self._free and not self._fits(size):
            self._bytes -= self._free.pop().numel()
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        memory = self._allocate(size + ALIGNMENT)
        return memory[-memory.data_ptr() % ALIGNMENT :][:size]

    def give_back(self, buffer: torch.Tensor) -> None:
        """Have ``buffer``, which nothing reads or writes any more, used again."""
        if buffer.numel() == USUAL_BYTES:
            self._free.append(buffer)
        else:
            self._bytes -= buffer.numel()

    def _in_use(self) -> int:
        return self._bytes - sum(buffer.numel() for buffer in self._free)

    def _fits(self, size: int) -> bool:
        return self._bytes + size <= self._limit


def aligned_start(batch: Batch) -> int:
    """The byte of its file at which a buffer for ``batch`` begins."""
    return batch.start // ALIGNMENT * ALIGNMENT


def capacity(batch: Batch) -> int:
    """Bytes of a buffer for a batch whose ends are rounded to the alignment."""
    return -(-batch.end // ALIGNMENT) * ALIGNMENT - aligned_start(batch)


def as_memory(buffer: torch.Tensor) -> memoryview:
    """The bytes of ``buffer`` for the system to read into."""
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")
