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
    """Views of the page tensor (uint8 [P, bytes]): data [P, B, 576 bytes] and scales [P, B, 8 bytes].

    As int64, since a gather costs the same for each element of whatever size; as bytes if the pool is not aligned.
    """
    data = block_size * DATA_BYTES
    end = data + block_size * SCALE_BYTES
    if cache_2d.shape[1] < end:
        raise ValueError(
            f"fp8_ds_mla page: expected at least {end} bytes for {block_size} tokens, got {cache_2d.shape[1]}; "
            "the cache was not allocated with the fp8_ds_mla layout"
        )
    cache_2d, unit = cache_2d[:, :end], 1
    if cache_2d.stride(0) % 8 == 0 and cache_2d.storage_offset() % 8 == 0:
        cache_2d, unit = cache_2d.view(torch.int64), 8
    return (
        cache_2d[:, : data // unit].unflatten(1, (block_size, DATA_BYTES // unit)),
        cache_2d[:, data // unit :].unflatten(1, (block_size, SCALE_BYTES // unit)),
    )


def read(cache_2d: torch.Tensor, slots: torch.Tensor, block_size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of the cache: slots int64 [N], all valid -> float32 [N, 512], written to ``out`` if given."""
    data, scales = _pages(cache_2d, block_size)
    page, offset = slots // block_size, slots % block_size
    row = data[page, offset].view(torch.uint8)
    scale = scales[page, offset].view(torch.uint8)[:, :GROUPS]
    if out is None:
        out = torch.empty(slots.shape[0], HEAD_DIM)
    fp8.decode_e4m3(row[:, :NOPE_DIM], fp8.decode_e8m0(scale), out=out[:, :NOPE_DIM])
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
    row = torch.cat((codes.flatten(1).view(torch.uint8), rope.contiguous().view(torch.uint8)), dim=1)
    scale = torch.nn.functional.pad(exponent.add_(127), (0, 1)).to(torch.uint8)
    data[page, offset] = row.view(data.dtype)
    scales[page, offset] = scale.view(scales.dtype)
