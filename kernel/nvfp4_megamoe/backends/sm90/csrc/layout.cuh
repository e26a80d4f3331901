// The packed form of NVFP4 weights, and its decoding to bf16. layout.py states the same layout in torch; e4m3.cuh decodes it to e4m3.
//
// A unit is 128 packed rows, two wgmma tiles of 64. A unit's values of a k128 lie as [k64][tile][thread][4 words], its scales as [thread]
// [8 bytes]. Those of kUnitsTogether units lie side by side for every k128 (block_index), so that what a CTA needs of a stage, one or
// more units, is one copy. For the second projection packed rows are consecutive rows; for the first a unit is 64 intermediate indices,
// and of a fragment's two row groups the first (row g of a warp's 16) is gate and the second (row g + 8) up, so that SwiGLU happens in a
// thread.
//
// Along K a thread owns whole blocks: of every k64, thread t of a quad has the 16 values of block t, so one scale serves a row's two
// words. The sum over K does not care which column meets which as long as the activations are permuted alike: in a k64 segment the
// activations' pair i (0..7) of block t is word t of 16-byte chunk i (bf16); e4m3.cuh has its own order. The first projection's rows
// are permuted so that its output comes out in the second's order.
//
// Two words hold a block, eight pairs of neighbours, so that a pair comes out with at most one shift and one AND: sign at bit 15,
// exponent and mantissa at bits 8..6 of each half, which as bf16 is value * 2^-126. Pair i's mantissa bit lies at bit kPairAt[i] of the
// first word (0, 6, 12), of the second (2, 8, 14), or of both mixed by kSharedMask (4, 10), each with its copy 16 bits above.
// The scale is stored as a 5-bit exponent and 3-bit mantissa and expands to bf16 scale * 2^118 with one multiply-add, so a decoded
// weight is value * scale * 2^-8, exactly (6 significant bits), and 2^8 goes into alpha.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>

#include "bits.cuh"

namespace sm90 {

constexpr uint32_t kPairMask = 0x81C081C0u;
constexpr uint32_t kSharedMask = 0x0C180C18u;   // bits of the shared pairs that lie in the first word; the others lie in the second
constexpr uint32_t kScaleBase = (235u << 7) * 0x00010001u;
constexpr float kAlphaFactor = 256.0f;
constexpr int kUnitRows = 128;
constexpr int kUnitsTogether = 4;   // fewer where an expert has no more left
constexpr int kBlockK = 128;
constexpr int kUnitValueBytes = kUnitRows * kBlockK / 2;     // per k block
constexpr int kUnitScaleBytes = kUnitRows * kBlockK / 16;

// Place of a unit's k block among an expert's, in units of kUnitValueBytes or kUnitScaleBytes: [group of units][k block][unit].
__host__ __device__ __forceinline__ size_t block_index(int units, int kblocks, int unit, int kb) {
    const int first = unit / kUnitsTogether * kUnitsTogether;
    const int together = units - first < kUnitsTogether ? units - first : kUnitsTogether;
    return size_t(first) * kblocks + size_t(kb) * together + (unit - first);
}

// Two scale bytes (bits 0..7 and 16..23 of `bytes`) to two bf16.
__device__ __forceinline__ __nv_bfloat162 expand_scales(uint32_t bytes) {
    const uint32_t v = bytes * 16u + kScaleBase;
    return *reinterpret_cast<const __nv_bfloat162*>(&v);
}
// The pair in `bits` times a scale of which both halves are the same half of a register: no instruction to duplicate it.
__device__ __forceinline__ uint32_t scaled_pair(uint32_t bits, __nv_bfloat162 scale) {
    bits &= kPairMask;
    const __nv_bfloat162 v = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits), scale);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// Pairs 4 * HALF to 4 * HALF + 3 of one block.
template <int HALF>
__device__ __forceinline__ void decode_pairs(uint32_t w0, uint32_t w1, __nv_bfloat162 scale, uint32_t (&pair)[4]) {
    const uint32_t z = select_bits(w0, w1, kSharedMask);
    if (HALF == 0) {
        pair[0] = scaled_pair(w0 << 6, scale);
        pair[1] = scaled_pair(z << 2, scale);
        pair[2] = scaled_pair(rotate_right(w1, 2), scale);
        pair[3] = scaled_pair(rotate_right(w0, 6), scale);
    } else {
        pair[0] = scaled_pair(w1 << 4, scale);
        pair[1] = scaled_pair(w0, scale);
        pair[2] = scaled_pair(rotate_right(z, 4), scale);
        pair[3] = scaled_pair(rotate_right(w1, 8), scale);
    }
}

// A thread's words of one k64 (x, y: row; z, w: row + 8) and its scales (byte 0: row, byte 2: row + 8) to the operand-A fragments of
// two m64k16.
template <int HALF>
__device__ __forceinline__ void decode_k32(const uint4& v, uint32_t scales, uint32_t (&frag)[8]) {
    const __nv_bfloat162 both = expand_scales(scales);
    uint32_t row[4], row8[4];
    decode_pairs<HALF>(v.x, v.y, __low2bfloat162(both), row);
    decode_pairs<HALF>(v.z, v.w, __high2bfloat162(both), row8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        frag[2 * i] = row[i];
        frag[2 * i + 1] = row8[i];
    }
}

}  // namespace sm90
