"""Launches the compiled kernels through the CUDA driver; the kernel language is not needed at run time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from nvfp4_megamoe.backends.sm100 import objects
from nvfp4_megamoe.backends.sm100.objects import KernelObject

_MAX_DYNAMIC_SHARED = 8
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6
_ARGUMENT = {"q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


class Launcher(Protocol):
    """Starts a kernel on a tensor's device."""

    def launch(self, name: str, blocks: int, args: Sequence[torch.Tensor | int | float]) -> None:
        """Launch ``blocks`` blocks on the current stream; a tensor in ``args`` stands for its address."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class DriverLauncher:
    """Loads every object once into the current context of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.functions: dict[str, tuple[KernelObject, ctypes.c_void_p]] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            for item in objects.read().values():
                self.functions[item.name] = (item, self._load(item))

    def _load(self, item: KernelObject) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = (objects.directory() / item.file).read_bytes()
        self._check(self.cuda.cuModuleLoadData(ctypes.byref(module), image), f"loading {item.file}")
        symbol = item.symbol.encode()
        self._check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, symbol), f"finding {item.symbol}")
        if item.shared_bytes:
            code = self.cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, item.shared_bytes)
            self._check(code, f"reserving shared memory for {item.name}")
        return function

    def _check(self, code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: CUDA error {code}, {(text.value or b'unknown').decode()}")

    def launch(self, name: str, blocks: int, args: Sequence[torch.Tensor | int | float]) -> None:
        """See :class:`Launcher`."""
        item, function = self.functions[name]
        values = argument_values(item, args)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_SERIALIZATION, 1
        attributes[1].id, attributes[1].value[:3] = _CLUSTER_DIMENSION, (item.cluster, 1, 1)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = _Config(
            blocks, 1, 1, item.threads, 1, 1, item.shared_bytes, stream, attributes, 1 + (item.cluster > 1)
        )
        self._check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launching {name}")


def argument_values(item: KernelObject, args: Sequence[torch.Tensor | int | float]) -> list:
    """ctypes values of a kernel's arguments.

    Raises:
        TypeError: their number or kinds are not those of the kernel.
    """
    kinds = "".join("q" if isinstance(arg, torch.Tensor) else "f" if isinstance(arg, float) else "i" for arg in args)
    if kinds != item.arguments:
        raise TypeError(f"{item.name} takes arguments {item.arguments}, got {kinds}")
    numbers = (arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
    return [_ARGUMENT[kind](number) for kind, number in zip(kinds, numbers, strict=True)]


@functools.cache
def launcher(device: torch.device) -> DriverLauncher:
    """The launcher of a device, loaded once a process."""
    return DriverLauncher(device)
