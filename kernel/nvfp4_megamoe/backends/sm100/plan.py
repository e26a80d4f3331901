"""What the kernels are told about a batch: tiles and rows, computed on the device without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.backends.sm100.layout import IMAGE_ROWS
from nvfp4_megamoe.moe.routing import make_slots

TILE_FIELDS = 8


class Plan(NamedTuple):
    """One batch's slots and tiles; shapes depend on T, K and E alone.

    tiles: int32 [max_tiles(T * K, E), 8], one row for each tile of 128 slots: expert, its first tile, its number of
        tiles, its first image, its first slot, its end, unused, unused. num_tiles: int32 [1], rows of ``tiles`` that
        count. pairs, num_pairs: the same for tiles of 256 slots, two images each.
    order: int32 [T * K], flat index t * K + k of each slot, see ``moe.routing``.
    a_row: int32 [T * K], row of the quantized activations of each slot.
    source: int32 [rows, 2], what the quantization kernel reads for each of its rows.
    here: int32 [T * K], 1 where the pair (t, k) has an expert here.
    """

    tiles: torch.Tensor
    num_tiles: torch.Tensor
    pairs: torch.Tensor
    num_pairs: torch.Tensor
    order: torch.Tensor
    a_row: torch.Tensor
    source: torch.Tensor
    here: torch.Tensor


def max_tiles(slots: int, experts: int) -> int:
    """Most tiles of 128 slots that any routing of ``slots`` slots to ``experts`` experts can take."""
    return slots // IMAGE_ROWS + min(slots, experts)


def make_plan(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_local_experts: int, one_scale: bool) -> Plan:
    """Plan a batch.

    Args:
        topk_ids: int32 or int64 [T, K], as for ``make_slots``.
        expert_map: as for ``make_slots``.
        num_local_experts: E, at least 1.
        one_scale: every expert has the same input scale, so a token is quantized once and gathered K times; else each
            slot is quantized with its expert's.
    """
    tokens, top_k = topk_ids.shape
    order, offsets = make_slots(topk_ids, expert_map, num_local_experts)
    device, slots = order.device, order.numel()
    position = torch.arange(slots, dtype=torch.int32, device=device)
    tiles, ends = _table(offsets, IMAGE_ROWS, slots)
    pairs, pair_ends = _table(offsets, 2 * IMAGE_ROWS, slots)
    slot_expert = torch.searchsorted(offsets[1:], position, right=True, out_int32=True)
    in_use = (position < offsets[-1]).to(torch.int32)
    here = torch.zeros_like(position).scatter_(0, order.long(), in_use)
    token = (order // top_k).to(torch.int32)
    if one_scale:
        a_row = token
        first = torch.arange(tokens, dtype=torch.int32, device=device)
        source = torch.stack([first, torch.zeros_like(first)], 1)
    else:
        a_row = position
        source = torch.stack([torch.where(in_use.bool(), token, -1), slot_expert.clamp(max=num_local_experts - 1)], 1)
    return Plan(tiles, ends[-1:], pairs, pair_ends[-1:], order, a_row, source.contiguous(), here)


def _table(offsets: torch.Tensor, rows: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of ``rows`` slots, and int32 [E] where each expert's end."""
    counts, experts = offsets.diff(), len(offsets) - 1
    tiles_of, images_of = ((counts + (size - 1)) // size for size in (rows, IMAGE_ROWS))
    ends, image_ends = (number.cumsum(0, dtype=torch.int32) for number in (tiles_of, images_of))
    index = torch.arange(max_tiles(slots, experts), dtype=torch.int32, device=offsets.device)
    expert = torch.searchsorted(ends, index, right=True, out_int32=True).clamp(max=experts - 1)
    by_expert = torch.stack([ends - tiles_of, tiles_of, image_ends - images_of, offsets[:-1], offsets[1:]], 1)[expert]
    zero = torch.zeros_like(expert)[:, None]
    return torch.cat([expert[:, None], by_expert, zero, zero], 1).contiguous(), ends
