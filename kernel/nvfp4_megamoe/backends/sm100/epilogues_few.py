"""What a warp does with its 32 weight rows of up to 64 slots: the accumulator's lanes are rows, its columns slots.

Both epilogues transpose through lines of shared memory, one for each of up to 32 slots, so that in the end a lane has
one slot: 16 float32 results of a block to be quantized, or 32 bfloat16 results to be stored. Only the warp itself reads
what it wrote there.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.epilogues import swiglu
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, GROUP, IMAGE_K, IMAGE_ROWS, part_scale_bytes
from nvfp4_megamoe.backends.sm100.quantize import round_block

# Bytes between the lines of two slots: 64, and 16 that spread them over the banks.
STAGING_PITCH = 80
_WARP_ROWS = 32


@cute.jit
def _gate_and_up(lane, near, far):
    """A lane's gate and up of one slot.

    Lanes 0 to 15 have 16 rows of gate, lanes 16 to 31 those of up. The lower lanes keep the slot of ``near`` and give
    that of ``far`` away; the upper lanes do the reverse.
    """
    given = far
    if lane >= GROUP:
        given = near
    taken = ptx.other_half(given)
    gate, up = near, taken
    if lane >= GROUP:
        gate, up = taken, far
    return gate, up


@cute.jit
def few_swiglu_epilogue(
    tile, part, quarter, lane, address, parameters, limit, n, out, out_scale, staging, slots: cutlass.Constexpr
):
    """16 rows of gate and of up, of each slot, to one block of 16 NVFP4 values in the images that GEMM 2 reads.

    Rows past the expert's slots are not stored: GEMM 2 multiplies whatever is there to columns that nobody reads.
    """
    alpha_gate, alpha_up, inverse_global, global_scale = ptx.load_4xf32(parameters + Int64(tile.expert) * 16)
    chunk = min(slots, 32)
    image = Int64(tile.image) * (n // (2 * IMAGE_K)) + tile.column // 4
    part_bytes = part_scale_bytes(slots)
    scales = out_scale + (image * (IMAGE_ROWS // slots) + part) * part_bytes + tile.column % 4 * (part_bytes // 4)
    for begin in cutlass.range_constexpr(0, slots, chunk):
        for half in cutlass.range_constexpr(0, chunk, 16):
            sums = ptx.load_columns(address + begin + half)
            ptx.wait_loads()
            for first in cutlass.range_constexpr(0, 16, 8):
                # The lines of slots 4 apart begin 16 banks apart, so that the two halves of the warp do not collide.
                for i in cutlass.range_constexpr(first, first + 4):
                    gate, up = _gate_and_up(lane, sums[i], sums[i + 4])
                    line = staging + (half + i + lane // GROUP * 4) * STAGING_PITCH
                    ptx.store_shared_f32(line + lane % GROUP * 4, swiglu(gate, up, alpha_gate, alpha_up, limit))
        cute.arch.sync_warp()
        slot = begin + lane
        if lane < chunk and slot < tile.rows:
            values = []
            for i in cutlass.range_constexpr(4):
                values += [*ptx.load_shared_4xf32(staging + lane * STAGING_PITCH + 16 * i)]
            low, high, scale = round_block(values, inverse_global, global_scale)
            row = part * slots + slot
            sixteen = tile.column % 4 * 2 + quarter // 2
            place = out + image * CODE_BYTES + row * 128 + (sixteen ^ (row % 8)) * 16 + quarter % 2 * 8
            ptx.store_2xu32(place, (low, high))
            ptx.store_u8(scales + slot % 32 * 16 + slot // 32 * 4 + quarter, scale)
        cute.arch.sync_warp()


@cute.jit
def few_weighted_epilogue(
    tile,
    quarter,
    lane,
    address,
    parameters,
    n,
    out,
    order,
    weights,
    top_k,
    staging,
    slots: cutlass.Constexpr,
    adds: cutlass.Constexpr,
):
    """32 rows of each slot times alpha and routing weight to 64 bytes of bfloat16, stored or added by one bulk copy."""
    alpha = ptx.load_f32(parameters + Int64(tile.expert) * 16)
    chunk = min(slots, 32)
    for begin in cutlass.range_constexpr(0, slots, chunk):
        slot = begin + lane
        mine = lane < chunk and slot < tile.rows
        flat, factor = Int32(0), Float32(0.0)
        if mine:
            flat = ptx.load_i32(order + Int64(tile.slot + slot) * 4)
            factor = ptx.product(alpha, ptx.load_f32(weights + Int64(flat) * 4))
        ptx.wait_bulk_read()
        cute.arch.sync_warp()
        for half in cutlass.range_constexpr(0, chunk, 16):
            sums = ptx.load_columns(address + begin + half)
            ptx.wait_loads()
            for i in cutlass.range_constexpr(16):
                scaled = ptx.product(sums[i], ptx.value_of_lane(factor, half + i))
                ptx.store_shared_bf16(staging + (half + i) * STAGING_PITCH + lane * 2, scaled)
        ptx.fence_async_shared()
        cute.arch.sync_warp()
        if mine:
            target = flat
            if cutlass.const_expr(adds):
                target = flat // top_k
            place = out + (Int64(target) * n + tile.column * IMAGE_ROWS + quarter * _WARP_ROWS) * 2
            line = staging + lane * STAGING_PITCH
            if cutlass.const_expr(adds):
                ptx.bulk_add_bf16(place, line, 2 * _WARP_ROWS)
            else:
                ptx.bulk_store(place, line, 2 * _WARP_ROWS)
        ptx.commit_bulk()
