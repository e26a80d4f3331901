"""The phases of one rank's start-up: what was done of what is to be done, how long it took, and how fast it goes."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .records import Record, Track

if TYPE_CHECKING:
    import torch
    from nvfp4_megamoe.checkpoint.read_plan import ReadPlan
    from nvfp4_megamoe.checkpoint.reader import ReadCounters

    from .status_file import StatusFile

logger = logging.getLogger(__name__)

START = "start"
MODEL = "model construction"
READ = "checkpoint read"
UPLOAD = "upload"
PREPARE = "weight preparation"
LAYER_TEST = "layer test"
COMPILE = "compile and warm-up"
KV_CACHE = "KV cache"
CAPTURE = "graph capture"
WAITING = "waiting"
READY = "ready"
STOPPING = "stopping"
STOPPED = "stopped"

WRITE_EVERY = 256
RATE_WINDOW_S = 4.0
_MAX_HEADER_BYTES = 100 << 20
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class Reporter:
    """The phases of this process. They nest; time is counted to the innermost one only.

    A thread that says that it works beside the rank has phases of its own. They are the rank's while that waits for it.
    """

    def __init__(self, file: StatusFile) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        self.error: str | None = None
        self._base = WAITING
        self._rates_at = time.perf_counter()
        self._rates_from: dict[str, dict[str, int]] = {}
        self._main = Track(self.record(START))
        self._waits_in: Record | None = self._main.current
        self._beside: dict[int, Track] = {}
        self._uncounted = 0
        self._refresh: Callable[[], None] | None = None
        file.run(self.state)

    def record(self, name: str) -> Record:
        """The record of phase ``name``, made at its first use."""
        record = self.records.get(name)
        if record is None:
            record = self.records[name] = Record(name)
        return record

    @contextlib.contextmanager
    def phase(self, name: str, then: str | None, totals: dict[str, int]) -> Iterator[Record]:
        """Be in phase ``name``; an exception that leaves the rank's outermost phase is what it fails of."""
        record = self.record(name)
        record.expect(**totals)
        track = self._beside.get(threading.get_ident(), self._main)
        outer = track.switch(record)
        track.depth += 1
        self.file.write()
        try:
            yield record
            if then is not None:
                self._base = then
        except Exception as error:
            if track is self._main and track.depth == 1:
                message = (str(error).strip() or "(no message)").splitlines()[0]
                self.error = f"{name}: {type(error).__name__}: {message}"
            raise
        finally:
            track.depth -= 1
            if track is self._main and not track.depth:
                outer = self.record(self._base)
            track.switch(outer)
            self.file.write()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Give the calling thread phases of its own inside a ``with`` block."""
        self._beside[threading.get_ident()] = Track(None)
        try:
            yield
        finally:
            del self._beside[threading.get_ident()]

    @contextlib.contextmanager
    def wait_beside(self) -> Iterator[None]:
        """Count the time of a ``with`` block to the phases of threads beside the rank alone."""
        self._waits_in = outer = self._main.switch(None)
        try:
            yield
        finally:
            self._main.switch(outer)

    def read_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], files: list[str], local_expert_ids: set[int] | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``weights``: time inside the iterator is READ, time at the consumer is UPLOAD.

        The loop runs once per tensor, some 300 000 times for a large checkpoint: it does no system call but the write.
        """
        read, upload = self.record(READ), self.record(UPLOAD)
        upload.done = done = read.done
        self._uncounted += 1
        self.file.submit(lambda: self._count(files, local_expert_ids))
        yield from self._alternate(weights, read, upload)
        if not self._uncounted:
            for record in (read, upload):
                record.total = {unit: done[unit] for unit in record.total}

    def stream_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], plan: ReadPlan, counters: ReadCounters
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``weights`` that a reader fetches ahead: READ's amounts are what it has fetched, UPLOAD's what came.

        Time inside the iterator, which is waiting for the reader, is READ; time at the consumer is UPLOAD.
        """
        read, upload = self.record(READ), self.record(UPLOAD)
        for record in (read, upload):
            record.expect(tensors=plan.tensors, bytes=plan.tensor_bytes)
        read.skipped = {"tensors": plan.skipped_tensors, "bytes": plan.skipped_bytes}
        before = dict(read.done)

        def refresh() -> None:
            read.done["tensors"] = before["tensors"] + counters.tensors
            read.done["bytes"] = before["bytes"] + counters.tensor_bytes

        self._refresh = refresh
        try:
            yield from self._alternate(weights, read, upload)
        finally:
            refresh()
            self._refresh = None

    def _alternate(
        self, weights: Iterable[tuple[str, torch.Tensor]], read: Record, upload: Record
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``weights``: time in the iterator goes to ``read``, time at the consumer and amounts to ``upload``."""
        done, track = upload.done, self._main
        clock = time.perf_counter
        outer = track.switch(read)
        self.file.write()
        try:
            for item in weights:
                now = clock()
                read.seconds += now - track.since
                track.since = now
                track.current = upload
                size = item[1].nbytes
                yield item
                done["bytes"] += size
                done["tensors"] += 1
                if not done["tensors"] % WRITE_EVERY:
                    self.file.write()
                now = clock()
                upload.seconds += now - track.since
                track.since = now
                track.current = read
        finally:
            # A generator closed late, by the garbage collector, must not disturb the phase that runs then.
            if track.current is read or track.current is upload:
                track.switch(outer)
            self.file.write()

    def prepare_modules(self, modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield ``modules``, counting decoder layers and parameter bytes as the consumer gets through them."""
        modules = list(modules)
        record = self.record(PREPARE)
        layers = [_decoder_layer(name) for name, _ in modules]
        last = {layer: index for index, layer in enumerate(layers) if layer is not None}
        record.expect(layers=len(last), bytes=sum(_own_bytes(module) for _, module in modules))
        for index, (name, module) in enumerate(modules):
            size = _own_bytes(module)
            yield name, module
            record.done["bytes"] += size
            if last.get(layers[index]) == index:
                record.done["layers"] += 1
                self.file.write()

    def state(self) -> dict[str, Any]:
        """What the file says beside who this process is: see docs/startup.md."""
        if (refresh := self._refresh) is not None:
            refresh()
        now = time.perf_counter()
        running = [(track.current, now - track.since) for track in (self._main, *self._beside.copy().values())]
        current = next((record for record, _ in running if record is not None), self._waits_in)
        if now - self._rates_at >= RATE_WINDOW_S:
            self._update_rates(now)
        phases = []
        for record in list(self.records.values()):
            seconds = record.seconds + sum(span for counted, span in running if counted is record)
            phase = {"name": record.name, "started": record.started, "seconds": round(seconds, 3)}
            phase |= {"done": record.done, "total": record.total, "rate": record.rate}
            phases.append(phase | ({"skipped": record.skipped} if record.skipped else {}))
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.process_time() + children.ru_utime + children.ru_stime
        return {"phase": current.name, "error": self.error, "cpu_s": round(cpu, 3), "phases": phases}

    def _update_rates(self, now: float) -> None:
        for record in list(self.records.values()):
            if (before := self._rates_from.get(record.name)) is not None:
                span = now - self._rates_at
                record.rate = {unit: round((record.done[unit] - before[unit]) / span, 1) for unit in before}
            self._rates_from[record.name] = dict(record.done)
        self._rates_at = now

    def _count(self, files: list[str], local_expert_ids: set[int] | None) -> None:
        """Add the tensors of safetensors ``files`` that this rank reads to what there is to do."""
        try:
            tensors, size = _tensors_and_bytes(files, local_expert_ids)
            for name in (READ, UPLOAD):
                self.record(name).expect(tensors=tensors, bytes=size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # The loader reads the same files and says what is wrong with them; here only the total is missing.
            logger.info("the number of weights to load is unknown: %s", error)
        finally:
            self._uncounted -= 1


def _tensors_and_bytes(files: list[str], local_expert_ids: set[int] | None) -> tuple[int, int]:
    if local_expert_ids is not None:
        from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
    tensors = size = 0
    for file in files:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"{file} is not a safetensors file")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or (local_expert_ids is not None and should_skip_weight(name, local_expert_ids)):
                continue
            begin, end = entry["data_offsets"]
            tensors += 1
            size += end - begin
    return tensors, size


def _decoder_layer(name: str) -> str | None:
    match = _DECODER_LAYER.search(name)
    return match and match.group(1)


def _own_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))
