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
constexpr int64_t kPanelMinimum = 5;

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
  operand *x, *h, *panel;
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
    panel = reinterpret_cast<operand*>(
        take(most * kTile * padded(std::max(layer.hidden, layer.intermediate)) * int64_t(sizeof(operand))));
#else
    blocks = nullptr;
    panel = nullptr;
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
// The operands of every slot that is multiplied on tiles into the panel; `rows` has the operands of one slot.
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
    pack_block(tokens, block.count, begin, std::min(vectors, begin + kPiece), ws.panel + i / pieces * kTile * stride);
  }
}
#endif

// Rows of one or two row ranges of an expert's weights (gate and up; or only one) times tokens into sums[m][row].
// panel: where the tokens start in the panel, or null where they are not multiplied on tiles.
void multiply(const PackedRows* parts, int part_count, int64_t rows, int64_t tokens, const operand* const* x,
              [[maybe_unused]] const operand* panel, ThreadScratch& scratch) {
#if defined(NVFP4_AMX)
  if (panel) {
    const int64_t chunks = padded(parts[0].k) / kChunk;
    for (int64_t begin = 0; begin < chunks; begin += kScratchChunks) {
      const int64_t end = std::min<int64_t>(chunks, begin + kScratchChunks), vectors = (end - begin) * kVectors;
      for (int p = 0; p < part_count; ++p)
        decode_block<kTile>(parts[p], rows, begin, end, scratch.decoded + p * rows * vectors * kOperandLanes);
      panel_block(scratch.decoded, rows * part_count, vectors, tokens, panel, chunks * kChunk * kTile, begin * kVectors,
                  scratch.sums, kScratchRows, begin > 0);
    }
    return;
  }
#endif
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

// Where the slots from `first` on, a whole number of blocks into their expert, start in the panel; null for the others.
const operand* panel_of(const Workspace& ws, int64_t expert, int64_t first, int64_t stride) {
  if (!use_panel(ws.offsets[expert + 1] - ws.offsets[expert])) return nullptr;
  return ws.panel + (ws.first_block[expert] * int64_t{16} + first - ws.offsets[expert]) * stride;
}

void gemm1(const Nvfp4Layer& layer, const Workspace& ws, int thread, int threads) {
  ThreadScratch& scratch = thread_scratch();
  const int64_t hidden = layer.hidden, inter = layer.intermediate;
  const int64_t x_stride = padded(hidden), h_stride = padded(inter);
  // W4A4 quantizes the intermediate in blocks of 16, which must not straddle two threads.
  const Range mine = share(inter, layer.quantize_activations ? kBlock : kRowUnit, thread, threads);
  const operand* x[kPanelTokens];
  for (int32_t t = 0; t < *ws.touched_count; ++t) {
    const int64_t expert = ws.touched[t];
    const PackedRows gate{layer.w13 + expert * 2 * inter * (hidden / 2),
                          layer.w13_scale + expert * 2 * inter * (hidden / kBlock), hidden};
    float gate_alpha = layer.w13_global[2 * expert] * kScaleBias;
    float up_alpha = layer.w13_global[2 * expert + 1] * kScaleBias;
    if (layer.quantize_activations) {
      const float scale = input_scale_13(layer, expert);
      gate_alpha *= scale;
      up_alpha *= scale;
    }
    for (int64_t first = ws.offsets[expert]; first < ws.offsets[expert + 1]; first += kPanelTokens) {
      const int64_t tokens = std::min<int64_t>(ws.offsets[expert + 1] - first, kPanelTokens);
      for (int64_t m = 0; m < tokens; ++m)
        x[m] = ws.x + (layer.quantize_activations ? first + m : ws.order[first + m] / layer.top_k) * x_stride;
      for (int64_t row = mine.begin; row < mine.end; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, mine.end - row);
        const PackedRows parts[2] = {gate.at(row), gate.at(inter + row)};
        multiply(parts, 2, rows, tokens, x, panel_of(ws, expert, first, x_stride), scratch);
        for (int64_t m = 0; m < tokens; ++m) {
          const float* sums = scratch.sums + m * kScratchRows;
          float activated[kTileRows];
          uint16_t values[kTileRows];
          swiglu(sums, sums + rows, gate_alpha, up_alpha, layer.limit, rows, activated);
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
  }
}

void gemm2(const Nvfp4Layer& layer, const Call& call, const Workspace& ws, int thread, int threads) {
  ThreadScratch& scratch = thread_scratch();
  const int64_t hidden = layer.hidden, inter = layer.intermediate, h_stride = padded(inter);
  const Range mine = share(hidden, kRowUnit, thread, threads);
  const operand* h[kPanelTokens];
  for (int64_t row = mine.begin; row < mine.end; row += kScratchRows) {
    const int64_t rows = std::min<int64_t>(kScratchRows, mine.end - row);
    for (int64_t token = 0; token < call.tokens; ++token)
      std::fill_n(ws.y + token * hidden + row, rows, 0.0f);
    for (int32_t t = 0; t < *ws.touched_count; ++t) {
      const int64_t expert = ws.touched[t];
      const PackedRows down{layer.w2 + expert * hidden * (inter / 2), layer.w2_scale + expert * hidden * (inter / kBlock),
                            inter};
      float alpha = layer.w2_global[expert] * kScaleBias;
      if (layer.quantize_activations) alpha *= layer.w2_input_scale[expert];
      for (int64_t first = ws.offsets[expert]; first < ws.offsets[expert + 1]; first += kPanelTokens) {
        const int64_t tokens = std::min<int64_t>(ws.offsets[expert + 1] - first, kPanelTokens);
        for (int64_t m = 0; m < tokens; ++m) h[m] = ws.h + (first + m) * h_stride;
        const PackedRows part = down.at(row);
        multiply(&part, 1, rows, tokens, h, panel_of(ws, expert, first, h_stride), scratch);
        for (int64_t m = 0; m < tokens; ++m) {
          const int64_t slot = ws.order[first + m];
          const float weight = call.weights[slot];
          const float* sums = scratch.sums + m * kScratchRows;
          float* y = ws.y + slot / layer.top_k * hidden + row;
          for (int64_t i = 0; i < rows; ++i) y[i] += sums[i] * alpha * weight;
        }
      }
    }
    for (int64_t token = 0; token < call.tokens; ++token) {
      const float* y = ws.y + token * hidden + row;
      uint16_t* out = call.out + token * call.out_stride + row;
      for (int64_t i = 0; i < rows; ++i) out[i] = to_bf16(y[i]);
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
#if defined(NVFP4_AMX)
  if (tiles) {
    const int64_t stride = padded(layer.intermediate);
    pack_panel(ws, stride, [&](int64_t place) { return ws.h + place * stride; }, thread, threads);
    wait();
  }
#endif
  gemm2(layer, call, ws, thread, threads);
}

// Below this, threads would wait for each other longer than they work.
constexpr int64_t kOneThreadNanoseconds = 50'000;

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
