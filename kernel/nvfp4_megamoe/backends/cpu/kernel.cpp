// The MoE layer on packed NVFP4 weights: route, GEMM 1 with SwiGLU, GEMM 2 with the sum over a token's slots.
//
// Parallel scheme. Every thread owns a range of weight rows, of w13 in phase 1 and of w2 in phase 2, and walks over all
// touched experts with it: equal work for any routing, each weight decoded by one thread, no atomics. An output element
// is computed by one thread in an order that depends on the routing only, hence results are identical on repeat and for
// any number of threads.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>

#include "activations.h"
#include "amx.h"
#include "dot.h"

namespace nvfp4 {
namespace {

constexpr int64_t kTokenChunk = 4096;  // tokens a pass; bounds the workspace
constexpr int64_t kTileRows = 32;      // gate rows of a block of phase 1, with as many up rows
constexpr int64_t kPanelTokens = 512;  // tokens of a block of either phase
constexpr int64_t kSumsKept = 1 << 17;  // outputs whose sums stay in the second cache over all experts
constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace
}  // namespace nvfp4

extern "C" {

// Mirrored field by field in library.py.
struct Nvfp4Layer {
  int64_t local_experts, num_experts, top_k, hidden, intermediate;
  const uint8_t *w13, *w13_scale, *w2, *w2_scale;
  const float *w13_global, *w2_global, *w13_input_scale, *w2_input_scale;
  float limit;           // of SwiGLU; infinity for none
  int32_t quantize_activations;  // W4A4
};
}

namespace nvfp4 {
namespace {

struct Call {
  const uint16_t* x;
  int64_t x_stride;
  const void* ids;
  int32_t ids_are_int64;
  const float* weights;
  const int32_t* expert_map;
  uint16_t* out;
  int64_t out_stride;
  int64_t tokens;
};

// Experts with at least this many tokens are multiplied on AMX tiles, where there are any.
constexpr int64_t kPanelMinimum = 4;

#if defined(NVFP4_AMX)
constexpr int64_t kRowUnit = kTile;
inline bool use_panel(int64_t tokens) { return tokens >= kPanelMinimum && amx_usable(); }
#else
constexpr int64_t kRowUnit = kGroup;
inline bool use_panel(int64_t) { return false; }
#endif

// Up to 16 slots of one expert in a panel.
struct Block {
  int32_t first, count;  // places in Workspace::order
};

// Pieces of the caller's scratch.
struct Workspace {
  int32_t *order, *offsets, *cursor, *touched, *touched_count;
  int32_t *first_block, *block_count;  // of a local expert in the panel, and of the panel
  Block* blocks;
  operand *x, *h;
  operand *x_panel, *h_panel;  // of the slots multiplied on tiles, which have no place in h
  float* y;
  int64_t bytes;

  Workspace(const Nvfp4Layer& layer, int64_t tokens, uint8_t* base) {
    const int64_t slots = tokens * layer.top_k;
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      uint8_t* p = base + at;
      at += aligned(size);
      return p;
    };
    order = reinterpret_cast<int32_t*>(take(slots * 4));
    offsets = reinterpret_cast<int32_t*>(take((layer.local_experts + 1) * 4));
    cursor = reinterpret_cast<int32_t*>(take(layer.local_experts * 4));
    touched = reinterpret_cast<int32_t*>(take(layer.local_experts * 4));
    touched_count = reinterpret_cast<int32_t*>(take(4));
    first_block = reinterpret_cast<int32_t*>(take(layer.local_experts * 4));
    block_count = reinterpret_cast<int32_t*>(take(4));
#if defined(NVFP4_AMX)
    const int64_t most = slots / kTile + std::min(layer.local_experts, slots / kPanelMinimum);
    blocks = reinterpret_cast<Block*>(take(most * int64_t(sizeof(Block))));
    x_panel = reinterpret_cast<operand*>(take(most * kTile * padded(layer.hidden) * int64_t(sizeof(operand))));
    h_panel = reinterpret_cast<operand*>(take(most * kTile * padded(layer.intermediate) * int64_t(sizeof(operand))));
#else
    blocks = nullptr;
    x_panel = h_panel = nullptr;
#endif
    x = reinterpret_cast<operand*>(
        take((layer.quantize_activations ? slots : tokens) * padded(layer.hidden) * int64_t(sizeof(operand))));
    h = reinterpret_cast<operand*>(take(slots * padded(layer.intermediate) * int64_t(sizeof(operand))));
    y = reinterpret_cast<float*>(take(tokens * layer.hidden * 4));
    bytes = at + kAlign;  // for aligning the base
  }
};

// Scratch of one thread: decoded weights, and the sums of a block. Kept for the life of the thread, 384 KiB.
struct ThreadScratch {
  operand* decoded = nullptr;
  float* sums = nullptr;
  ThreadScratch() {
    decoded = static_cast<operand*>(std::aligned_alloc(kAlign, kScratchOperands * sizeof(operand)));
    sums = static_cast<float*>(std::aligned_alloc(kAlign, kPanelTokens * kScratchRows * sizeof(float)));
    if (!decoded || !sums) throw std::bad_alloc();
  }
  ~ThreadScratch() {
    std::free(decoded);
    std::free(sums);
  }
};

ThreadScratch& thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

int64_t local_expert(const Nvfp4Layer& layer, const Call& call, int64_t slot) {
  const int64_t id = call.ids_are_int64 ? static_cast<const int64_t*>(call.ids)[slot]
                                        : static_cast<const int32_t*>(call.ids)[slot];
  if (!call.expert_map) return id >= 0 && id < layer.local_experts ? id : -1;
  if (id < 0 || id >= layer.num_experts) return -1;
  const int64_t local = call.expert_map[id];
  return local >= 0 && local < layer.local_experts ? local : -1;
}

// Slots sorted by local expert, stably: moe.routing.make_slots.
void route(const Nvfp4Layer& layer, const Call& call, Workspace& ws) {
  const int64_t slots = call.tokens * layer.top_k, experts = layer.local_experts;
  std::fill(ws.offsets, ws.offsets + experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = local_expert(layer, call, slot);
    if (e >= 0) ++ws.offsets[e + 1];
  }
  int32_t count = 0, blocks = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t tokens = ws.offsets[e + 1], first = ws.offsets[e];
    if (tokens) ws.touched[count++] = static_cast<int32_t>(e);
    ws.offsets[e + 1] += first;
    ws.cursor[e] = first;
    ws.first_block[e] = blocks;
#if defined(NVFP4_AMX)
    if (use_panel(tokens))
      for (int32_t m = 0; m < tokens; m += kTile) ws.blocks[blocks++] = {first + m, std::min(kTile, tokens - m)};
#endif
  }
  *ws.touched_count = count;
  *ws.block_count = blocks;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = local_expert(layer, call, slot);
    if (e >= 0) ws.order[ws.cursor[e]++] = static_cast<int32_t>(slot);
  }
}

struct Range {
  int64_t begin, end;
};

// This thread's share of `count` in multiples of `unit`.
Range share(int64_t count, int64_t unit, int thread, int threads) {
  const int64_t units = (count + unit - 1) / unit;
  return {units * thread / threads * unit, std::min(count, units * (thread + 1) / threads * unit)};
}

// bfloat16 elements [begin, end) of a row into operands in lane order; begin is a multiple of kChunk, and where end is
// the end of the row, operands up to the next chunk are zeroed.
void store_lane_order(const uint16_t* row, int64_t begin, int64_t end, operand* to) {
  int64_t e = begin;
#if defined(NVFP4_BF16)
  const __m512i lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
                                        10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i evens = _mm512_slli_epi16(lane, 1), odds = _mm512_or_si512(evens, _mm512_set1_epi16(1));
  for (; e + kChunk <= end; e += kChunk) {
    voperand v[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load_operand(row + e + j * kOperandLanes);
    const voperand even01 = _mm512_permutex2var_epi16(v[0], evens, v[1]), odd01 = _mm512_permutex2var_epi16(v[0], odds, v[1]);
    const voperand even23 = _mm512_permutex2var_epi16(v[2], evens, v[3]), odd23 = _mm512_permutex2var_epi16(v[2], odds, v[3]);
    store_operand(to + e, _mm512_permutex2var_epi16(even01, evens, even23));
    store_operand(to + e + kOperandLanes, _mm512_permutex2var_epi16(odd01, evens, odd23));
    store_operand(to + e + 2 * kOperandLanes, _mm512_permutex2var_epi16(even01, odds, even23));
    store_operand(to + e + 3 * kOperandLanes, _mm512_permutex2var_epi16(odd01, odds, odd23));
  }
#endif
  for (; e + kChunk <= end; e += kChunk)
    for (int lane = 0; lane < kOperandLanes; ++lane)
      for (int j = 0; j < kVectors; ++j)
        to[e + j * kOperandLanes + lane] = to_operand(row[e + lane * kVectors + j]);
  if (e < end) {
    std::fill(to + e, to + e + kChunk, operand(0));
    for (int64_t i = e; i < end; ++i) to[e + position_in_chunk(static_cast<int>(i - e))] = to_operand(row[i]);
  }
}

void pack_tokens(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int thread, int threads) {
  const int64_t stride = padded(layer.hidden), chunks = stride / kChunk;
  const Range mine = share(call.tokens * chunks, 1, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t token = i / chunks, begin = i % chunks * kChunk;
    store_lane_order(call.x + token * call.x_stride, begin, std::min(begin + kChunk, layer.hidden), ws.x + token * stride);
  }
}

// Input scale of GEMM 1: one for gate and up, which share their input.
float input_scale_13(const Nvfp4Layer& layer, int64_t expert) {
  return std::max(layer.w13_input_scale[2 * expert], layer.w13_input_scale[2 * expert + 1]);
}

// W4A4: each slot has its own copy of the token, quantized with its expert's input scale.
void pack_slots_quantized(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int thread, int threads) {
  const int64_t stride = padded(layer.hidden), chunks = stride / kChunk;
  for (int32_t i = 0; i < *ws.touched_count; ++i) {
    const int64_t expert = ws.touched[i], first = ws.offsets[expert];
    const float scale = input_scale_13(layer, expert);
    const Range mine = share((ws.offsets[expert + 1] - first) * chunks, 1, thread, threads);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      const int64_t place = first + k / chunks, begin = k % chunks * kChunk;
      const int64_t end = std::min(begin + kChunk, layer.hidden);
      const uint16_t* from = call.x + ws.order[place] / layer.top_k * call.x_stride;
      uint16_t values[kChunk];
      for (int64_t e = begin; e < end; e += kBlock) {
        float block[kBlock];
        for (int i = 0; i < kBlock; ++i) block[i] = from_bf16(from[e + i]);
        quantize_block(block, scale, values + (e - begin));
      }
      store_lane_order(values, 0, end - begin, ws.x + place * stride + begin);
    }
  }
}

#if defined(NVFP4_AMX)
// The tokens of every slot that is multiplied on tiles into the panel; `rows` has the operands of one slot.
template <typename Rows>
void pack_panel(const Workspace& ws, int64_t stride, const Rows& rows, int thread, int threads) {
  constexpr int64_t kPiece = 16;  // vectors, so that a few blocks keep all threads busy
  const int64_t vectors = stride / kOperandLanes, pieces = (vectors + kPiece - 1) / kPiece;
  const Range mine = share(*ws.block_count * pieces, 1, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const Block block = ws.blocks[i / pieces];
    const operand* tokens[kTile];
    for (int32_t m = 0; m < block.count; ++m) tokens[m] = rows(block.first + m);
    const int64_t begin = i % pieces * kPiece;
    pack_block(tokens, block.count, begin, std::min(vectors, begin + kPiece), ws.x_panel + i / pieces * kTile * stride);
  }
}
#endif

// Rows of one or two row ranges of an expert's weights (gate and up; or only one) times tokens into sums[m][row].
void multiply(const PackedRows* parts, int part_count, int64_t rows, int64_t tokens, const operand* const* x,
              ThreadScratch& scratch) {
  if (tokens <= kFusedTokens) {
    for (int p = 0; p < part_count; ++p)
      fused_block(parts[p], rows, static_cast<int>(tokens), x, scratch.sums + p * rows, kScratchRows);
    return;
  }
  const int64_t chunks = padded(parts[0].k) / kChunk;
  for (int64_t begin = 0; begin < chunks; begin += kScratchChunks) {
    const int64_t end = std::min<int64_t>(chunks, begin + kScratchChunks), vectors = (end - begin) * kVectors;
    for (int p = 0; p < part_count; ++p)
      decode_block<kGroup>(parts[p], rows, begin, end, scratch.decoded + p * rows * vectors * kOperandLanes);
    scratch_block(scratch.decoded, rows * part_count, vectors, tokens, x, begin * kChunk, scratch.sums, kScratchRows,
                  begin > 0);
  }
}

struct Alphas {
  float gate, up;
};

Alphas alphas_13(const Nvfp4Layer& layer, int64_t expert) {
  const float scale = layer.quantize_activations ? kScaleBias * input_scale_13(layer, expert) : kScaleBias;
  return {layer.w13_global[2 * expert] * scale, layer.w13_global[2 * expert + 1] * scale};
}

float alpha_2(const Nvfp4Layer& layer, int64_t expert) {
  const float alpha = layer.w2_global[expert] * kScaleBias;
  return layer.quantize_activations ? alpha * layer.w2_input_scale[expert] : alpha;
}

PackedRows gate_rows(const Nvfp4Layer& layer, int64_t expert) {
  const int64_t hidden = layer.hidden, row = expert * 2 * layer.intermediate;
  return PackedRows{layer.w13, layer.w13_scale, hidden}.at(row);
}

PackedRows down_rows(const Nvfp4Layer& layer, int64_t expert) {
  return PackedRows{layer.w2, layer.w2_scale, layer.intermediate}.at(expert * layer.hidden);
}

#if defined(NVFP4_AMX)
// The touched expert after number t, or the last.
int64_t expert_after(const Workspace& ws, int32_t t) { return ws.touched[std::min(t + 1, *ws.touched_count - 1)]; }

// SwiGLU of 16 rows of a block of tokens, and for W4A4 its quantization, into the panel of GEMM 2.
void finish_tile(const Nvfp4Layer& layer, int64_t expert, Alphas alphas, const float* gate, const float* up, int64_t row,
                 operand* block) {
  alignas(kAlign) float values[kTileFloats];
  swiglu_vectors(gate, up, alphas.gate, alphas.up, layer.limit, kTileFloats, values);
  if (layer.quantize_activations) {
    alignas(kAlign) float turned[kTileFloats];
    transpose16(values, kTile, turned, kTile);
    for (int m = 0; m < kTile; ++m) {
      uint16_t quantized[kBlock];
      quantize_block(turned + m * kTile, layer.w2_input_scale[expert], quantized);
      for (int i = 0; i < kBlock; ++i) turned[m * kTile + i] = from_bf16(quantized[i]);
    }
    transpose16(turned, kTile, values, kTile);
  }
  store_panel_rows(values, row, block);
}

// Rows `mine` of gate and up of touched expert number t.
void gemm1_on_tiles(const Nvfp4Layer& layer, const Workspace& ws, int32_t t, Range mine, ThreadScratch& scratch) {
  const int64_t expert = ws.touched[t], inter = layer.intermediate;
  const int64_t x_stride = kTile * padded(layer.hidden), h_stride = kTile * padded(inter);
  const PackedRows gate = gate_rows(layer, expert), next_gate = gate_rows(layer, expert_after(ws, t));
  const Alphas alphas = alphas_13(layer, expert);
  const int64_t slots = ws.offsets[expert + 1] - ws.offsets[expert];
  for (int64_t first = 0; first < slots; first += kPanelTokens) {
    const int64_t tokens = std::min<int64_t>(slots - first, kPanelTokens), block = ws.first_block[expert] + first / kTile;
    for (int64_t row = mine.begin; row < mine.end; row += kTile) {
      const PackedRows parts[] = {gate.at(row), gate.at(inter + row)};
      const bool last = row + kTile >= mine.end;
      const PackedRows next[] = {last ? next_gate.at(mine.begin) : parts[0].at(kTile),
                                 last ? next_gate.at(inter + mine.begin) : parts[1].at(kTile)};
      const auto finish = [&](int64_t m, int width, const float* sums) {
        for (int b = 0; b < width; ++b, sums += kTileFloats)
          finish_tile(layer, expert, alphas, sums, sums + width * kTileFloats, row,
                      ws.h_panel + (block + m / kTile + b) * h_stride);
      };
      panel_product<2>(parts, next, tokens, ws.x_panel + block * x_stride, x_stride, scratch.decoded, scratch.sums, finish);
    }
  }
}

// Rows `mine` of w2 of touched expert number t, added to y.
void gemm2_on_tiles(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int32_t t, Range mine,
                    ThreadScratch& scratch) {
  const int64_t expert = ws.touched[t], h_stride = kTile * padded(layer.intermediate);
  const PackedRows down = down_rows(layer, expert), next_down = down_rows(layer, expert_after(ws, t)).at(mine.begin);
  const float alpha = alpha_2(layer, expert);
  const int64_t begin = ws.offsets[expert], slots = ws.offsets[expert + 1] - begin;
  for (int64_t first = 0; first < slots; first += kPanelTokens) {
    const int64_t tokens = std::min<int64_t>(slots - first, kPanelTokens), block = ws.first_block[expert] + first / kTile;
    const operand* h = ws.h_panel + block * h_stride;
    for (int64_t row = mine.begin; row < mine.end; row += 2 * kTile) {
      const int groups = mine.end - row > kTile ? 2 : 1;
      const PackedRows parts[] = {down.at(row), down.at(row + kTile)};
      const bool last = row + 2 * kTile >= mine.end;
      const PackedRows next[] = {last ? next_down : down.at(row + 2 * kTile),
                                 last ? next_down.at(kTile) : down.at(row + 3 * kTile)};
      const auto finish = [&](int64_t m, int width, const float* sums) {
        for (int b = 0; b < width; ++b, m += kTile) {
          alignas(kAlign) float turned[2][kTileFloats];
          for (int g = 0; g < groups; ++g) transpose16(sums + (g * width + b) * kTileFloats, kTile, turned[g], kTile);
          const int64_t count = std::min<int64_t>(kTile, tokens - m);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = ws.order[begin + first + m + i];
            float* y = ws.y + slot / layer.top_k * layer.hidden + row;
            const __m512 factor = _mm512_set1_ps(alpha * call.weights[slot]);
            for (int g = 0; g < groups; ++g, y += kTile)
              _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_load_ps(turned[g] + i * kTile), factor, _mm512_loadu_ps(y)));
          }
        }
      };
      if (groups == 2) {
        panel_product<2>(parts, next, tokens, h, h_stride, scratch.decoded, scratch.sums, finish);
      } else {
        panel_product<1>(parts, next, tokens, h, h_stride, scratch.decoded, scratch.sums, finish);
      }
    }
  }
}

// The operands between the end of a row of the panel of GEMM 2 and its last chunk.
void clear_panel_end(const Nvfp4Layer& layer, const Workspace& ws) {
  const int64_t inter = layer.intermediate, stride = kTile * padded(inter), vector = inter / kChunk * kVectors;
  const int64_t begin = inter % kChunk / 8 * kOperandLanes;  // of a vector, after whole pairs
  for (int64_t block = 0; block < *ws.block_count; ++block)
    for (int64_t v = vector; v < vector + kVectors; ++v) {
      operand* to = ws.h_panel + block * stride + v * kPanelVector;
      std::fill(to + begin, to + kPanelVector, operand(0));
    }
}
#endif

void gemm1(const Nvfp4Layer& layer, const Workspace& ws, int thread, int threads) {
  ThreadScratch& scratch = thread_scratch();
  const int64_t hidden = layer.hidden, inter = layer.intermediate;
  const int64_t x_stride = padded(hidden), h_stride = padded(inter);
  // W4A4 quantizes the intermediate in blocks of 16, which must not straddle two threads.
  const Range mine = share(inter, layer.quantize_activations ? kBlock : kRowUnit, thread, threads);
  const operand* x[kPanelTokens];
  for (int32_t t = 0; t < *ws.touched_count; ++t) {
    const int64_t expert = ws.touched[t];
#if defined(NVFP4_AMX)
    if (use_panel(ws.offsets[expert + 1] - ws.offsets[expert])) {
      gemm1_on_tiles(layer, ws, t, mine, scratch);
      continue;
    }
#endif
    const PackedRows gate = gate_rows(layer, expert);
    const Alphas alphas = alphas_13(layer, expert);
    for (int64_t first = ws.offsets[expert]; first < ws.offsets[expert + 1]; first += kPanelTokens) {
      const int64_t tokens = std::min<int64_t>(ws.offsets[expert + 1] - first, kPanelTokens);
      for (int64_t m = 0; m < tokens; ++m)
        x[m] = ws.x + (layer.quantize_activations ? first + m : ws.order[first + m] / layer.top_k) * x_stride;
      for (int64_t row = mine.begin; row < mine.end; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, mine.end - row);
        const PackedRows parts[2] = {gate.at(row), gate.at(inter + row)};
        multiply(parts, 2, rows, tokens, x, scratch);
        for (int64_t m = 0; m < tokens; ++m) {
          const float* sums = scratch.sums + m * kScratchRows;
          float activated[kTileRows];
          uint16_t values[kTileRows];
          swiglu(sums, sums + rows, alphas.gate, alphas.up, layer.limit, rows, activated);
          if (layer.quantize_activations) {
            for (int64_t i = 0; i < rows; i += kBlock)
              quantize_block(activated + i, layer.w2_input_scale[expert], values + i);
          } else {
            for (int64_t i = 0; i < rows; ++i) values[i] = to_bf16(activated[i]);
          }
          operand* to = ws.h + (first + m) * h_stride;
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t e = row + i;
            to[e / kChunk * kChunk + position_in_chunk(static_cast<int>(e % kChunk))] = to_operand(values[i]);
          }
        }
      }
    }
  }
  // The operands between the end of a row and its last chunk.
  if (inter % kChunk && thread == threads - 1) {
    const int64_t slots = ws.offsets[layer.local_experts], base = inter / kChunk * kChunk;
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t e = inter % kChunk; e < kChunk; ++e)
        ws.h[slot * h_stride + base + position_in_chunk(static_cast<int>(e))] = operand(0);
#if defined(NVFP4_AMX)
    clear_panel_end(layer, ws);
#endif
  }
}

void gemm2(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int thread, int threads) {
  ThreadScratch& scratch = thread_scratch();
  const int64_t hidden = layer.hidden, inter = layer.intermediate, h_stride = padded(inter);
  const Range mine = share(hidden, kRowUnit, thread, threads);
  const operand* h[kPanelTokens];
  const int64_t step = std::max<int64_t>(kScratchRows, kSumsKept / call.tokens / kScratchRows * kScratchRows);
  for (int64_t begin = mine.begin; begin < mine.end; begin += step) {
    const Range part{begin, std::min(mine.end, begin + step)};
    for (int64_t token = 0; token < call.tokens; ++token)
      std::fill(ws.y + token * hidden + part.begin, ws.y + token * hidden + part.end, 0.0f);
    for (int32_t t = 0; t < *ws.touched_count; ++t) {
      const int64_t expert = ws.touched[t];
#if defined(NVFP4_AMX)
      if (use_panel(ws.offsets[expert + 1] - ws.offsets[expert])) {
        gemm2_on_tiles(layer, call, ws, t, part, scratch);
        continue;
      }
#endif
      const PackedRows down = down_rows(layer, expert);
      const float alpha = alpha_2(layer, expert);
      for (int64_t first = ws.offsets[expert]; first < ws.offsets[expert + 1]; first += kPanelTokens) {
        const int64_t tokens = std::min<int64_t>(ws.offsets[expert + 1] - first, kPanelTokens);
        for (int64_t m = 0; m < tokens; ++m) h[m] = ws.h + (first + m) * h_stride;
        for (int64_t row = part.begin; row < part.end; row += kScratchRows) {
          const int64_t rows = std::min<int64_t>(kScratchRows, part.end - row);
          const PackedRows weights = down.at(row);
          multiply(&weights, 1, rows, tokens, h, scratch);
          for (int64_t m = 0; m < tokens; ++m) {
            const int64_t slot = ws.order[first + m];
            const float weight = call.weights[slot];
            const float* sums = scratch.sums + m * kScratchRows;
            float* y = ws.y + slot / layer.top_k * hidden + row;
            for (int64_t i = 0; i < rows; ++i) y[i] += sums[i] * alpha * weight;
          }
        }
      }
    }
    for (int64_t token = 0; token < call.tokens; ++token) {
      const float* y = ws.y + token * hidden;
      uint16_t* out = call.out + token * call.out_stride;
      for (int64_t i = part.begin; i < part.end; ++i) out[i] = to_bf16(y[i]);
    }
  }
}

// What one thread takes for the routed slots, in nanoseconds; measured at 10 bytes and 100 operations a nanosecond.
int64_t estimated_nanoseconds(const Nvfp4Layer& layer, const Workspace& ws) {
  const int64_t weights = 3 * layer.hidden * layer.intermediate;
  const int64_t bytes = *ws.touched_count * weights * 9 / 16, operations = 2 * ws.offsets[layer.local_experts] * weights;
  return bytes / 10 + operations / 100;
}

// One thread's part; `wait` is the barrier of all threads.
template <typename Wait>
void run_thread(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int thread, int threads, Wait wait) {
  if (layer.quantize_activations) {
    pack_slots_quantized(layer, call, ws, thread, threads);
  } else {
    pack_tokens(layer, call, ws, thread, threads);
  }
  wait();
#if defined(NVFP4_AMX)
  const bool tiles = *ws.block_count > 0;
  std::optional<TileContext> context;
  if (tiles) {
    context.emplace();
    const int64_t stride = padded(layer.hidden);
    const auto x = [&](int64_t place) {
      return ws.x + (layer.quantize_activations ? place : ws.order[place] / layer.top_k) * stride;
    };
    pack_panel(ws, stride, x, thread, threads);
    wait();
  }
#endif
  gemm1(layer, ws, thread, threads);
  wait();
  gemm2(layer, call, ws, thread, threads);
}

// Below this, threads would wait for each other longer than they work.
constexpr int64_t kOneThreadNanoseconds = 20'000;

void run_chunk(const Nvfp4Layer& layer, const Call& call, uint8_t* base) {
  Workspace ws(layer, call.tokens, base);
  route(layer, call, ws);
  if (estimated_nanoseconds(layer, ws) < kOneThreadNanoseconds) {
    run_thread(layer, call, ws, 0, 1, [] {});
    return;
  }
  // All of torch's threads or none: with a smaller team libgomp ends the others, and new ones would not be bound to the
  // cores that vLLM gave to the old.
#pragma omp parallel
  run_thread(layer, call, ws, omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
  });
}

}  // namespace
}  // namespace nvfp4

#define NVFP4_EXPORT extern "C" __attribute__((visibility("default")))

NVFP4_EXPORT const char* nvfp4_isa() {
#if defined(NVFP4_AMX)
  return nvfp4::amx_usable() ? "amx_bf16" : "avx512_bf16";
#elif defined(NVFP4_BF16)
  return "avx512_bf16";
#elif defined(NVFP4_AVX512)
  return "avx512";
#else
  return "avx2";
#endif
}

NVFP4_EXPORT int32_t nvfp4_threads() { return omp_get_max_threads(); }

NVFP4_EXPORT int64_t nvfp4_layer_bytes() { return sizeof(Nvfp4Layer); }

NVFP4_EXPORT int64_t nvfp4_workspace_bytes(const Nvfp4Layer* layer, int64_t tokens) {
  return nvfp4::Workspace(*layer, std::min(tokens, nvfp4::kTokenChunk), nullptr).bytes;
}

// Strides in elements. The workspace holds nvfp4_workspace_bytes(layer, tokens).
NVFP4_EXPORT void nvfp4_forward(const Nvfp4Layer* layer, const void* x, int64_t x_stride, const void* ids,
                                int32_t ids_are_int64, const float* weights, const int32_t* expert_map, void* out,
                                int64_t out_stride, int64_t tokens, uint8_t* workspace) {
  auto base = reinterpret_cast<uint8_t*>(nvfp4::aligned(reinterpret_cast<int64_t>(workspace)));
  for (int64_t first = 0; first < tokens; first += nvfp4::kTokenChunk) {
    const int64_t slot = first * layer->top_k;
    const nvfp4::Call call{static_cast<const uint16_t*>(x) + first * x_stride,
                           x_stride,
                           static_cast<const uint8_t*>(ids) + slot * (ids_are_int64 ? 8 : 4),
                           ids_are_int64,
                           weights + slot,
                           expert_map,
                           static_cast<uint16_t*>(out) + first * out_stride,
                           out_stride,
                           std::min(nvfp4::kTokenChunk, tokens - first)};
    nvfp4::run_chunk(*layer, call, base);
  }
}
