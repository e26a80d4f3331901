// The packed form of NVFP4 weights and its decoding in registers. layout.py states the same layout in torch.
//
// A unit is 128 weight rows: for the first projection 64 gate rows and the 64 up rows of the same intermediate indices, for the
// second 128 consecutive rows; both are two wgmma tiles of 64 rows. A unit's values lie as [k64][tile][thread][4 words], its scales
// as [k64][tile][warp][row group][k16][row, row + 8].
//
// A word holds one thread's 8 values of one m64k16 operand-A fragment, four pairs. Two words (k32) are packed together so that a
// pair comes out with at most one shift and one AND: sign at bit 15, exponent and mantissa at bits 8..6 of each half, which as bf16
// is value * 2^-126. The scale is stored as a 5-bit exponent and 3-bit mantissa and expands to bf16 scale * 2^118 with one multiply-add,
// so a decoded weight is value * scale * 2^-8, exactly (6 significant bits), and 2^8 goes into alpha.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>

namespace sm90 {

constexpr uint32_t kPairMask = 0x81C081C0u;
constexpr uint32_t kSharedMask = 0x0C180C18u;   // bits of the fourth pairs that lie in the first word; the others lie in the second
constexpr uint32_t kScaleBase = (235u << 7) * 0x00010001u;
constexpr float kAlphaFactor = 256.0f;
constexpr int kUnitRows = 128;
constexpr int kBlockK = 128;
constexpr int kUnitValueBytes = kUnitRows * kBlockK / 2;     // per k block
constexpr int kUnitScaleBytes = kUnitRows * kBlockK / 16;

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
__device__ __forceinline__ uint32_t rotr(uint32_t w, int n) { return __funnelshift_r(w, w, n); }

// Two words and four scale bytes (k16 0: row, row + 8; k16 1: row, row + 8) to two operand-A fragments.
__device__ __forceinline__ void decode_k32(uint32_t w0, uint32_t w1, uint32_t scales, uint32_t (&frag)[8]) {
    const __nv_bfloat162 row = expand_scales(scales & 0x00FF00FFu), row8 = expand_scales(__byte_perm(scales, 0, 0x4341));
    const __nv_bfloat162 s0 = __low2bfloat162(row), s1 = __low2bfloat162(row8), s2 = __high2bfloat162(row), s3 = __high2bfloat162(row8);
    const uint32_t z = (w0 & kSharedMask) | (w1 & ~kSharedMask);
    frag[0] = scaled_pair(w0 << 6, s0);
    frag[1] = scaled_pair(w0, s1);
    frag[2] = scaled_pair(rotr(w0, 6), s0);
    frag[3] = scaled_pair(z << 2, s1);
    frag[4] = scaled_pair(w1 << 4, s2);
    frag[5] = scaled_pair(rotr(w1, 2), s3);
    frag[6] = scaled_pair(rotr(w1, 8), s2);
    frag[7] = scaled_pair(rotr(z, 4), s3);
}

}  // namespace sm90
