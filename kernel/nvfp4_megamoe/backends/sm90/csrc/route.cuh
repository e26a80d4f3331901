// Routing: a slot for every (token, k) pair of a local expert, stably sorted by expert, each expert's first slot a multiple of 8; the
// sum over a token's slots.
#pragma once
#include <cuda_bf16.h>

#include "activations.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

namespace sm90 {

constexpr int kRouteThreads = 1024;

struct RouteParams {
    const void* ids;          // [pairs] int32 or int64
    const int* expert_map;    // [map_size] global to local, or null: ids are local
    int* order;               // [capacity] pair of a slot; undefined between an expert's last slot and the next multiple of 8
    int* inverse;             // [pairs] slot, -1 where not local
    int* offsets;             // [E]
    int* counts;              // [E]
    int* flags;
    const __nv_bfloat16* x;   // [tokens, hidden]
    __nv_bfloat16* permuted;  // [tokens, hidden], or null: nobody gathers
    int pairs, map_size, num_experts, num_flags, tokens, hidden;
};

// One CTA per local expert. Every CTA reads all ids: it counts those of smaller experts (where its slots begin) and its own. CTAs
// beyond the experts permute activations.
template <typename Id>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ RouteParams p) {
    constexpr int kWarps = kRouteThreads / 32;
    __shared__ int equal_of[kWarps], base;
    __shared__ int histogram[kMaxExperts];   // pairs of the experts before this one
    grid_launch_dependents();
    const int expert = blockIdx.x;
    if (expert >= p.num_experts) {
        const int item = (expert - p.num_experts) * kRouteThreads + threadIdx.x, items = p.hidden / 32;
        if (item < p.tokens * items) permute_in_row(p.x, p.permuted, p.hidden, item / items, item % items);
        return;
    }
    for (int e = threadIdx.x; e < expert; e += kRouteThreads) histogram[e] = 0;
    if (threadIdx.x == 0) base = 0;
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Id* ids = static_cast<const Id*>(p.ids);
    const int segment = ((p.pairs + kWarps - 1) / kWarps + 31) / 32 * 32;
    const int begin = warp * segment, end = min(p.pairs, begin + segment);
    auto local = [&](int i) {
        const Id id = ids[i];
        if (p.expert_map == nullptr) return id >= 0 && id < p.num_experts ? int(id) : -1;
        const int l = id >= 0 && id < p.map_size ? p.expert_map[id] : -1;
        return l < p.num_experts ? l : -1;
    };
    int equal = 0;
#pragma unroll 4
    for (int i = begin + lane; i < end; i += 32) {
        const int l = local(i);
        equal += l == expert;
        if (l >= 0 && l < expert) atomicAdd(&histogram[l], 1);
        if (expert == 0 && l < 0) p.inverse[i] = -1;
    }
    equal = __reduce_add_sync(~0u, equal);
    if (lane == 0) equal_of[warp] = equal;
    __syncthreads();
    for (int e = threadIdx.x; e < expert; e += kRouteThreads) atomicAdd(&base, (histogram[e] + 7) / 8 * 8);
    __syncthreads();
    int total = 0, position = 0;
    for (int w = 0; w < kWarps; ++w) {
        total += equal_of[w];
        position += w < warp ? equal_of[w] : 0;
    }
    position += base;
    constexpr int kAhead = 4;   // loads in flight
    for (int i0 = begin; i0 < end; i0 += 32 * kAhead) {
        bool mine[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int i = i0 + 32 * a + lane;
            mine[a] = i < end && local(i) == expert;
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int i = i0 + 32 * a + lane;
            const uint32_t ballot = __ballot_sync(~0u, mine[a]);
            if (mine[a]) {
                const int at = position + __popc(ballot & ((1u << lane) - 1));
                p.order[at] = i;
                p.inverse[i] = at;
            }
            position += __popc(ballot);
        }
    }
    if (threadIdx.x == 0) {
        p.offsets[expert] = base;
        p.counts[expert] = total;
    }
    if (expert == 0)
        for (int i = threadIdx.x; i < p.num_flags; i += kRouteThreads) p.flags[i] = 0;
}

struct ReduceParams {
    const __nv_bfloat16* slot_out;   // [capacity, hidden]
    const int* inverse;              // [T, topk]
    const float* weights;            // [T, topk]
    __nv_bfloat16* out;              // [T, hidden]
    int topk, hidden;
};

constexpr int kReduceThreads = 128;

// out[t] = sum over k, in order, of weight * slot output: deterministic. Grid [T, hidden / 8 / threads].
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ ReduceParams p) {
    grid_wait();
    const int token = blockIdx.x, column = (blockIdx.y * kReduceThreads + threadIdx.x) * 8;
    if (column >= p.hidden) return;
    float sum[8] = {};
#pragma unroll 4
    for (int k = 0; k < p.topk; ++k) {
        const int at = p.inverse[token * p.topk + k];
        if (at < 0) continue;
        const float w = p.weights[token * p.topk + k];
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p.slot_out + size_t(at) * p.hidden + column));
        const __nv_bfloat162* pair = reinterpret_cast<const __nv_bfloat162*>(&v);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __bfloat1622float2(pair[i]);
            sum[2 * i] += w * f.x;
            sum[2 * i + 1] += w * f.y;
        }
    }
    uint4 v;
    __nv_bfloat162* pair = reinterpret_cast<__nv_bfloat162*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    *reinterpret_cast<uint4*>(p.out + size_t(token) * p.hidden + column) = v;
}

}  // namespace sm90
