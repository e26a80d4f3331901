// Products on AMX tiles: 16 weight rows x 16 tokens x 32 elements an instruction.
//
// The weights are the first operand of the tile product, so decoded rows are used as they are; the tokens are the
// second, which wants pairs of elements of 16 tokens side by side. A panel holds tokens in that form, in blocks of 16:
// [block][vector of 32 operands][16 pairs][16 tokens][2].
#pragma once

#include "dot.h"

#if defined(NVFP4_BF16) && ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(NVFP4_EMULATE_AMX))
#define NVFP4_AMX 1

#if !defined(NVFP4_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nvfp4 {

constexpr int kTile = 16;                    // rows of a tile, and tokens of a block
constexpr int kTileFloats = kTile * kTile;
constexpr int kPanelVector = kOperandLanes * kTile;  // operands of one vector of a block

// 16 x 16 transpose of 32-bit elements; strides in elements.
inline void transpose16(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[i + h]), high = _mm512_castps_pd(b[i + h + 2]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 * q + c] holds columns c, c + 4, c + 8, c + 12 of rows 4q .. 4q + 3, one in each quarter.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(even01, even23, 0xDD));
    _mm512_storeu_ps(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0xDD));
  }
}

// Vectors [begin, end) of up to 16 tokens' operands into their block; missing tokens become zero.
inline void pack_block(const operand* const* tokens, int count, int64_t begin, int64_t end, operand* block) {
  alignas(64) operand rows[kTile * kOperandLanes] = {};
  for (int64_t v = begin; v < end; ++v) {
    for (int m = 0; m < count; ++m) store_operand(rows + m * kOperandLanes, load_operand(tokens[m] + v * kOperandLanes));
    transpose16(reinterpret_cast<const float*>(rows), kTile, reinterpret_cast<float*>(block + v * kPanelVector), kTile);
  }
}

#if defined(NVFP4_EMULATE_AMX)

struct TileContext {};
inline bool amx_usable() { return true; }

template <int kGroups, int kBlocks>
inline void tile_products(const operand* w, int64_t w_stride, const operand* x, int64_t x_stride, int64_t vectors,
                          float* c) {
  for (int g = 0; g < kGroups; ++g)
    for (int b = 0; b < kBlocks; ++b)
      for (int row = 0; row < kTile; ++row)
        for (int m = 0; m < kTile; ++m) {
          float sum = 0.0f;
          for (int64_t k = 0; k < vectors * kOperandLanes; ++k) {
            const int64_t v = k / kOperandLanes, lane = k % kOperandLanes;
            const uint32_t wb = w[g * w_stride + (v * kTile + row) * kOperandLanes + lane];
            const uint32_t xb = x[b * x_stride + v * kPanelVector + (lane / 2 * kTile + m) * 2 + lane % 2];
            float wf, xf;
            std::memcpy(&wf, &(const uint32_t&)(wb << 16), 4);
            std::memcpy(&xf, &(const uint32_t&)(xb << 16), 4);
            sum += wf * xf;
          }
          c[(g * kBlocks + b) * kTileFloats + row * kTile + m] = sum;
        }
}

#else

// Whether the kernel of the operating system lets this process use tiles; asks it once.
inline bool amx_usable() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool usable = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return usable;
}

// Configures the tiles of this thread and gives the former configuration back, which torch's kernels rely on.
class TileContext {
 public:
  TileContext() {
    _tile_storeconfig(former_);
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes a row
      config[48 + t] = kTile;   // rows
    }
    _tile_loadconfig(config);
  }
  ~TileContext() {
    if (former_[0]) {
      _tile_loadconfig(former_);
    } else {
      _tile_release();
    }
  }
  TileContext(const TileContext&) = delete;
  TileContext& operator=(const TileContext&) = delete;

 private:
  alignas(64) uint8_t former_[64];
};

// kGroups x 16 decoded rows times kBlocks x 16 tokens; strides between groups and between blocks in operands.
// c: [group][block][row][token].
template <int kGroups, int kBlocks>
inline void tile_products(const operand* w, int64_t w_stride, const operand* x, int64_t x_stride, int64_t vectors,
                          float* c) {
  _tile_zero(0);
  if constexpr (kBlocks > 1) _tile_zero(1);
  if constexpr (kGroups > 1) _tile_zero(2);
  if constexpr (kGroups > 1 && kBlocks > 1) _tile_zero(3);
  for (int64_t v = 0; v < vectors; ++v) {
    _tile_loadd(4, w + v * kTile * kOperandLanes, 64);
    _tile_loadd(6, x + v * kPanelVector, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, x + x_stride + v * kPanelVector, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kGroups > 1) {
      _tile_loadd(5, w + w_stride + v * kTile * kOperandLanes, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, c + kTileFloats, 64);
  if constexpr (kGroups > 1) _tile_stored(2, c + kBlocks * kTileFloats, 64);
  if constexpr (kGroups > 1 && kBlocks > 1) _tile_stored(3, c + 3 * kTileFloats, 64);
}

#endif

template <int kGroups, int kBlocks>
inline void tile_step(const operand* w, int64_t w_stride, const operand* x, int64_t x_stride, int64_t vectors,
                      int64_t tokens, float* c, int64_t ldc, bool add) {
  alignas(64) float products[kGroups * kBlocks * kTileFloats], turned[kTileFloats];
  tile_products<kGroups, kBlocks>(w, w_stride, x, x_stride, vectors, products);
  for (int g = 0; g < kGroups; ++g) {
    for (int b = 0; b < kBlocks; ++b) {
      transpose16(products + (g * kBlocks + b) * kTileFloats, kTile, turned, kTile);
      const int64_t count = tokens - b * kTile < kTile ? tokens - b * kTile : kTile;
      for (int64_t m = 0; m < count; ++m) {
        float* to = c + (b * kTile + m) * ldc + g * kTile;
        const __m512 sums = _mm512_load_ps(turned + m * kTile);
        _mm512_storeu_ps(to, add ? _mm512_add_ps(sums, _mm512_loadu_ps(to)) : sums);
      }
    }
  }
}

// Decoded rows (a multiple of 16, groups of 16) times the tokens of a panel, whose vectors start at `vector`.
inline void panel_block(const operand* scratch, int64_t rows, int64_t vectors, int64_t tokens, const operand* panel,
                        int64_t panel_stride, int64_t vector, float* c, int64_t ldc, bool add) {
  const int64_t w_stride = vectors * kTile * kOperandLanes;
  for (int64_t m = 0; m < tokens; m += 2 * kTile) {
    const operand* x = panel + m / kTile * panel_stride + vector * kPanelVector;
    const bool pair = tokens - m > kTile;
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      const operand* w = scratch + row / kTile * w_stride;
      const auto step = rows - row > kTile ? (pair ? tile_step<2, 2> : tile_step<2, 1>)
                                           : (pair ? tile_step<1, 2> : tile_step<1, 1>);
      step(w, w_stride, x, panel_stride, vectors, tokens - m, c + m * ldc + row, ldc, add);
    }
  }
}

}  // namespace nvfp4

#endif
