// Products on AMX tiles: 16 weight rows x 16 tokens x 32 elements an instruction.
//
// The weights are the first operand of the tile product, so decoded rows are used as they are; the tokens are the
// second, which wants pairs of elements of 16 tokens side by side. A panel holds tokens in that form, in blocks of 16:
// [block][vector of 32 operands][16 pairs][16 tokens][2]. Sums come as tiles of [16 rows][16 tokens].
#pragma once

#include <algorithm>

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

inline thread_local float emulated_tiles[4][kTileFloats];

template <int kGroups, int kBlocks>
inline void tiles_zero() {
  std::memset(emulated_tiles, 0, sizeof emulated_tiles);
}

template <int kGroups, int kBlocks>
inline void tiles_load(const float* c) {
  std::memcpy(emulated_tiles, c, sizeof(float) * kGroups * kBlocks * kTileFloats);
}

template <int kGroups, int kBlocks>
inline void tiles_store(float* c) {
  std::memcpy(c, emulated_tiles, sizeof(float) * kGroups * kBlocks * kTileFloats);
}

template <int kGroups, int kBlocks>
inline void tiles_multiply(const operand* w, int64_t w_stride, const operand* x, int64_t x_stride) {
  const auto value = [](uint32_t bits) {
    bits <<= 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int g = 0; g < kGroups; ++g)
    for (int b = 0; b < kBlocks; ++b)
      for (int row = 0; row < kTile; ++row)
        for (int m = 0; m < kTile; ++m)
          for (int lane = 0; lane < kOperandLanes; ++lane)
            emulated_tiles[g * kBlocks + b][row * kTile + m] +=
                value(w[g * w_stride + row * kOperandLanes + lane]) *
                value(x[b * x_stride + (lane / 2 * kTile + m) * 2 + lane % 2]);
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

// Tiles 0 .. 3 hold the sums of kGroups x 16 rows and kBlocks x 16 tokens as [group][block]; in memory a tile is
// [row][token].
template <int kGroups, int kBlocks>
inline void tiles_zero() {
  _tile_zero(0);
  if constexpr (kGroups * kBlocks > 1) _tile_zero(1);
  if constexpr (kGroups * kBlocks > 2) _tile_zero(2);
  if constexpr (kGroups * kBlocks > 2) _tile_zero(3);
}

template <int kGroups, int kBlocks>
inline void tiles_load(const float* c) {
  _tile_loadd(0, c, 64);
  if constexpr (kGroups * kBlocks > 1) _tile_loadd(1, c + kTileFloats, 64);
  if constexpr (kGroups * kBlocks > 2) _tile_loadd(2, c + 2 * kTileFloats, 64);
  if constexpr (kGroups * kBlocks > 2) _tile_loadd(3, c + 3 * kTileFloats, 64);
}

template <int kGroups, int kBlocks>
inline void tiles_store(float* c) {
  _tile_stored(0, c, 64);
  if constexpr (kGroups * kBlocks > 1) _tile_stored(1, c + kTileFloats, 64);
  if constexpr (kGroups * kBlocks > 2) _tile_stored(2, c + 2 * kTileFloats, 64);
  if constexpr (kGroups * kBlocks > 2) _tile_stored(3, c + 3 * kTileFloats, 64);
}

// One vector of decoded rows times that of the tokens; strides between groups and between blocks in operands.
template <int kGroups, int kBlocks>
inline void tiles_multiply(const operand* w, int64_t w_stride, const operand* x, int64_t x_stride) {
  asm volatile("" ::: "memory");  // GCC does not know that the loads below read what was stored
  _tile_loadd(6, x, 64);
  _tile_loadd(4, w, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kBlocks > 1) {
    _tile_loadd(7, x + x_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kGroups > 1) {
    _tile_loadd(5, w + w_stride, 64);
    if constexpr (kBlocks > 1) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(1, 5, 6);
    }
  }
}

#endif

constexpr int kNarrowBlocks = 2;  // of tokens, whose sums stay in the tiles
constexpr int kNarrowChunks = 2;  // decoded at a time: two of these and the tokens fit the first cache
constexpr int kWideChunks = 4;

// A piece of 16 rows, chunks [begin, end), being decoded row by row to [vector][16 rows][lane], block scale applied. What
// is decoded after it, from chunk `next_begin` of `next` on, is fetched.
class PieceDecoder {
 public:
  PieceDecoder(const PackedRows& w, int64_t begin, int64_t end, const PackedRows& next, int64_t next_begin, operand* to)
      : codes_(w.codes + begin * kChunkBytes), scales_(w.scales + begin * kChunkScales),
        next_codes_(next.codes + next_begin * kChunkBytes), next_scales_(next.scales + next_begin * kChunkScales), to_(to),
        left_(w.k - begin * kChunk), whole_(std::min(end, w.k / kChunk) - begin), partial_(end * kChunk > w.k),
        codes_stride_(w.k / 2), scales_stride_(w.k / kBlock), fetch_scales_(next_begin % kScalesLine == 0) {}

  void row() {
    operand* to = to_;
    if (fetch_scales_) _mm_prefetch(reinterpret_cast<const char*>(next_scales_), _MM_HINT_T0);
    for (int64_t i = 0; i < whole_; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(next_codes_ + i * kChunkBytes), _MM_HINT_T0);
      chunk(load_int(codes_ + i * kChunkBytes), scale_lanes(load_scales(scales_ + i * kChunkScales, kChunkScales)), to);
      to += kVectors * kTile * kOperandLanes;
    }
    if (partial_) {
      const int64_t left = left_ - whole_ * kChunk;
      chunk(load_int_partial(codes_ + whole_ * kChunkBytes, static_cast<int>(left / 8)),
            scale_lanes(load_scales(scales_ + whole_ * kChunkScales, left / kBlock)), to);
    }
    codes_ += codes_stride_;
    scales_ += scales_stride_;
    next_codes_ += codes_stride_;
    next_scales_ += scales_stride_;
    to_ += kOperandLanes;
  }

 private:
  static constexpr int kScalesLine = 64 / kChunkScales;  // chunks a cache line of scales

  static void chunk(vint codes, vfloat scale, operand* to) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store_operand(to + j * kTile * kOperandLanes, decode_scaled(codes, j, scale));
  }

  const uint8_t *codes_, *scales_, *next_codes_, *next_scales_;
  operand* to_;
  int64_t left_, whole_;
  bool partial_;
  int64_t codes_stride_, scales_stride_;
  bool fetch_scales_;
};

// kGroups x 16 rows times up to kBlocks x 16 tokens. A piece of the rows is multiplied while the next is decoded.
template <int kGroups, int kBlocks>
inline void narrow_product(const PackedRows* parts, const PackedRows* next, const operand* x, int64_t x_stride,
                           operand* scratch, float* c) {
  constexpr int64_t kBuffer = kGroups * kTile * kNarrowChunks * kChunk;
  const int64_t chunks = padded(parts[0].k) / kChunk;
  const operand* ready = nullptr;
  int64_t ready_vectors = 0;
  tiles_zero<kGroups, kBlocks>();
  for (int64_t begin = 0, piece = 0; begin < chunks; begin += kNarrowChunks, ++piece) {
    const int64_t end = begin + kNarrowChunks < chunks ? begin + kNarrowChunks : chunks;
    const int64_t vectors = (end - begin) * kVectors, w_stride = ready_vectors * kTile * kOperandLanes;
    operand* to = scratch + piece % 2 * kBuffer;
    int64_t done = 0;
    for (int g = 0; g < kGroups; ++g) {
      PieceDecoder decoder(parts[g], begin, end, end < chunks ? parts[g] : next[g], end < chunks ? end : 0,
                           to + g * vectors * kTile * kOperandLanes);
      for (int row = 0; row < kTile; ++row) {
        decoder.row();
        for (const int64_t due = (g * kTile + row + 1) * ready_vectors / (kGroups * kTile); done < due; ++done) {
          tiles_multiply<kGroups, kBlocks>(ready + done * kTile * kOperandLanes, w_stride, x, x_stride);
          x += kPanelVector;
        }
      }
    }
    ready = to;
    ready_vectors = vectors;
  }
  for (int64_t v = 0; v < ready_vectors; ++v, x += kPanelVector)
    tiles_multiply<kGroups, kBlocks>(ready + v * kTile * kOperandLanes, ready_vectors * kTile * kOperandLanes, x, x_stride);
  tiles_store<kGroups, kBlocks>(c);
}

template <int kGroups, int kBlocks>
inline void wide_step(const operand* w, int64_t vectors, const operand* x, int64_t x_stride, float* c, bool add) {
  if (add) {
    tiles_load<kGroups, kBlocks>(c);
  } else {
    tiles_zero<kGroups, kBlocks>();
  }
  for (int64_t v = 0; v < vectors; ++v)
    tiles_multiply<kGroups, kBlocks>(w + v * kTile * kOperandLanes, vectors * kTile * kOperandLanes, x + v * kPanelVector,
                                     x_stride);
  tiles_store<kGroups, kBlocks>(c);
}

// kGroups x 16 rows times the tokens of a panel. finish(m, width, c) is told, once for every two blocks of tokens or the
// last one, that the sums of the `width` blocks from token m on are complete: c is [group][block] of tiles.
template <int kGroups, typename Finish>
inline void panel_product(const PackedRows* parts, const PackedRows* next, int64_t tokens, const operand* panel,
                          int64_t panel_stride, operand* scratch, float* c, const Finish& finish) {
  if (tokens <= 2 * kTile) {
    const auto product = tokens <= kTile ? narrow_product<kGroups, 1> : narrow_product<kGroups, 2>;
    product(parts, next, panel, panel_stride, scratch, c);
    finish(0, tokens <= kTile ? 1 : 2, c);
    return;
  }
  const int64_t chunks = padded(parts[0].k) / kChunk;
  for (int64_t begin = 0; begin < chunks; begin += kWideChunks) {
    const int64_t end = begin + kWideChunks < chunks ? begin + kWideChunks : chunks, vectors = (end - begin) * kVectors;
    for (int g = 0; g < kGroups; ++g) {
      PieceDecoder decoder(parts[g], begin, end, end < chunks ? parts[g] : next[g], end < chunks ? end : 0,
                           scratch + g * vectors * kTile * kOperandLanes);
      for (int row = 0; row < kTile; ++row) decoder.row();
    }
    for (int64_t m = 0; m < tokens; m += 2 * kTile) {
      const operand* x = panel + m / kTile * panel_stride + begin * kVectors * kPanelVector;
      // Sums that nothing is added to later are finished at once, all in one place.
      float* to = chunks <= kWideChunks ? c : c + m / (2 * kTile) * (kGroups * kNarrowBlocks * kTileFloats);
      const auto step = tokens - m > kTile ? wide_step<kGroups, 2> : wide_step<kGroups, 1>;
      step(scratch, vectors, x, panel_stride, to, begin > 0);
      if (end == chunks) finish(m, tokens - m > kTile ? 2 : 1, to);
    }
  }
}

// 16 consecutive intermediates of a block of tokens, [16][16 tokens], into the block's operands; `row` is the first.
inline void store_panel_rows(const float* values, int64_t row, operand* block) {
  const auto rounded = [](const float* p) {  // bfloat16 in the upper half, to nearest even; NaN stays NaN
    const __m512 x = _mm512_load_ps(p);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  };
  const int64_t vector = row / kChunk * kVectors, pair = row % kChunk / 8;
  // Elements e and e + 4 of a chunk are neighbours in a vector: position_in_chunk.
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < kVectors; ++j) {
      const float* from = values + (8 * half + j) * kTile;
      const __m512i even = _mm512_srli_epi32(rounded(from), 16);
      const __m512i both = _mm512_mask_mov_epi16(even, 0xAAAAAAAAu, rounded(from + kVectors * kTile));
      store_operand(block + (vector + j) * kPanelVector + (pair + half) * kOperandLanes, both);
    }
}

}  // namespace nvfp4

#endif
