// One expert's weights from the checkpoint's layout (a copy in scratch) to the packed layout of layout.cuh, written in place.
#pragma once
#include <cstdint>

#include "layout.cuh"

namespace sm90 {

struct RepackParams {
    const uint8_t* values;   // [rows, K / 2], low nibble first
    const uint8_t* scales;   // [rows, K / 16] e4m3 bits
    uint8_t* out_values;
    uint8_t* out_scales;
    int rows, k, gate_up;    // gate_up: rows are gate rows, then as many up rows
};

// Source of packed row r (0..63) of a unit's tile m. The intermediate index that thread group g of warp w computes is, in the second
// projection's k64 segment `unit`, element j of pair 2 * w + m of block t, where g = 2 * t + j: its place in a chunk of layout.cuh.
__device__ __forceinline__ int source_row(const RepackParams& p, int unit, int m, int r) {
    if (!p.gate_up) return unit * kUnitRows + m * 64 + r;
    const int w = r >> 4, up = (r >> 3) & 1, g = r & 7;
    return up * (p.rows / 2) + unit * 64 + (g >> 1) * 16 + w * 4 + m * 2 + (g & 1);
}
__device__ __forceinline__ uint32_t pair_bits(uint32_t byte) {
    const uint32_t lo = byte & 15, hi = byte >> 4;
    return ((lo & 8) << 12) | ((lo & 7) << 6) | ((hi & 8) << 28) | ((hi & 7) << 22);
}
// e4m3 bits to a 5-bit exponent (2^-10 at 0) and a 3-bit mantissa. Zero stays 0; its block's values are zeroed as well, because the
// code 0 expands to a tiny number. NaN expands to a bf16 NaN.
__device__ __forceinline__ uint32_t scale_code(uint32_t bits) {
    bits &= 0x7F;
    if (bits == 0) return 0;
    if (bits == 0x7F) return (20 << 3) | 4;
    uint32_t e = bits >> 3, m = bits & 7;
    if (e > 0) return ((e + 3) << 3) | m;
    const int shift = __clz(m) - 28;   // subnormal m * 2^-9
    m = (m << shift) & 7;
    return ((4 - shift) << 3) | m;
}

// A thread writes the four words of one lane for one k64 of one 64-row tile: block t of two rows.
__global__ void repack_values(const __grid_constant__ RepackParams p) {
    const int blocks = p.k / 64;
    const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= int64_t(p.rows / kUnitRows) * blocks * 256) return;
    const int tid = item & 127, m = (item >> 7) & 1;
    const int block = (item >> 8) % blocks, unit = (item >> 8) / blocks;
    const int lane = tid & 31;
    const int r = (tid >> 5) * 16 + (lane >> 2);
    const int k16 = block * 4 + (lane & 3);
    uint32_t words[4];
    for (int half = 0; half < 2; ++half) {
        const int64_t row = source_row(p, unit, m, r + 8 * half);
        const bool zero = (p.scales[row * (p.k / 16) + k16] & 0x7F) == 0;
        uint32_t f[8];
        for (int i = 0; i < 8; ++i) f[i] = zero ? 0 : pair_bits(p.values[row * (p.k / 2) + k16 * 8 + i]);
        const uint32_t z = rotate_right(f[1], 2) | rotate_right(f[6], 28);
        words[2 * half] = rotate_right(f[0], 6) | f[5] | rotate_right(f[3], 26) | (z & kSharedMask);
        words[2 * half + 1] = rotate_right(f[4], 4) | rotate_right(f[2], 30) | rotate_right(f[7], 24) | (z & ~kSharedMask);
    }
    const size_t at = block_index(p.rows / kUnitRows, p.k / kBlockK, unit, block >> 1) * 512 + (block & 1) * 256 + (item & 255);
    reinterpret_cast<uint4*>(p.out_values)[at] = make_uint4(words[0], words[1], words[2], words[3]);
}

// A thread writes the 8 scale bytes of one thread for one k128 of one unit: [k64][row half][tile].
__global__ void repack_scales(const __grid_constant__ RepackParams p) {
    const int blocks = p.k / kBlockK;
    const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= int64_t(p.rows / kUnitRows) * blocks * 128) return;
    const int tid = item & 127, lane = tid & 31;
    const int block = (item >> 7) % blocks, unit = (item >> 7) / blocks;
    const int r = (tid >> 5) * 16 + (lane >> 2);
    uint8_t* out = p.out_scales + block_index(p.rows / kUnitRows, blocks, unit, block) * kUnitScaleBytes + tid * 8;
    for (int i = 0; i < 8; ++i) {
        const int k64 = i >> 2, half = (i >> 1) & 1, m = i & 1;
        const int64_t row = source_row(p, unit, m, r + 8 * half);
        out[i] = scale_code(p.scales[row * (p.k / 16) + block * 8 + k64 * 4 + (lane & 3)]);
    }
}

}  // namespace sm90
