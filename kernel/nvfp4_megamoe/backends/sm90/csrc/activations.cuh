// Activations in the order and precision that the GEMMs read. A k64 segment (64 columns) is handled in two halves: half h has elements
// 8 * h to 8 * h + 7 of the segment's four blocks, which are chunks 4 * h to 4 * h + 3 in bf16 (layout.cuh), 2 * h and 2 * h + 1 in
// e4m3 (e4m3.cuh). All K are multiples of 128.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>

#include "gemm.cuh"
#include "ptx.cuh"

namespace sm90 {

constexpr float kE4m3Max = 448.f;

// Half `item & 1` of segment `item >> 1` of a row in plain order: word [i][t] is pair 4 * half + i of block t.
__device__ __forceinline__ void load_half_segment(const __nv_bfloat16* row, int item, uint32_t (&word)[4][4]) {
    const uint4* source = reinterpret_cast<const uint4*>(row) + (item >> 1) * 8 + (item & 1);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const uint4 v = __ldg(source + 2 * t);
        word[0][t] = v.x;
        word[1][t] = v.y;
        word[2][t] = v.z;
        word[3][t] = v.w;
    }
}

// Permutes one half segment of a token's row; the result is not swizzled.
__device__ __forceinline__ void permute_in_row(const __nv_bfloat16* x, __nv_bfloat16* out, int hidden, int token, int item) {
    uint32_t word[4][4];
    load_half_segment(x + size_t(token) * hidden, item, word);
    uint4* target = reinterpret_cast<uint4*>(out + size_t(token) * hidden) + item * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) target[i] = make_uint4(word[i][0], word[i][1], word[i][2], word[i][3]);
}

// A segment's two halves are handled by neighbouring lanes, with N chunks each. They exchange half of them, so that one store of both
// covers 32 bytes: lane `half` keeps chunks half, half + 2, ... All lanes of a warp call this.
template <int N>
__device__ __forceinline__ void interleave_chunks(uint4 (&chunk)[N], int half) {
    uint4 kept[N];
#pragma unroll
    for (int q = 0; q < N / 2; ++q) {
        const uint4 other = half ? chunk[2 * q] : chunk[2 * q + 1], own = half ? chunk[2 * q + 1] : chunk[2 * q];
        const uint4 got = make_uint4(__shfl_xor_sync(~0u, other.x, 1), __shfl_xor_sync(~0u, other.y, 1),
                                     __shfl_xor_sync(~0u, other.z, 1), __shfl_xor_sync(~0u, other.w, 1));
        kept[q] = half ? got : own;
        kept[N / 2 + q] = half ? own : got;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) chunk[i] = kept[i];
}

struct PermuteParams {
    const __nv_bfloat16* x;   // [T, hidden]
    const int* inverse;       // [T, topk]
    void* out;                // tiled by slot
    float* scale;             // kE4m3: [capacity]
    int topk, hidden, capacity;
};

constexpr int kPermuteThreads = 256;
constexpr int kQuantizeThreads = 128;

// Largest magnitude of the CTA's `value`s. NaN is ignored: it stays NaN when it is rounded.
template <int THREADS>
__device__ __forceinline__ float block_max(float value) {
    __shared__ float of_warp[THREADS / 32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, d));
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) value = fmaxf(value, of_warp[w]);
    return value;
}
__device__ __forceinline__ float max_of(float value, const uint32_t (&word)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float2 f = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word[i / 4][i % 4]));
        value = fmaxf(value, fmaxf(fabsf(f.x), fabsf(f.y)));
    }
    return value;
}
// amax / 448; 1 for a row of zeros.
__device__ __forceinline__ float e4m3_scale(float amax) { return amax == 0.f ? 1.f : amax / kE4m3Max; }

// The half's two e4m3 chunks: even elements of its pairs, odd elements. inverse: 1 / scale.
__device__ __forceinline__ void quantize_half_segment(const uint32_t (&word)[4][4], float inverse, uint4 (&chunk)[2]) {
    uint32_t even[4], odd[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        float2 f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            f[i] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word[i][t]));
            f[i] = make_float2(f[i].x * inverse, f[i].y * inverse);
        }
        even[t] = pack_e4m3(f[0].x, f[1].x) | uint32_t(pack_e4m3(f[2].x, f[3].x)) << 16;
        odd[t] = pack_e4m3(f[0].y, f[1].y) | uint32_t(pack_e4m3(f[2].y, f[3].y)) << 16;
    }
    chunk[0] = make_uint4(even[0], even[1], even[2], even[3]);
    chunk[1] = make_uint4(odd[0], odd[1], odd[2], odd[3]);
}

// Writes a token's row to each of its slots, tiled by slot; in e4m3 with the row's scale. Grid [T].
template <int PRECISION>
__global__ void __launch_bounds__(kPermuteThreads) permute_kernel(const __grid_constant__ PermuteParams p) {
    grid_wait();
    grid_launch_dependents();
    const int token = blockIdx.x, items = p.hidden / 32;
    const __nv_bfloat16* row = p.x + size_t(token) * p.hidden;
    const int* slots = p.inverse + token * p.topk;
    char* out = static_cast<char*>(p.out);
    uint32_t word[4][4];
    float scale = 1.f;
    if (PRECISION == kE4m3) {
        float amax = 0.f;
        for (int item = threadIdx.x; item < items; item += kPermuteThreads) {
            load_half_segment(row, item, word);
            amax = max_of(amax, word);
        }
        scale = e4m3_scale(block_max<kPermuteThreads>(amax));
        for (int k = threadIdx.x; k < p.topk; k += kPermuteThreads)
            if (slots[k] >= 0) p.scale[slots[k]] = scale;
    }
    constexpr int kChunks = PRECISION == kE4m3 ? 2 : 4;
    const int half = threadIdx.x & 1;
    for (int item0 = 0; item0 < items; item0 += kPermuteThreads) {
        const int item = item0 + threadIdx.x;
        uint4 chunk[kChunks] = {};
        if (item < items) {
            if (PRECISION == kBf16 || items > kPermuteThreads) load_half_segment(row, item, word);   // else `word` is still the item's
            if constexpr (PRECISION == kE4m3) {
                quantize_half_segment(word, 1.f / scale, chunk);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) chunk[i] = make_uint4(word[i][0], word[i][1], word[i][2], word[i][3]);
            }
        }
        interleave_chunks(chunk, half);
        if (item >= items) continue;
        for (int k = 0; k < p.topk; ++k) {
            const int at = slots[k];
            if (at < 0) continue;
#pragma unroll
            for (int i = 0; i < kChunks; ++i)
                *reinterpret_cast<uint4*>(out + slot_chunk(p.capacity, at, (item >> 1) * 2 * kChunks + 2 * i + half)) = chunk[i];
        }
    }
}

struct QuantizeParams {
    void* act;            // tiled by slot: bf16 in, e4m3 out
    const int* inverse;   // [pairs]
    float* scale;         // [capacity]
    int columns, capacity;
};

// Quantizes the intermediate of one (token, k) pair's slot in place: e4m3 segments take the room of bf16 segments with half their
// number, which the CTA has read by then. Grid [pairs].
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const __grid_constant__ QuantizeParams p) {
    grid_wait();
    grid_launch_dependents();
    const int slot = p.inverse[blockIdx.x];
    if (slot < 0) return;
    char* act = static_cast<char*>(p.act);
    const int items = p.columns / 32;
    uint32_t word[4][4] = {};
    const auto load = [&](int item) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = *reinterpret_cast<const uint4*>(act + slot_chunk(p.capacity, slot, item * 4 + i));
            word[i][0] = v.x;
            word[i][1] = v.y;
            word[i][2] = v.z;
            word[i][3] = v.w;
        }
    };
    float amax = 0.f;
    for (int item = threadIdx.x; item < items; item += kQuantizeThreads) {
        load(item);
        amax = max_of(amax, word);
    }
    const float scale = e4m3_scale(block_max<kQuantizeThreads>(amax));
    if (threadIdx.x == 0) p.scale[slot] = scale;
    for (int item0 = 0; item0 < items; item0 += kQuantizeThreads) {
        const int item = item0 + threadIdx.x;
        if (items > kQuantizeThreads) {   // else `word` is still the item's
            if (item < items) load(item);
            __syncthreads();   // what is overwritten below has been read
        }
        uint4 chunk[2];
        quantize_half_segment(word, 1.f / scale, chunk);
        interleave_chunks(chunk, item & 1);
        if (item >= items) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<uint4*>(act + slot_chunk(p.capacity, slot, (item >> 1) * 4 + 2 * i + (item & 1))) = chunk[i];
    }
}

}  // namespace sm90
