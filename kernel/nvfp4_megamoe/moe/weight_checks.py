"""Values that no NVFP4 expert may have, found on the device without dequantizing anything."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.checkpoint.expert_tensors import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE

_SIGN, _MAGNITUDE, _NAN = 0x80, 0x7F, 0x7F
_MAGNITUDES_OF_A_BLOCK = 0x7777_7777_7777_7777  # sixteen codes without their signs: -0 is still zero


class Fault(NamedTuple):
    """One expert's tensor with bad values. ``expert`` counts the experts that were checked."""

    expert: int
    kind: str
    found: str
    expected: str


_BLOCK_FAULTS = (
    ("{n} NaN block scale(s)", "finite UE4M3 scales"),
    ("{n} negative block scale(s) (sign bit set)", "UE4M3 scales, which have no sign"),
    ("{n} zero block scale(s) over non-zero codes", "a positive scale for each block that is not zero"),
)


def first_fault(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, input_scale: torch.Tensor
) -> Fault | None:
    """Check the values of one projection of every expert; waits for the device once, and again if a scale is odd.

    Codes are read only of experts that have a block scale which is not a positive number.

    Args:
        packed: uint8 [E, N, K / 2], K a multiple of 16, rows contiguous and 8-byte aligned.
        block_scale: float8_e4m3fn [E, N, K / 16].
        global_scale: float32 [E].
        input_scale: float32 [E].

    Returns:
        The first expert's fault, or None. Scratch memory: less than twice the packed bytes of one expert.
    """
    if not packed.shape[0]:
        return None
    scalars = torch.stack((global_scale, input_scale)).float()
    bits = block_scale.view(torch.uint8)
    ends = torch.stack([torch.stack(bits[e].aminmax()) for e in range(packed.shape[0])]).cpu()
    scalars = scalars.cpu()
    bad_scalars = ~(scalars.isfinite() & (scalars > 0))
    counts = torch.zeros(packed.shape[0], len(_BLOCK_FAULTS), dtype=torch.int64)
    # Bit patterns of positive numbers are those from 1 to 0x7E.
    odd = ((ends[:, 0] == 0) | (ends[:, 1] >= _NAN)).nonzero().flatten().tolist()
    if odd:
        counts[odd] = torch.stack([_count(packed[e], block_scale[e]) for e in odd]).cpu()
    bad = counts.any(1) | bad_scalars.any(0)
    if not bad.any():
        return None
    expert = int(bad.nonzero()[0])
    for kind, value, wrong in zip((GLOBAL_SCALE, INPUT_SCALE), scalars[:, expert], bad_scalars[:, expert], strict=True):
        if wrong:
            return Fault(expert, kind, f"the value is {float(value):g}", "a finite number above zero")
    first = int(counts[expert].nonzero()[0])
    found, expected = _BLOCK_FAULTS[first]
    return Fault(expert, BLOCK_SCALE, found.format(n=int(counts[expert, first])), expected)


def _count(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """int64 [3], how many blocks of one expert have each fault of ``_BLOCK_FAULTS``."""
    bits = block_scale.view(torch.uint8)
    magnitude = bits & _MAGNITUDE
    codes = (packed.view(torch.int64) & _MAGNITUDES_OF_A_BLOCK) != 0  # the 16 codes of a block are one int64
    nan = magnitude == _NAN
    return torch.stack(
        (nan.sum(), ((bits & _SIGN != 0) & ~nan).sum(), ((magnitude == 0) & codes & (bits & _SIGN == 0)).sum())
    )
