// Operations on 32-bit words that are one instruction of the GPU. Plain integers, so that the host compiles them too.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SM90_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SM90_HOST_DEVICE inline
#endif

namespace sm90 {

// PTX prmt: nibble i of `selector` picks byte i; a nibble's bit 3 replicates the byte's sign instead.
SM90_HOST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
#else
    const uint64_t bytes = (uint64_t(b) << 32) | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t n = (selector >> (4 * i)) & 15, byte = uint32_t(bytes >> (8 * (n & 7))) & 255;
        d |= (n & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return d;
#endif
}
SM90_HOST_DEVICE uint32_t rotate_right(uint32_t w, int n) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(w, w, n);
#else
    return (w >> n) | (w << (32 - n));
#endif
}
// The bits of `ones` where `mask` is set, of `zeros` elsewhere. Written with AND and OR, ptxas makes two LOP3 of it.
SM90_HOST_DEVICE uint32_t select_bits(uint32_t ones, uint32_t zeros, uint32_t mask) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE2;" : "=r"(d) : "r"(ones), "r"(mask), "r"(zeros));
    return d;
#else
    return (ones & mask) | (zeros & ~mask);
#endif
}

}  // namespace sm90
