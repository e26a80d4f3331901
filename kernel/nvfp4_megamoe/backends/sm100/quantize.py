"""BF16 activations to NVFP4 with given global scales, one pass over the data, and the block rounding it shares.

One block of threads makes one output row; a thread makes 16 values: 32 bytes in, 8 bytes of codes and one scale out.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from nvfp4_megamoe.backends.sm100 import ptx

THREADS = 128
_FLOAT_MAX = 3.4028234663852886e38


@cute.jit
def round_block(values: list, inverse_global: Float32, global_scale: Float32):
    """Round 16 float32 values as ``numerics.nvfp4.quantize`` does, bit for bit.

    Args:
        values: 16 Float32.
        inverse_global: 1 / global scale. global_scale: 1 / inverse_global, which need not be the given global scale.

    Returns:
        Two Uint32 of codes, low nibble first, and the block scale's bits in a Uint32.
    """
    amax = ptx.absolute(values[0])
    for i in cutlass.range_constexpr(1, 16):
        amax = ptx.larger(amax, ptx.absolute(values[i]))
    scale = ptx.encode_ue4m3(ptx.product(inverse_global, ptx.product(amax, Float32(1 / 6))))
    divisor = ptx.product(ptx.decode_ue4m3(scale), global_scale)
    inverse = Float32(0.0)
    if divisor != Float32(0.0):
        inverse = ptx.smaller(ptx.reciprocal(divisor), Float32(_FLOAT_MAX))
    scaled = [ptx.product(value, inverse) for value in values]
    low, high = ptx.encode_e2m1(scaled[:8]), ptx.encode_e2m1(scaled[8:])
    if inverse == Float32(0.0):
        low, high = Uint32(0), Uint32(0)
    return low, high, scale


class QuantizeRows:
    """Kernel: row r of the output is row ``source[r]`` of x, quantized with scale pair ``scale_index[r]``."""

    @cute.kernel
    def _kernel(self, x: Int64, source: Int64, scales: Int64, codes: Int64, block_scales: Int64, columns: Int32):
        thread, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        wanted = Int64(row) * 8
        token, expert = ptx.load_i32(source + wanted), ptx.load_i32(source + wanted + 4)
        if token >= 0:
            pair = scales + Int64(expert) * 8
            inverse_global, global_scale = ptx.load_f32(pair), ptx.load_f32(pair + 4)
            blocks = columns // 16
            for block in range(thread, blocks, THREADS):
                at = x + (Int64(token) * columns + Int64(block) * 16) * 2
                words = [*ptx.stream_4xu32(at), *ptx.stream_4xu32(at + 16)]
                values = [half(word) for word in words for half in (ptx.bf16_low, ptx.bf16_high)]
                low, high, scale = round_block(values, inverse_global, global_scale)
                index = Int64(row) * blocks + block
                ptx.store_2xu32(codes + index * 8, (low, high))
                ptx.store_u8(block_scales + index, scale)
        cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def __call__(
        self,
        x: Int64,
        source: Int64,
        scales: Int64,
        codes: Int64,
        block_scales: Int64,
        columns: Int32,
        rows: Int32,
        stream: cuda.CUstream,
    ):
        """Launch for ``rows`` output rows.

        Args:
            x: bfloat16 [T, columns], 16-byte aligned rows.
            source: int32 [rows, 2], row of x (negative: leave the output row as it is) and index into ``scales``.
            scales: float32 [n, 2], reciprocal of the global scale, and reciprocal of that reciprocal.
            codes: uint8 [rows, columns / 2], written. block_scales: uint8 [rows, columns / 16], written.
        """
        self._kernel(x, source, scales, codes, block_scales, columns).launch(
            grid=[rows, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )
