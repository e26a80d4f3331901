"""Reads a plan's tensors in file order, several reads at once, a bounded number of bytes ahead of their consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_megamoe.checkpoint.buffers import BufferPool, aligned_start, allocate_pageable, as_memory, capacity
from nvfp4_megamoe.checkpoint.headers import TensorInfo
from nvfp4_megamoe.checkpoint.read_plan import Batch, ReadPlan
from nvfp4_megamoe.checkpoint.shard_file import Identity, ShardFile
from nvfp4_megamoe.errors import CheckpointError

# Room for what the consumer is late by; more would only take the buffers out of the processor's cache.
DEFAULT_AHEAD_BYTES = 64 << 20
# The disk works on while a thread whose read has ended waits for Python's lock.
READS_AT_ONCE = 2
THREAD_NAME = "checkpoint-reader"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass
class ReadCounters:
    """What has been read so far; written by the reader, read by anyone.

    Attributes:
        tensors, tensor_bytes: that have been read.
        disk_bytes, cached_bytes: fetched from the disk and from the system's page cache, gaps and alignment included.
        read_seconds: while at least one read was under way. wait_seconds: that the consumer waited for a tensor.
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
                reader's threads.

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
        self._pool = BufferPool(ahead_bytes, allocate)
        self._last_of = {batch.path: batch for batch in plan.batches}
        self._files: dict[Path, ShardFile] = {}
        self._changed = threading.Condition()  # guards all below, the pool and the counters
        self._begun = 0
        self._ended: dict[int, torch.Tensor | BaseException] = {}
        self._stopped = False
        self._under_way = 0
        self._busy_since = 0.0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the plan in its order.

        Raises:
            CheckpointError: naming the shard that cannot be read, ends early or changed, as soon as what was read
                before it has been consumed.
        """
        threads = [threading.Thread(target=self._work, name=THREAD_NAME, daemon=True) for _ in range(READS_AT_ONCE)]
        for thread in threads:
            thread.start()
        try:
            for index, batch in enumerate(self.plan.batches):
                buffer = self._wait_for(index)
                if batch is self._last_of[batch.path]:
                    self._finish(batch.path)
                for name, info in batch.tensors:
                    yield name, _tensor(buffer, info, aligned_start(batch))
                with self._changed:
                    self._pool.give_back(buffer)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            for thread in threads:
                thread.join()
            for file in self._files.values():
                file.close()

    def _wait_for(self, index: int) -> torch.Tensor:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: index in self._ended)
            ended = self._ended.pop(index)
            self.counters.wait_seconds += time.perf_counter() - began
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _finish(self, path: Path) -> None:
        """Close a shard of which every read has ended: they are waited for in the plan's order."""
        self._files[path].check_unchanged()
        self._files.pop(path).close()

    def _work(self) -> None:
        """Read batches until none is left: each begins after those before it have, as soon as there is a buffer."""
        while (begun := self._begin()) is not None:
            index, batch, buffer = begun
            try:
                self._fetch(batch, buffer)
                ended = buffer
            except BaseException as error:
                ended = error
            with self._changed:
                self._ended[index] = ended
                self._changed.notify_all()

    def _begin(self) -> tuple[int, Batch, torch.Tensor] | None:
        with self._changed:
            while not self._stopped and self._begun < len(self.plan.batches):
                index, batch = self._begun, self.plan.batches[self._begun]
                try:
                    buffer = self._pool.take(capacity(batch))
                except BaseException as error:
                    self._ended[index] = error
                    self._begun = len(self.plan.batches)
                    self._changed.notify_all()
                    return None
                if buffer is not None:
                    self._begun += 1
                    return index, batch, buffer
                self._changed.wait()
        return None

    def _fetch(self, batch: Batch, buffer: torch.Tensor) -> None:
        counters = self.counters
        with self._changed:
            if batch.path not in self._files:
                self._files[batch.path] = ShardFile(batch.path, self._identities[batch.path], self._direct)
            file = self._files[batch.path]
            if not self._under_way:
                self._busy_since = time.perf_counter()
            self._under_way += 1
        try:
            fetched = file.read(as_memory(buffer), aligned_start(batch), batch.end)
        finally:
            with self._changed:
                self._under_way -= 1
                if not self._under_way:
                    counters.read_seconds += time.perf_counter() - self._busy_since
        with self._changed:
            counters.disk_bytes += fetched.disk_bytes
            counters.cached_bytes += fetched.cached_bytes
            counters.tensors += len(batch.tensors)
            counters.tensor_bytes += sum(info.end - info.start for _, info in batch.tensors)
            counters.buffer_bytes = self._pool.peak
            counters.buffered_because = counters.buffered_because or file.buffered_because


def _tensor(buffer: torch.Tensor, info: TensorInfo, base: int) -> torch.Tensor:
    """The tensor at ``info`` of a file whose bytes from ``base`` on are in ``buffer``."""
    data, dtype = buffer[info.start - base : info.end - base], DTYPES[info.dtype]
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(info.shape)
