// The library's C interface: plain pointers and integers, so that it needs neither torch nor a Python version at build time.
#include <cuda_runtime.h>

#include "activations.cuh"
#include "gemm.cuh"
#include "repack.cuh"
#include "route.cuh"

namespace sm90 {
// Of this library alone: a process may hold several (benchmarks/sm90_variants.py), and the dynamic linker gives a template's static
// variables to all of them.
namespace {

template <typename... Params, typename Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int smem, cudaStream_t stream, bool overlap, const Args& args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

template <int PHASE, int PRECISION, int NWG, int TILES, int NMAX, int NMIN, int STEP>
cudaError_t launch_one(const GemmParams& p, int grid, cudaStream_t stream) {
    auto kernel = gemm_kernel<PHASE, PRECISION, NWG, TILES, NMAX, NMIN, STEP>;
    constexpr int smem = SmemPlan<PRECISION, NWG, TILES, NMAX>::kBytes;
    static const cudaError_t ready = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (ready != cudaSuccess) return ready;
    return launch(kernel, dim3(grid), NWG * 128 + 128, smem, stream, true, p);
}

template <int PHASE>
cudaError_t launch_bf16(int variant, const GemmParams& p, int grid, cudaStream_t stream) {
    switch (variant) {
        case 8: return launch_one<PHASE, kBf16, 4, 2, 8, 8, 8>(p, grid, stream);
        case 16: return launch_one<PHASE, kBf16, 4, 2, 16, 16, 8>(p, grid, stream);
        case 24: return launch_one<PHASE, kBf16, 4, 2, 24, 24, 8>(p, grid, stream);
        case 32: return launch_one<PHASE, kBf16, 4, 2, 32, 32, 8>(p, grid, stream);
        case 48: return launch_one<PHASE, kBf16, 2, 2, 48, 32, 8>(p, grid, stream);
        case 80: return launch_one<PHASE, kBf16, 2, 2, 80, 56, 8>(p, grid, stream);
        case 96: return launch_one<PHASE, kBf16, 2, 2, 96, 64, 8>(p, grid, stream);
        case 128: return launch_one<PHASE, kBf16, 2, 2, 128, 64, 32>(p, grid, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <int PHASE>
cudaError_t launch_e4m3(int variant, const GemmParams& p, int grid, cudaStream_t stream) {
    switch (variant) {
        case 48: return launch_one<PHASE, kE4m3, 2, 2, 48, 32, 8>(p, grid, stream);
        case 80: return launch_one<PHASE, kE4m3, 2, 2, 80, 56, 8>(p, grid, stream);
        case 96: return launch_one<PHASE, kE4m3, 2, 2, 96, 64, 16>(p, grid, stream);
        case 144: return launch_one<PHASE, kE4m3, 2, 2, 144, 112, 32>(p, grid, stream);
        case 256: return launch_one<PHASE, kE4m3, 2, 1, 256, 192, 32>(p, grid, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <int PHASE>
cudaError_t launch_gemm(int e4m3, int variant, const GemmParams& p, int grid, cudaStream_t stream) {
    return e4m3 ? launch_e4m3<PHASE>(variant, p, grid, stream) : launch_bf16<PHASE>(variant, p, grid, stream);
}

}  // namespace
}  // namespace sm90

extern "C" {

struct Nvfp4Sm90Forward {
    const void* x;                // bf16 [T, H]
    const void* ids;              // [T, K]
    const float* topk_weights;    // [T, K]
    const int* expert_map;        // or null
    void* out;                    // bf16 [T, H]
    const uint8_t *w13, *w13_scale, *w2, *w2_scale;   // packed
    const float *w13_global, *w2_global;
    int *order, *inverse, *offsets, *counts, *flags;
    float *partial, *act_scale;      // act_scale: [capacity], only where activations are e4m3
    void *intermediate, *slot_out;   // tiled by slot; [capacity, H], which holds permuted x until the first projection is done
    int tokens, topk, ids_64, map_size, num_experts, hidden, intermediate_size, variant, variant2, grid, num_flags, capacity;
    int e4m3_first, e4m3_second;     // precision of each projection: 0 bf16, 1 e4m3
    float limit;
};

// Bytes of the partial sums that any variant may need for `grid` CTAs.
size_t nvfp4_sm90_partial_bytes(int grid) { return size_t(grid) * 256 * 144 * sizeof(float); }

int nvfp4_sm90_forward(const Nvfp4Sm90Forward* a, void* stream_) {
    using namespace sm90;
    cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    const auto* x = static_cast<const __nv_bfloat16*>(a->x);
    const bool tiled = a->variant > 32;   // the bf16 variants up to 32 gather; e4m3 has none of these
    RouteParams route = {a->ids, a->expert_map, a->order, a->inverse, a->offsets, a->counts, a->flags, x,
                         tiled ? nullptr : static_cast<__nv_bfloat16*>(a->slot_out),
                         a->tokens * a->topk, a->map_size, a->num_experts, a->num_flags, a->tokens, a->hidden};
    const int permuting = tiled ? 0 : (a->tokens * (a->hidden / 32) + kRouteThreads - 1) / kRouteThreads;
    cudaError_t error = launch(a->ids_64 ? route_kernel<long long> : route_kernel<int>, dim3(a->num_experts + permuting), kRouteThreads, 0, stream, false, route);
    if (error != cudaSuccess) return error;
    if (tiled) {
        PermuteParams permute = {x, a->inverse, a->slot_out, a->act_scale, a->topk, a->hidden, a->capacity};
        error = launch(a->e4m3_first ? permute_kernel<kE4m3> : permute_kernel<kBf16>, dim3(a->tokens), kPermuteThreads, 0, stream, true, permute);
        if (error != cudaSuccess) return error;
    }
    GemmParams g = {};
    g.counts = a->counts;
    g.capacity = a->capacity;
    g.order = a->order;
    g.offsets = a->offsets;
    g.partial = a->partial;
    g.num_experts = a->num_experts;
    g.topk = a->topk;
    g.limit = a->limit;
    g.act = a->slot_out;
    g.act_scale = a->act_scale;
    g.values = a->w13;
    g.scales = a->w13_scale;
    g.alpha = a->w13_global;
    g.out = static_cast<__nv_bfloat16*>(a->intermediate);
    g.flags = a->flags;
    g.kblocks = a->hidden / kBlockK;
    g.units = a->intermediate_size / 64;
    g.out_stride = a->intermediate_size;
    error = launch_gemm<kGateUp>(a->e4m3_first, a->variant, g, a->grid, stream);
    if (error != cudaSuccess) return error;
    if (a->e4m3_second) {
        QuantizeParams quantize = {a->intermediate, a->inverse, a->act_scale, a->intermediate_size, a->capacity};
        error = launch(quantize_kernel, dim3(a->tokens * a->topk), kQuantizeThreads, 0, stream, true, quantize);
        if (error != cudaSuccess) return error;
    }
    g.act = a->intermediate;
    g.values = a->w2;
    g.scales = a->w2_scale;
    g.alpha = a->w2_global;
    g.out = static_cast<__nv_bfloat16*>(a->slot_out);
    g.flags = a->flags + a->num_flags / 2;
    g.kblocks = a->intermediate_size / kBlockK;
    g.units = a->hidden / kUnitRows;
    g.out_stride = a->hidden;
    error = launch_gemm<kDown>(a->e4m3_second, a->variant2, g, a->grid, stream);
    if (error != cudaSuccess) return error;
    ReduceParams r = {static_cast<const __nv_bfloat16*>(a->slot_out), a->inverse, a->topk_weights, static_cast<__nv_bfloat16*>(a->out), a->topk, a->hidden};
    return launch(reduce_kernel, dim3(a->tokens, (a->hidden / 8 + kReduceThreads - 1) / kReduceThreads), kReduceThreads, 0, stream, true, r);
}

// Repacks `experts` experts in place. scratch: rows * k / 2 + rows * k / 16 bytes.
int nvfp4_sm90_repack(uint8_t* values, uint8_t* scales, int experts, int rows, int k, int gate_up, uint8_t* scratch, void* stream_) {
    using namespace sm90;
    cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    const size_t value_bytes = size_t(rows) * k / 2, scale_bytes = size_t(rows) * k / 16;
    for (int e = 0; e < experts; ++e) {
        uint8_t *v = values + e * value_bytes, *s = scales + e * scale_bytes;
        cudaError_t error = cudaMemcpyAsync(scratch, v, value_bytes, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) return error;
        error = cudaMemcpyAsync(scratch + value_bytes, s, scale_bytes, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) return error;
        const RepackParams p = {scratch, scratch + value_bytes, v, s, rows, k, gate_up};
        repack_values<<<unsigned((value_bytes / 16 + 255) / 256), 256, 0, stream>>>(p);
        repack_scales<<<unsigned((scale_bytes / 8 + 255) / 256), 256, 0, stream>>>(p);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

// Hash of the sources that this library was built from: build.py.
const char* nvfp4_sm90_sources() { return NVFP4_SM90_SOURCES; }

const char* nvfp4_sm90_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
