"""The packed weight layout of ``csrc/layout.cuh``, stated again in torch: the repacking kernel is tested against it."""

from __future__ import annotations

import torch

UNIT_ROWS = 128
UNITS_TOGETHER = 4  # the last group of an expert may have fewer
# Mantissa bit of each pair of a block in the two words' common numbering; by it modulo 6 a pair lies in the first word
# (0), in the second (2) or, by SHARED_MASK, in both (4).
PAIR_AT = (0, 4, 8, 12, 2, 6, 10, 14)
FIRST_WORD, SECOND_WORD, BOTH_WORDS = (0, 3, 5), (2, 4, 7), (1, 6)  # pairs
SHARED_MASK = 0x0C180C18  # bits of the shared pairs that lie in the first word
PAIR_MASK = 0x81C081C0
SCALE_BASE = 235  # bf16 exponent of scale code 0
E4M3_MAGNITUDES = (0x70177017, 0x07600760), (0x0DC00DC0, 0xD01DD01D)  # of each word, for pairs 0 to 3 and 4 to 7
E4M3_SIGNS = 0x82288228  # of the first word; the other bits are the second's
WORD = 0xFFFFFFFF


def _rotl(x: torch.Tensor, n: int) -> torch.Tensor:
    n %= 32
    return ((x << n) | (x >> (32 - n))) & WORD


def unit_rows(rows: int, gate_up: bool) -> torch.Tensor:
    """Source row of every packed row, [rows / 128, 2, 4 warps, 2 row halves, 8 groups]: ``source_row`` in csrc."""
    index = torch.arange(rows)
    if not gate_up:
        return index.view(-1, 2, 4, 2, 8)
    # [gate or up, unit, block, warp, tile, low or high] to [unit, tile, warp, gate or up, (block, low or high)]
    return index.view(2, -1, 4, 4, 2, 2).permute(1, 4, 3, 0, 2, 5).flatten(-2)


def pack_values(packed: torch.Tensor, scale: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """uint8 [rows, K / 2], low nibble first, to uint8 [rows * K / 2] by unit; blocks of scale 0 become 0."""
    rows, half = packed.shape
    codes = torch.stack((packed & 15, packed >> 4), -1).view(rows, half * 2).long()
    codes = codes * (scale.view(torch.uint8) & 0x7F != 0).repeat_interleave(16, dim=1)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)  # as the low half of a pair
    # [unit, m, warp, row half, group, k64, block, pair, low or high]
    bits = bits[unit_rows(rows, gate_up).flatten()].view(-1, 2, 4, 2, 8, half // 32, 4, 8, 2)
    pair = bits[..., 0] | (bits[..., 1] << 16)
    pair = [_rotl(pair[..., i], at - 6) for i, at in enumerate(PAIR_AT)]
    first, second, both = (sum(pair[i] for i in word) for word in (FIRST_WORD, SECOND_WORD, BOTH_WORDS))
    words = torch.stack((first | (both & SHARED_MASK), second | (both & ~SHARED_MASK & WORD)), -1)
    # to [unit, k64, m, warp, group, block, row half, word]
    return words.permute(0, 5, 1, 2, 4, 6, 3, 7).contiguous().to(torch.uint32).view(torch.uint8).flatten()


def pack_scales(scale: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """float8_e4m3fn [rows, K / 16] to uint8 [rows * K / 16]: 5-bit exponent from 2^-10, 3-bit mantissa, packed."""
    bits = scale.view(torch.uint8).long() & 0x7F
    exponent, mantissa = bits >> 3, bits & 7
    normal = ((exponent + 3) << 3) | mantissa
    top = torch.floor(torch.log2(mantissa.clamp(min=1).float())).long()  # leading bit of a subnormal
    subnormal = ((1 + top) << 3) | ((mantissa << (3 - top)) & 7)
    code = torch.where(exponent > 0, normal, subnormal)
    code = torch.where(bits == 0, 0, torch.where(bits == 0x7F, (20 << 3) | 4, code)).to(torch.uint8)
    # [unit, m, warp, row half, group, k128, k64, block] to [unit, k128, warp, group, block, k64, row half, m]
    code = code[unit_rows(scale.shape[0], gate_up).flatten()].view(-1, 2, 4, 2, 8, scale.shape[1] // 8, 2, 4)
    return code.permute(0, 5, 2, 4, 7, 6, 3, 1).contiguous().flatten()


def side_by_side(packed: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """One expert's packed values or scales from [unit][k128] to [UNITS_TOGETHER units][k128][unit]: ``block_index``."""
    groups = packed.view(rows // UNIT_ROWS, k // 128, -1).split(UNITS_TOGETHER)
    return torch.cat([group.transpose(0, 1).flatten() for group in groups])


def decode(values: torch.Tensor, scales: torch.Tensor, rows: int, k: int, gate_up: bool) -> torch.Tensor:
    """What ``decode_k32`` makes of packed weights, float32 [rows, K] in source order: value * scale * 2^-8."""
    first, second = _words(values, k)
    both = (first & SHARED_MASK) | (second & ~SHARED_MASK & WORD)
    word = {i: w for w, pairs in ((first, FIRST_WORD), (second, SECOND_WORD), (both, BOTH_WORDS)) for i in pairs}
    pairs = torch.stack([_rotl(word[i], 6 - at) for i, at in enumerate(PAIR_AT)], -1) & PAIR_MASK
    value = torch.stack((pairs & 0xFFFF, pairs >> 16), -1).to(torch.uint16).view(torch.bfloat16).float().flatten(-2)
    scale = ((_codes(scales, k).long() << 4) + (SCALE_BASE << 7)).to(torch.uint16).view(torch.bfloat16).float()
    return _rows((value * scale.unsqueeze(-1)).bfloat16().float(), rows, k, gate_up)


def decode_e4m3(values: torch.Tensor, scales: torch.Tensor, rows: int, k: int, gate_up: bool) -> torch.Tensor:
    """What ``decode_block_e4m3`` makes of them, float32 [rows, K] in source order: e4m3(value * scale * 2^-3)."""
    first, second = _words(values, k)
    code = _codes(scales, k).long()
    scale = torch.where(code == 164, torch.nan, (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 13))
    magnitudes = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)) * scale.unsqueeze(-1)
    table = magnitudes.to(torch.float8_e4m3fn).float()
    signs = (first & E4M3_SIGNS) | (second & ~E4M3_SIGNS & WORD)
    out = []
    for i, at in enumerate(PAIR_AT):
        of_first, of_second = E4M3_MAGNITUDES[i // 4]
        magnitude = (first & of_first) | (second & of_second)
        for high in (0, 16):
            nibble = _rotl(magnitude, -(at + high)) & 15
            picked = table.gather(-1, (nibble & 7).unsqueeze(-1)).squeeze(-1)
            picked = torch.where(nibble > 7, torch.nan, picked)  # PRMT would not select
            out.append(torch.where(_rotl(signs, -(at + high + 9)) & 1 == 1, -picked, picked))
    return _rows(torch.stack(out, -1), rows, k, gate_up)


def _words(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second words, [unit, k64, m, warp, group, block, row half]."""
    return values.view(torch.uint32).long().view(-1, k // 64, 2, 4, 8, 4, 2, 2).unbind(-1)


def _codes(scales: torch.Tensor, k: int) -> torch.Tensor:
    """Scale codes in the order of ``_words``."""
    return scales.view(-1, k // 128, 4, 8, 4, 2, 2, 2).permute(0, 1, 5, 7, 2, 3, 4, 6).flatten(1, 2)


def _rows(elements: torch.Tensor, rows: int, k: int, gate_up: bool) -> torch.Tensor:
    """[unit, k64, m, warp, group, block, row half, element] to [rows, K] in source order."""
    result = torch.empty(rows, k)
    result[unit_rows(rows, gate_up).flatten()] = elements.permute(0, 2, 3, 6, 4, 1, 5, 7).reshape(-1, k)
    return result
