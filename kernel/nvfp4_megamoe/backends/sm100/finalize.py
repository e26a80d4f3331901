"""Sum over a token's slots, in float32, in the order of its choices: the same bits every time."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute

from nvfp4_megamoe.backends.sm100 import ptx

THREADS = 128
_VECTOR = 8


class SumSlots:
    """Kernel: row t of the output is the sum of the weighted rows t * top_k + k that have an expert here."""

    @cute.kernel
    def _kernel(self, rows: Int64, here: Int64, out: Int64, top_k: Int32, columns: Int32):
        thread, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        for vector in range(thread, columns // _VECTOR, THREADS):
            sums = [Float32(0.0) for _ in range(_VECTOR)]
            for choice in range(top_k):
                flat = token * top_k + choice
                if ptx.load_i32(here + Int64(flat) * 4) != 0:
                    words = ptx.stream_4xu32(rows + (Int64(flat) * columns + vector * _VECTOR) * 2)
                    for i in cutlass.range_constexpr(4):
                        sums[2 * i] = sums[2 * i] + ptx.bf16_low(words[i])
                        sums[2 * i + 1] = sums[2 * i + 1] + ptx.bf16_high(words[i])
            pairs = [ptx.pack_bf16(sums[2 * i], sums[2 * i + 1]) for i in range(4)]
            ptx.store_4xu32(out + (Int64(token) * columns + vector * _VECTOR) * 2, pairs)
        cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def __call__(
        self, rows: Int64, here: Int64, out: Int64, top_k: Int32, columns: Int32, tokens: Int32, stream: cuda.CUstream
    ):
        """Launch for ``tokens`` tokens.

        Args:
            rows: bfloat16 [tokens * top_k, columns]. here: int32 [tokens * top_k], not zero where the row is written.
            out: bfloat16 [tokens, columns], written; zeros for a token without a row.
        """
        self._kernel(rows, here, out, top_k, columns).launch(
            grid=[tokens, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )
