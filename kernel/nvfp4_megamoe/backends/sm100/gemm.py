"""Grouped NVFP4 GEMM of one expert's slots with its weights, persistent over (expert, tile).

A tile is 128 slots by ``tile_n`` rows of the expert's weights. K goes in steps of 256: a stage of shared memory holds
the images of both operands and of their block scales (see ``layout``). Warps by role:

- epilogue, four for each 128 columns of the accumulator: TMEM to registers to the result;
- gather, four (GEMM 1 only): rows of the activations by slot, with cp.async, into the swizzle;
- load, one: weights, and for GEMM 2 also activations, as contiguous bulk copies;
- multiply, one: block scales to TMEM, four K = 64 multiplications a step.

Every role finds the tiles by itself from the plan, in the same fixed order, so no scheduler warp is needed.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.epilogues import swiglu_epilogue, weighted_epilogue
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, IMAGE_K, IMAGE_ROWS, SCALE_BYTES
from nvfp4_megamoe.backends.sm100.tiles import Tile, tile_count

WARP = 32
GATHER_WARPS = 4
# Groups of cp.async that a gather thread leaves under way while it issues the next.
GATHER_LAG = 2
SHARED_LIMIT = 232448
TMEM_COLUMNS = 512
_BLOCK_K = 64
STEPS = IMAGE_K // _BLOCK_K
# Shared memory descriptors without the address, in 16-byte units: stride between groups of 8 rows, version 1, swizzle.
_OPERAND = (2 << 61) | (1 << 46) | ((1024 >> 4) << 32) | (1 << 16)
_SCALES = (1 << 46) | ((128 >> 4) << 32) | (1 << 16)
STAGING_PITCH = 272


def _signed(bits: int) -> int:
    """The int64 of the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits


class GroupedGemm:
    """One compiled variant.

    Args:
        first: GEMM 1 (gather, SwiGLU, NVFP4 out) or GEMM 2 (weighted BF16 rows out).
        tile_n: 128 or 256 rows of weights a tile.
        adds: GEMM 2 adds its rows to the tokens' sums instead of storing one row for each slot.
        pair: two blocks of a cluster multiply 256 slots by 256 rows of weights together; each loads its own 128 slots
            and half of the weights. The first block's multiply warp issues for both, the second's reports its stages.
    """

    def __init__(self, first: bool, tile_n: int, adds: bool = False, pair: bool = False) -> None:
        assert not pair or tile_n == 2 * IMAGE_ROWS
        self.first, self.tile_n, self.adds, self.pair = first, tile_n, adds, pair
        self.cluster = 2 if pair else 1
        self.weight_rows, self.images = tile_n, tile_n // IMAGE_ROWS
        self.own_images = self.images // self.cluster
        self.slots, self.slot_tile, self.part_scale_bytes = IMAGE_ROWS, SCALE_BYTES // STEPS, SCALE_BYTES
        self.accumulators = 2 if tile_n == 128 else 1
        self.epilogue_warps = 4 * self.images
        self.gather_warps, self.gather_lag = GATHER_WARPS if first else 0, GATHER_LAG
        self._lay_out(0 if first else self.epilogue_warps * WARP * STAGING_PITCH, SCALE_BYTES)

    def _lay_out(self, staging: int, slot_scales: int) -> None:
        """Warps, shared memory and TMEM, from the sizes of the tile; bytes of the epilogue and of a stage's scales."""
        self.gather_warp = self.epilogue_warps
        self.load_warp = self.gather_warp + self.gather_warps
        self.multiply_warp = self.load_warp + 1
        self.threads = (self.multiply_warp + 1) * WARP
        self.slot_code_bytes, self.slot_scale_bytes = self.slots * IMAGE_K // 2, slot_scales
        self.stage_bytes = self.slot_code_bytes + self.own_images * CODE_BYTES + slot_scales + self.images * SCALE_BYTES
        self.stages = (SHARED_LIMIT - 1024 - staging) // self.stage_bytes
        self.barriers = self.stages * self.stage_bytes + staging
        self.shared_bytes = self.barriers + 1024
        # A, B: E2M1; scales UE4M3; dense K 64; M 128 or, by a pair, 256.
        self.shape = (1 << 7) | (1 << 10) | ((self.tile_n >> 3) << 17) | (self.cluster << 27)
        self.scale_columns = self.accumulators * self.tile_n
        assert self.scale_columns + 4 * STEPS * (1 + self.images) <= TMEM_COLUMNS
        # The swizzle of codes is by address.
        assert self.stage_bytes % 1024 == 0

    # Shared memory of a stage: codes of the slots and of the weights, then their scales.
    def _slot_codes(self, stage):
        return stage

    def _weight_codes(self, stage):
        return stage + self.slot_code_bytes

    def _slot_scales(self, stage):
        return stage + self.slot_code_bytes + self.own_images * CODE_BYTES

    def _weight_scales(self, stage):
        return self._slot_scales(stage) + self.slot_scale_bytes

    def _operands(self, stage):
        """Where codes of A and B, scales of A and B lie, and the bytes of one K = 64 step of those scales."""
        codes = self._slot_codes(stage), self._weight_codes(stage)
        return *codes, self._slot_scales(stage), self._weight_scales(stage), self.slot_tile, SCALE_BYTES // STEPS

    def _parts(self, rows):
        """Accumulations that a tile with ``rows`` slots takes."""
        return 1

    def _rows(self, tiles, index, columns):
        """Slots of a tile, where ``_parts`` depends on them."""
        return IMAGE_ROWS

    @cute.jit
    def _advance(self, number, parity, size):
        """The next of ``size`` buffers in a ring, and the parity of its barriers there."""
        number += 1
        if number == size:
            number = Int32(0)
            parity ^= 1
        return number, parity

    @cute.jit
    def _define(self, thread, shared):
        """Define the shared memory that the tensor core reads and no copy writes: none."""

    @cute.jit
    def __call__(
        self,
        a: Int64,
        a_scale: Int64,
        a_row: Int64,
        b: Int64,
        b_scale: Int64,
        tiles: Int64,
        num_tiles: Int64,
        parameters: Int64,
        out: Int64,
        out_scale: Int64,
        order: Int64,
        weights: Int64,
        top_k: Int32,
        n: Int32,
        k: Int32,
        limit: Float32,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        """Launch on ``blocks`` blocks.

        Args:
            a, a_scale: GEMM 1: row-major codes [rows, k / 2] and scales [rows, k / 16]; GEMM 2: images by tile.
            a_row: GEMM 1: int32 [slots], row of ``a`` of each slot.
            b, b_scale: images of every expert's [n, k] weights.
            tiles: int32 [num_tiles, 8], see ``plan``. num_tiles: int32 [1].
            parameters: float32 [E, 4]. GEMM 1: alpha of gate, alpha of up, reciprocal of the result's global scale,
                reciprocal of that; GEMM 2: alpha.
            out, out_scale: GEMM 1: images of the result by tile; GEMM 2: bfloat16 [T * top_k, n], or [T, n] to add to.
            order: int32 [slots], flat index t * top_k + k of each slot. weights: float32 [T * top_k]. GEMM 2 only.
            limit: clamp of SwiGLU, infinite for none.
        """
        self._kernel(
            a,
            a_scale,
            a_row,
            b,
            b_scale,
            tiles,
            num_tiles,
            parameters,
            out,
            out_scale,
            order,
            weights,
            top_k,
            n,
            k,
            limit,
        ).launch(
            grid=[blocks, 1, 1],
            block=[self.threads, 1, 1],
            smem=self.shared_bytes,
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
            cluster=[self.cluster, 1, 1],
        )

    @cute.kernel
    def _kernel(
        self,
        a: Int64,
        a_scale: Int64,
        a_row: Int64,
        b: Int64,
        b_scale: Int64,
        tiles: Int64,
        num_tiles: Int64,
        parameters: Int64,
        out: Int64,
        out_scale: Int64,
        order: Int64,
        weights: Int64,
        top_k: Int32,
        n: Int32,
        k: Int32,
        limit: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        lane = thread % WARP
        rank = Int32(0)
        if cutlass.const_expr(self.pair):
            rank = cute.arch.block_idx_in_cluster()
        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        full = shared + self.barriers
        empty = full + 8 * self.stages
        done = empty + 8 * self.stages
        free = done + 8 * self.accumulators
        tmem_at = free + 8 * self.accumulators
        if warp == self.load_warp and lane == 0:
            for stage in cutlass.range_constexpr(self.stages):
                # In a pair the first block's stage is full when the second's is, too.
                report = Int32(1) - rank if cutlass.const_expr(self.pair) else 0
                ptx.init_barrier(full + 8 * stage, 1 + self.gather_warps + report)
                ptx.init_barrier(empty + 8 * stage, 1)
            for i in cutlass.range_constexpr(self.accumulators):
                ptx.init_barrier(done + 8 * i, 1)
                ptx.init_barrier(free + 8 * i, self.epilogue_warps * self.cluster)
            cute.arch.mbarrier_init_fence()
        if warp == self.multiply_warp:
            ptx.allocate_tmem(tmem_at, TMEM_COLUMNS, self.cluster)
        self._define(thread, shared)
        ptx.fence_before()
        self._sync()
        ptx.fence_after()
        tmem = ptx.load_shared_i32(tmem_at)
        cute.arch.griddepcontrol_wait()
        columns = n // self.weight_rows
        count = tile_count(num_tiles, columns)
        steps = k // IMAGE_K
        # elect.sync tells the compiler that one thread runs what follows; else it loops around each instruction.
        if warp == self.load_warp:
            with cute.arch.elect_one():
                self._load(a, a_scale, b, b_scale, tiles, columns, count, n, steps, shared, full, empty, rank)
        elif warp == self.multiply_warp:
            with cute.arch.elect_one():
                if rank == 0:
                    self._multiply(tiles, columns, count, steps, shared, full, empty, done, free, tmem)
                else:
                    self._report(count, steps, full)
        elif warp < self.epilogue_warps:
            self._epilogue(
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
                shared + self.stages * self.stage_bytes,
                done,
                free,
                tmem,
                rank,
            )
        elif cutlass.const_expr(self.first):
            self._gather(
                thread - self.gather_warp * WARP,
                lane,
                a,
                a_scale,
                a_row,
                tiles,
                columns,
                count,
                k,
                steps,
                shared,
                full,
                empty,
                rank,
            )
        cute.arch.griddepcontrol_launch_dependents()
        ptx.fence_before()
        self._sync()
        if warp == self.multiply_warp:
            ptx.fence_after()
            ptx.free_tmem(tmem, TMEM_COLUMNS, self.cluster)

    @cute.jit
    def _sync(self):
        """All threads of the block, or of both blocks of a pair, whose barriers and shared memory must be alive."""
        if cutlass.const_expr(self.pair):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _first(self):
        """First tile of this block or pair, and the distance to its next."""
        return cute.arch.block_idx()[0] // self.cluster, cute.arch.grid_dim()[0] // self.cluster

    @cute.jit
    def _load(self, a, a_scale, b, b_scale, tiles, columns, count, n, steps, shared, full, empty, rank):
        """One thread: weights, and GEMM 2's activations, as whole images."""
        size = self.own_images * CODE_BYTES + self.images * SCALE_BYTES
        if cutlass.const_expr(not self.first):
            size += self.slot_code_bytes + self.part_scale_bytes
        parts = IMAGE_ROWS // self.slots
        stage, parity = Int32(0), Int32(1)
        index, stride = self._first()
        while index < count:
            tile = Tile.find(tiles, index, columns, rank, self.cluster)
            for part in cutlass.range(self._parts(tile.rows), unroll=1):
                for step in range(steps):
                    ptx.wait(empty + 8 * stage, parity)
                    base, barrier = shared + stage * self.stage_bytes, full + 8 * stage
                    ptx.expect(barrier, size)
                    for image in cutlass.range_constexpr(self.images):
                        row = tile.expert * (n // IMAGE_ROWS) + tile.column * self.images + image
                        source = Int64(row) * steps + step
                        scales, place = b_scale + source * SCALE_BYTES, self._weight_scales(base) + image * SCALE_BYTES
                        if cutlass.const_expr(self.pair):
                            # A pair shares the codes, image 0 in the first block; each needs the scales of both, which
                            # one brings. Its stage is empty when the other's is: one commit says so to both.
                            if image == rank:
                                ptx.bulk_load_pair(place, scales, SCALE_BYTES, barrier)
                                ptx.bulk_load(self._weight_codes(base), b + source * CODE_BYTES, CODE_BYTES, barrier)
                        else:
                            ptx.bulk_load(place, scales, SCALE_BYTES, barrier)
                            place = self._weight_codes(base) + image * CODE_BYTES
                            ptx.bulk_load(place, b + source * CODE_BYTES, CODE_BYTES, barrier)
                    if cutlass.const_expr(not self.first):
                        source = (Int64(self._image(tile)) * steps + step) * parts + part
                        ptx.bulk_load(
                            self._slot_codes(base), a + source * self.slot_code_bytes, self.slot_code_bytes, barrier
                        )
                        scales = a_scale + source * self.part_scale_bytes
                        ptx.bulk_load(self._slot_scales(base), scales, self.part_scale_bytes, barrier)
                    stage, parity = self._advance(stage, parity, self.stages)
            index += stride

    @cute.jit
    def _image(self, tile):
        """Image of the tile's slots. A second block without any reads the first's, which is there to be read."""
        image = tile.image
        if cutlass.const_expr(self.pair):
            image -= Int32(tile.rows == 0)
        return image

    @cute.jit
    def _gather(self, thread, lane, a, a_scale, a_row, tiles, columns, count, k, steps, shared, full, empty, rank):
        """16-byte chunks of the slots' rows into the swizzle, 4-byte groups of scales into the tiles.

        A stage is announced ``gather_lag`` stages later, when its copies are complete and fenced.
        """
        stride_rows = 4 * self.gather_warps
        groups = self.slots * STEPS // (WARP * self.gather_warps)
        chunk, first_row = thread % 8, thread // 8
        target = self._slot_codes(first_row * 128 + ((chunk ^ (first_row % 8)) * 16))
        scale_row, group = thread % self.slots, thread // self.slots * groups
        scale_target = group * self.slot_tile + (scale_row % 32) * 16 + (scale_row // 32) * 4
        stage, parity, issued, behind = Int32(0), Int32(1), Int32(0), Int32(0)
        index, stride = self._first()
        while index < count:
            whole = Tile.find(tiles, index, columns, rank, self.cluster)
            for part in cutlass.range(self._parts(whole.rows), unroll=1):
                tile = whole.part(part, self.slots)
                rows, sizes = [], []
                for i in cutlass.range_constexpr(self.slots // stride_rows):
                    row, size = self._row(a_row, tile, first_row + stride_rows * i)
                    rows.append(a + Int64(row) * (k // 2) + chunk * 16)
                    sizes.append(size)
                row, scale_size = self._row(a_row, tile, scale_row)
                scale_source = a_scale + Int64(row) * (k // 16) + 4 * group
                for step in range(steps):
                    ptx.wait(empty + 8 * stage, parity)
                    base = shared + stage * self.stage_bytes
                    for i in cutlass.range_constexpr(self.slots // stride_rows):
                        # first_row < stride_rows, a power of two: its swizzle and that of the distance share no bit.
                        place = base + 128 * stride_rows * i + (target ^ (stride_rows * i % 8 * 16))
                        ptx.copy_16(place, rows[i] + step * (IMAGE_K // 2), sizes[i])
                    scales = self._slot_scales(base) + scale_target
                    for i in cutlass.range_constexpr(groups):
                        source = scale_source + step * (IMAGE_K // 16) + 4 * i
                        ptx.copy_4(scales + self.slot_tile * i, source, scale_size // 4)
                    ptx.commit_copies()
                    issued += 1
                    stage, parity = self._advance(stage, parity, self.stages)
                    if issued > self.gather_lag:
                        ptx.wait_copies(self.gather_lag)
                        behind = self._announce(lane, full, behind)
            index += stride
        for left in cutlass.range_constexpr(self.gather_lag - 1, -1, -1):
            if issued > left:
                ptx.wait_copies(left)
                behind = self._announce(lane, full, behind)

    @cute.jit
    def _row(self, a_row, tile, row):
        """Row of ``a`` for a row of the tile, and 16; past the expert's slots the first row, and 0."""
        source, size = Int32(0), Int32(0)
        if row < tile.rows:
            source = ptx.load_i32(a_row + Int64(tile.slot + row) * 4)
            size = Int32(16)
        return source, size

    @cute.jit
    def _announce(self, lane, full, stage):
        """This warp's part of a stage is in shared memory: let the tensor core see it; returns the next stage."""
        ptx.fence_async_shared()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.arrive(full + 8 * stage)
        return self._advance(stage, Int32(0), self.stages)[0]

    @cute.jit
    def _report(self, count, steps, full):
        """The second block's thread: tell the first block's barrier of every full stage here."""
        stage, parity = Int32(0), Int32(0)
        index, stride = self._first()
        while index < count:
            for _ in range(steps):
                ptx.wait(full + 8 * stage, parity)
                ptx.arrive_remote(ptx.remote(full + 8 * stage, Int32(0)))
                stage, parity = self._advance(stage, parity, self.stages)
            index += stride

    @cute.jit
    def _multiply(self, tiles, columns, count, steps, shared, full, empty, done, free, tmem):
        """One thread: block scales to TMEM and the multiplications, in order."""
        stage, parity, which, free_parity = Int32(0), Int32(0), Int32(0), Int32(1)
        index, stride = self._first()
        while index < count:
            for _ in cutlass.range(self._parts(self._rows(tiles, index, columns)), unroll=1):
                ptx.wait(free + 8 * which, free_parity, self._scope())
                ptx.fence_after()
                target = tmem + which * self.tile_n
                for step in range(steps):
                    ptx.wait(full + 8 * stage, parity, self._scope())
                    ptx.fence_after()
                    self._step(shared + stage * self.stage_bytes, target, tmem + self.scale_columns, step)
                    self._commit(empty + 8 * stage)
                    stage, parity = self._advance(stage, parity, self.stages)
                self._commit(done + 8 * which)
                which, free_parity = self._advance(which, free_parity, self.accumulators)
            index += stride

    def _scope(self) -> str:
        return "cluster" if self.pair else "cta"

    def _commit(self, barrier) -> None:
        if self.pair:
            ptx.commit_pair(barrier)
        else:
            ptx.commit(barrier)

    @cute.jit
    def _step(self, base, target, scales, step):
        """One stage: four times 64 of K."""
        operand, scale = Int64(_signed(_OPERAND)), Int64(_SCALES)
        *places, tile_a, tile_b = self._operands(base)
        at_a, at_b, scale_a, scale_b = (Int64(place >> 4) for place in places)
        for i in cutlass.range_constexpr(STEPS):
            columns_a = scales + 4 * i
            columns_b = scales + 4 * STEPS + 4 * self.images * i
            ptx.copy_scales(columns_a, scale + scale_a + tile_a // 16 * i, self.cluster)
            for image in cutlass.range_constexpr(self.images):
                source = scale + scale_b + tile_b // 16 * i + image * (SCALE_BYTES >> 4)
                ptx.copy_scales(columns_b + 4 * image, source, self.cluster)
        for i in cutlass.range_constexpr(STEPS):
            columns_a = scales + 4 * i
            columns_b = scales + 4 * STEPS + 4 * self.images * i
            add = Int32(1)
            if cutlass.const_expr(i == 0):
                add = step
            at = 2 * i
            ptx.multiply(
                target,
                operand + at_a + at,
                operand + at_b + at,
                self.shape,
                columns_a,
                columns_b,
                add,
                self.cluster,
            )

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
        """Four warps for each image of the accumulator: a thread has one slot's 128 columns."""
        image, quarter = warp // 4, warp % 4
        which, parity = Int32(0), Int32(0)
        row = quarter * WARP + lane
        index, stride = self._first()
        while index < count:
            tile = Tile.find(tiles, index, columns, rank, self.cluster)
            ptx.wait(done + 8 * which, parity)
            ptx.fence_after()
            address = tmem + (quarter << 21) + which * self.tile_n + image * IMAGE_ROWS
            column = tile.column * self.images + image
            if cutlass.const_expr(self.first):
                swiglu_epilogue(tile, row, column, address, parameters, limit, n, out, out_scale)
            else:
                weighted_epilogue(
                    tile,
                    row,
                    column,
                    address,
                    parameters,
                    n,
                    out,
                    order,
                    weights,
                    top_k,
                    staging + (warp * WARP + lane) * STAGING_PITCH,
                    self.adds,
                )
            ptx.fence_before()
            cute.arch.sync_warp()
            if lane == 0:
                if cutlass.const_expr(self.pair):
                    ptx.arrive_remote(ptx.remote(free + 8 * which, Int32(0)))
                else:
                    ptx.arrive(free + 8 * which)
            which, parity = self._advance(which, parity, self.accumulators)
            index += stride
        # Shared memory must outlive the stores that read it, and the next kernel reads what they write.
        if cutlass.const_expr(not self.first):
            ptx.wait_bulk()
