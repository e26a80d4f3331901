"""Hand-written programs on a real GPU, in place of the model: what both compute must be the same.

Hopper has all of the model's instructions but those of the fifth-generation tensor core and a few conversions, so
it can say whether the model, and the definitions that it is tested against, are right about the others.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest
import torch

from .programs import run as run_on_model

VERSION, TARGET = "9.0", "sm_90a"  # what a driver for CUDA 13.0 assembles
# Not on Hopper: conversion to E2M1, packed float32, three-input minimum.
NEEDS_BLACKWELL = ("e2m1x2", "f32x2", "min.NaN.f32 %r2, %r8, %r9, %r10")


def needs_hopper() -> pytest.MarkDecorator:
    """Skips where there is no GPU of compute capability 9.0."""
    there = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return pytest.mark.skipif(not there, reason="needs a Hopper GPU")


def for_hopper(ptx: str) -> str:
    """The program for Hopper; skips the test where an instruction of it is not there."""
    if missing := [text for text in NEEDS_BLACKWELL if text in ptx]:
        pytest.skip(f"{missing[0]} is not on Hopper")
    return ptx.replace(".version 9.4", f".version {VERSION}").replace(".target sm_100a", f".target {TARGET}")


def run(
    ptx: str, out: np.ndarray, source: np.ndarray | None = None, warps: int = 1, cluster: int = 1, **options
) -> None:
    """As ``programs.run``, on the GPU; the model runs the program first, so that one it rejects never gets there.

    ``options`` are the model's.

    Raises:
        RuntimeError: the driver refuses program or launch, or the kernel faults.
    """
    assembled = for_hopper(ptx)
    run_on_model(ptx, out.copy(), source, warps, cluster, **options)
    given = np.zeros(16, np.uint8) if source is None else source
    tensors = [torch.from_numpy(_bytes(array).copy()).cuda() for array in (out, np.ascontiguousarray(given))]
    function = _driver().load(assembled.encode() + b"\0", "kernel")
    values = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
    stream = torch.cuda.current_stream().cuda_stream
    _driver().launch(function, cluster, 32 * warps, values, stream, cluster=cluster)
    _bytes(out)[:] = tensors[0].cpu().numpy()


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, shared with it."""
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


@functools.cache
def _driver():
    from nvfp4_megamoe.backends.sm100.driver import Driver

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return Driver()
