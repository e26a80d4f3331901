"""E2M1, the 4-bit float of NVFP4: one sign bit, two exponent bits, one mantissa bit, no NaN and no infinity.

Source: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch

E2M1_MAX = 6.0

# Bit 3 of a code is the sign, so code 8 is -0.
E2M1_VALUES = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=torch.float32
)


def encode(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value, ties to the even code, saturating at 6.

    Args:
        x: floating point [...]. Infinities saturate, and so does NaN, for which the format has no code.

    Returns:
        uint8 [...], codes 0 to 15; the sign of zero is kept.
    """
    x = x if x.dtype == torch.float64 else x.float()
    magnitude = x.abs()
    # Counted down from 7 so that NaN, which no comparison holds for, gives the largest magnitude. Each bound is the
    # middle between two neighbours; it belongs to the one whose mantissa bit is 0, which makes < and <= alternate.
    code = torch.full(x.shape, 7, dtype=torch.uint8, device=x.device)
    for bound in (0.25, 1.25, 2.5, 5.0):
        code -= (magnitude <= bound).view(torch.uint8)
    for bound in (0.75, 1.75, 3.5):
        code -= (magnitude < bound).view(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of E2M1 codes.

    Args:
        codes: uint8 [...], each below 16.
        dtype: of the result; every E2M1 value is exact in every floating point type of 8 bits or more.

    Returns:
        ``dtype`` [...].
    """
    return E2M1_VALUES.to(device=codes.device, dtype=dtype)[codes.int()]


def decode_packed(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of packed codes, ``decode(unpack(packed))`` in one look at a table for each byte.

    Args:
        packed: uint8 [..., K / 2].
        dtype: as for :func:`decode`.

    Returns:
        ``dtype`` [..., K], contiguous.
    """
    table = E2M1_VALUES.to(device=packed.device, dtype=dtype)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)
    return pairs.index_select(0, packed.flatten().int()).view(*packed.shape[:-1], packed.shape[-1] * 2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the one with the lower index in the low nibble.

    Args:
        codes: uint8 [..., K], each below 16, K even.

    Returns:
        uint8 [..., K / 2], contiguous.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"E2M1 codes are packed in pairs: the last dimension must be even, not {codes.shape[-1]}.")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: uint8 [..., K / 2].

    Returns:
        uint8 [..., K].
    """
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
