"""Prepares full layers on a thread of its own, one at a time, while the loader brings in the tensors of others."""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

import torch

from . import progress

Item = TypeVar("Item")
_NICENESS = 10  # a tenth of the weight of an ordinary thread where both want a processor; setpriority(2)


class LayerPreparer:
    """``with LayerPreparer(prepare) as preparer: ... preparer.submit(layer)``; all are prepared when the block is left.

    A block that is left by an exception waits for the layer at hand and drops the others: the thread never outlives it.
    Layers that wait take no memory beyond their parameters; scratch is that of one layer.

    Inside the block PyTorch runs on the calling thread alone, and a layer's preparation on one thread less than before:
    work that is divided over more threads than there are processors waits for the last of them each time. Layers that
    begin when the block has ended have all threads.

    Attributes:
        seconds: spent preparing. wait_seconds: how long the end of the block waited for it.
    """

    def __init__(self, prepare: Callable[[torch.nn.Module], None], gives_way: bool = False) -> None:
        """Make the thread, which starts with the block.

        Args:
            prepare: runs with the default device, the current GPU and the modes of the thread that calls this.
            gives_way: whether it leaves the processor to the loader where both want it; threads that ``prepare`` leaves
                behind would go on doing so.
        """
        self.seconds = self.wait_seconds = 0.0
        self._prepare = prepare
        self._layers: queue.SimpleQueue[torch.nn.Module | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = self._loaded = False
        self._threads = torch.get_num_threads()
        self._gives_way = gives_way
        state = contextvars.copy_context()
        self._thread = threading.Thread(
            target=state.run, args=(self._run, _Modes()), name="layer-preparation", daemon=True
        )

    def __enter__(self) -> LayerPreparer:
        torch.set_num_threads(1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped, self._loaded = kind is not None, True
        self._layers.put(None)
        began = time.perf_counter()
        try:
            with progress.wait_beside():
                self._thread.join()
        finally:
            self._stopped = True  # a signal's exception may have ended the wait
            self._thread.join()
            torch.set_num_threads(self._threads)
            self.wait_seconds = time.perf_counter() - began
        if kind is None:
            self.check()

    def submit(self, layer: torch.nn.Module) -> None:
        """Have ``layer``, which has all its tensors, prepared after those submitted before it."""
        self._layers.put(layer)

    def check(self) -> None:
        """Raise the exception that ended the preparation of a layer, if there was one."""
        if self._error is not None:
            raise self._error

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield ``items`` until a layer's preparation fails; then raise what it failed of."""
        for item in items:
            self.check()
            yield item

    def _run(self, modes: _Modes) -> None:
        try:
            if self._gives_way:
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
            with modes, progress.beside():
                while (layer := self._layers.get()) is not None and not self._stopped:
                    torch.set_num_threads(self._threads if self._loaded else max(1, self._threads - 1))
                    began = time.perf_counter()
                    self._prepare(layer)
                    self.seconds += time.perf_counter() - began
        except BaseException as error:
            self._error = error


class _Modes:
    """What PyTorch keeps for each thread, as it was where this was made."""

    def __init__(self) -> None:
        self._device = torch.get_default_device()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def __enter__(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        self._entered = (torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad), self._device)
        for mode in self._entered:
            mode.__enter__()

    def __exit__(self, *exception: object) -> None:
        for mode in reversed(self._entered):
            mode.__exit__(*exception)
