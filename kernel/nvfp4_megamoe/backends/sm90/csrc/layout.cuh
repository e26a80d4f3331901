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

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <int BYTE>
__device__ __forceinline__ uint32_t expand_scale(uint32_t word) {
    return __byte_perm(word, 0, 0x4440 + BYTE) * 0x00100010u + kScaleBase;
}
__device__ __forceinline__ uint32_t rotr(uint32_t w, int n) { return __funnelshift_r(w, w, n); }

// Two words and four scale bytes (k16 0: row, row + 8; k16 1: row, row + 8) to two operand-A fragments.
__device__ __forceinline__ void decode_k32(uint32_t w0, uint32_t w1, uint32_t scales, uint32_t (&frag)[8]) {
    const uint32_t s0 = expand_scale<0>(scales), s1 = expand_scale<1>(scales);
    const uint32_t s2 = expand_scale<2>(scales), s3 = expand_scale<3>(scales);
    const uint32_t z = (w0 & kSharedMask) | (w1 & ~kSharedMask);
    frag[0] = mul_bf16x2((w0 << 6) & kPairMask, s0);
    frag[1] = mul_bf16x2(w0 & kPairMask, s1);
    frag[2] = mul_bf16x2(rotr(w0, 6) & kPairMask, s0);
    frag[3] = mul_bf16x2((z << 2) & kPairMask, s1);
    frag[4] = mul_bf16x2((w1 << 4) & kPairMask, s2);
    frag[5] = mul_bf16x2(rotr(w1, 2) & kPairMask, s3);
    frag[6] = mul_bf16x2(rotr(w1, 8) & kPairMask, s2);
    frag[7] = mul_bf16x2(rotr(z, 4) & kPairMask, s3);
}

}  // namespace sm90
