// Grouped GEMM over slots: weights are wgmma's operand A, decoded in registers; slots are its columns. One persistent CTA per
// multiprocessor: NWG consumer warpgroups, each with one unit (two 64-row tiles), share the activations; one producer warpgroup
// copies packed weights and activations tiled by slot in bulk, or gathers activation rows where slots are few.
#pragma once
#include <cuda_bf16.h>

#include "layout.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace sm90 {

enum Phase { kGateUp = 0, kDown = 1 };

struct GemmParams {
    const __nv_bfloat16* act;   // gather: [T, K] tokens; else tiled by slot, see slot_chunk
    const int* order;           // [capacity] flat index t * topk + k of a slot
    const int* offsets;         // [E + 1] first slot of every expert, a multiple of 8
    const int* counts;          // [E]
    const uint8_t* values;      // [E, units, kblocks, kUnitValueBytes]
    const uint8_t* scales;      // [E, units, kblocks, kUnitScaleBytes]
    const float* alpha;         // kGateUp: [E, 2]; kDown: [E]
    __nv_bfloat16* out;         // kGateUp: tiled by slot; kDown: [capacity, out_stride]
    float* partial;             // [grid, NWG, 128 threads * NMAX]
    int* flags;                 // [grid, NWG], zero at launch
    int num_experts, kblocks, units, topk, out_stride, capacity;
    float limit;
};

// Byte offset of 16-byte chunk `chunk` of a slot's row in activations tiled by slot, [K / 64][capacity][128 bytes], already swizzled
// as wgmma reads them: the rows of a tile, which begins at a multiple of 8, are one contiguous copy for every 64 columns.
__device__ __forceinline__ size_t slot_chunk(int capacity, int slot, int chunk) {
    return (size_t(chunk >> 3) * capacity + slot) * 128 + (((chunk & 7) ^ (slot & 7)) * 16);
}

template <int NWG, int NMAX>
struct SmemPlan {
    static constexpr int kValues = NWG * kUnitValueBytes;
    static constexpr int kScales = NWG * kUnitScaleBytes;
    static constexpr int kActHalf = NMAX * 128;               // 64 columns of k, 128-byte rows
    static constexpr int kStage = kValues + kScales + 2 * kActHalf;
    static constexpr int kTables = (int(sizeof(ScheduleTables)) + 127) / 128 * 128;
    static constexpr int kStaging = NWG * 4 * 512;
    static constexpr int kFixed = kTables + kStaging + 256 + 1024;   // barriers, alignment
    static constexpr int kStages = (227 * 1024 - kFixed) / kStage > 6 ? 6 : (227 * 1024 - kFixed) / kStage;
    static constexpr int kBytes = kStages * kStage + kFixed;
};

// Compiled widths are NMIN, NMIN + STEP, ..., NMAX; a tile takes the smallest that covers its slots.
template <int PHASE, int NWG, int NMAX, int NMIN, int STEP>
struct Gemm {
    using Plan = SmemPlan<NWG, NMAX>;
    static constexpr int S = Plan::kStages;
    static constexpr bool kGather = PHASE == kGateUp && NMAX <= 32;   // few slots: gathering rows here is cheaper than another kernel
    // Stages whose copies are in flight when an earlier one is published. A consumer keeps two stages, so at most S - 2.
    static constexpr int kLag = S > 4 ? 2 : 1;
    static constexpr int kProducerRegisters = 56;
    static constexpr int kConsumerRegisters = NWG == 2 ? 224 : 104;   // the sum is what the launch gives the CTA
    static_assert(S >= 3);
    static constexpr bool kNarrow = NMAX > 32;   // one 64-row tile per wgmma group: half the fragment registers

    struct Shared {
        uint32_t stages, full, empty, staging;
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
    static __device__ __forceinline__ void load_weights(const GemmParams& p, const Tile& t, int kb, uint32_t base, uint32_t full, uint64_t policy) {
        const int unit0 = t.row_tile * NWG;
        const size_t block = (size_t(t.expert) * p.units + unit0) * p.kblocks + kb;
        const int units = min(NWG, p.units - unit0);
        for (int u = 0; u < units; ++u) {
            const size_t b = block + size_t(u) * p.kblocks;
            bulk_load(base + u * kUnitValueBytes, p.values + b * kUnitValueBytes, kUnitValueBytes, full, policy);
            bulk_load(base + Plan::kValues + u * kUnitScaleBytes, p.scales + b * kUnitScaleBytes, kUnitScaleBytes, full, policy);
        }
    }

    // Activations tiled by slot: one thread does it all.
    static __device__ __forceinline__ void produce_tiled(const GemmParams& p, const Shared& sh, const ScheduleTables& sched) {
        if (threadIdx.x != NWG * 128) return;
        const uint64_t policy = NMAX > 64 ? policy_normal() : policy_evict_first();
        const uint64_t keep = policy_evict_last();
        const char* act = reinterpret_cast<const char*>(p.act);
        Ring ring;
        Cursor cursor;
        Tile t;
        bool first = true;
        while (cursor.next(sched, t)) {
            const uint32_t act_bytes = (t.rows + 7) / 8 * 1024;
            const uint32_t bytes = min(NWG, p.units - t.row_tile * NWG) * (kUnitValueBytes + kUnitScaleBytes) + 2 * act_bytes;
            for (int kb = t.kb0; kb < t.kb1; ++kb) {
                const uint32_t full = sh.full + ring.stage * 8;
                mbar_wait(sh.empty + ring.stage * 8, ring.phase ^ 1);
                const uint32_t base = sh.stages + ring.stage * Plan::kStage;
                mbar_expect_tx(full, bytes);
                load_weights(p, t, kb, base, full, policy);
                if (first) {   // weights may be read before the previous kernel has written the activations
                    grid_wait();
                    first = false;
                }
                for (int half = 0; half < 2; ++half)
                    bulk_load(base + Plan::kValues + Plan::kScales + half * Plan::kActHalf, act + slot_chunk(p.capacity, t.slot0, (2 * kb + half) * 8), act_bytes, full, keep);
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
            const uint32_t weight_bytes = min(NWG, p.units - t.row_tile * NWG) * (kUnitValueBytes + kUnitScaleBytes);
            uint32_t offset[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const int r = row0 + 8 * i;
                if (r < t.rows) {
                    offset[i] = uint32_t(p.order[t.slot0 + r] / p.topk) * row_bytes + chunk * 16;
                }
            }
            const char* act = reinterpret_cast<const char*>(p.act) + size_t(t.kb0) * (kBlockK * 2);
            const uint32_t dst0 = Plan::kValues + Plan::kScales + (chunk >> 3) * Plan::kActHalf + row0 * 128 + (((chunk & 7) ^ row0) * 16);
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

    template <int N>
    static __device__ __forceinline__ void mainloop(const Shared& sh, Ring& ring, int kblocks, float (&acc)[2][N / 2]) {
        const int wg = threadIdx.x >> 7, tid = threadIdx.x & 127;
        const uint32_t value_offset = wg * kUnitValueBytes + tid * 16;
        const uint32_t scale_offset = Plan::kValues + wg * kUnitScaleBytes + (tid >> 5) * 64 + ((tid & 31) >> 2) * 8;
        const uint32_t desc_hi = uint32_t(make_desc(0) >> 32);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) acc[m][i] = 0.f;
        uint32_t frag[kNarrow ? 1 : 2][2][8];
        uint32_t previous = 0;
        for (int kb = 0; kb < kblocks; ++kb) {
            mbar_wait(sh.full + ring.stage * 8, ring.phase);
            const uint32_t base = sh.stages + ring.stage * Plan::kStage;
            const uint32_t desc_lo = (uint32_t(1) << 16) | (((base + Plan::kValues + Plan::kScales) & 0x3FFFF) >> 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint4 v[2];
                uint2 s[2];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    v[m] = lds128(base + value_offset + half * 4096 + m * 2048);
                    s[m] = lds64(base + scale_offset + half * 512 + m * 256);
                }
                if (half == 1) __syncwarp();   // for release
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t lo = desc_lo + half * (Plan::kActHalf >> 4) + h * 4;
                    const uint64_t desc0 = (uint64_t(desc_hi) << 32) | lo, desc1 = (uint64_t(desc_hi) << 32) | (lo + 2);
                    // A fragment's registers may be written again once at most the group after its own is in flight.
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        uint32_t(&f)[8] = frag[kNarrow ? 0 : h][m];
                        if (kNarrow || m == 0) {
                            wgmma_wait<1>();
                            if (half == 0 && h == 1 && m == 0 && kb > 0) release(previous);
                        }
                        decode_k32(h ? v[m].z : v[m].x, h ? v[m].w : v[m].y, h ? s[m].y : s[m].x, f);
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
        const int unit = t.row_tile * NWG + wg;
        float acc[2][N / 2];
        mainloop<N>(sh, ring, t.kb1 - t.kb0, acc);

        if (t.kb0 > 0) {   // not the finisher: leave the sum for it
            float4* dst = reinterpret_cast<float4*>(p.partial) + (size_t(blockIdx.x) * NWG + wg) * (128 * NMAX / 4) + tid;
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < N / 8; ++i)
                    dst[(m * (N / 8) + i) * 128] = make_float4(acc[m][4 * i], acc[m][4 * i + 1], acc[m][4 * i + 2], acc[m][4 * i + 3]);
            __threadfence();
            named_barrier(1 + wg, 128);
            if (tid == 0) st_release(p.flags + blockIdx.x * NWG + wg, 1);
            return;
        }
        if (t.kb1 < sched.kblocks) {
            for (int c = blockIdx.x + 1; sched.range_begin(c) < t.sk_end; ++c) {
                if (sched.range_begin(c) == sched.range_begin(c + 1)) continue;   // more CTAs than items: this one has none
                if (tid == 0)
                    while (ld_acquire(p.flags + c * NWG + wg) == 0) {}
                named_barrier(1 + wg, 128);
                const float4* src = reinterpret_cast<const float4*>(p.partial) + (size_t(c) * NWG + wg) * (128 * NMAX / 4) + tid;
#pragma unroll
                for (int m = 0; m < 2; ++m)
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

        // A warp has 16 weight rows of every slot. Transposed through shared memory, a slot's 16 outputs are 32 contiguous bytes.
        const int warp = tid >> 5, lane = tid & 31;
        const uint32_t staging = sh.staging + (wg * 4 + warp) * 512;
        const uint32_t st_addr = staging + (lane & 7) * 32 + ((lane >> 3) & 1) * 16;
        float alpha[2];
        if (PHASE == kGateUp) {
            alpha[0] = p.alpha[2 * t.expert] * kAlphaFactor;
            alpha[1] = p.alpha[2 * t.expert + 1] * kAlphaFactor;
        } else {
            alpha[0] = alpha[1] = p.alpha[t.expert] * kAlphaFactor;
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            if (8 * j < t.rows) {
#pragma unroll
                for (int m = 0; m < (PHASE == kGateUp ? 1 : 2); ++m) {
                    float v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (PHASE == kGateUp) {
                            const float g = fminf_nan(acc[0][4 * j + i] * alpha[0], p.limit);
                            const float u = clamp_nan(acc[1][4 * j + i] * alpha[1], p.limit);
                            v[i] = __fdividef(g, 1.f + __expf(-g)) * u;
                        } else {
                            v[i] = acc[m][4 * j + i] * alpha[0];
                        }
                    }
                    __syncwarp();
                    stmatrix_x2_trans(st_addr, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
                    __syncwarp();
                    if (lane < 16) {
                        const int slot = 8 * j + (lane >> 1);
                        if (slot < t.rows) {
                            const uint4 w = lds128(staging + lane * 16);
                            const int at = t.slot0 + slot;
                            char* out = reinterpret_cast<char*>(p.out);
                            if (PHASE == kGateUp) out += slot_chunk(p.capacity, at, unit * 8 + warp * 2 + (lane & 1));
                            else out += (size_t(at) * p.out_stride + unit * 128 + m * 64 + warp * 16 + (lane & 1) * 8) * 2;
                            *reinterpret_cast<uint4*>(out) = w;
                        }
                    }
                }
            }
        }
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
            if (t.row_tile * NWG + wg < p.units) dispatch<NMIN>(p, sh, ring, sched, t);
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
        sh.full = sh.staging + Plan::kStaging + Plan::kTables;
        sh.empty = sh.full + S * 8;
        const int E = p.num_experts;
        if (threadIdx.x == 0) {
            for (int s = 0; s < S; ++s) {
                mbar_init(sh.full + s * 8, kGather ? 4 + 1 : 1);
                mbar_init(sh.empty + s * 8, NWG * 4);
            }
            mbar_fence_init();
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
                sched.init(E, (p.units + NWG - 1) / NWG, p.kblocks, NMAX);
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

template <int PHASE, int NWG, int NMAX, int NMIN, int STEP>
__global__ void __launch_bounds__(NWG * 128 + 128, 1) gemm_kernel(const __grid_constant__ GemmParams p) {
    Gemm<PHASE, NWG, NMAX, NMIN, STEP>::run(p);
}

}  // namespace sm90
