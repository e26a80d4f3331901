"""The plan of a batch in torch: the reference for the plan kernel, and the plan of tests that run a GEMM alone."""

from __future__ import annotations

import torch
from nvfp4_megamoe.backends.sm100.layout import IMAGE_ROWS
from nvfp4_megamoe.backends.sm100.plan import Plan, max_tiles
from nvfp4_megamoe.moe.routing import make_slots


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
