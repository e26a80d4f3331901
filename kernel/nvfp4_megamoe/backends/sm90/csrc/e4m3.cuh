// Decoding of packed weights (layout.cuh) to e4m3 with their block scale folded in. Plain integers, so that the host compiles it too.
//
// A scale selects 8 bytes, e4m3(magnitude * scale * 2^-3) of the 8 magnitudes; PRMT picks four of them by nibbles. The packed words
// carry the magnitudes of pairs 0..3 at bits 0, 4, 8, 12 and of pairs 4..7 at bits 2, 6, 10, 14 (low elements; the high ones 16 bits
// above): four nibbles a selector, for four low or four high elements. So in a k64 segment of e4m3 activations, block t's elements
// 8 * half + 2 * b + j (b = 0..3) are the bytes of word t of 16-byte chunk 2 * half + j.
//
// Range: a scale is at most 448 and a magnitude at most 6, so 2688 * 2^-3 = 336 <= 448: nothing saturates. Products below 2^-3 become
// subnormal, of scales under 2^-2 that is: blocks 1792 times smaller than the largest one that a tensor may have. Powers of two times
// a scale are exact; 1.5, 3 and 6 times a scale with mantissa 1, 3, 5, 6 or 7 eighths are rounded by 2.2 to 4.8 %.
#pragma once
#include <cstdint>

#include "bits.cuh"

namespace sm90 {

constexpr int kScaleCodes = 256;
constexpr float kE4m3AlphaFactor = 8.0f;

// Magnitude m (0..7) times the scale of code `code` (layout.cuh: 5-bit exponent from 2^-10, 3-bit mantissa), times 2^-3, in float32:
// exact. Code 164 is NaN. Code 0 is a scale of zero, whose values are packed as zeros.
SM90_HOST_DEVICE float scaled_magnitude(uint32_t code, int m) {
    const uint32_t bits = ((code >> 3) + 127 - 10 - 3) << 23 | (code & 7) << 20;
    float scale;
#ifdef __CUDA_ARCH__
    scale = code == 164 ? __uint_as_float(0x7FFFFFFFu) : __uint_as_float(bits);
#else
    __builtin_memcpy(&scale, &bits, 4);
    if (code == 164) scale = __builtin_nanf("");
#endif
    return (m < 5 ? 0.5f * m : m == 5 ? 3.f : m == 6 ? 4.f : 6.f) * scale;
}

// One block's two words and its 8 bytes (low: magnitudes 0..3) to four words: [2 * half + j] as above.
SM90_HOST_DEVICE void decode_block_e4m3(uint32_t w0, uint32_t w1, uint32_t low, uint32_t high, uint32_t (&out)[4]) {
    const uint32_t first = (w0 & 0x70177017u) | (w1 & 0x07600760u);    // magnitudes of pairs 0..3
    const uint32_t second = (w0 & 0x0DC00DC0u) | (w1 & 0xD01DD01Du);   // of pairs 4..7, two bits higher
    const uint32_t signs = select_bits(w0, w1, 0x82288228u);            // every odd bit is a sign, the even ones are of no use
    // Shifted so that each sign is the top bit of some byte: pairs 0..3 alternate between shifts of 6 and 2, the others of 4 and 0.
    const uint32_t s2 = signs * 4u, s4 = signs * 16u, s6 = signs * 64u;
    constexpr uint32_t kSign = 0x80808080u, kLowSigns = 0x2615u, kHighSigns = 0x0437u;
    out[0] = (prmt(s2, s6, kLowSigns) & kSign) | prmt(low, high, first);
    out[1] = (prmt(s2, s6, kHighSigns) & kSign) | prmt(low, high, first >> 16);
    out[2] = (prmt(signs, s4, kLowSigns) & kSign) | prmt(low, high, rotate_right(second, 2));
    out[3] = (prmt(signs, s4, kHighSigns) & kSign) | prmt(low, high, rotate_right(second, 18));
}

}  // namespace sm90
