"""The packed weight layout of ``csrc/layout.cuh``, stated again in torch: the repacking kernel is tested against it."""

from __future__ import annotations

import torch

UNIT_ROWS = 128
# Mantissa bit, in its word, of the first three pairs of either word; the fourth pairs share the bits left over.
FIRST_WORD, SECOND_WORD = (0, 6, 12), (2, 8, 14)
FOURTH_PAIRS = (4, 10)
SHARED_MASK = 0x0C180C18  # bits of the fourth pairs that lie in the first word
PAIR_MASK = 0x81C081C0
SCALE_BASE = 235  # bf16 exponent of scale code 0
WORD = 0xFFFFFFFF


def _rotl(x: torch.Tensor, n: int) -> torch.Tensor:
    n %= 32
    return ((x << n) | (x >> (32 - n))) & WORD


def unit_rows(rows: int, gate_up: bool) -> torch.Tensor:
    """Source row of every packed row, [rows / 128, 2, 64]: a unit's tiles are gate and up, or consecutive rows."""
    index = torch.arange(rows)
    return index.view(2, -1, 64).transpose(0, 1) if gate_up else index.view(-1, 2, 64)


def pack_values(packed: torch.Tensor, scale: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """uint8 [rows, K / 2], low nibble first, to uint8 [rows * K / 2] in packed order; blocks of scale 0 become 0."""
    rows, half = packed.shape
    codes = torch.stack((packed & 15, packed >> 4), -1).view(rows, half * 2).long()
    codes = codes * (scale.view(torch.uint8) & 0x7F != 0).repeat_interleave(16, dim=1)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)  # as the low half of a pair
    # [unit, m, warp, row half, group, k64, k32, k16, column half, t, low or high]
    bits = bits[unit_rows(rows, gate_up)].view(-1, 2, 4, 2, 8, half // 32, 2, 2, 2, 4, 2)
    pairs = bits[..., 0] | (bits[..., 1] << 16)
    # [unit, k64, m, warp, group, t, k32, k16, register], register = column half, row half
    pairs = pairs.permute(0, 5, 1, 2, 4, 9, 6, 7, 8, 3).flatten(-2)
    first, second = (
        sum(_rotl(pairs[..., k, i], m - 6) for i, m in enumerate(word))
        for k, word in enumerate((FIRST_WORD, SECOND_WORD))
    )
    fourth = sum(_rotl(pairs[..., k, 3], m - 6) for k, m in enumerate(FOURTH_PAIRS))
    words = torch.stack((first | (fourth & SHARED_MASK), second | (fourth & ~SHARED_MASK & WORD)), -1)
    return words.contiguous().to(torch.uint32).view(torch.uint8).flatten()


def pack_scales(scale: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """float8_e4m3fn [rows, K / 16] to uint8 [rows * K / 16]: 5-bit exponent from 2^-10, 3-bit mantissa, packed."""
    bits = scale.view(torch.uint8).long() & 0x7F
    exponent, mantissa = bits >> 3, bits & 7
    normal = ((exponent + 3) << 3) | mantissa
    top = torch.floor(torch.log2(mantissa.clamp(min=1).float())).long()  # leading bit of a subnormal
    subnormal = ((1 + top) << 3) | ((mantissa << (3 - top)) & 7)
    code = torch.where(exponent > 0, normal, subnormal)
    code = torch.where(bits == 0, 0, torch.where(bits == 0x7F, (20 << 3) | 4, code)).to(torch.uint8)
    # [unit, m, warp, row half, group, k64, k16] to [unit, k64, m, warp, group, k16, row half]
    code = code[unit_rows(scale.shape[0], gate_up)].view(-1, 2, 4, 2, 8, scale.shape[1] // 4, 4)
    return code.permute(0, 5, 1, 2, 4, 6, 3).contiguous().flatten()


def decode(values: torch.Tensor, scales: torch.Tensor, rows: int, k: int, gate_up: bool) -> torch.Tensor:
    """What ``decode_k32`` makes of packed weights, float32 [rows, K] in source order: value * scale * 2^-8."""
    words = values.view(torch.uint32).long().view(-1, k // 64, 2, 4, 8, 4, 2, 2)
    w0, w1 = words[..., 0], words[..., 1]
    z = (w0 & SHARED_MASK) | (w1 & ~SHARED_MASK & WORD)
    pairs = torch.stack(
        [
            torch.stack([_rotl(w, 6 - m) for w, m in zip((w, w, w, z), (*word, fourth), strict=True)], -1)
            for w, word, fourth in ((w0, FIRST_WORD, FOURTH_PAIRS[0]), (w1, SECOND_WORD, FOURTH_PAIRS[1]))
        ],
        -2,
    )  # [unit, k64, m, warp, group, t, k32, k16, register]
    pairs = pairs & PAIR_MASK
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), -1).unflatten(-2, (2, 2))
    value = halves.to(torch.uint16).view(torch.bfloat16).float()
    # [unit, k64, m, warp, group, -, k32, k16, -, row half, -]
    code = scales.long().view(-1, k // 64, 2, 4, 8, 1, 2, 2, 1, 2, 1)
    scale = ((code << 4) + (SCALE_BASE << 7)).to(torch.uint16).view(torch.bfloat16).float()
    product = (value * scale).bfloat16().float()
    # From [unit, k64, m, warp, group, t, k32, k16, column half, row half, low or high] to row, k
    out = product.permute(0, 2, 3, 9, 4, 1, 6, 7, 8, 5, 10).reshape(-1, k)
    result = torch.empty(rows, k)
    result[unit_rows(rows, gate_up).flatten()] = out
    return result
