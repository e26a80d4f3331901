"""UE4M3, the unsigned block scale of NVFP4, held in the bits of ``torch.float8_e4m3fn`` with the sign bit clear.

0 to 448; 2**-6 is the smallest normal, 2**-9 the smallest value above zero, 0x7F is NaN.
Source: OCP 8-bit Floating Point Specification (OFP8) revision 1.0, E4M3, without its sign.
"""

from __future__ import annotations

import torch

UE4M3_MAX = 448.0
_MIN_EXPONENT = -6
_MANTISSA_BITS = 3


def encode(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest UE4M3 value, ties to even, saturating at 448.

    Args:
        x: floating point [...]. Negative values give zero. NaN stays NaN, so that a bad scale remains visible.

    Returns:
        float8_e4m3fn [...], sign bit clear.
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = x.clamp(0.0, UE4M3_MAX).abs()  # abs: clamp may keep the sign of -0
    if x.dtype == torch.float64:
        # torch converts float64 by way of float32, which rounds twice; rounding here first leaves nothing to round.
        exponent = torch.frexp(x).exponent - 1
        step = exponent.clamp(min=_MIN_EXPONENT) - _MANTISSA_BITS
        x = torch.ldexp(torch.ldexp(x, -step).round(), step)
    return x.to(torch.float8_e4m3fn)


def decode(scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of UE4M3 scales.

    Args:
        scale: float8_e4m3fn [...], or uint8 [...] holding the same bits (reinterpreted, never value-cast).
        dtype: of the result; exact in bfloat16 and wider.

    Returns:
        ``dtype`` [...]. A set sign bit, which UE4M3 does not have, gives a negative value.

    Raises:
        ValueError: any other dtype of ``scale``, since its bits are not UE4M3.
    """
    if scale.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"UE4M3 scales are float8_e4m3fn, or uint8 holding their bits, not {scale.dtype}.")
    return scale.view(torch.float8_e4m3fn).to(dtype)
