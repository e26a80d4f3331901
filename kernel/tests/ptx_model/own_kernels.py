"""Compile the project's kernels once a test session and execute their launches on the model."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from .launch import HostObject, Launch
from .machine import Machine
from .memory import GlobalMemory

_STEP = 0x1000_0000


@functools.cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="sm100-kernels-")


@functools.cache
def host_object(name: str) -> HostObject:
    """The compiled kernel of that name in ``nvfp4_megamoe.backends.sm100.catalogue``."""
    from nvfp4_megamoe.backends.sm100.catalogue import compile_kernel

    return HostObject(compile_kernel(name), Path(_directory().name), name)


def as_array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bytes of a CPU tensor, shared with it; arrays as they are."""
    return value.view(torch.uint8).numpy() if isinstance(value, torch.Tensor) else value


def capture(name: str, args: list, memory: GlobalMemory) -> Launch:
    """Record the launch with ``args``: tensors and arrays become addresses in ``memory``, int and float scalars."""
    from nvfp4_megamoe.backends.sm100.catalogue import arguments

    given = "".join("f" if isinstance(arg, float) else "i" if isinstance(arg, int) else "q" for arg in args)
    if given != arguments(name):
        raise TypeError(f"{name} takes arguments {arguments(name)}, got {given}")
    values = []
    for i, arg in enumerate(args):
        if isinstance(arg, (torch.Tensor, np.ndarray)):
            values.append(ctypes.c_int64(memory.add(_STEP * (i + 1), as_array(arg), f"argument {i}")))
        else:
            values.append(ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int32(arg))
    return host_object(name).capture(values)


def execute(name: str, args: list, **options: object) -> Machine:
    """Launch the kernel and run it to its end on the model; ``options`` as in :class:`Machine`."""
    memory = GlobalMemory()
    machine = capture(name, args, memory).machine(memory, **options)
    machine.run()
    return machine
