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

__device__ __forceinline__ int source_row(const RepackParams& p, int unit, int m, int r) {
    return p.gate_up ? m * (p.rows / 2) + unit * 64 + r : unit * kUnitRows + m * 64 + r;
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

// A thread writes the four words of one lane for one k64 of one 64-row tile.
__global__ void repack_values(const __grid_constant__ RepackParams p) {
    const int blocks = p.k / 64;
    const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= int64_t(p.rows / kUnitRows) * blocks * 256) return;
    const int tid = item & 127, m = (item >> 7) & 1;
    const int block = (item >> 8) % blocks, unit = (item >> 8) / blocks;
    const int lane = tid & 31, t = lane & 3;
    const int r = (tid >> 5) * 16 + (lane >> 2);
    uint32_t words[4];
    for (int pair = 0; pair < 2; ++pair) {
        uint32_t f[2][4];
        for (int k = 0; k < 2; ++k) {
            const int k16 = block * 4 + pair * 2 + k;
            for (int a = 0; a < 4; ++a) {   // fragment registers: row, row + 8, row (k + 8), row + 8 (k + 8)
                const int64_t row = source_row(p, unit, m, r + (a & 1) * 8);
                const uint32_t byte = p.values[row * (p.k / 2) + k16 * 8 + t + (a >> 1) * 4];
                const bool zero = (p.scales[row * (p.k / 16) + k16] & 0x7F) == 0;
                f[k][a] = zero ? 0 : pair_bits(byte);
            }
        }
        const uint32_t z = rotr(f[0][3], 2) | rotr(f[1][3], 28);
        words[2 * pair] = rotr(f[0][0], 6) | f[0][1] | rotr(f[0][2], 26) | (z & kSharedMask);
        words[2 * pair + 1] = rotr(f[1][0], 4) | rotr(f[1][1], 30) | rotr(f[1][2], 24) | (z & ~kSharedMask);
    }
    reinterpret_cast<uint4*>(p.out_values)[item] = make_uint4(words[0], words[1], words[2], words[3]);
}

// A thread writes the 8 scale bytes of one row pair for one k64 of one 64-row tile.
__global__ void repack_scales(const __grid_constant__ RepackParams p) {
    const int blocks = p.k / 64;
    const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= int64_t(p.rows / kUnitRows) * blocks * 64) return;
    const int pair_row = item & 31, m = (item >> 5) & 1;
    const int block = (item >> 6) % blocks, unit = (item >> 6) / blocks;
    const int r = (pair_row >> 3) * 16 + (pair_row & 7);
    uint8_t bytes[8];
    for (int k = 0; k < 4; ++k)
        for (int half = 0; half < 2; ++half)
            bytes[2 * k + half] = scale_code(p.scales[int64_t(source_row(p, unit, m, r + 8 * half)) * (p.k / 16) + block * 4 + k]);
    for (int i = 0; i < 8; ++i) p.out_scales[item * 8 + i] = bytes[i];
}

}  // namespace sm90
