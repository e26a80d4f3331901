"""Reads a plan's tensors in file order on a thread of its own, a bounded number of bytes ahead of their consumer."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_megamoe.checkpoint.headers import TensorInfo
from nvfp4_megamoe.checkpoint.read_plan import BATCH_BYTES, Batch, ReadPlan
from nvfp4_megamoe.checkpoint.shard_file import ALIGNMENT, Identity, ShardFile
from nvfp4_megamoe.errors import CheckpointError

DEFAULT_AHEAD_BYTES = 256 << 20
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass
class ReadCounters:
    """What has been read so far; written by the reader's thread, read by anyone.

    Attributes:
        tensors, tensor_bytes: that have arrived.
        disk_bytes, cached_bytes: fetched from the disk and from the system's page cache, gaps and alignment included.
        read_seconds: spent in reads. wait_seconds: that the consumer waited for a tensor.
        buffer_bytes: largest memory used for reading ahead.
        buffered_because: why reads went through the page cache; None where they went past it.
    """

    tensors: int = 0
    tensor_bytes: int = 0
    disk_bytes: int = 0
    cached_bytes: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    buffer_bytes: int = 0
    buffered_because: str | None = None


def allocate_pageable(size: int) -> torch.Tensor:
    """Ordinary memory for a buffer: ``size`` bytes, uint8."""
    return torch.empty(size, dtype=torch.uint8)


class CheckpointReader:
    """Iterates over (name, tensor), once; a tensor is valid until the next one is asked for.

    Tensors are views of buffers that are used again: the consumer copies what it keeps.
    """

    def __init__(
        self,
        plan: ReadPlan,
        identities: dict[Path, Identity],
        *,
        ahead_bytes: int = DEFAULT_AHEAD_BYTES,
        direct: bool = True,
        allocate: Callable[[int], torch.Tensor] = allocate_pageable,
    ) -> None:
        """Prepare to read; nothing is opened before the first tensor is asked for.

        Args:
            plan: what to read.
            identities: of the shards, taken before their headers were read.
            ahead_bytes: memory for what is read before it is asked for; at least one batch is read in any case.
            direct: see ``ShardFile``.
            allocate: gives a uint8 tensor of so many bytes; pinned memory makes copies to a GPU faster. Called on the
                reader's thread.

        Raises:
            CheckpointError: a tensor of the plan has a type that PyTorch does not have.
        """
        for batch in plan.batches:
            for name, info in batch.tensors:
                if info.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{name} in {batch.path} has dtype {info.dtype}; expected one of {', '.join(DTYPES)}. Export "
                        "the checkpoint with a type that PyTorch has."
                    )
        self.plan = plan
        self.counters = ReadCounters()
        self._identities = identities
        self._direct = direct
        self._pool = _BufferPool(ahead_bytes, allocate)
        self._ready: queue.SimpleQueue[tuple[Batch, torch.Tensor] | BaseException | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the plan in its order.

        Raises:
            CheckpointError: naming the shard that cannot be read, ends early or changed, as soon as what was read
                before it has been consumed.
        """
        thread = threading.Thread(target=self._read, name="checkpoint-reader", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = self._ready.get()
                self.counters.wait_seconds += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                batch, buffer = item
                for name, info in batch.tensors:
                    yield name, _tensor(buffer, info, _aligned_start(batch))
                self._pool.give_back(buffer)
        finally:
            self._pool.stop()
            thread.join()

    def _read(self) -> None:
        file: ShardFile | None = None
        try:
            for batch in self.plan.batches:
                if file is None or file.path != batch.path:
                    self._finish(file)
                    file = ShardFile(batch.path, self._identities[batch.path], self._direct)
                start = _aligned_start(batch)
                buffer = self._pool.take(_capacity(batch))
                if buffer is None:
                    break
                self._fetch(file, batch, start, buffer)
                self._ready.put((batch, buffer))
            self._finish(file)
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
        finally:
            if file is not None:
                file.close()

    def _fetch(self, file: ShardFile, batch: Batch, start: int, buffer: torch.Tensor) -> None:
        counters, before = self.counters, (file.disk_bytes, file.cached_bytes)
        began = time.perf_counter()
        file.read(_memory(buffer), start, batch.end)
        counters.read_seconds += time.perf_counter() - began
        counters.disk_bytes += file.disk_bytes - before[0]
        counters.cached_bytes += file.cached_bytes - before[1]
        counters.tensors += len(batch.tensors)
        counters.tensor_bytes += sum(info.end - info.start for _, info in batch.tensors)
        counters.buffer_bytes = max(counters.buffer_bytes, self._pool.peak)
        counters.buffered_because = counters.buffered_because or file.buffered_because

    @staticmethod
    def _finish(file: ShardFile | None) -> None:
        if file is not None:
            file.check_unchanged()
            file.close()


class _BufferPool:
    """Aligned buffers, the last one used first, within a limit; one is always given, so that reading goes on.

    A batch that is larger than the usual ones has a buffer of its own, freed after use.
    """

    def __init__(self, limit: int, allocate: Callable[[int], torch.Tensor]) -> None:
        self.peak = 0
        self._limit = limit
        self._allocate = allocate
        self._free: list[torch.Tensor] = []
        self._bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    def take(self, size: int) -> torch.Tensor | None:
        """A buffer of at least ``size`` bytes, or None after ``stop``; waits for the consumer at the limit."""
        usual = size <= _USUAL
        size = _USUAL if usual else size
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (usual and self._free) or not self._in_use() or self._fits(size)
            )
            if self._stopped:
                return None
            if usual and self._free:
                return self._free.pop()
            while self._free and not self._fits(size):
                self._bytes -= self._free.pop().numel()
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
        memory = self._allocate(size + ALIGNMENT)
        return memory[-memory.data_ptr() % ALIGNMENT :][:size]

    def give_back(self, buffer: torch.Tensor) -> None:
        with self._changed:
            if buffer.numel() == _USUAL:
                self._free.append(buffer)
            else:
                self._bytes -= buffer.numel()
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _in_use(self) -> int:
        return self._bytes - sum(buffer.numel() for buffer in self._free)

    def _fits(self, size: int) -> bool:
        return self._bytes + size <= self._limit


_USUAL = BATCH_BYTES + 2 * ALIGNMENT


def _aligned_start(batch: Batch) -> int:
    return batch.start // ALIGNMENT * ALIGNMENT


def _capacity(batch: Batch) -> int:
    """Bytes of buffer for a batch whose ends are rounded to the alignment."""
    return -(-batch.end // ALIGNMENT) * ALIGNMENT - _aligned_start(batch)


def _memory(buffer: torch.Tensor) -> memoryview:
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")


def _tensor(buffer: torch.Tensor, info: TensorInfo, base: int) -> torch.Tensor:
    """The tensor at ``info`` of a file whose bytes from ``base`` on are in ``buffer``."""
    data, dtype = buffer[info.start - base : info.end - base], DTYPES[info.dtype]
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(info.shape)
