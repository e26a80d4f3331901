"""Loads the compiled kernels and states their C interface (``csrc/api.cu``)."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from nvfp4_megamoe.backends.sm90.build import LIBRARY, sources_digest
from nvfp4_megamoe.errors import UnsupportedError

REBUILD = "run python -m nvfp4_megamoe.backends.sm90.build"


class ForwardArgs(ctypes.Structure):
    """``Nvfp4Sm90Forward``: pointers are device addresses."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "ids", "topk_weights", "expert_map", "out")),
        *((name, ctypes.c_void_p) for name in ("w13", "w13_scale", "w2", "w2_scale", "w13_global", "w2_global")),
        *(
            (name, ctypes.c_void_p)
            for name in ("order", "inverse", "offsets", "counts", "flags", "partial", "act_scale")
        ),
        *((name, ctypes.c_void_p) for name in ("intermediate", "slot_out")),
        *((name, ctypes.c_int) for name in ("tokens", "topk", "ids_64", "map_size", "num_experts", "hidden")),
        *((name, ctypes.c_int) for name in ("intermediate_size", "variant", "variant2", "grid")),
        *((name, ctypes.c_int) for name in ("num_flags", "capacity", "e4m3_first", "e4m3_second")),
        ("limit", ctypes.c_float),
    ]


def library_path() -> Path:
    """``$NVFP4_SM90_LIBRARY`` or the file that the build step writes."""
    return Path(os.environ.get("NVFP4_SM90_LIBRARY", LIBRARY))


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library that serves, once a process. Raises as :func:`open_library`."""
    return open_library(library_path(), sources_digest())


def open_library(path: Path, sources: str) -> ctypes.CDLL:
    """Load the library at ``path``, which must have been built from ``sources`` (``build.sources_digest``).

    Raises:
        UnsupportedError: it has not been built, cannot be loaded, or was built from other sources.
    """
    if not path.exists():
        raise UnsupportedError(f"{path} does not exist: {REBUILD}")
    try:
        lib = ctypes.CDLL(str(path))
        lib.nvfp4_sm90_sources.restype = ctypes.c_char_p
        made_from = lib.nvfp4_sm90_sources().decode()
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"{path} is not a library of these kernels ({error}): {REBUILD}") from error
    if made_from != sources:
        raise UnsupportedError(f"{path} was built from sources {made_from}, expected {sources}: {REBUILD}")
    lib.nvfp4_sm90_forward.argtypes = [ctypes.POINTER(ForwardArgs), ctypes.c_void_p]
    lib.nvfp4_sm90_forward.restype = ctypes.c_int
    lib.nvfp4_sm90_repack.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int] * 4,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    lib.nvfp4_sm90_repack.restype = ctypes.c_int
    lib.nvfp4_sm90_partial_bytes.argtypes = [ctypes.c_int]
    lib.nvfp4_sm90_partial_bytes.restype = ctypes.c_size_t
    lib.nvfp4_sm90_error.argtypes = [ctypes.c_int]
    lib.nvfp4_sm90_error.restype = ctypes.c_char_p
    return lib


def check(lib: ctypes.CDLL, code: int, what: str) -> None:
    """Raise RuntimeError with CUDA's own words where ``code`` is not success."""
    if code != 0:
        raise RuntimeError(f"{what}: CUDA error {code}, {lib.nvfp4_sm90_error(code).decode()}")
