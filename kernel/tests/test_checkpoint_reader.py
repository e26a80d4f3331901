"""The checkpoint reader: right bytes, bounded memory, and every fault of a file named."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.checkpoint import buffers, page_cache, reader, shard_file
from nvfp4_megamoe.checkpoint.headers import read_header
from nvfp4_megamoe.checkpoint.read_plan import plan_reads
from nvfp4_megamoe.checkpoint.reader import CheckpointReader
from nvfp4_megamoe.errors import CheckpointError
from safetensors.torch import save_file

MIB = 1 << 20


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return {
        "bf16": noise(300, 512).view(torch.bfloat16),
        "e4m3": noise(1000, 7).view(torch.float8_e4m3fn),
        "e8m0": noise(33).view(torch.float8_e8m0fnu),
        "empty": torch.empty(0, 4),
        "large": noise(5, MIB),
        "scalar": torch.tensor(2.5),
        **{f"u8.{i}": noise(i * 1237 + 1) for i in range(40)},
    }


@pytest.fixture
def shards(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    half = sorted(tensors)[: len(tensors) // 2]
    save_file({name: tensors[name] for name in half}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in tensors if name not in half}, tmp_path / "b.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def made(shards: list[Path], batch_bytes: int = MIB, wanted=lambda name: True, **options: object) -> CheckpointReader:
    identities = {path: shard_file.identify(path) for path in shards}
    plan = plan_reads(map(read_header, shards), wanted, batch_bytes)
    return CheckpointReader(plan, identities, **options)


def drop_from_memory(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def no_reader_thread() -> bool:
    return not any(thread.name.startswith(reader.THREAD_NAME) for thread in threading.enumerate())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("batch_bytes", [1, 100_000, 16 * MIB])
def test_every_tensor_arrives_as_it_was_saved(
    shards: list[Path], tensors: dict[str, torch.Tensor], direct: bool, batch_bytes: int
) -> None:
    drop_from_memory(shards)
    source = made(shards, batch_bytes, direct=direct)
    seen = []
    for name, tensor in source:
        expected = tensors[name]
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
        seen.append(name)
    assert sorted(seen) == sorted(tensors)
    assert source.counters.tensors == len(tensors)
    assert source.counters.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert no_reader_thread()


def test_a_tensor_at_an_odd_offset_arrives_whole(tmp_path: Path) -> None:
    """The format does not promise alignment; safetensors' own writer gives it."""
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[],"data_offsets":[3,7]}}'
    )
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc" + torch.tensor(1.5).numpy().tobytes())
    assert {name: tensor.tolist() for name, tensor in made([path])} == {"a": [97, 98, 99], "b": 1.5}


def test_what_is_in_memory_is_not_read_from_the_disk_again(shards: list[Path], tmp_path: Path) -> None:
    with shards[0].open("rb") as file:
        os.fsync(file.fileno())
        cached = page_cache.is_cached(file.fileno(), 0, 1)
    if not cached:
        pytest.skip("this file system or kernel does not tell what is cached")
    warm = made(shards)
    list(warm)
    assert warm.counters.cached_bytes > 0 and warm.counters.disk_bytes == 0
    drop_from_memory(shards)
    cold = made(shards)
    list(cold)
    if cold.counters.buffered_because is None:
        assert cold.counters.disk_bytes > 0 and cold.counters.cached_bytes == 0


def test_tensors_that_are_not_wanted_are_not_read(shards: list[Path], tensors: dict[str, torch.Tensor]) -> None:
    drop_from_memory(shards)
    small = made(shards, wanted=lambda name: name != "large")
    assert "large" not in dict(small)
    fetched = small.counters.disk_bytes + small.counters.cached_bytes
    assert fetched < sum(t.nbytes for t in tensors.values()) - 4 * MIB


def test_memory_stays_within_the_limit_while_the_consumer_is_slow(tmp_path: Path) -> None:
    count, size = 24, 3 * MIB
    save_file({f"t{i:02}": torch.full((size,), i, dtype=torch.uint8) for i in range(count)}, tmp_path / "s.safetensors")
    usual = buffers.USUAL_BYTES
    source = made([tmp_path / "s.safetensors"], batch_bytes=size, ahead_bytes=2 * usual)
    for index, (_, tensor) in enumerate(source):
        time.sleep(0.005)
        assert tensor[0] == tensor[-1] == index, "a buffer was filled again while in use"
    assert source.counters.buffer_bytes == 2 * usual


def test_a_tensor_larger_than_the_limit_still_comes(tmp_path: Path) -> None:
    big = torch.arange(40 * MIB // 4, dtype=torch.int32)
    save_file({"a": torch.ones(9), "big": big, "z": torch.ones(5)}, tmp_path / "s.safetensors")
    source = made([tmp_path / "s.safetensors"], ahead_bytes=MIB)
    assert all(torch.equal(tensor, big) for name, tensor in source if name == "big")
    assert source.counters.buffer_bytes < 41 * MIB, "the large buffer is in addition to none of the usual ones"


def test_reading_goes_on_while_the_consumer_works(shards: list[Path]) -> None:
    source = made(shards)
    weights = iter(source)
    next(weights)
    end = time.monotonic() + 20
    while source.counters.tensors < source.plan.tensors:
        assert time.monotonic() < end, f"{source.counters.tensors} of {source.plan.tensors} read ahead"
        time.sleep(0.01)
    weights.close()
    assert no_reader_thread()


def test_a_consumer_that_stops_ends_the_thread(shards: list[Path]) -> None:
    weights = iter(made(shards, batch_bytes=1, ahead_bytes=1))
    next(weights)
    weights.close()
    assert no_reader_thread()


class Disk:
    """Stands between the reader and os.preadv: ``before`` sees each read's number before it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
        self.reads, self._before, self._preadv, self._lock = 0, before, os.preadv, threading.Lock()
        monkeypatch.setattr(shard_file.os, "preadv", self._read)

    def _read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            number, self.reads = self.reads, self.reads + 1
        self._before(number)
        return self._preadv(descriptor, buffers, offset)


def test_reads_are_under_way_at_once_and_may_end_in_any_order(
    shards: list[Path], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = threading.Event()

    def the_second_ends_first(number: int) -> None:
        assert number != 0 or second.wait(20), "the second read waits for the first"
        if number == 2:  # begun by the thread that has done the second
            second.set()

    Disk(monkeypatch, the_second_ends_first)
    for name, tensor in made(shards, batch_bytes=1):
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8)), name
    assert second.is_set() and no_reader_thread()


def test_a_consumer_that_stops_waits_for_the_reads_under_way_only(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, go_on = threading.Event(), threading.Event()

    def wait(number: int) -> None:
        if number:
            slow.set()
            assert go_on.wait(20)

    disk = Disk(monkeypatch, wait)
    weights = iter(made(shards, batch_bytes=1))
    next(weights)
    assert slow.wait(20)
    threading.Timer(0.1, go_on.set).start()
    weights.close()
    assert go_on.is_set() and no_reader_thread() and disk.reads <= 1 + reader.READS_AT_ONCE


def test_a_failing_read_is_raised_after_the_tensors_before_it(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail_the_second(number: int) -> None:
        if number == 1:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert failed.wait(20)

    Disk(monkeypatch, fail_the_second)
    weights = iter(made(shards, batch_bytes=1))
    next(weights)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        for _ in weights:
            pass
    assert no_reader_thread()


def test_memory_that_cannot_be_had_ends_the_load(shards: list[Path]) -> None:
    def allocate(size: int) -> torch.Tensor:
        raise MemoryError(f"{size} bytes of pinned memory")

    with pytest.raises(MemoryError, match="pinned"):
        list(made(shards, allocate=allocate))
    assert no_reader_thread()


def fault_of(source: CheckpointReader) -> str:
    with pytest.raises(CheckpointError) as caught:
        list(source)
    assert no_reader_thread()
    return str(caught.value)


def test_a_shard_that_vanishes(shards: list[Path]) -> None:
    source = made(shards)
    shards[1].unlink()
    message = fault_of(source)
    assert str(shards[1]) in message and "No such file" in message


def test_a_shard_that_is_truncated_before_it_is_opened(shards: list[Path]) -> None:
    source = made(shards)
    os.truncate(shards[1], shards[1].stat().st_size - 1000)
    message = fault_of(source)
    assert str(shards[1]) in message and "changed while it was being loaded" in message


@pytest.fixture
def opened(shards: list[Path]) -> Iterator[tuple[shard_file.ShardFile, memoryview, int]]:
    """The second shard, open, a buffer for it and its size."""
    size = shards[1].stat().st_size
    file = shard_file.ShardFile(shards[1], shard_file.identify(shards[1]))
    memory = torch.empty(size + 3 * buffers.ALIGNMENT, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % buffers.ALIGNMENT :]
    yield file, buffers.as_memory(memory), size
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_that_is_truncated_while_it_is_read(
    opened: tuple[shard_file.ShardFile, memoryview, int], direct: bool
) -> None:
    file, buffer, size = opened
    drop_from_memory([file.path])
    if not direct:
        file.buffered_because = "the test asks for it"
    os.truncate(file.path, size - 1000)
    with pytest.raises(CheckpointError, match=r"b\.safetensors ends at byte \d+; expected \d+ bytes"):
        file.read(buffer, 0, size)


def test_a_shard_that_is_written_to(shards: list[Path]) -> None:
    source = made(shards, batch_bytes=1, ahead_bytes=1)
    weights = iter(source)
    next(weights)
    status = shards[0].stat()
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"a\.safetensors changed while it was being loaded"):
        list(weights)


def test_a_shard_that_is_replaced_by_another_of_the_same_size(shards: list[Path], tmp_path: Path) -> None:
    source = made(shards)
    other = tmp_path / "other"
    other.write_bytes(shards[0].read_bytes())
    status = shards[0].stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, shards[0])
    assert "a.safetensors changed while it was being loaded" in fault_of(source)


def test_a_disk_that_fails(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(shards[1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset, *flags)

    source = made(shards)
    monkeypatch.setattr(shard_file.os, "preadv", failing)
    message = fault_of(source)
    assert str(shards[1]) in message and "Input/output error" in message and "bytes 0 to" in message


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    shards: list[Path], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, flags_of = os.preadv, __import__("fcntl").fcntl

    def refusing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if flags_of(descriptor, 3) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return preadv(descriptor, buffers, offset)

    drop_from_memory(shards)
    monkeypatch.setattr(shard_file.os, "preadv", refusing)
    source = made(shards)
    assert {name: tensor.clone().shape for name, tensor in source} == {n: t.shape for n, t in tensors.items()}
    assert source.counters.buffered_because


def test_a_type_that_pytorch_lacks_is_refused_before_reading(tmp_path: Path) -> None:
    header = b'{"odd":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(CheckpointError, match=r"odd in .*odd\.safetensors has dtype F6_E2M3"):
        made([path])
