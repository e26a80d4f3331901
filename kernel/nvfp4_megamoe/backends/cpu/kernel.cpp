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

#include "activations.h"
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

// Pieces of the caller's scratch.
struct Workspace {
  int32_t *order, *offsets, *cursor, *touched, *touched_count;
  operand *x, *h;
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
  int32_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (ws.offsets[e + 1]) ws.touched[count++] = static_cast<int32_t>(e);
    ws.offsets[e + 1] += ws.offsets[e];
    ws.cursor[e] = ws.offsets[e];
  }
  *ws.touched_count = count;
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
      decode_block(parts[p], rows, begin, end, scratch.decoded + p * rows * vectors * kOperandLanes);
    scratch_block(scratch.decoded, rows * part_count, vectors, tokens, x, begin * kChunk, scratch.sums, kScratchRows,
                  begin > 0);
  }
}

void gemm1(const Nvfp4Layer& layer, const Workspace& ws, int thread, int threads) {
  ThreadScratch& scratch = thread_scratch();
  const int64_t hidden = layer.hidden, inter = layer.intermediate;
  const int64_t x_stride = padded(hidden), h_stride = padded(inter);
  // W4A4 quantizes the intermediate in blocks of 16, which must not straddle two threads.
  const Range mine = share(inter, layer.quantize_activations ? kBlock : kGroup, thread, threads);
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
        multiply(parts, 2, rows, tokens, x, scratch);
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
  const Range mine = share(hidden, kGroup, thread, threads);
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
        multiply(&part, 1, rows, tokens, h, scratch);
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

void run_chunk(const Nvfp4Layer& layer, const Call& call, uint8_t* base) {
  Workspace ws(layer, call.tokens, base);
#pragma omp parallel
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (thread == 0) route(layer, call, ws);
    if (layer.quantize_activations) {
#pragma omp barrier
      pack_slots_quantized(layer, call, ws, thread, threads);
    } else {
      pack_tokens(layer, call, ws, thread, threads);
    }
#pragma omp barrier
    gemm1(layer, ws, thread, threads);
#pragma omp barrier
    gemm2(layer, call, ws, thread, threads);
  }
}

}  // namespace
}  // namespace nvfp4

#define NVFP4_EXPORT extern "C" __attribute__((visibility("default")))

NVFP4_EXPORT const char* nvfp4_isa() {
#if defined(NVFP4_BF16)
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
