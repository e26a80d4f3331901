"""What ``MEGA_MOE_LAYER_TEST`` asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from nvfp4_megamoe.backends.select import BACKENDS, ONLY_BY_NAME
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.checkpoint.index import CheckpointIndex, read_index

VARIABLE = "MEGA_MOE_LAYER_TEST"
STRICT, FALLBACK, REPORT, OFF = "strict", "fallback", "report", "off"

ONE_SCALE = (
    "vLLM's own NVFP4 backends use the gate's weight_scale_2 for the up projection too. Choose a fallback of ours, or "
    f"{VARIABLE}=strict"
)

# vLLM's names for --moe-backend that take NVFP4 weights and apply SwiGLU's clamp.
_VLLM = (
    "b12x",
    "cutlass",
    "emulation",
    "flashinfer_cutedsl",
    "flashinfer_cutlass",
    "flashinfer_trtllm",
    "humming",
    "marlin",
)


class Fallback(NamedTuple):
    """Another backend. precision: of one of ours; None for its own choice, and for vLLM's."""

    backend: str
    precision: str | None
    is_ours: bool


class Setting(NamedTuple):
    """mode: one of the four. fallback: given where the mode is ``fallback``."""

    mode: str
    fallback: Fallback | None = None


def read_setting() -> Setting:
    """Read the environment.

    Raises:
        ValueError: naming what is known.
    """
    value = os.environ.get(VARIABLE, STRICT)
    mode, _, rest = value.partition(":")
    if mode in (STRICT, REPORT, OFF) and not rest and value == mode:
        return Setting(mode)
    if mode != FALLBACK:
        raise ValueError(f"{VARIABLE}={value!r}: expected strict, report, off or fallback:BACKEND")
    ours = BACKENDS | ONLY_BY_NAME
    backend, colon, precision = rest.partition(":")
    if backend in ours and not (colon and not precision):
        return Setting(FALLBACK, Fallback(backend, precision or None, True))
    if backend in _VLLM and not colon:
        return Setting(FALLBACK, Fallback(backend, None, False))
    raise ValueError(
        f"{VARIABLE}={value!r}: expected fallback:BACKEND with one of {', '.join(ours)} (and :PRECISION if wanted), or "
        f"of vLLM's {', '.join(_VLLM)}"
    )


def refuse_unequal_scales(directory: Path) -> None:
    """Refuse a fallback to a backend of vLLM's for a checkpoint whose gate and up scales differ; reads those alone.

    Raises:
        ValueError: naming the first expert whose scales differ.
        CheckpointError: the checkpoint cannot be read.
    """
    setting = read_setting()
    if setting.fallback is None or setting.fallback.is_ours:
        return
    index = read_index(directory)
    gate, up = f".{et.GATE}.{et.GLOBAL_SCALE}", f".{et.UP}.{et.GLOBAL_SCALE}"
    for name in sorted(index.files):
        if ".ffn.experts." not in name or not name.endswith(gate):
            continue
        other = name.removesuffix(gate) + up
        first, second = _bytes_of(index, name), _bytes_of(index, other)
        if first != second:
            raise ValueError(f"{VARIABLE}=fallback:{setting.fallback.backend}: {name} and {other} differ. {ONE_SCALE}")


def _bytes_of(index: CheckpointIndex, name: str) -> bytes:
    info = index.info(name)
    with open(index.directory / index.files[name], "rb", buffering=0) as file:
        return os.pread(file.fileno(), info.end - info.start, info.start)
