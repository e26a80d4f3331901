// What happens to activations between the products: bfloat16 rounding, SwiGLU, NVFP4 quantization (W4A4).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace nvfp4 {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

// e^x to 2 units in the last place for |x| <= 87, saturating beyond; NaN stays NaN. Free of branches, so that loops
// over it are vectorised.
inline float exp_saturating(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((bits_of(shifted) - 0x4B400000u + 127u) << 23);
}

// silu(min(gate, limit)) * clamp(up, -limit, limit). Comparisons are written so that NaN passes.
inline void swiglu(const float* gate, const float* up, float gate_alpha, float up_alpha, float limit, int64_t count,
                   float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float g = gate[i] * gate_alpha;
    float u = up[i] * up_alpha;
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    out[i] = g / (1.0f + exp_saturating(-g)) * u;
  }
}

#if defined(NVFP4_AVX512)
// The same for whole vectors; the division is one step of Newton's after an estimate of 14 bits.
inline void swiglu_vectors(const float* gate, const float* up, float gate_alpha, float up_alpha, float limit, int64_t count,
                           float* out) {
  const vfloat high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit), one = _mm512_set1_ps(1.0f);
  const vfloat most = _mm512_set1_ps(87.0f), least = _mm512_set1_ps(-87.0f), round = _mm512_set1_ps(12582912.0f);
  const auto c = [](float x) { return _mm512_set1_ps(x); };
  for (int64_t i = 0; i < count; i += kLanes) {
    // Of min and max the second operand is returned where one is NaN.
    const vfloat g = _mm512_min_ps(high, mul(_mm512_loadu_ps(gate + i), c(gate_alpha)));
    const vfloat u = _mm512_max_ps(low, _mm512_min_ps(high, mul(_mm512_loadu_ps(up + i), c(up_alpha))));
    const vfloat x = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_sub_ps(zero(), g)));
    const vfloat shifted = fma(x, c(1.44269504f), round), n = _mm512_sub_ps(shifted, round);
    const vfloat r = fma(n, c(2.12194440e-4f), fma(n, c(-0.693359375f), x));
    vfloat p = c(1.9875691500e-4f);
    p = fma(p, r, c(1.3981999507e-3f));
    p = fma(p, r, c(8.3334519073e-3f));
    p = fma(p, r, c(4.1665795894e-2f));
    p = fma(p, r, c(1.6666665459e-1f));
    p = fma(p, r, c(5.0000001201e-1f));
    p = fma(mul(p, r), r, _mm512_add_ps(r, one));
    const vfloat d = _mm512_add_ps(_mm512_scalef_ps(p, n), one), estimate = _mm512_rcp14_ps(d);
    const vfloat inverse = mul(estimate, _mm512_fnmadd_ps(d, estimate, c(2.0f)));
    _mm512_storeu_ps(out + i, mul(mul(g, inverse), u));
  }
}
#endif

inline float reciprocal(float x) {
  if (x == 0.0f) return 0.0f;
  const float y = 1.0f / x;
  return y > 3.40282347e38f ? 3.40282347e38f : y;
}

// Round to the nearest UE4M3, ties to even, saturating at 448; returns its value. x is not negative; NaN stays NaN.
inline float round_ue4m3(float x) {
  x = x > 448.0f ? 448.0f : x;
  if (x < 0.015625f) return std::nearbyint(x * 512.0f) * 0.001953125f;
  const uint32_t bits = bits_of(x);
  return x != x ? x : float_of((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFFu);
}

// Round to the nearest E2M1, ties to the even code, saturating at 6.
inline float round_e2m1(float x) {
  const float m = std::fabs(x);
  const int code = 7 - (m <= 0.25f) - (m < 0.75f) - (m <= 1.25f) - (m < 1.75f) - (m <= 2.5f) - (m < 3.5f) - (m <= 5.0f);
  return std::copysign(kE2M1[code], x);
}

// One block of 16 as NVFP4 under a given global scale, in the order of operations of numerics.nvfp4.quantize.
// out = e2m1 * block scale, exact in bfloat16; the global scale is left to the caller's alpha. A NaN makes the block NaN.
inline void quantize_block(const float* x, float global_scale, uint16_t* out) {
  const float inverse_global = reciprocal(global_scale);
  float amax = 0.0f;
  bool nan = false;
  for (int i = 0; i < kBlock; ++i) {
    nan |= x[i] != x[i];
    amax = std::fmax(amax, std::fabs(x[i]));
  }
  const float scale = nan ? NAN : round_ue4m3(inverse_global * (amax * (1.0f / 6.0f)));
  const float inverse = reciprocal(scale * reciprocal(inverse_global));
  for (int i = 0; i < kBlock; ++i) {
    const float code = inverse == 0.0f ? 0.0f : round_e2m1(x[i] * inverse);
    out[i] = to_bf16(code * scale);
  }
}

}  // namespace nvfp4
