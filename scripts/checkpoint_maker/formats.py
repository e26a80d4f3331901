"""How a format stores a matrix: what it keeps of the pool's tiles, and how a power of two scales that.

Suffixes are those of DeepSeek's checkpoints (``.weight``, ``.scale``) and, for NVFP4, of ModelOpt's exports
(``.weight``, ``.weight_scale``, ``.weight_scale_2``, ``.input_scale``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from nvfp4_megamoe.numerics import e2m1, nvfp4

from checkpoint_maker import tiles
from checkpoint_maker.geometry import TILE

_E4M3_MAX = 448.0
_MX_BLOCK = 32
_E8M0_BIAS = 127


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns], its tiles drawn from one family of the pool and multiplied by ``2 ** exponent``.

    ``global_factor`` multiplies the NVFP4 global scale (the block scales shrink accordingly, the weight stays);
    ``input_scale`` is the NVFP4 activation scale. Formats without these ignore them.
    """

    name: str
    rows: int
    columns: int
    family: int
    exponent: int
    expert: bool = False
    global_factor: float = 1.0
    input_scale: float = 1.0


@dataclass(frozen=True)
class Parts:
    """A family of tiles in one format. ``stored`` maps suffixes to [TILES, m, n]; ``values`` is what they stand for."""

    stored: dict[str, torch.Tensor]
    values: torch.Tensor  # float32 or bfloat16, whichever holds every value exactly, [TILES, 128, 128]
    global_scale: torch.Tensor | None = None


@functools.cache
def parts(codec: str, seed: int, family: int, global_factor: float = 1.0) -> Parts:
    """The pool's tiles in a format: 'bf16', 'fp8' (float32 scales), 'fp8_e8m0', 'mxfp4' or 'nvfp4'."""
    pool = tiles.pool(seed, family)
    if codec == "bf16":
        return Parts({".weight": pool}, pool)
    if codec in ("fp8", "fp8_e8m0"):
        return _fp8(pool, e8m0=codec == "fp8_e8m0")
    return _mxfp4(pool) if codec == "mxfp4" else _nvfp4(pool, global_factor)


def _fp8(pool: torch.Tensor, e8m0: bool) -> Parts:
    scale = pool.float().abs().amax((1, 2), keepdim=True) / _E4M3_MAX
    exponent = _ceil_log2(scale)
    if e8m0:
        scale = _exp2(exponent)
    weight = (pool.float() / scale).to(torch.float8_e4m3fn)
    values = weight.float() * scale
    if e8m0:
        return Parts({".weight": weight, ".scale": _e8m0(exponent)}, values.bfloat16())
    return Parts({".weight": weight, ".scale": scale}, values)


def _mxfp4(pool: torch.Tensor) -> Parts:
    blocks = pool.float().unflatten(-1, (-1, _MX_BLOCK))
    exponent = _ceil_log2(blocks.abs().amax(-1) / e2m1.E2M1_MAX)
    scale = _exp2(exponent).unsqueeze(-1)
    codes = e2m1.encode(blocks / scale)
    values = (e2m1.decode(codes) * scale).flatten(-2).bfloat16()
    packed = e2m1.pack(codes.flatten(-2)).view(torch.int8)
    return Parts({".weight": packed, ".scale": _e8m0(exponent)}, values)


def _nvfp4(pool: torch.Tensor, global_factor: float) -> Parts:
    scale = nvfp4.global_scale_of(pool) * global_factor
    packed, block_scale, _ = nvfp4.quantize(pool, scale)
    return Parts({".weight": packed, ".weight_scale": block_scale}, nvfp4.dequantize(packed, block_scale, scale), scale)


def _ceil_log2(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa > 0.5, exponent, exponent - 1)


def _exp2(exponent: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(exponent.shape), exponent)


def _e8m0(exponent: torch.Tensor) -> torch.Tensor:
    return (exponent + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint: the codec of its routed experts and of its other linear layers."""

    experts: str
    linears: str

    def codec(self, matrix: Matrix) -> str:
        """Codec of a matrix."""
        return self.experts if matrix.expert else self.linears


FORMATS = {
    "bf16": Format("bf16", "bf16"),
    "fp8": Format("fp8", "fp8"),
    "mxfp4": Format("mxfp4", "fp8_e8m0"),
    "nvfp4": Format("nvfp4", "fp8_e8m0"),
}


def describe(matrix: Matrix, codec: str, dequantize: bool, seed: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what :func:`store` returns, without making it."""
    kept = parts(codec, seed, matrix.family, matrix.global_factor)
    stored = {".weight": kept.values} if dequantize else kept.stored
    result: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for suffix, part in stored.items():
        shape = matrix.rows // TILE * part.shape[1], matrix.columns // TILE * part.shape[2]
        result[matrix.name + suffix] = part.dtype, shape
    if codec == "nvfp4" and not dequantize:
        result |= {matrix.name + suffix: (torch.float32, ()) for suffix in (".weight_scale_2", ".input_scale")}
    return result


def store(matrix: Matrix, codec: str, dequantize: bool, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a matrix by name; with ``dequantize`` one tensor, ``.weight``, of the values that the codec holds."""
    kept = parts(codec, seed, matrix.family, matrix.global_factor)
    chosen = tiles.choose(seed, matrix.name, matrix.rows, matrix.columns)
    factor = math.ldexp(1.0, matrix.exponent)
    if dequantize:
        return {matrix.name + ".weight": tiles.assemble(kept.values, chosen).mul_(factor)}
    result = {matrix.name + suffix: tiles.assemble(part, chosen) for suffix, part in kept.stored.items()}
    if codec == "bf16":
        result[matrix.name + ".weight"].mul_(factor)
    elif codec == "nvfp4":
        result[matrix.name + ".weight_scale_2"] = kept.global_scale * factor
        result[matrix.name + ".input_scale"] = torch.tensor(matrix.input_scale, dtype=torch.float32)
    elif codec == "fp8":
        result[matrix.name + ".scale"].mul_(factor)
    else:
        result[matrix.name + ".scale"].view(torch.uint8).add_(matrix.exponent)
    return result
