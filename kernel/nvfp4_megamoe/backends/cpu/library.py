"""The compiled kernel as Python functions, and the choice between it and the torch path."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime that the kernel's symbols resolve to

from nvfp4_megamoe.backends.cpu import build
from nvfp4_megamoe.errors import UnsupportedError

logger = logging.getLogger(__name__)

ENVIRONMENT = "NVFP4_CPU_KERNEL"


class Layer(ctypes.Structure):
    """``Nvfp4Layer`` of kernel.cpp, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("local_experts", "num_experts", "top_k", "hidden", "intermediate")),
        *((name, c_void_p) for name in ("w13", "w13_scale", "w2", "w2_scale")),
        *((name, c_void_p) for name in ("w13_global", "w2_global", "w13_input_scale", "w2_input_scale")),
        ("limit", c_float),
        ("quantize_activations", c_int32),
    )


_SIGNATURES = {
    "nvfp4_isa": (c_char_p, ()),
    "nvfp4_threads": (c_int32, ()),
    "nvfp4_layer_bytes": (c_int64, ()),
    "nvfp4_workspace_bytes": (c_int64, (POINTER(Layer), c_int64)),
    # layer; x, its stride; ids, whether they are int64; weights, expert_map; out, its stride; tokens, workspace
    "nvfp4_forward": (
        None,
        (POINTER(Layer), *(c_void_p, c_int64, c_void_p, c_int32), *(c_void_p,) * 3, *(c_int64, c_int64, c_void_p)),
    ),
}


def load(path: Path) -> ctypes.CDLL:
    """Load a library of ``build.build``.

    Raises:
        OSError: the file is not a library or its symbols are not found, those of OpenMP among them.
        UnsupportedError: the library is of another version of this file.
    """
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.nvfp4_layer_bytes() != ctypes.sizeof(Layer):
        raise UnsupportedError(f"{path} is of another version of the CPU kernel. Delete it and start again.")
    return library


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The compiled kernel, built now where that is still to be done, or None for the torch path.

    ``NVFP4_CPU_KERNEL`` may be ``auto`` (the default), ``compiled`` or ``torch``.

    Raises:
        UnsupportedError: ``compiled`` is set and there is no kernel, or the variable has another value.
    """
    mode = os.environ.get(ENVIRONMENT, "auto")
    if mode not in ("auto", "compiled", "torch"):
        raise UnsupportedError(f"{ENVIRONMENT}={mode}: expected auto, compiled or torch.")
    if mode == "torch":
        logger.warning("%s=torch: the MoE layers run in plain torch, many times slower than the kernel.", ENVIRONMENT)
        return None
    try:
        library = load(build.build())
    except (UnsupportedError, OSError) as error:
        if mode == "compiled":
            raise UnsupportedError(f"{ENVIRONMENT}=compiled, but: {error}") from error
        logger.warning("The MoE layers run in plain torch, many times slower than the kernel: %s", error)
        return None
    logger.info("CPU kernel: %s, %d threads", library.nvfp4_isa().decode(), library.nvfp4_threads())
    return library
