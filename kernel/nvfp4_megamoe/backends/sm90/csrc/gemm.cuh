// Grouped GEMM over slots: weights are wgmma's operand A, decoded in registers; slots are its columns. One persistent CTA per
// multiprocessor: NWG consumer warpgroups, each with one unit (two 64-row tiles) or half of one, share the activations; one producer
// warpgroup copies packed weights and activations tiled by slot in bulk, or gathers activation rows where slots are few.
#pragma once
#include <cuda_bf16.h>

#include "e4m3.cuh"
#include "layout.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace sm90 {

enum Phase { kGateUp = 0, kDown = 1 };
enum Precision { kBf16 = 0, kE4m3 = 1 };   // of the activations, and of what weights are decoded to

struct GemmParams {
    const void* act;            // gather: bf16 [T, K] tokens, permuted as layout.cuh says; else tiled by slot, see slot_chunk
    const float* act_scale;     // kE4m3: [capacity], of a slot's activations
    const int* order;           // [capacity] flat index t * topk + k of a slot
    const int* offsets;         // [E + 1] first slot of every expert, a multiple of 8
    const int* counts;          // [E]
    const uint8_t* values;      // [E, units * kblocks, kUnitValueBytes], see block_index
    const uint8_t* scales;      // [E, units * kblocks, kUnitScaleBytes]
    const float* alpha;         // kGateUp: [E, 2]; kDown: [E]
    __nv_bfloat16* out;         // kGateUp: tiled by slot; kDown: [capacity, out_stride]
    float* partial;             // [grid, NWG, 128 threads * TILES * NMAX / 2]
    int* flags;                 // [grid, NWG], zero at launch
    int num_experts, kblocks, units, topk, out_stride, capacity;
    float limit;
};

// Byte offset of 16-byte chunk `chunk` of a slot's row in activations tiled by slot, [K / 64 or, in e4m3, 128][capacity][128 bytes],
// already swizzled as wgmma reads them: the rows of a tile, which begins at a multiple of 8, are contiguous for every 128 bytes of K.
__device__ __forceinline__ size_t slot_chunk(int capacity, int slot, int chunk) {
    return (size_t(chunk >> 3) * capacity + slot) * 128 + (((chunk & 7) ^ (slot & 7)) * 16);
}

template <int PRECISION, int NWG, int TILES, int NMAX>
struct SmemPlan {
    static constexpr int kUnits = NWG * TILES / 2;
    static constexpr int kValues = kUnits * kUnitValueBytes;
    static constexpr int kScales = kUnits * kUnitScaleBytes;
    static constexpr int kActParts = PRECISION == kE4m3 ? 1 : 2;   // of 128-byte rows
    static constexpr int kActPart = NMAX * 128;
    static constexpr int kStage = kValues + kScales + kActParts * kActPart;
    static constexpr int kTables = (int(sizeof(ScheduleTables)) + 127) / 128 * 128;
    static constexpr int kMagnitudes = PRECISION == kE4m3 ? kScaleCodes * 8 : 0;
    static constexpr int kSlotScales = PRECISION == kE4m3 ? NMAX * 4 : 0;   // of a warpgroup
    static constexpr int kStaging = NWG * 4 * 512;
    static constexpr int kFixed = kTables + kStaging + kMagnitudes + NWG * kSlotScales + 256 + 1024;   // barriers, alignment
    static constexpr int kStages = (227 * 1024 - kFixed) / kStage > 6 ? 6 : (227 * 1024 - kFixed) / kStage;
    static constexpr int kBytes = kStages * kStage + kFixed;
};

// Compiled widths are NMIN, NMIN + STEP, ..., NMAX; a tile takes the smallest that covers its slots. TILES is a warpgroup's 64-row
// tiles: two share each activation that wgmma reads, one leaves registers for twice the slots, so that decoding is paid half as often.
template <int PHASE, int PRECISION, int NWG, int TILES, int NMAX, int NMIN, int STEP>
struct Gemm {
    using Plan = SmemPlan<PRECISION, NWG, TILES, NMAX>;
    static constexpr int S = Plan::kStages;
    static constexpr int kUnits = Plan::kUnits;
    static constexpr bool kGather = PHASE == kGateUp && NMAX <= 32;   // few slots: gathering rows here is cheaper than another kernel
    // Stages whose copies are in flight when an earlier one is published. A consumer keeps two stages, so at most S - 2.
    static constexpr int kLag = S > 4 ? 2 : 1;
    static constexpr int kProducerRegisters = 56;
    static constexpr int kConsumerRegisters = NWG == 2 ? 224 : 104;   // the sum is at most what the launch gives the CTA
    static constexpr int kPartial = 128 * TILES * NMAX / 2;           // floats of a warpgroup's accumulators
    static_assert(S >= 3);
    static_assert(PRECISION == kBf16 || NMAX > 32);
    static_assert(kUnitsTogether % kUnits == 0);   // so that a CTA's units of a k block are one piece
    static constexpr bool kNarrow = NMAX > 32;   // one 64-row tile per wgmma group: half the fragment registers
    // What a stage reads first is read before the last group of the stage before, which hides its latency; what was read too early is read
    // again. Where a warpgroup has two tiles, it has enough to do meanwhile, and too few registers.
    static constexpr bool kReadAhead = TILES == 1;

    struct Shared {
        uint32_t stages, full, empty, staging, magnitudes, slot_scales;
    };

    struct Ring {
        int stage = 0;
        uint32_t phase = 0;
        __device__ __forceinline__ void advance() {
            if (++stage == S) {
                stage = 0;
                phase ^= 1;
            }
        }
    };

    // ---- producer ----
    static __device__ __forceinline__ void load_weights(const GemmParams& p, const Tile& t, int kb, uint32_t base, uint32_t full,
                                                        uint64_t policy) {
        const int unit0 = t.row_tile * kUnits, units = min(kUnits, p.units - unit0);
        const size_t block = size_t(t.expert) * p.units * p.kblocks + block_index(p.units, p.kblocks, unit0, kb);
        bulk_load(base, p.values + block * kUnitValueBytes, units * kUnitValueBytes, full, policy);
        bulk_load(base + Plan::kValues, p.scales + block * kUnitScaleBytes, units * kUnitScaleBytes, full, policy);
    }

    static __device__ __forceinline__ void load_activations(const GemmParams& p, const Tile& t, int kb, uint32_t base, uint32_t full,
                                                            uint64_t policy) {
        const char* act = reinterpret_cast<const char*>(p.act);
        for (int part = 0; part < Plan::kActParts; ++part)
            bulk_load(base + Plan::kValues + Plan::kScales + part * Plan::kActPart,
                      act + slot_chunk(p.capacity, t.slot0, (Plan::kActParts * kb + part) * 8), (t.rows + 7) / 8 * 1024, full, policy);
    }

    // Activations tiled by slot: one thread does it all. Weights may be read before the previous kernel has written the activations, so
    // the ring, at first empty, is filled with them before the wait for that kernel.
    static __device__ __forceinline__ void produce_tiled(const GemmParams& p, const Shared& sh, const ScheduleTables& sched) {
        if (threadIdx.x != NWG * 128) return;
        const uint64_t policy = NMAX > 64 ? policy_normal() : policy_evict_first();
        const uint64_t keep = policy_evict_last();
        Ring ring;
        Cursor cursor;
        Tile t;
        bool first = true;
        while (cursor.next(sched, t)) {
            const uint32_t act_bytes = (t.rows + 7) / 8 * 1024;
            const uint32_t weight_bytes = min(kUnits, p.units - t.row_tile * kUnits) * (kUnitValueBytes + kUnitScaleBytes);
            const uint32_t bytes = weight_bytes + Plan::kActParts * act_bytes;
            int kb = t.kb0;
            if (first) {
                first = false;
                const int filled = min(S, t.kb1 - kb);
#pragma unroll 1
                for (int i = 0; i < filled; ++i) {
                    mbar_expect_tx(sh.full + i * 8, bytes);
                    load_weights(p, t, kb + i, sh.stages + i * Plan::kStage, sh.full + i * 8, policy);
                }
                grid_wait();
#pragma unroll 1
                for (int i = 0; i < filled; ++i, ++kb) {
                    load_activations(p, t, kb, sh.stages + i * Plan::kStage, sh.full + i * 8, keep);
                    ring.advance();
                }
            }
            for (; kb < t.kb1; ++kb) {
                const uint32_t full = sh.full + ring.stage * 8;
                mbar_wait(sh.empty + ring.stage * 8, ring.phase ^ 1);
                const uint32_t base = sh.stages + ring.stage * Plan::kStage;
                mbar_expect_tx(full, bytes);
                load_weights(p, t, kb, base, full, policy);
                load_activations(p, t, kb, base, full, keep);
                ring.advance();
            }
        }
    }

    static __device__ __forceinline__ void produce_gather(const GemmParams& p, const Shared& sh, const ScheduleTables& sched) {
        constexpr int R = NMAX / 8;   // rows per thread
        const int tid = threadIdx.x - NWG * 128;
        const int chunk = tid & 15, row0 = tid >> 4;
        const uint64_t policy = NMAX > 64 ? policy_normal() : policy_evict_first();
        const uint32_t row_bytes = p.kblocks * kBlockK * 2;
        Ring ring, done;
        Cursor cursor;
        Tile t;
        int issued = 0;
        while (cursor.next(sched, t)) {
            const uint32_t weight_bytes = min(kUnits, p.units - t.row_tile * kUnits) * (kUnitValueBytes + kUnitScaleBytes);
            uint32_t offset[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const int r = row0 + 8 * i;
                if (r < t.rows) {
                    offset[i] = uint32_t(p.order[t.slot0 + r] / p.topk) * row_bytes + chunk * 16;
                }
            }
            const char* act = reinterpret_cast<const char*>(p.act) + size_t(t.kb0) * (kBlockK * 2);
            const uint32_t dst0 = Plan::kValues + Plan::kScales + (chunk >> 3) * Plan::kActPart + row0 * 128 + (((chunk & 7) ^ row0) * 16);
            for (int kb = t.kb0; kb < t.kb1; ++kb) {
                const uint32_t full = sh.full + ring.stage * 8;
                mbar_wait(sh.empty + ring.stage * 8, ring.phase ^ 1);
                const uint32_t base = sh.stages + ring.stage * Plan::kStage;
                if (tid == 0) {
                    mbar_expect_tx(full, weight_bytes);
                    load_weights(p, t, kb, base, full, policy);
                }
#pragma unroll
                for (int i = 0; i < R; ++i)
                    if (row0 + 8 * i < t.rows) cp_async16(base + dst0 + i * 1024, act + offset[i]);
                cp_async_commit();
                if (++issued > kLag) {
                    cp_async_wait<kLag>();
                    publish(sh, done);
                }
                act += kBlockK * 2;
                ring.advance();
            }
        }
        cp_async_wait<0>();
        for (int i = min(issued, kLag); i > 0; --i) publish(sh, done);
    }

    // This thread's activations of the oldest unpublished stage have arrived: make them visible to wgmma and say so.
    static __device__ __forceinline__ void publish(const Shared& sh, Ring& done) {
        fence_proxy_async();
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbar_arrive(sh.full + done.stage * 8);
        done.advance();
    }

    // ---- consumer ----
    // Says for the warp that it has read a stage; a __syncwarp lies between the other lanes' reads and this.
    static __device__ __forceinline__ void release(uint32_t empty) {
        if ((threadIdx.x & 31) == 0) mbar_arrive(empty);
    }

    // Offset of this thread's words of the first k64 of its warpgroup's first tile.
    static __device__ __forceinline__ uint32_t value_offset() {
        const int wg = threadIdx.x >> 7;
        return (wg * TILES / 2) * kUnitValueBytes + (TILES == 2 ? 0 : (wg & 1) * 2048) + (threadIdx.x & 127) * 16;
    }
    static __device__ __forceinline__ uint32_t scale_offset() {
        return Plan::kValues + ((threadIdx.x >> 7) * TILES / 2) * kUnitScaleBytes + (threadIdx.x & 127) * 8;
    }
    // Scale bytes of tile m of this warpgroup: row in bits 0..7, row + 8 in bits 16..23. A word holds a k64's [row half][tile].
    static __device__ __forceinline__ uint32_t tile_scales(uint32_t word, int m) {
        if (TILES == 1) m = (threadIdx.x >> 7) & 1;
        return TILES == 1 ? (word >> (8 * m)) & 0x00FF00FFu : m ? prmt(word, 0, 0x4341) : word & 0x00FF00FFu;
    }

    // Low half of the descriptor of a stage's activations. Taken from one lane, it is known to be the same for the warp: its sums stay in
    // uniform registers instead of being moved there for every wgmma.
    static __device__ __forceinline__ uint32_t activations_desc(uint32_t base) {
        return __shfl_sync(~0u, (uint32_t(1) << 16) | (((base + Plan::kValues + Plan::kScales) & 0x3FFFF) >> 4), 0);
    }

    template <int N>
    static __device__ __forceinline__ void mainloop(const Shared& sh, Ring& ring, int kblocks, float (&acc)[TILES][N / 2]) {
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) acc[m][i] = 0.f;
        if constexpr (PRECISION == kE4m3) mainloop_e4m3<N>(sh, ring, kblocks, acc);
        else mainloop_bf16<N>(sh, ring, kblocks, acc);
    }

    template <int N>
    static __device__ __forceinline__ void mainloop_bf16(const Shared& sh, Ring& ring, int kblocks, float (&acc)[TILES][N / 2]) {
        static_assert(TILES == 2);
        const uint32_t values = value_offset(), scales = scale_offset();
        const uint32_t desc_hi = uint32_t(make_desc(0) >> 32);
        uint32_t frag[kNarrow ? 1 : 2][2][8];
        uint32_t previous = 0;
        for (int kb = 0; kb < kblocks; ++kb) {
            mbar_wait(sh.full + ring.stage * 8, ring.phase);
            const uint32_t base = sh.stages + ring.stage * Plan::kStage;
            const uint32_t desc_lo = activations_desc(base);
            const uint2 s = lds64(base + scales);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint4 v[2];
#pragma unroll
                for (int m = 0; m < 2; ++m) v[m] = lds128(base + values + half * 4096 + m * 2048);
                if (half == 1) __syncwarp();   // for release
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t lo = desc_lo + half * (Plan::kActPart >> 4) + h * 4;
                    const uint64_t desc0 = (uint64_t(desc_hi) << 32) | lo, desc1 = (uint64_t(desc_hi) << 32) | (lo + 2);
                    // A fragment's registers may be written again once at most the group after its own is in flight.
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        uint32_t(&f)[8] = frag[kNarrow ? 0 : h][m];
                        if (kNarrow || m == 0) {
                            wgmma_wait<1>();
                            if (half == 0 && h == 1 && m == 0 && kb > 0) release(previous);
                        }
                        const uint32_t bytes = tile_scales(half ? s.y : s.x, m);
                        if (h == 0) decode_k32<0>(v[m], bytes, f);
                        else decode_k32<1>(v[m], bytes, f);
                        if (kNarrow) {
                            wgmma_fence();
                            Wgmma<N>::rs(acc[m], f[0], f[1], f[2], f[3], desc0);
                            Wgmma<N>::rs(acc[m], f[4], f[5], f[6], f[7], desc1);
                            wgmma_commit();
                        }
                    }
                    if (!kNarrow) {
                        uint32_t(&f)[2][8] = frag[kNarrow ? 0 : h];
                        wgmma_fence();
#pragma unroll
                        for (int m = 0; m < 2; ++m) Wgmma<N>::rs(acc[m], f[m][0], f[m][1], f[m][2], f[m][3], desc0);
#pragma unroll
                        for (int m = 0; m < 2; ++m) Wgmma<N>::rs(acc[m], f[m][4], f[m][5], f[m][6], f[m][7], desc1);
                        wgmma_commit();
                    }
                }
            }
            previous = sh.empty + ring.stage * 8;
            ring.advance();
        }
        wgmma_wait<0>();
        release(previous);
    }

    // The 8 bytes of each row's scale for step n (k64 n / TILES of tile n % TILES).
    static __device__ __forceinline__ void load_magnitudes(const Shared& sh, uint2 s, int n, uint2 (&table)[2]) {
        const uint32_t bytes = tile_scales(n / TILES ? s.y : s.x, n % TILES) * 8;
        table[0] = lds64(sh.magnitudes + (bytes & 0xFFFF));
        table[1] = lds64(sh.magnitudes + (bytes >> 16));
    }

    template <int N>
    static __device__ __forceinline__ void mainloop_e4m3(const Shared& sh, Ring& ring, int kblocks, float (&acc)[TILES][N / 2]) {
        const uint32_t values = value_offset(), scales = scale_offset();
        const uint32_t desc_hi = uint32_t(make_desc(0) >> 32);
        uint32_t frag[2][8];
        uint32_t previous = 0;
        uint4 v[2];
        uint2 table[2][2], s;
        const auto begin_stage = [&](const Ring& at) {   // what its first step reads
            const uint32_t base = sh.stages + at.stage * Plan::kStage;
            s = lds64(base + scales);
            v[0] = lds128(base + values);
            load_magnitudes(sh, s, 0, table[0]);
        };
        bool ready = false;   // kReadAhead: the stage had arrived when it was read
        for (int kb = 0; kb < kblocks; ++kb) {
            if (!kReadAhead || !ready) {
                mbar_wait(sh.full + ring.stage * 8, ring.phase);
                begin_stage(ring);
            }
            const uint32_t base = sh.stages + ring.stage * Plan::kStage;
            const uint32_t desc_lo = activations_desc(base);
#pragma unroll
            for (int n = 0; n < 2 * TILES; ++n) {
                if (n + 1 < 2 * TILES) {
                    v[(n + 1) & 1] = lds128(base + values + ((n + 1) / TILES) * 4096 + ((n + 1) % TILES) * 2048);
                    load_magnitudes(sh, s, n + 1, table[(n + 1) & 1]);
                } else if (kReadAhead) {
                    Ring next = ring;
                    next.advance();
                    ready = mbar_test(sh.full + next.stage * 8, next.phase);
                    begin_stage(next);   // unconditionally: a branch or a loop here would make ptxas serialize wgmma
                }
                if (n + 2 == 2 * TILES) __syncwarp();   // for release
                uint32_t row[4], row8[4];
                wgmma_wait<1>();   // the group before the last one read these fragments
                if (n == 1 && kb > 0) release(previous);
                decode_block_e4m3(v[n & 1].x, v[n & 1].y, table[n & 1][0].x, table[n & 1][0].y, row);
                decode_block_e4m3(v[n & 1].z, v[n & 1].w, table[n & 1][1].x, table[n & 1][1].y, row8);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    frag[n & 1][2 * i] = row[i];
                    frag[n & 1][2 * i + 1] = row8[i];
                }
                const uint32_t lo = desc_lo + (n / TILES) * 4;
                const uint32_t(&f)[8] = frag[n & 1];
                wgmma_fence();
                WgmmaE4m3<N>::rs(acc[n % TILES], f[0], f[1], f[2], f[3], (uint64_t(desc_hi) << 32) | lo);
                WgmmaE4m3<N>::rs(acc[n % TILES], f[4], f[5], f[6], f[7], (uint64_t(desc_hi) << 32) | (lo + 2));
                wgmma_commit();
            }
            previous = sh.empty + ring.stage * 8;
            ring.advance();
        }
        wgmma_wait<0>();
        release(previous);
    }

    // A warpgroup beyond the last unit only keeps the ring going.
    static __device__ __forceinline__ void skip(const Shared& sh, Ring& ring, int kblocks) {
        for (int kb = 0; kb < kblocks; ++kb) {
            mbar_wait(sh.full + ring.stage * 8, ring.phase);
            release(sh.empty + ring.stage * 8);
            ring.advance();
        }
    }

    template <int N>
    static __device__ __forceinline__ void tile(const GemmParams& p, const Shared& sh, Ring& ring, const ScheduleTables& sched, const Tile& t) {
        const int wg = threadIdx.x >> 7, tid = threadIdx.x & 127;
        const int unit = t.row_tile * kUnits + wg * TILES / 2;
        // What the epilogue needs is fetched before the main loop, which hides the latency.
        constexpr float kFactor = PRECISION == kE4m3 ? kE4m3AlphaFactor : kAlphaFactor;
        float alpha[2];   // of row g and of row g + 8
        if (PHASE == kGateUp) {
            alpha[0] = __ldg(p.alpha + 2 * t.expert) * kFactor;
            alpha[1] = __ldg(p.alpha + 2 * t.expert + 1) * kFactor;
        } else {
            alpha[0] = alpha[1] = __ldg(p.alpha + t.expert) * kFactor;
        }
        float scale[(N + 127) / 128];   // of slots tid, tid + 128
        if (PRECISION == kE4m3) {
            mbar_wait(sh.full + ring.stage * 8, ring.phase);   // activations have arrived, so their scales are written
#pragma unroll
            for (int i = 0; i < (N + 127) / 128; ++i) scale[i] = tid + 128 * i < t.rows ? __ldcg(p.act_scale + t.slot0 + tid + 128 * i) : 0.f;
        }
        // All that is needed of the k blocks after the main loop, in one register: -1 if another CTA finishes the tile, 0 if this one has
        // it whole, else the item number after its last.
        const int finish = t.kb0 > 0 ? -1 : t.kb1 < sched.kblocks ? t.sk_end : 0;
        float acc[TILES][N / 2];
        mainloop<N>(sh, ring, t.kb1 - t.kb0, acc);

        if (finish < 0) {   // leave the sum for that CTA
            float4* dst = reinterpret_cast<float4*>(p.partial) + (size_t(blockIdx.x) * NWG + wg) * (kPartial / 4) + tid;
#pragma unroll
            for (int m = 0; m < TILES; ++m)
#pragma unroll
                for (int i = 0; i < N / 8; ++i)
                    dst[(m * (N / 8) + i) * 128] = make_float4(acc[m][4 * i], acc[m][4 * i + 1], acc[m][4 * i + 2], acc[m][4 * i + 3]);
            __threadfence();
            named_barrier(1 + wg, 128);
            if (tid == 0) st_release(p.flags + blockIdx.x * NWG + wg, 1);
            return;
        }
        if (finish > 0) {
            for (int c = blockIdx.x + 1; sched.range_begin(c) < finish; ++c) {
                if (sched.range_begin(c) == sched.range_begin(c + 1)) continue;   // more CTAs than items: this one has none
                if (tid == 0)
                    while (ld_acquire(p.flags + c * NWG + wg) == 0) {}
                named_barrier(1 + wg, 128);
                const float4* src = reinterpret_cast<const float4*>(p.partial) + (size_t(c) * NWG + wg) * (kPartial / 4) + tid;
#pragma unroll
                for (int m = 0; m < TILES; ++m)
#pragma unroll
                    for (int i = 0; i < N / 8; ++i) {
                        const float4 v = __ldcg(src + (m * (N / 8) + i) * 128);
                        acc[m][4 * i] += v.x;
                        acc[m][4 * i + 1] += v.y;
                        acc[m][4 * i + 2] += v.z;
                        acc[m][4 * i + 3] += v.w;
                    }
            }
        }

        const uint32_t scales = sh.slot_scales + wg * Plan::kSlotScales;
        if (PRECISION == kE4m3) {
            named_barrier(1 + wg, 128);   // the tile before has been read
#pragma unroll
            for (int i = 0; i < (N + 127) / 128; ++i)
                if (tid + 128 * i < NMAX) st_shared_f32(scales + (tid + 128 * i) * 4, scale[i]);
            named_barrier(1 + wg, 128);
        }

        // A warp has 16 weight rows of every slot and tile; of the first projection's, the first 8 are gate and the others up of the same
        // intermediate indices. Four 8 x 8 matrices at a time are transposed through shared memory; a lane then stores 16 bytes of a slot.
        // kChunks neighbouring lanes have neighbouring 16 bytes: two tiles' 8 rows (kGateUp) or a tile's two halves of 16 (kDown).
        constexpr int kChunks = PHASE == kGateUp && TILES == 1 ? 1 : 2, kGroups = 4 / kChunks;   // kGroups: of 8 slots, at a time
        const int lane = lane_id();   // read here, so that ptxas keeps nothing that is made of it through the main loop
        const int warp = tid >> 5, tile0 = TILES == 2 ? 0 : wg & 1;
        const int matrix = lane >> 3, chunk = kChunks == 2 ? lane & 1 : 0;
        const int slot = kChunks == 2 ? lane >> 1 : lane;   // of this lane's 16 bytes, within kGroups * 8
        const uint32_t staging = sh.staging + (wg * 4 + warp) * 512;
        const uint32_t store_at = staging + matrix * 128 + ((lane & 7) ^ (kChunks == 2 ? (matrix & 1) * 4 : 0)) * 16;
        const uint32_t load_at = staging + ((slot >> 3) * kChunks + chunk) * 128 + ((slot & 7) ^ (chunk * 4)) * 16;
        char* out = reinterpret_cast<char*>(p.out);
        if (PHASE == kGateUp) out += slot_chunk(p.capacity, t.slot0 + slot, unit * 8 + warp * 2 + (kChunks == 2 ? chunk : tile0));
        else out += (size_t(t.slot0 + slot) * p.out_stride + unit * 128 + tile0 * 64 + warp * 16 + chunk * 8) * 2;
        const size_t group_bytes = PHASE == kGateUp ? 8 * 128 : size_t(p.out_stride) * 16;
#pragma unroll
        for (int j0 = 0; j0 < N / 8; j0 += kGroups) {
            if (8 * j0 < t.rows) {
                float factor[kGroups][4];
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    float2 of_slot = make_float2(1.f, 1.f);
                    if (PRECISION == kE4m3 && j0 + j < N / 8) of_slot = lds_f32x2(scales + ((j0 + j) * 8 + 2 * (lane & 3)) * 4);
#pragma unroll
                    for (int i = 0; i < 4; ++i) factor[j][i] = alpha[i >> 1] * (i & 1 ? of_slot.y : of_slot.x);
                }
#pragma unroll
                for (int m = 0; m < (PHASE == kGateUp ? 1 : TILES); ++m) {
                    uint32_t packed[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int j = j0 + i / kChunks, c = i % kChunks;
                        packed[i] = 0;
                        if (j >= N / 8) continue;
                        const float(&f)[4] = factor[i / kChunks];
                        if (PHASE == kGateUp) {
                            const float(&v)[N / 2] = acc[kChunks == 2 ? c : 0];
                            packed[i] = pack_bf16(swiglu(v[4 * j] * f[0], v[4 * j + 2] * f[2], p.limit), swiglu(v[4 * j + 1] * f[1], v[4 * j + 3] * f[3], p.limit));
                        } else {
                            packed[i] = pack_bf16(acc[m][4 * j + 2 * c] * f[2 * c], acc[m][4 * j + 2 * c + 1] * f[2 * c + 1]);
                        }
                    }
                    __syncwarp();
                    stmatrix_x4_trans(store_at, packed);
                    __syncwarp();
                    if (8 * j0 + slot < t.rows) *reinterpret_cast<uint4*>(out + j0 * group_bytes + m * 128) = lds128(load_at);
                }
            }
        }
    }

    static __device__ __forceinline__ float swiglu(float gate, float up, float limit) {
        const float g = fminf_nan(gate, limit), u = clamp_nan(up, limit);
        return __fdividef(g, 1.f + __expf(-g)) * u;
    }
    static __device__ __forceinline__ float fminf_nan(float a, float b) { return a > b ? b : a; }
    static __device__ __forceinline__ float clamp_nan(float a, float b) { return a > b ? b : (a < -b ? -b : a); }
    static __device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }

    // Smallest compiled width that covers t.rows.
    template <int N>
    static __device__ __forceinline__ void dispatch(const GemmParams& p, const Shared& sh, Ring& ring, const ScheduleTables& sched, const Tile& t) {
        if constexpr (N >= NMAX) {
            tile<NMAX>(p, sh, ring, sched, t);
        } else {
            if (t.rows <= N) tile<N>(p, sh, ring, sched, t);
            else dispatch<N + STEP>(p, sh, ring, sched, t);
        }
    }

    static __device__ __forceinline__ void consume(const GemmParams& p, const Shared& sh, const ScheduleTables& sched) {
        Ring ring;
        Cursor cursor;
        Tile t;
        const int wg = threadIdx.x >> 7;
        while (cursor.next(sched, t)) {
            if (t.row_tile * kUnits + wg * TILES / 2 < p.units) dispatch<NMIN>(p, sh, ring, sched, t);
            else skip(sh, ring, t.kb1 - t.kb0);
        }
    }

    static __device__ __forceinline__ void run(const GemmParams& p) {
        extern __shared__ __align__(1024) uint8_t smem_raw[];
        uint8_t* smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(smem_raw) + 1023) & ~uintptr_t(1023));
        ScheduleTables& sched = *reinterpret_cast<ScheduleTables*>(smem + S * Plan::kStage + Plan::kStaging);
        Shared sh;
        sh.stages = smem_u32(smem);
        sh.staging = sh.stages + S * Plan::kStage;
        sh.magnitudes = sh.staging + Plan::kStaging + Plan::kTables;
        sh.slot_scales = sh.magnitudes + Plan::kMagnitudes;
        sh.full = sh.slot_scales + NWG * Plan::kSlotScales;
        sh.empty = sh.full + S * 8;
        const int E = p.num_experts;
        if (threadIdx.x == 0) {
            for (int s = 0; s < S; ++s) {
                mbar_init(sh.full + s * 8, kGather ? 4 + 1 : 1);
                mbar_init(sh.empty + s * 8, NWG * 4);
            }
            mbar_fence_init();
        }
        if (PRECISION == kE4m3) {
            for (int i = threadIdx.x; i < kScaleCodes * 4; i += blockDim.x)
                st_shared16(sh.magnitudes + i * 2, pack_e4m3(scaled_magnitude(i >> 2, (i & 3) * 2), scaled_magnitude(i >> 2, (i & 3) * 2 + 1)));
        }
        if (kGather) grid_wait();
        if (threadIdx.x < 32) {   // offsets and slot tiles of every expert
            const int lane = threadIdx.x;
            int sum = 0;
            for (int e0 = 0; e0 < E; e0 += 32) {
                const int e = e0 + lane;
                const int count = e < E ? p.counts[e] : 0;
                int incl = (count + NMAX - 1) / NMAX;
                const int own = incl;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    const int o = __shfl_up_sync(~0u, incl, d);
                    if (lane >= d) incl += o;
                }
                if (e < E) {
                    sched.offsets[e] = p.offsets[e];
                    sched.counts[e] = count;
                    sched.tiles_before[e] = sum + incl - own;
                }
                sum += __shfl_sync(~0u, incl, 31);
            }
            if (lane == 0) {
                sched.tiles_before[E] = sum;
                sched.init(E, (p.units + kUnits - 1) / kUnits, p.kblocks, NMAX);
            }
        }
        __syncthreads();
        grid_launch_dependents();
        if (threadIdx.x >= NWG * 128) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
            if (kGather) produce_gather(p, sh, sched);
            else produce_tiled(p, sh, sched);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
            consume(p, sh, sched);
        }
    }
};

template <int PHASE, int PRECISION, int NWG, int TILES, int NMAX, int NMIN, int STEP>
__global__ void __launch_bounds__(NWG * 128 + 128, 1) gemm_kernel(const __grid_constant__ GemmParams p) {
    Gemm<PHASE, PRECISION, NWG, TILES, NMAX, NMIN, STEP>::run(p);
}

}  // namespace sm90
