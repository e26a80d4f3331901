"""Which bytes of a checkpoint's shards are read, in which order, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from nvfp4_megamoe.checkpoint.headers import ShardHeader, TensorInfo

BATCH_BYTES = 8 << 20
# Reading through a small gap costs less than a second request; scalars of other ranks' experts lie in such gaps.
MAX_GAP_BYTES = 64 << 10


@dataclass(frozen=True)
class Batch:
    """Consecutive wanted tensors of one file, read in one go.

    Attributes:
        path: of the shard.
        start, end: bytes of the file from the first tensor's first to the last tensor's last, gaps included.
        tensors: name and place of each, in file order.
    """

    path: Path
    start: int
    end: int
    tensors: tuple[tuple[str, TensorInfo], ...]


@dataclass(frozen=True)
class ReadPlan:
    """Batches file by file, each file's from front to back; numbers and bytes of the tensors read and left alone."""

    shards: tuple[ShardHeader, ...]
    batches: tuple[Batch, ...]
    tensors: int
    tensor_bytes: int
    skipped_tensors: int
    skipped_bytes: int


def plan_reads(
    shards: Iterable[ShardHeader],
    wanted: Callable[[str], bool],
    batch_bytes: int = BATCH_BYTES,
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> ReadPlan:
    """Choose the reads that fetch every wanted tensor of ``shards`` once.

    Args:
        shards: headers, in the order in which the files are to be read; a file without a wanted tensor is not opened.
        wanted: whether this rank needs the tensor of a name; asked once per tensor.
        batch_bytes: longest batch; a larger tensor gets a batch of its own.
        max_gap_bytes: longest run of unwanted bytes between two wanted tensors that is read through.
    """
    used, batches = [], []
    read = [0, 0]
    skipped = [0, 0]
    for shard in shards:
        chosen = []
        for name, info in sorted(shard.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            is_wanted = wanted(name)
            count = read if is_wanted else skipped
            count[0] += 1
            count[1] += info.end - info.start
            if is_wanted:
                chosen.append((name, info))
        if chosen:
            used.append(shard)
            batches += _batches(shard.path, chosen, batch_bytes, max_gap_bytes)
    return ReadPlan(tuple(used), tuple(batches), *read, *skipped)


def _batches(path: Path, chosen: list[tuple[str, TensorInfo]], batch_bytes: int, max_gap_bytes: int) -> Iterable[Batch]:
    first = 0
    for index in range(1, len(chosen) + 1):
        start, end = chosen[first][1].start, chosen[index - 1][1].end
        if index < len(chosen):
            following = chosen[index][1]
            if following.start - end <= max_gap_bytes and following.end - start <= batch_bytes:
                continue
        yield Batch(path, start, end, tuple(chosen[first:index]))
        first = index
