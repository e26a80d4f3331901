"""What the kernels are told about a batch: tiles and rows. ``plan_kernel`` computes it, on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.backends.sm100.layout import IMAGE_ROWS

TILE_FIELDS = 8
MAX_EXPERTS = 512
# Blocks of the plan kernel's cluster when there are many slots.
CLUSTER = 8
# One block of 32 warps, while each has at most four groups of 32 slots: a cluster's two barriers cost more than that.
_ONE_BLOCK = 4 * 32 * 32


class Plan(NamedTuple):
    """One batch's slots and tiles; shapes depend on T, K and E alone.

    tiles: int32 [max_tiles(T * K, E), 8], one row for each tile of 128 slots: expert, its first tile, its number of
        tiles, its first image, its first slot, its end, unused, unused. num_tiles: int32 [1], rows of ``tiles`` that
        count; what the others hold is undefined. pairs, num_pairs: the same for tiles of 256 slots, two images each.
    order: int32 [T * K], flat index t * K + k of each slot: those of expert 0 first, each expert's in increasing order,
        those without an expert here last.
    a_row: int32 [T * K], row of the quantized activations of each slot.
    source: int32 [rows, 2], what the quantization kernel reads for each of its rows: token and scale. ``one_scale``,
        where every expert has the same input scale: rows = T, each token once; else one row a slot, with its
        expert's scale, and token -1 for a slot without an expert here.
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


def plan_shapes(tokens: int, top_k: int, experts: int, one_scale: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every int32 tensor of a Plan."""
    slots = tokens * top_k
    rows = max_tiles(slots, experts)
    return {
        "tiles": (rows, TILE_FIELDS),
        "num_tiles": (1,),
        "pairs": (rows, TILE_FIELDS),
        "num_pairs": (1,),
        "order": (slots,),
        "a_row": (slots,),
        "source": (tokens if one_scale else slots, 2),
        "here": (slots,),
    }


def plan_launch(
    plan: Plan, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, one_scale: bool
) -> tuple[str, int, list[torch.Tensor | int]]:
    """Name, blocks and arguments of the launch that fills ``plan``.

    Args:
        topk_ids: int32 or int64 [T, K]. An id that no expert has, such as the -1 of a padding token, is dropped.
        expert_map: int32 [num_experts], local expert of each global one, -1 where it is on another rank; None where
            ``topk_ids`` are local ids.
        experts: E, from 1 to MAX_EXPERTS.
        one_scale: see :class:`Plan`.
    """
    slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    name, blocks = ("plan_one", 1) if slots <= _ONE_BLOCK else ("plan_cluster", CLUSTER)
    mapped = expert_map is not None
    table, known = (expert_map, len(expert_map)) if mapped else (plan.num_tiles, experts)
    numbers = [int(topk_ids.dtype == torch.int64), int(mapped), known, slots, top_k, experts, int(one_scale)]
    return name, blocks, [topk_ids, table, *plan, *numbers]
