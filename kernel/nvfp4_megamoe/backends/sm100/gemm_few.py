"""Grouped NVFP4 GEMM for few slots an expert: weights on the M side, 16 to 64 slots on the N side.

A tile is 128 rows of an expert's weights by up to 128 of its slots, taken in parts of ``slots``; a part reads the
weights again, which a well chosen ``slots`` makes rare. A stage of shared memory holds an image of the weights and a
part of an image of the slots, so that most of it, and most of what is under way, are weights. Roles, schedule and
barriers are those of ``gemm``; the accumulator is transposed: its lanes are weight rows, its columns slots.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Uint32, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.epilogues_few import STAGING_PITCH, few_swiglu_epilogue, few_weighted_epilogue
from nvfp4_megamoe.backends.sm100.gemm import STEPS, GroupedGemm
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, FEW_SLOTS, IMAGE_ROWS, SCALE_BYTES, part_scale_bytes
from nvfp4_megamoe.backends.sm100.tiles import Tile

# Groups of cp.async under way in a gather thread. The weights' bulk copies are many stages ahead; at 631 clocks a stage
# (see docs/sm100-kernel.md) four groups cover 1.4 microseconds.
GATHER_LAG = 4
_GATHER_ROWS = 16
_EPILOGUE_WARPS = 4


class FewGemm(GroupedGemm):
    """One compiled variant.

    Args:
        first, adds: as for ``GroupedGemm``.
        slots: columns of the accumulator, one of ``FEW_SLOTS``.
    """

    def __init__(self, first: bool, slots: int, adds: bool = False) -> None:
        assert slots in FEW_SLOTS
        self.first, self.tile_n, self.adds, self.pair, self.cluster = first, slots, adds, False, 1
        self.weight_rows, self.images, self.own_images = IMAGE_ROWS, 1, 1
        self.slots, self.part_scale_bytes = slots, part_scale_bytes(slots)
        self.slot_tile = self.part_scale_bytes // STEPS
        self.accumulators, self.epilogue_warps = 2, _EPILOGUE_WARPS
        self.gather_warps, self.gather_lag = slots // _GATHER_ROWS if first else 0, GATHER_LAG
        # A tile of scales is copied to TMEM as 32 lines; with 16 slots the last runs past the part, within these bytes.
        self._lay_out(_EPILOGUE_WARPS * min(slots, 32) * STAGING_PITCH, SCALE_BYTES)

    # Shared memory of a stage: codes of the weights and of the slots, then their scales.
    def _weight_codes(self, stage):
        return stage

    def _slot_codes(self, stage):
        return stage + CODE_BYTES

    def _weight_scales(self, stage):
        return stage + CODE_BYTES + self.slot_code_bytes

    def _slot_scales(self, stage):
        return self._weight_scales(stage) + SCALE_BYTES

    def _operands(self, stage):
        codes = self._weight_codes(stage), self._slot_codes(stage)
        return *codes, self._weight_scales(stage), self._slot_scales(stage), SCALE_BYTES // STEPS, self.slot_tile

    def _parts(self, rows):
        return (rows + self.slots - 1) // self.slots

    @cute.jit
    def _rows(self, tiles, index, columns):
        return Tile.find(tiles, index, columns, Int32(0), self.cluster).rows

    @cute.jit
    def _define(self, thread, shared):
        """Zeros for the slots' scales of every stage: the gather writes no word of a row that a part does not have."""
        lines = SCALE_BYTES // 16
        zero = Uint32(0)
        for i in range(thread, self.stages * lines, self.threads):
            place = self._slot_scales(shared + i // lines * self.stage_bytes) + i % lines * 16
            ptx.store_shared_4xu32(place, [zero] * 4)
        ptx.fence_async_shared()

    @cute.jit
    def _epilogue(
        self,
        warp,
        lane,
        tiles,
        columns,
        count,
        n,
        parameters,
        out,
        out_scale,
        order,
        weights,
        top_k,
        limit,
        staging,
        done,
        free,
        tmem,
        rank,
    ):
        """Four warps: each has 32 weight rows of every slot."""
        which, parity = Int32(0), Int32(0)
        line = staging + warp * (min(self.slots, 32) * STAGING_PITCH)
        index, stride = self._first()
        while index < count:
            whole = Tile.find(tiles, index, columns, rank, self.cluster)
            for part in cutlass.range(self._parts(whole.rows), unroll=1):
                tile = whole.part(part, self.slots)
                ptx.wait(done + 8 * which, parity)
                ptx.fence_after()
                address = tmem + (warp << 21) + which * self.slots
                if cutlass.const_expr(self.first):
                    few_swiglu_epilogue(
                        tile, part, warp, lane, address, parameters, limit, n, out, out_scale, line, self.slots
                    )
                else:
                    few_weighted_epilogue(
                        tile,
                        warp,
                        lane,
                        address,
                        parameters,
                        n,
                        out,
                        order,
                        weights,
                        top_k,
                        line,
                        self.slots,
                        self.adds,
                    )
                ptx.fence_before()
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.arrive(free + 8 * which)
                which, parity = self._advance(which, parity, self.accumulators)
            index += stride
        # Shared memory must outlive the stores that read it, and the next kernel reads what they write.
        if cutlass.const_expr(not self.first):
            ptx.wait_bulk()
