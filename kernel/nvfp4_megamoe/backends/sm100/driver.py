"""Launches the compiled kernels through the CUDA driver; the kernel language is not needed at run time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
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


class Driver:
    """The calls of the CUDA driver that loading and launching take, in the current context."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def load(self, image: bytes, symbol: str, shared_bytes: int = 0) -> ctypes.c_void_p:
        """The kernel ``symbol`` of a cubin, or of PTX that ends with a zero byte.

        Raises:
            RuntimeError: the driver refuses it, with its reason.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image), f"loading {symbol}")
        code = self._cuda.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode())
        self._check(code, f"finding {symbol}")
        if shared_bytes:
            code = self._cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._check(code, f"reserving {shared_bytes} bytes of shared memory for {symbol}")
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        blocks: int,
        threads: int,
        values: Sequence[ctypes._SimpleCData],
        stream: int,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch; its start may overlap the end of the kernel before (programmatic dependent launch).

        Raises:
            RuntimeError: the driver refuses the launch, with its reason.
        """
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_SERIALIZATION, 1
        attributes[1].id, attributes[1].value[:3] = _CLUSTER_DIMENSION, (cluster, 1, 1)
        config = _Config(blocks, 1, 1, threads, 1, 1, shared_bytes, stream, attributes, 1 + (cluster > 1))
        self._check(self._cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), "launching")

    def _check(self, code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: CUDA error {code}, {(text.value or b'unknown').decode()}")


class DriverLauncher:
    """Loads every object once into the current context of a device.

    ``source``: the objects' directory; None: the one that :func:`objects.directory` names.
    """

    def __init__(self, device: torch.device, source: Path | None = None) -> None:
        self.device, self._driver = device, Driver()
        self._functions: dict[str, tuple[KernelObject, ctypes.c_void_p]] = {}
        source = source or objects.directory()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            for item in objects.read(source).values():
                try:
                    function = self._driver.load((source / item.file).read_bytes(), item.symbol, item.shared_bytes)
                except RuntimeError as error:
                    raise RuntimeError(f"{source / item.file}: {error}") from None
                self._functions[item.name] = item, function

    def launch(self, name: str, blocks: int, args: Sequence[torch.Tensor | int | float]) -> None:
        """See :class:`Launcher`."""
        item, function = self._functions[name]
        values = argument_values(item, args)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        try:
            self._driver.launch(function, blocks, item.threads, values, stream, item.shared_bytes, item.cluster)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from None


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
