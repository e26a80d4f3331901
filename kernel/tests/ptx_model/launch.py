"""What a compiled kernel's own host code would launch: grid, cluster, shared memory, and parameter bytes.

The ahead-of-time object is linked with ``launch_stub.c``, a runtime that records the launch, and its host entry is
called with the caller's arguments. Tensor maps are therefore those that the kernel language itself encodes.
"""

from __future__ import annotations

import copy
import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError
from .machine import Machine
from .memory import GlobalMemory
from .parser import Program, parse

_STUB = Path(__file__).with_name("launch_stub.c")
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6


@dataclass(frozen=True)
class Launch:
    """One recorded launch; ``params`` is laid out as the kernel's parameter space."""

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_shared: int
    programmatic: bool
    params: bytes

    def machine(self, memory: GlobalMemory, **options: object) -> Machine:
        """A machine for this launch; ``options`` as in :class:`Machine`."""
        return Machine(
            self.program, self.params, memory, self.grid, self.block, self.dynamic_shared, self.cluster, **options
        )


class HostObject:
    """The host code of one compiled function, exported to ``directory/name.o`` and ``name.h``."""

    def __init__(self, compiled: object, directory: Path, name: str) -> None:
        """Export ``compiled`` (result of ``cute.compile`` with ``--keep-ptx``) and link it with the stub."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise ModelError("launch capture needs a C compiler (gcc or cc) to link the object")
        compiled.export_to_c(file_path=str(directory), file_name=name, function_prefix=name)
        library = directory / f"lib{name}.so"
        command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic", "-o", library, directory / f"{name}.o", _STUB]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self.ptx = compiled.__ptx__
        self.program = parse(self.ptx)
        self.library = ctypes.CDLL(str(library))
        entry = re.search(rf"void (_mlir_{name}__mlir_ciface\w+)\(", (directory / f"{name}.h").read_text())
        if entry is None:
            raise ModelError(f"{name}.h declares no host entry")
        self.entry = getattr(self.library, entry[1])
        self._load(name)

    def with_ptx(self, ptx: str) -> HostObject:
        """The same host code with another device program of the same parameters."""
        other = copy.copy(self)
        other.ptx, other.program = ptx, parse(ptx)
        return other

    def _load(self, name: str) -> None:
        """Call the object's own initialisation, which loads the device code into the stub."""
        module, status, device = ctypes.c_void_p(), ctypes.c_int(0), ctypes.c_int(0)
        reference = ctypes.pointer(ctypes.pointer(module))
        getattr(self.library, f"_mlir_{name}_cuda_init")(_pointers([reference, ctypes.pointer(status)]))
        getattr(self.library, f"_mlir_{name}_cuda_load_to_device")(
            _pointers([reference, ctypes.pointer(device), ctypes.pointer(status)])
        )

    def capture(self, args: Sequence[ctypes._SimpleCData]) -> Launch:
        """Call the host code with ``args`` and a null stream.

        Raises:
            ModelError: the host code fails or does not launch exactly one kernel.
        """
        sizes = [size for _, size in self.program.params.values()]
        self._set("stub_param_count", ctypes.c_int, len(sizes))
        table = (ctypes.c_int * 64).in_dll(self.library, "stub_param_sizes")
        table[: len(sizes)] = sizes
        self._set("stub_launches", ctypes.c_int, 0)
        values = [*args, ctypes.c_void_p(0), ctypes.c_int32(0)]
        self.entry(_pointers([ctypes.pointer(value) for value in values]), len(values))
        launches = ctypes.c_int.in_dll(self.library, "stub_launches").value
        if values[-1].value or launches != 1:
            raise ModelError(f"the host code returned {values[-1].value} after {launches} launches")
        raw = bytes((ctypes.c_ubyte * sum(sizes)).in_dll(self.library, "stub_params"))
        params, at = bytearray(self.program.param_bytes), 0
        for offset, size in self.program.params.values():
            params[offset : offset + size] = raw[at : at + size]
            at += size
        attributes = self._attributes()
        cluster = tuple(
            int.from_bytes(attributes.get(_CLUSTER_DIMENSION, b"")[i : i + 4], "little") or 1 for i in (0, 4, 8)
        )
        return Launch(
            self.program,
            tuple((ctypes.c_uint * 3).in_dll(self.library, "stub_grid")),
            tuple((ctypes.c_uint * 3).in_dll(self.library, "stub_block")),
            cluster,
            ctypes.c_uint64.in_dll(self.library, "stub_shared").value,
            bool(attributes.get(_PROGRAMMATIC_SERIALIZATION, b"\0")[0]),
            bytes(params),
        )

    def _attributes(self) -> dict[int, bytes]:
        count = ctypes.c_uint.in_dll(self.library, "stub_attribute_count").value
        ids = (ctypes.c_int * 16).in_dll(self.library, "stub_attribute_ids")
        values = ((ctypes.c_ubyte * 64) * 16).in_dll(self.library, "stub_attribute_values")
        return {ids[i]: bytes(values[i]) for i in range(count)}

    def _set(self, name: str, kind: type, value: int) -> None:
        kind.in_dll(self.library, name).value = value


def _pointers(items: Sequence[object]) -> ctypes.Array:
    return (ctypes.c_void_p * len(items))(*(ctypes.cast(item, ctypes.c_void_p) for item in items))
