// The two products of weight rows with activation rows: fused with the decoding for few tokens, and from decoded
// scratch for many. Both write c[m * ldc + row], plain float32 sums without kScaleBias and without the global scale.
#pragma once

#include <type_traits>

#include "isa.h"

namespace nvfp4 {

// Row-major packed weights of one expert: codes [rows, k / 2], block scales [rows, k / 16].
struct PackedRows {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t k;
  PackedRows at(int64_t row) const { return {codes + row * (k / 2), scales + row * (k / kBlock), k}; }
};

inline uint64_t load_scales(const uint8_t* p, int64_t count) {
  uint64_t bytes = 0;
  if (count >= kChunkScales) {
    std::memcpy(&bytes, p, kChunkScales);
  } else {
    for (int64_t i = 0; i < count; ++i) bytes |= static_cast<uint64_t>(p[i]) << (8 * i);
  }
  return bytes;
}

// Codes and block scales of one chunk of a row; past the end of the row both are zero.
template <bool kPartial>
inline vint load_chunk(const PackedRows& w, int64_t row, int64_t chunk, vfloat& scale) {
  const uint8_t* codes = w.codes + row * (w.k / 2) + chunk * kChunkBytes;
  const uint8_t* scales = w.scales + row * (w.k / kBlock) + chunk * kChunkScales;
  const int64_t left = w.k - chunk * kChunk;
  if constexpr (kPartial) {
    scale = scale_lanes(load_scales(scales, left / kBlock));
    return load_int_partial(codes, static_cast<int>(left / 8));
  }
  scale = scale_lanes(load_scales(scales, kChunkScales));
  return load_int(codes);
}

// Rows from the one being read to the one being fetched: 8 KiB of codes where that is 4 to 16 rows. Without it the
// processor waits at the start of each row, whose neighbours in time are not neighbours in memory.
inline int64_t prefetch_distance(int64_t k) {
  const int64_t rows = 16384 / k;
  return rows < 4 ? 4 : rows > 16 ? 16 : rows;
}

inline void prefetch_chunk(const PackedRows& row, int64_t chunk) {
  constexpr int kScalesLine = 64 / kChunkScales;  // chunks a cache line of scales
  _mm_prefetch(reinterpret_cast<const char*>(row.codes + chunk * kChunkBytes), _MM_HINT_T0);
  if (chunk % kScalesLine == 0)
    _mm_prefetch(reinterpret_cast<const char*>(row.scales + chunk * kChunkScales), _MM_HINT_T0);
}

// R rows times M tokens with the decoding in registers; the block scale multiplies a chunk's partial sum.
template <int R, int M>
inline void fused_rows(const PackedRows& w, int64_t ahead, const operand* const* x, float* c, int64_t ldc) {
  vfloat acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = zero();
  const auto step = [&](auto partial, int64_t chunk) {
    vint codes[R];
    vfloat scale[R], part[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) prefetch_chunk(w.at(r + ahead), chunk);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) codes[r] = load_chunk<decltype(partial)::value>(w, r, chunk, scale[r]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[r][m] = zero();
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = chunk * kChunk + j * kOperandLanes;
      voperand value[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) value[r] = decode_operand(codes[r], j);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const voperand xv = load_operand(x[m] + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) part[r][m] = dot(value[r], xv, part[r][m]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] = fma(part[r][m], scale[r], acc[r][m]);
  };
  const int64_t whole = w.k / kChunk;
  for (int64_t chunk = 0; chunk < whole; ++chunk) step(std::false_type{}, chunk);
  if (w.k % kChunk) step(std::true_type{}, whole);
  for (int m = 0; m < M; ++m) {
    alignas(16) float sums[4];
    _mm_store_ps(sums, sum4(acc[0][m], R > 1 ? acc[R > 1 ? 1 : 0][m] : zero(), R > 2 ? acc[R > 2 ? 2 : 0][m] : zero(),
                            R > 3 ? acc[R > 3 ? 3 : 0][m] : zero()));
    for (int r = 0; r < R; ++r) c[m * ldc + r] = sums[r];
  }
}

#if defined(NVFP4_AVX512)
constexpr int kFusedTokens = 6;  // more tokens than this go through decoded scratch
constexpr int kTileTokens = 6;   // 4 rows x 6 tokens: 24 accumulators of 32 registers
#else
constexpr int kFusedTokens = 3;
constexpr int kTileTokens = 3;   // 4 rows x 3 tokens: 12 accumulators of 16 registers
#endif

// rows (a multiple of 4) times tokens (1 .. kFusedTokens).
inline void fused_block(const PackedRows& w, int64_t rows, int tokens, const operand* const* x, float* c, int64_t ldc) {
  const int64_t ahead = prefetch_distance(w.k);
  const auto run = [&](auto kernel, int step) {
    for (int64_t row = 0; row < rows; row += step) kernel(w.at(row), ahead, x, c + row, ldc);
  };
  switch (tokens) {
#if defined(NVFP4_AVX512)
    case 1: run(fused_rows<4, 1>, 4); break;
    case 2: run(fused_rows<4, 2>, 4); break;
    case 3: run(fused_rows<2, 3>, 2); break;
    case 4: run(fused_rows<2, 4>, 2); break;
    case 5: run(fused_rows<2, 5>, 2); break;
    default: run(fused_rows<2, 6>, 2); break;
#else
    case 1: run(fused_rows<2, 1>, 2); break;
    case 2: run(fused_rows<2, 2>, 2); break;
    default: run(fused_rows<1, 3>, 1); break;
#endif
  }
}

constexpr int kGroup = 4;        // rows of one register tile
constexpr int kScratchChunks = sizeof(operand) == 2 ? 16 : 8;  // chunks along K decoded at a time
constexpr int kDecodeAhead = 8;  // rows from the one being decoded to the one being fetched
constexpr int kScratchRows = 64;
constexpr int64_t kScratchOperands = static_cast<int64_t>(kScratchRows) * kScratchChunks * kChunk;

// Decode rows x chunks [begin, end) to [row / kRows][vector][row % kRows][lane], block scale applied.
template <int kRows>
inline void decode_block(const PackedRows& w, int64_t rows, int64_t begin, int64_t end, operand* scratch) {
  const int64_t whole = w.k / kChunk;
  const int64_t group_size = (end - begin) * kVectors * kRows * kOperandLanes;
  for (int64_t row = 0; row < rows; ++row) {
    operand* to = scratch + row / kRows * group_size + row % kRows * kOperandLanes;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      prefetch_chunk(w.at(row + kDecodeAhead), chunk);
      vfloat scale;
      const vint codes = chunk < whole ? load_chunk<false>(w, row, chunk, scale) : load_chunk<true>(w, row, chunk, scale);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store_operand(to + j * kRows * kOperandLanes, decode_scaled(codes, j, scale));
      to += kVectors * kRows * kOperandLanes;
    }
  }
}

template <int M>
inline void tile(const operand* w, int64_t vectors, const operand* const* x, int64_t offset, float* c, int64_t ldc, bool add) {
  vfloat acc[kGroup][M];
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = zero();
  const operand* xs[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) xs[m] = x[m] + offset;
  for (int64_t v = 0; v < vectors; ++v) {
    voperand value[kGroup];
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) value[r] = load_operand(w + (v * kGroup + r) * kOperandLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const voperand xv = load_operand(xs[m] + v * kOperandLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) acc[r][m] = dot(value[r], xv, acc[r][m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m128 sums = sum4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]);
    _mm_storeu_ps(c + m * ldc, add ? _mm_add_ps(sums, _mm_loadu_ps(c + m * ldc)) : sums);
  }
}

// Decoded rows [scratch of decode_block] times tokens; x rows are read from operand `offset` on.
inline void scratch_block(const operand* scratch, int64_t rows, int64_t vectors, int64_t tokens, const operand* const* x,
                          int64_t offset, float* c, int64_t ldc, bool add) {
  for (int64_t m = 0; m < tokens;) {
    // Equal shares: 7 tokens are 4 + 3, not 6 + 1, whose second tile would wait for the adders.
    const int64_t left = tokens - m;
    const int64_t count = (left + (left + kTileTokens - 1) / kTileTokens - 1) / ((left + kTileTokens - 1) / kTileTokens);
    for (int64_t row = 0; row < rows; row += kGroup) {
      const operand* w = scratch + row * vectors * kOperandLanes;
      float* to = c + m * ldc + row;
      switch (count) {
        case 1: tile<1>(w, vectors, x + m, offset, to, ldc, add); break;
        case 2: tile<2>(w, vectors, x + m, offset, to, ldc, add); break;
#if defined(NVFP4_AVX512)
        case 4: tile<4>(w, vectors, x + m, offset, to, ldc, add); break;
        case 5: tile<5>(w, vectors, x + m, offset, to, ldc, add); break;
        case 6: tile<6>(w, vectors, x + m, offset, to, ldc, add); break;
#endif
        default: tile<3>(w, vectors, x + m, offset, to, ldc, add); break;
      }
    }
    m += count;
  }
}

}  // namespace nvfp4
