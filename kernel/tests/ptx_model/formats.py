"""The small floating-point formats, as tables and as round-to-nearest-even encoders, in numpy.

Written apart from ``nvfp4_megamoe.numerics`` so that a fault there cannot hide a fault of a kernel.
"""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3_values() -> np.ndarray:
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    magnitude = np.where(bits & 127 == 127, np.nan, magnitude)
    return np.where(bits >> 7, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3_values()
_E2M1_MAGNITUDES, _E4M3_MAGNITUDES = E2M1[:8], E4M3[:127]


def _encode(magnitudes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the nearest magnitude, ties to the even index (the even mantissa), saturating."""
    size = np.minimum(np.abs(x), magnitudes[-1]).astype(np.float64)
    high = np.searchsorted(magnitudes, size)
    low = np.maximum(high - 1, 0)
    below, above = size - magnitudes[low], magnitudes[high] - size
    return np.where((below < above) | ((below == above) & (low % 2 == 0)), low, high)


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """uint8 codes of ``cvt.rn.satfinite.e2m1x2.f32``; NaN becomes the largest positive value."""
    nan = np.isnan(x)
    codes = _encode(_E2M1_MAGNITUDES, np.where(nan, 6, x)) | np.where(np.signbit(x) & ~nan, 8, 0)
    return codes.astype(np.uint8)


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """uint8 bits of ``cvt.rn.satfinite.e4m3x2.f32``; NaN becomes 0x7f."""
    nan = np.isnan(x)
    bits = _encode(_E4M3_MAGNITUDES, np.where(nan, 0, x)) | np.where(np.signbit(x), 128, 0)
    return np.where(nan, 127, bits).astype(np.uint8)


def encode_bf16(x: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values, round to nearest even; NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """float32 [..., 2n] of packed bytes [..., n], low nibble first."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.float32)
    out[..., 0::2] = E2M1[packed & 15]
    out[..., 1::2] = E2M1[packed >> 4]
    return out
