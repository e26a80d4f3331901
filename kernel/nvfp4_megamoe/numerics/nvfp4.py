"""NVFP4: E2M1 values, a UE4M3 scale for every 16 of them along K, a float32 scale for the tensor.

A value is ``e2m1 * block_scale * global_scale``. The order of the float32 operations is that of vLLM's reference
(``nvfp4_emulation_utils.py``) and of its CUDA quantizer, so results agree bit for bit with both conventions: vLLM
passes the reciprocal of the global scale to the quantizer and the global scale itself to the dequantizer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.numerics import e2m1, ue4m3

BLOCK = 16
_GLOBAL_RANGE = e2m1.E2M1_MAX * ue4m3.UE4M3_MAX
_FLOAT32 = torch.finfo(torch.float32)


class NVFP4(NamedTuple):
    """A quantized tensor of K columns.

    packed: uint8 [..., K / 2], low nibble first. block_scale: float8_e4m3fn [..., K / 16]. global_scale: float32 [].
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor


def global_scale_of(x: torch.Tensor) -> torch.Tensor:
    """Global scale that lets the largest magnitude of ``x`` use the whole range: amax / (6 * 448).

    Args:
        x: floating point [...], finite.

    Returns:
        float32 [], positive: at least the smallest normal number, and 1 where ``x`` is all zero or empty.
    """
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    amax = x.abs().amax().float()
    scale = (amax / _GLOBAL_RANGE).clamp(min=_FLOAT32.tiny)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(x: torch.Tensor, global_scale: torch.Tensor | None = None) -> NVFP4:
    """Quantize to NVFP4, round to nearest even, saturating.

    Args:
        x: floating point [..., K], finite, K a multiple of 16. Computed in float32.
        global_scale: float32, a scalar or one value for each index of the leading dimensions of ``x``;
            :func:`global_scale_of` where it is None.

    Returns:
        NVFP4 with ``global_scale`` as given. A block whose scale rounds to zero has codes 0 throughout. A NaN or
        an infinity gives its block a NaN or saturated scale; under a given global scale no other block is touched.

    Raises:
        ValueError: K is not a multiple of 16, or the shape of ``global_scale`` is not a prefix of that of ``x``.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs K to be a multiple of {BLOCK}, not {x.shape[-1]} (shape {tuple(x.shape)}).")
    if global_scale is None:
        global_scale = global_scale_of(x)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    inverse_global = _reciprocal(_over_blocks(global_scale, blocks))
    amax = blocks.abs().amax(-1, keepdim=True)
    block_scale = ue4m3.encode(inverse_global * (amax * (1 / e2m1.E2M1_MAX)))
    # 1 / (1 / global) rather than global: this is what the reference, which is given 1 / global, multiplies with.
    inverse = _reciprocal(ue4m3.decode(block_scale) * _reciprocal(inverse_global))
    codes = torch.where(inverse == 0, 0, e2m1.encode(blocks * inverse))
    return NVFP4(e2m1.pack(codes.flatten(-2)), block_scale.squeeze(-1), global_scale)


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values of an NVFP4 tensor.

    Args:
        packed: uint8 [..., K / 2].
        block_scale: float8_e4m3fn, or uint8 holding the same bits, [..., K / 16].
        global_scale: float32, a scalar or one value for each index of the leading dimensions of ``packed``.
        dtype: of the result. float64 is exact (a value has at most 30 significant bits); every other type is
            computed in float32 as ``e2m1 * (block_scale * global_scale)``, the reference's order, then rounded.

    Returns:
        ``dtype`` [..., K].

    Raises:
        ValueError: the shapes do not belong together.
    """
    if packed.shape[:-1] != block_scale.shape[:-1] or packed.shape[-1] * 2 != block_scale.shape[-1] * BLOCK:
        raise ValueError(
            f"NVFP4 needs one block scale for {BLOCK // 2} packed bytes: packed is {tuple(packed.shape)}, "
            f"block_scale {tuple(block_scale.shape)}."
        )
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = e2m1.decode_packed(packed, compute).unflatten(-1, (-1, BLOCK))
    scale = ue4m3.decode(block_scale, compute).unsqueeze(-1)
    return values.mul_(scale * _over_blocks(global_scale, values)).flatten(-2).to(dtype)


def _over_blocks(global_scale: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Append dimensions so that ``global_scale`` broadcasts from the left over ``blocks`` [..., K / 16, 16]."""
    leading = blocks.shape[:-2]
    pairs = zip(global_scale.shape, leading, strict=False)
    if global_scale.ndim > len(leading) or any(given not in (1, size) for given, size in pairs):
        raise ValueError(
            f"The global scale, shape {tuple(global_scale.shape)}, must be a scalar or match the leading dimensions "
            f"{tuple(leading)} from the left."
        )
    return global_scale.reshape(*global_scale.shape, *(1,) * (blocks.ndim - global_scale.ndim))


def _reciprocal(x: torch.Tensor) -> torch.Tensor:
    """1 / x, zero where x is zero, finite where x is so small that it would overflow."""
    return torch.where(x == 0, 0.0, (1.0 / x).clamp(max=_FLOAT32.max))
