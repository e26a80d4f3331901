"""The plan of a batch in one kernel: a stable counting sort of the slots by expert, and the tables of tiles.

One cluster does it all. Every warp owns a run of consecutive slots. It counts them by expert (lanes with the same
expert find each other with match), the counts of warps and blocks are summed in order, and every warp then places its
slots behind those of the warps before it. No atomics: the order is that of the flat indices, every time.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, Uint32, Uint64, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.layout import IMAGE_ROWS
from nvfp4_megamoe.backends.sm100.plan import MAX_EXPERTS

WARP = 32
_ROW_BYTES = 32


class MakePlan:
    """Kernel: ``Plan`` (see ``plan``) from the router's choices, by one cluster of ``cluster`` blocks."""

    threads = 1024
    warps = threads // WARP
    # Words of a table: one for each expert, and one for the slots without.
    bins = MAX_EXPERTS + 1

    def __init__(self, cluster: int) -> None:
        self.cluster = cluster
        assert self.bins <= self.threads
        # counts of each warp; the block's counts, first slots of this block, first slots, tiles, pairs; sums of warps
        self.shared_bytes = 4 * (self.bins * (self.warps + 5) + 3 * self.warps)

    @cute.jit
    def __call__(
        self,
        ids: Int64,
        expert_map: Int64,
        tiles: Int64,
        num_tiles: Int64,
        pairs: Int64,
        num_pairs: Int64,
        order: Int64,
        a_row: Int64,
        source: Int64,
        here: Int64,
        wide: Int32,
        mapped: Int32,
        known: Int32,
        slots: Int32,
        top_k: Int32,
        experts: Int32,
        one_scale: Int32,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        """Launch one cluster; ``blocks`` is its size.

        Args:
            ids: int32, or int64 where ``wide`` is not 0: [slots]. An id outside [0, known) is dropped.
            expert_map: int32 [known], read where ``mapped`` is not 0: local expert of an id, or what is outside
                [0, experts) for none. Without it an id is a local expert, and known is ``experts``.
            tiles, num_tiles, pairs, num_pairs, order, a_row, source, here: written, see ``plan.Plan``.
            experts: E, from 1 to MAX_EXPERTS. one_scale: see ``plan.Plan.source``.
        """
        self._kernel(
            ids,
            expert_map,
            tiles,
            num_tiles,
            pairs,
            num_pairs,
            order,
            a_row,
            source,
            here,
            wide,
            mapped,
            known,
            slots,
            top_k,
            experts,
            one_scale,
        ).launch(
            grid=[blocks, 1, 1],
            block=[self.threads, 1, 1],
            smem=self.shared_bytes,
            stream=stream,
            use_pdl=True,
            cluster=[self.cluster, 1, 1],
        )

    @cute.kernel
    def _kernel(
        self,
        ids: Int64,
        expert_map: Int64,
        tiles: Int64,
        num_tiles: Int64,
        pairs: Int64,
        num_pairs: Int64,
        order: Int64,
        a_row: Int64,
        source: Int64,
        here: Int64,
        wide: Int32,
        mapped: Int32,
        known: Int32,
        slots: Int32,
        top_k: Int32,
        experts: Int32,
        one_scale: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        rank = Int32(0)
        if cutlass.const_expr(self.cluster > 1):
            rank = cute.arch.block_idx_in_cluster()
        counts = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=16).toint())
        total = counts + 4 * self.bins * self.warps
        base, begin, first, first_pair = (total + 4 * self.bins * i for i in range(1, 5))
        sums = first_pair + 4 * self.bins
        mine = counts + 4 * self.bins * warp
        for i in range(lane, experts + 1, WARP):
            ptx.store_shared_i32(mine + 4 * i, Int32(0))
        cute.arch.sync_warp()
        cute.arch.griddepcontrol_wait()

        # Groups of 32 slots, in runs of consecutive groups for each warp of the cluster.
        groups = (slots + WARP - 1) // WARP
        run = (groups + self.cluster * self.warps - 1) // (self.cluster * self.warps)
        start = (rank * self.warps + warp) * run
        stop = cutlass.min(start + run, groups)
        for group in range(start, stop):
            expert = self._expert(ids, expert_map, group * WARP + lane, wide, mapped, known, slots, experts)
            peers = ptx.match_any(expert)
            self._count(mine, expert, peers, lane)
        cute.arch.sync_threads()

        self._offsets(thread, warp, lane, rank, experts, counts, total, base, begin, first, first_pair, sums)
        if (rank == 0) & (thread == 0):
            ptx.store_i32(num_tiles, ptx.load_shared_i32(first + 4 * experts))
            ptx.store_i32(num_pairs, ptx.load_shared_i32(first_pair + 4 * experts))
        for expert in range(rank * self.warps + warp, experts, self.cluster * self.warps):
            self._table(tiles, expert, lane, begin, first, first)
            self._table(pairs, expert, lane, begin, first_pair, first)

        for group in range(start, stop):
            flat = group * WARP + lane
            expert = self._expert(ids, expert_map, flat, wide, mapped, known, slots, experts)
            peers = ptx.match_any(expert)
            position = ptx.count_bits(peers & self._before(lane))
            if expert >= 0:
                position += ptx.load_shared_i32(base + 4 * expert) + ptx.load_shared_i32(mine + 4 * expert)
            cute.arch.sync_warp()
            self._count(mine, expert, peers, lane)
            if expert >= 0:
                self._place(order, a_row, source, here, flat, position, expert, top_k, experts, one_scale)
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(self.cluster > 1):
            # The other blocks have read this one's counts.
            cute.arch.cluster_wait()

    @cute.jit
    def _expert(self, ids, expert_map, flat, wide, mapped, known, slots, experts):
        """Local expert of a slot, ``experts`` where it has none here, -1 past the last slot."""
        expert = Int32(-1)
        if flat < slots:
            expert = experts
            chosen = self._id(ids, flat, wide)
            if Uint64(chosen) < Uint64(known):
                local = Int32(chosen)
                if mapped != 0:
                    local = ptx.load_i32(expert_map + chosen * 4)
                if Uint32(local) < Uint32(experts):
                    expert = local
        return expert

    @cute.jit
    def _id(self, ids, flat, wide):
        """The router's choice as it is, sign included."""
        chosen = Int64(0)
        if wide != 0:
            chosen = ptx.load_i64(ids + Int64(flat) * 8)
        if wide == 0:
            chosen = Int64(ptx.load_i32(ids + Int64(flat) * 4))
        return chosen

    @cute.jit
    def _before(self, lane):
        """Mask of the lanes before this one."""
        return (Uint32(1) << Uint32(lane)) - Uint32(1)

    @cute.jit
    def _count(self, mine, expert, peers, lane):
        """Add the lanes of each expert to the warp's counts; one lane writes for all with the same expert."""
        if (expert >= 0) & ((peers & self._before(lane)) == Uint32(0)):
            at = mine + 4 * expert
            ptx.store_shared_i32(at, ptx.load_shared_i32(at) + ptx.count_bits(peers))
        cute.arch.sync_warp()

    @cute.jit
    def _offsets(self, thread, warp, lane, rank, experts, counts, total, base, begin, first, first_pair, sums):
        """From counts to places, one thread for each expert and one for the slots without.

        Afterwards ``counts`` of a warp are those of the warps before it in the block.
        """
        own, here, before = Int32(0), Int32(0), Int32(0)
        if thread <= experts:
            for w in cutlass.range(self.warps, unroll=4):
                at = counts + 4 * (self.bins * w + thread)
                count = ptx.load_shared_i32(at)
                ptx.store_shared_i32(at, own)
                own += count
            ptx.store_shared_i32(total + 4 * thread, own)
        here = own
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            here = Int32(0)
            if thread <= experts:
                for other in cutlass.range_constexpr(self.cluster):
                    count = ptx.load_cluster_i32(ptx.remote(total + 4 * thread, Int32(other)))
                    here += count
                    if Int32(other) < rank:
                        before += count
            cute.arch.cluster_arrive()
        tiles, pairs = Int32(0), Int32(0)
        if thread < experts:
            tiles = (here + IMAGE_ROWS - 1) // IMAGE_ROWS
            pairs = (here + 2 * IMAGE_ROWS - 1) // (2 * IMAGE_ROWS)
        values = [here, tiles, pairs]
        inclusive = [self._scan(value) for value in values]
        if lane == WARP - 1:
            for i in cutlass.range_constexpr(3):
                ptx.store_shared_i32(sums + 4 * (i * self.warps + warp), inclusive[i])
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(3):
            of_warp = ptx.load_shared_i32(sums + 4 * (i * self.warps + lane))
            earlier = self._scan(of_warp) - of_warp
            place = inclusive[i] - values[i] + ptx.shuffle_from(earlier, warp)
            if thread <= experts:
                table = (begin, first, first_pair)[i]
                ptx.store_shared_i32(table + 4 * thread, place)
                if cutlass.const_expr(i == 0):
                    ptx.store_shared_i32(base + 4 * thread, place + before)
        cute.arch.sync_threads()

    @cute.jit
    def _scan(self, value):
        """Sum of the values of this lane and those before it."""
        for step in cutlass.range_constexpr(5):
            value = value + ptx.shuffle_up(value, 1 << step)
        return value

    @cute.jit
    def _table(self, table, expert, lane, begin, first, first_image):
        """One warp: an expert's rows of a table; the end of its slots is where the next one's begin."""
        at = 4 * expert
        tile, after = ptx.load_shared_i32(first + at), ptx.load_shared_i32(first + at + 4)
        image = ptx.load_shared_i32(first_image + at)
        slot, end = ptx.load_shared_i32(begin + at), ptx.load_shared_i32(begin + at + 4)
        for row in range(tile + lane, after, WARP):
            place = table + Int64(row) * _ROW_BYTES
            ptx.store_4xi32(place, (expert, tile, after - tile, image))
            ptx.store_4xi32(place + 16, (slot, end, Int32(0), Int32(0)))

    @cute.jit
    def _place(self, order, a_row, source, here, flat, position, expert, top_k, experts, one_scale):
        """Everything that the plan says about one slot."""
        token = flat // top_k
        used = Int32(expert < experts)
        ptx.store_i32(order + Int64(position) * 4, flat)
        ptx.store_i32(here + Int64(flat) * 4, used)
        if one_scale != 0:
            ptx.store_i32(a_row + Int64(position) * 4, token)
            if flat == token * top_k:
                ptx.store_2xi32(source + Int64(token) * 8, (token, Int32(0)))
        else:
            ptx.store_i32(a_row + Int64(position) * 4, position)
            if used == 0:
                token = Int32(-1)
                expert = experts - 1
            ptx.store_2xi32(source + Int64(position) * 8, (token, expert))
