"""What a thread does with its slot's 128 accumulator columns."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int64, Uint32, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, GROUP, IMAGE_K, IMAGE_ROWS, SCALE_BYTES
from nvfp4_megamoe.backends.sm100.quantize import round_block

_LOG2_E = 1.4426950408889634
_ROW_BYTES = IMAGE_ROWS * 2


@cute.jit
def swiglu(gate, up, alpha_gate, alpha_up, limit):
    """silu(min(gate, L)) * clamp(up, -L, L) of scaled accumulators; exp and reciprocal approximate."""
    gate = ptx.smaller(ptx.product(gate, alpha_gate), limit)
    up = ptx.larger(ptx.smaller(ptx.product(up, alpha_up), limit), ptx.product(limit, Float32(-1.0)))
    sigmoid = ptx.fast_reciprocal(Float32(1.0) + ptx.exp2(ptx.product(gate, Float32(-_LOG2_E))))
    return ptx.product(ptx.product(gate, sigmoid), up)


@cute.jit
def swiglu_epilogue(tile, row, column, address, parameters, limit, n, out, out_scale):
    """Groups of 16 columns of gate and of up to 64 NVFP4 values, in the images that GEMM 2 reads.

    Rows past the expert's slots are stored too: their activations are zeros, and GEMM 2 reads whole images. A tile
    without any slot has no image.
    """
    alpha_gate, alpha_up, inverse_global, global_scale = ptx.load_4xf32(parameters + Int64(tile.expert) * 16)
    codes, scales = [], Uint32(0)
    for block in cutlass.range_constexpr(IMAGE_ROWS // (2 * GROUP)):
        gate = ptx.load_columns(address + 2 * GROUP * block)
        up = ptx.load_columns(address + 2 * GROUP * block + GROUP)
        ptx.wait_loads()
        values = [swiglu(gate[i], up[i], alpha_gate, alpha_up, limit) for i in range(16)]
        low, high, scale = round_block(values, inverse_global, global_scale)
        codes += [low, high]
        scales = scales | (scale << (8 * block))
    # Four column tiles of 64 values make one K image.
    image = Int64(tile.image) * (n // (2 * IMAGE_K)) + column // 4
    chunk = (column % 4) * 2
    line = out + image * CODE_BYTES + row * 128
    if tile.rows > 0:
        ptx.store_4xu32(line + (chunk ^ (row % 8)) * 16, codes[:4])
        ptx.store_4xu32(line + ((chunk + 1) ^ (row % 8)) * 16, codes[4:])
        ptx.store_u32(out_scale + image * SCALE_BYTES + (column % 4) * 512 + (row % 32) * 16 + (row // 32) * 4, scales)


@cute.jit
def weighted_epilogue(
    tile, row, column, address, parameters, n, out, order, weights, top_k, staging, adds: cutlass.Constexpr
):
    """128 columns times alpha and routing weight to bfloat16: one row of 256 bytes for each slot.

    The row goes through the thread's own line of shared memory and leaves as one bulk copy, or as a bulk addition to
    the token's row.
    """
    alpha = ptx.load_f32(parameters + Int64(tile.expert) * 16)
    flat, factor = cutlass.Int32(0), Float32(0.0)
    if row < tile.rows:
        flat = ptx.load_i32(order + Int64(tile.slot + row) * 4)
        factor = ptx.product(alpha, ptx.load_f32(weights + Int64(flat) * 4))
    ptx.wait_bulk_read()
    for block in cutlass.range_constexpr(IMAGE_ROWS // 16):
        values = ptx.load_columns(address + 16 * block)
        ptx.wait_loads()
        scaled = [ptx.product(value, factor) for value in values]
        pairs = [ptx.pack_bf16(scaled[2 * i], scaled[2 * i + 1]) for i in range(8)]
        ptx.store_shared_4xu32(staging + 32 * block, pairs[:4])
        ptx.store_shared_4xu32(staging + 32 * block + 16, pairs[4:])
    ptx.fence_async_shared()
    if row < tile.rows:
        target = flat
        if cutlass.const_expr(adds):
            target = flat // top_k
        place = out + (Int64(target) * n + column * IMAGE_ROWS) * 2
        if cutlass.const_expr(adds):
            ptx.bulk_add_bf16(place, staging, _ROW_BYTES)
        else:
            ptx.bulk_store(place, staging, _ROW_BYTES)
    ptx.commit_bulk()
