"""The ways in which the CPU backend can compute, each testable on any machine with AVX2."""

from __future__ import annotations

import ctypes
import functools

from nvfp4_megamoe.backends.cpu import build, library
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.moe.geometry import MoEGeometry

_QUICK = tuple(flag.replace("-O3", "-O1") for flag in build.FLAGS)  # to compile, not to run
_FLAGS = {
    "native": build.FLAGS,
    "native-f32": (*_QUICK, "-DNVFP4_OPERAND_F32"),
    "avx2": (*(flag for flag in _QUICK if flag != "-march=native"), "-mavx2", "-mfma", "-mf16c"),
    "bf16": (*_QUICK, "-DNVFP4_EMULATE_BF16"),
    "amx": (*_QUICK, "-DNVFP4_EMULATE_BF16", "-DNVFP4_EMULATE_AMX"),
}
# Without AVX512 the bfloat16 operands and the tiles cannot even be emulated.
VARIANTS = [*(v for v in _FLAGS if v not in ("bf16", "amx") or "avx512bw" in build.cpu_flags()), "torch"]


@functools.cache
def kernel(variant: str) -> ctypes.CDLL | None:
    return None if variant == "torch" else library.load(build.build(_FLAGS[variant]))


def backend(variant: str, geometry: MoEGeometry, precision: str | None = None) -> CpuBackend:
    """A backend that computes with ``variant`` whatever this machine would choose."""
    made = CpuBackend(geometry, precision)
    made._kernel = kernel(variant)
    return made
