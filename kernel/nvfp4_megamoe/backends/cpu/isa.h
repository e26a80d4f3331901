// Vector types and the decoding of packed NVFP4, one variant for each instruction set level.
//
// Lane order. A chunk is one vector register of packed codes: kChunk consecutive elements along K. Shifting each of its
// integer lanes right by 4 * j and using the low bits as a table index decodes one code of every lane, so the decoded
// vector j holds elements of stride 8 (float32 operands) or 4 (bfloat16 operands). Activations are stored in the same
// order (position_in_chunk), which a dot product does not notice. Every float32 lane covers elements of one block of 16
// only, hence one vector of block scales serves all vectors of a chunk.
//
// A block scale byte b is widened by the float16 converter: the bits of UE4M3 shifted left by 7 are its value * 2^-8,
// subnormals included. kScaleBias undoes the factor, which is exact, in the epilogue.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace nvfp4 {

constexpr float kScaleBias = 256.0f;
constexpr int kBlock = 16;  // elements a block scale

alignas(64) inline constexpr float kE2M1[16] = {0.f,  0.5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                         -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#define NVFP4_AVX512 1
using vfloat = __m512;
using vint = __m512i;
constexpr int kLanes = 16;

inline vfloat zero() { return _mm512_setzero_ps(); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
inline vfloat mul(vfloat a, vfloat b) { return _mm512_mul_ps(a, b); }
inline vint load_int(const void* p) { return _mm512_loadu_si512(p); }
inline vint load_int_partial(const void* p, int dwords) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << dwords) - 1), p);
}

// Values of code j (0..7) of every 32-bit lane.
inline vfloat decode_f32(vint codes, int j) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), _mm512_load_ps(kE2M1));
}

// Block scales * 2^-8 for the float32 lanes of a chunk: lane i belongs to block i / 2.
inline vfloat scale_lanes(uint64_t bytes) {
  const __m256i pattern = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
                                           4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
  const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<long long>(bytes)), pattern);
  return _mm512_cvtph_ps(_mm256_slli_epi16(words, 7));
}

// Lane sums of four vectors; the order of additions is the same for each of them.
inline __m128 sum4(vfloat a, vfloat b, vfloat c, vfloat d) {
  const vfloat ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const vfloat cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d abd = _mm512_castps_pd(ab), cdd = _mm512_castps_pd(cd);
  const vfloat all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abd, cdd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(abd, cdd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

using vfloat = __m256;
using vint = __m256i;
constexpr int kLanes = 8;

inline vfloat zero() { return _mm256_setzero_ps(); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
inline vfloat mul(vfloat a, vfloat b) { return _mm256_mul_ps(a, b); }
inline vint load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline vint load_int_partial(const void* p, int dwords) {
  const vint lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(static_cast<const int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(dwords), lane));
}

inline vfloat decode_f32(vint codes, int j) {
  const vfloat magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kE2M1), _mm256_srli_epi32(codes, 4 * j));
  const vint sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28 - 4 * j), _mm256_set1_epi32(INT32_MIN));
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}

inline vfloat scale_lanes(uint64_t bytes) {
  const __m128i pattern = _mm_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1);
  const __m128i words = _mm_shuffle_epi8(_mm_cvtsi64_si128(static_cast<long long>(bytes)), pattern);
  return _mm256_cvtph_ps(_mm_slli_epi16(words, 7));
}

inline __m128 sum4(vfloat a, vfloat b, vfloat c, vfloat d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

#else
#error "this kernel needs AVX2 with FMA and F16C, or AVX512 (F, BW, VL, DQ)"
#endif

constexpr int kChunk = 8 * kLanes;             // elements along K in one register of packed codes
constexpr int kChunkBytes = kChunk / 2;
constexpr int kChunkScales = kChunk / kBlock;

// Operands: what weights and activations are multiplied as. NVFP4_EMULATE_BF16 builds the bfloat16 variant on a CPU
// without AVX512_BF16, for tests.
#if defined(NVFP4_AVX512) && (defined(__AVX512BF16__) || defined(NVFP4_EMULATE_BF16)) && !defined(NVFP4_OPERAND_F32)

#define NVFP4_BF16 1
using operand = uint16_t;
using voperand = __m512i;

alignas(64) inline constexpr uint16_t kE2M1Bf16[32] = {
    0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040,
    0xC080, 0xC0C0, 0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0,
    0xC000, 0xC040, 0xC080, 0xC0C0};

inline voperand load_operand(const operand* p) { return _mm512_loadu_si512(p); }
inline void store_operand(operand* p, voperand v) { _mm512_storeu_si512(p, v); }

// acc + the products of the two bfloat16 in each lane.
inline vfloat dot(voperand a, voperand b, vfloat acc) {
#if defined(__AVX512BF16__) && !defined(NVFP4_EMULATE_BF16)
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                                   _mm512_castsi512_ps(_mm512_and_si512(b, high)));
  const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                    _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
  return _mm512_add_ps(_mm512_add_ps(acc, odd), even);
#endif
}

// Unscaled values of code j (0..3) of every 16-bit lane; the table repeats because the index has five bits.
inline voperand decode_operand(vint codes, int j) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), _mm512_load_si512(kE2M1Bf16));
}

// Values times block scale. The product has at most six significant bits, so the lower half of each float32 is zero.
inline voperand decode_scaled(vint codes, int j, vfloat scale) {
  const __m512i even = _mm512_castps_si512(mul(decode_f32(codes, j), scale));
  const __m512i odd = _mm512_castps_si512(mul(decode_f32(codes, j + 4), scale));
  return _mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
}

inline operand to_operand(uint16_t bf16_bits) { return bf16_bits; }

#else

using operand = float;
using voperand = vfloat;

#if defined(NVFP4_AVX512)
inline voperand load_operand(const operand* p) { return _mm512_loadu_ps(p); }
inline void store_operand(operand* p, voperand v) { _mm512_storeu_ps(p, v); }
#else
inline voperand load_operand(const operand* p) { return _mm256_loadu_ps(p); }
inline void store_operand(operand* p, voperand v) { _mm256_storeu_ps(p, v); }
#endif

inline vfloat dot(voperand a, voperand b, vfloat acc) { return fma(a, b, acc); }
inline voperand decode_operand(vint codes, int j) { return decode_f32(codes, j); }
inline voperand decode_scaled(vint codes, int j, vfloat scale) { return mul(decode_f32(codes, j), scale); }

inline operand to_operand(uint16_t bf16_bits) {
  const uint32_t bits = static_cast<uint32_t>(bf16_bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#endif

constexpr int kOperandLanes = sizeof(vfloat) / sizeof(operand);
constexpr int kVectors = kChunk / kOperandLanes;  // operand vectors a chunk: 8 float32 or 4 bfloat16

// Where element e of a chunk (0 <= e < kChunk) is stored among the chunk's operands.
constexpr int position_in_chunk(int e) { return (e % kVectors) * kOperandLanes + e / kVectors; }

constexpr int64_t padded(int64_t k) { return (k + kChunk - 1) / kChunk * kChunk; }

}  // namespace nvfp4
