"""The ``fp8_ds_mla`` page: for each token 448 E4M3 values and 64 bfloat16 rotary values, then all tokens' scales.

A page of B tokens holds B x 576 data bytes (448 codes, 128 bytes of bfloat16), followed by B x 8 scale bytes (seven
E8M0 scales, one per 64 codes, and a zero). Pages may lie apart: the row stride of the two-dimensional page tensor is
whatever the pool uses. A slot is ``page * B + offset``.
"""

from __future__ import annotations

import torch

from . import fp8

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
GROUP = 64
GROUPS = NOPE_DIM // GROUP
DATA_BYTES = NOPE_DIM + 2 * ROPE_DIM
SCALE_BYTES = GROUPS + 1
# The native writers never let a scale fall under this number.
SCALE_FLOOR = 1e-4


def _pages(cache_2d: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the page tensor (uint8 [P, bytes]): data [P, B, 576] and scales [P, B, 8]."""
    data = block_size * DATA_BYTES
    end = data + block_size * SCALE_BYTES
    if cache_2d.shape[1] < end:
        raise ValueError(
            f"fp8_ds_mla page: expected at least {end} bytes for {block_size} tokens, got {cache_2d.shape[1]}; "
            "the cache was not allocated with the fp8_ds_mla layout"
        )
    return (
        cache_2d[:, :data].unflatten(1, (block_size, DATA_BYTES)),
        cache_2d[:, data:end].unflatten(1, (block_size, SCALE_BYTES)),
    )


def read(cache_2d: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Rows of the cache: slots int64 [N], all valid -> float32 [N, 512]."""
    data, scales = _pages(cache_2d, block_size)
    page, offset = slots // block_size, slots % block_size
    row = data[page, offset]
    out = torch.empty(slots.shape[0], HEAD_DIM)
    out[:, :NOPE_DIM] = fp8.decode_e4m3(row[:, :NOPE_DIM], fp8.decode_e8m0(scales[page, offset][:, :GROUPS]))
    out[:, NOPE_DIM:] = row[:, NOPE_DIM:].view(torch.bfloat16)
    return out


def write(
    cache_2d: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    nope: torch.Tensor,
    rope: torch.Tensor,
    flush_subnormals: bool,
) -> None:
    """Quantise and store rows: slots int64 [N], all valid; nope bfloat16 [N, 448]; rope bfloat16 [N, 64]."""
    data, scales = _pages(cache_2d, block_size)
    page, offset = slots // block_size, slots % block_size
    groups = nope.float().unflatten(-1, (GROUPS, GROUP))
    exponent = fp8.power_of_two_exponent(groups.abs().amax(-1), SCALE_FLOOR)
    codes = fp8.encode_e4m3(groups / fp8.exponent_to_scale(exponent).unsqueeze(-1), flush_subnormals)
    data[page, offset] = torch.cat((codes.flatten(1).view(torch.uint8), rope.contiguous().view(torch.uint8)), dim=1)
    scales[page, offset] = torch.nn.functional.pad(exponent.add_(127), (0, 1)).to(torch.uint8)
