// SPDX-License-Identifier: Apache-2.0
// Draft attention over quantized pages (KIVI layout), dequantized in registers, then the full-precision tail.
//
// Free of R1, so the work is cut to fit the chip: the tiles of all requests, 64 quantized or 16 tail tokens each, form
// one line; every warp of the grid takes an equal run of it and works alone, no barrier in the loop. Where a run
// crosses from one unit (request, 8 item rows, KV head) to the next, it writes the unit's partial state; states merge
// in key order (device/softmax_state.cuh). Item row i is query row i / group, head i % group, as in
// split_attention.cuh.
//
// The operands are turned around: keys take the 16-wide side of mma m16n8k16, item rows its 8-wide side. Scores are
// s[key][row], outputs o[channel][row]; the weights turn from one into the other by movmatrix. Lane (g, t) = (lane / 4,
// lane % 4) reads channels t * D/4 .. of keys, channels g * D/8 .. of values (quant_tile.cuh), and token slots 2t,
// 2t+1, 2t+8, 2t+9 of a 16-token block stand for tokens t, 4+t, 8+t, 12+t: neighbouring lanes then read neighbouring
// rows.
//
// Grid: one block a multiprocessor; block: as many warps as there is room for. Shared memory: the line (QuantLine),
// then three halves of a tile a warp, filled by cp.async two halves ahead. Other dtypes, head_dims, page and group
// sizes take device/simple_attention.cuh.
#include <algorithm>

#include "device/cp_async.cuh"
#include "device/element.cuh"
#include "device/mma.cuh"
#include "device/quant_line.cuh"
#include "device/quant_tile.cuh"
#include "device/shared_memory.cuh"
#include "device/simple_attention.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

constexpr int kMostWarps = 12;  // of any shape

struct QuantArgs {
  QuantAttentionParams p;
  PartialStates partial;  // the state of row i % 8 of unit u from the run of worker w at index (w + u) * 8 + i % 8
  int* line;              // [QuantLine::ints], for the merge
  int workers;
};

template <int kHeadDim_, int kBits_, int kGroup_>
struct QuantShape {
  static constexpr int kHeadDim = kHeadDim_, kBits = kBits_, kGroup = kGroup_;
  static constexpr int kHalf = 16 / kBits;
  static constexpr int kMaxWarps =
      kBits == 8 ? 8 : kMostWarps;                       // 8 bits take more registers, and fewer warps find room
  static constexpr int kCodeRow = kHeadDim * kBits / 8;  // bytes
  // Half a tile in shared memory, keys or values: the parts of the page's head blob that belong to 64 tokens, or 16
  // rows of the tail. Offsets in bytes.
  static constexpr int kCodes = kQuantTokens * kCodeRow;
  static constexpr int kParam = kQuantTokens / kGroup * kHeadDim * 2;  // of keys and of values alike
  static constexpr int kScale = kCodes, kZero = kScale + kParam, kQuantBytes = kZero + kParam;
  static constexpr int kTailBytes = kTailTokens * kHeadDim * 2;
  static constexpr int kHalfBytes = kQuantBytes > kTailBytes ? kQuantBytes : kTailBytes;
  static constexpr int kHalves = 3;  // a warp's: one at work, two on their way
  static constexpr int kWarpBytes = kHalves * kHalfBytes;
  static_assert(kHalfBytes % 128 == 0);

  static __host__ __device__ int line_bytes(int requests) { return (QuantLine::ints(requests) * 4 + 127) / 128 * 128; }
};

// Bytes from `from` to shared memory, by one warp.
template <int kBytes>
__device__ __forceinline__ void copy_piece(uint32_t to, const char* from, int lane) {
#pragma unroll
  for (int i = 0; i < (kBytes + 511) / 512; ++i) {
    const int at = (i * 32 + lane) * 16;
    if (kBytes % 512 == 0 || at < kBytes) cp_async16(to + at, from + at, true);
  }
}

// The keys or the values of the tile at `c`.
template <class Shape, bool kValues>
__device__ void copy_half(const QuantAttentionParams& p, const QuantLine& line, const LineCursor& c, const char* page,
                          uint32_t stage, int lane) {
  if (!c.is_tail()) {
    const int first = c.tile * kQuantTokens % p.page_size;  // within the page
    const auto layout = QuantPageLayout::make(p.kv_heads, p.page_size, Shape::kHeadDim, Shape::kBits, Shape::kGroup, 2);
    const char* blob = page + c.kv_head * layout.head_bytes;
    const int64_t params = kValues ? layout.v_param_bytes : layout.k_param_bytes;
    if (kValues) blob += layout.code_bytes + 2 * layout.k_param_bytes;
    const int64_t param = kValues ? int64_t(first) * (Shape::kHeadDim / Shape::kGroup) * 2
                                  : int64_t(first) / Shape::kGroup * Shape::kHeadDim * 2;
    copy_piece<Shape::kCodes>(stage, blob + int64_t(first) * Shape::kCodeRow, lane);
    blob += layout.code_bytes + param;
    copy_piece<Shape::kParam>(stage + Shape::kScale, blob, lane);
    copy_piece<Shape::kParam>(stage + Shape::kZero, blob + params, lane);
    return;
  }
  constexpr int kRowBytes = Shape::kHeadDim * 2;
  const int first = (c.tile - c.quant_tiles) * kTailTokens;
  const int valid = line.last_pos[c.request] + 1 - p.quant_len[c.request] - first;
  const char* from =
      page + (int64_t((kValues ? p.kv_heads : 0) + c.kv_head) * p.page_size + first % p.page_size) * kRowBytes;
#pragma unroll
  for (int i = 0; i < Shape::kTailBytes / 512; ++i) {
    const int at = (i * 32 + lane) * 16;
    // Past the last token memory may hold anything: zeros instead.
    cp_async16(stage + at, from + at, at / kRowBytes < valid);
  }
}

// The token of slot `slot` (a row of the score tile) in its block of 16.
__device__ __forceinline__ int token_of_slot(int slot) { return slot % 8 / 2 + slot % 2 * 4 + slot / 8 * 8; }

// What one warp sums up over a unit.
template <class Shape>
struct QuantState {
  static constexpr int kSteps = Shape::kHeadDim / 16, kOutTiles = Shape::kHeadDim / 16;
  uint32_t q[kSteps][2];
  float o[kOutTiles][4];
  float l[2];  // of item rows 2t, 2t + 1; this lane's keys
  RunningMax m[2];

  __device__ void start(const QuantAttentionParams& p, const QuantLine& line, const LineCursor& c, int lane) {
    const int g = lane / 4, t = lane % 4, group = p.q_heads / p.kv_heads;
    const int query0 = line.row_offset[c.request], rows = (line.row_offset[c.request + 1] - query0) * group;
    const int i = c.row_block * kItemRows + g;
    const bool exists = i < rows;
    const auto* from =
        static_cast<const uint16_t*>(p.q) +
        (exists ? (query0 + i / group) * p.q_stride_row + (c.kv_head * group + i % group) * p.q_stride_head : 0) +
        t * (Shape::kHeadDim / 4);
#pragma unroll
    for (int w = 0; w < kSteps * 2 / Shape::kHalf; ++w) {
      uint32_t words[Shape::kHalf];
      load_words(words, from + w * 2 * Shape::kHalf);
#pragma unroll
      for (int j = 0; j < Shape::kHalf; ++j)
        q[(w * Shape::kHalf + j) / 2][j % 2] = exists ? pair_halves<Shape::kHalf>(words, j) : 0u;
    }
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.f;
#pragma unroll
    for (int i2 = 0; i2 < 2; ++i2) {
      l[i2] = 0.f;
      m[i2].raw = negative_infinity();
    }
  }

  // Scores in, weights out as B fragments (fp16 or bf16) of kBlocks blocks of 16 tokens; what was summed is rescaled.
  template <int kBlocks, bool kHalf>
  __device__ __forceinline__ void weigh(const float (&s)[kBlocks][4], float c, uint32_t (&weights)[kBlocks][2]) {
    float rescale[2], reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = negative_infinity();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) x = fmaxf(x, fmaxf(s[b][r], s[b][r + 2]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
      rescale[r] = m[r].update(x, c);
      reference[r] = m[r].reference(c);
      l[r] *= rescale[r];
    }
    if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] *= rescale[e % 2];
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = softmax_weight(s[b][e], c, reference[e % 2]);
        l[e % 2] += w[e];
      }
      weights[b][0] = movmatrix_trans(kHalf ? pack_half(w[0], w[1]) : pack_bf16(w[0], w[1]));
      weights[b][1] = movmatrix_trans(kHalf ? pack_half(w[2], w[3]) : pack_bf16(w[2], w[3]));
    }
  }

  // Scores of the 64 keys of a tile: s[block of 16][slots g, g + 8 x rows 2t, 2t + 1].
  __device__ __forceinline__ void score_tile(const unsigned char* stage, int lane, float (&s)[4][4]) const {
    constexpr int kHalf = Shape::kHalf, kBits = Shape::kBits, kHeadDim = Shape::kHeadDim;
    constexpr int kKeyWords = kHeadDim / 4 * kBits / 32, kChunk = kKeyWords < 4 ? kKeyWords : 4;
    constexpr int kGroupBlocks = Shape::kGroup / 16;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < kQuantTokens / Shape::kGroup; ++group) {
      // 2 and 4 bits: with q' = q * scale * 2^power and a code as v = 1 + code / 2^power, a score is
      // sum q' v - sum q' + sum q zero. The last two are the same for the group's keys: two more products.
      float minus_sum[4] = {}, zeros[4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kKeyWords / kChunk; ++chunk) {
        uint32_t words[kGroupBlocks][2][kChunk];
#pragma unroll
        for (int b = 0; b < kGroupBlocks; ++b)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            load_words(words[b][half],
                       stage + (group * Shape::kGroup + b * 16 + token_of_slot(g + 8 * half)) * Shape::kCodeRow +
                           t * (Shape::kCodeRow / 4) + chunk * kChunk * 4);
#pragma unroll
        for (int w = 0; w < kChunk; ++w) {
          const int word = chunk * kChunk + w;
          const int at = (group * kHeadDim + t * (kHeadDim / 4) + word * 2 * kHalf) * 2;
          uint32_t scale[kHalf], zero[kHalf];
          load_words(scale, stage + Shape::kScale + at);
          load_words(zero, stage + Shape::kZero + at);
#pragma unroll
          for (int j = 0; j < kHalf; j += 2) {
            const int step = (word * kHalf + j) / 2;
            const uint32_t scale0 = pair_halves<kHalf>(scale, j), scale1 = pair_halves<kHalf>(scale, j + 1);
            const uint32_t zero0 = pair_halves<kHalf>(zero, j), zero1 = pair_halves<kHalf>(zero, j + 1);
            if constexpr (kBits == 8) {  // the same with v = 1024 + code, in fp16
              const uint32_t q0 = pack_half(low_of(scale0) * low_of(q[step][0]), high_of(scale0) * high_of(q[step][0]));
              const uint32_t q1 = pack_half(low_of(scale1) * low_of(q[step][1]), high_of(scale1) * high_of(q[step][1]));
              constexpr uint32_t kMinusOne = 0xe400e400u;  // -1024
              mma_m16n8k16_half(minus_sum, {kMinusOne, kMinusOne, kMinusOne, kMinusOne}, q0, q1);
              mma_m16n8k16(zeros, {zero0, scale0, zero1, scale1}, q[step][0], q[step][1]);  // only c0, c1 are of use
#pragma unroll
              for (int b = 0; b < kGroupBlocks; ++b)
                mma_m16n8k16_half(s[group * kGroupBlocks + b],
                                  {raw_bytes(words[b][0][w], j), raw_bytes(words[b][1][w], j),
                                   raw_bytes(words[b][0][w], j + 1), raw_bytes(words[b][1][w], j + 1)},
                                  q0, q1);
            } else {
              using Raw = RawCodes<kBits>;
              const uint32_t q0 = multiply_bf16x2(multiply_bf16x2(scale0, Raw::factor(j)), q[step][0]);
              const uint32_t q1 = multiply_bf16x2(multiply_bf16x2(scale1, Raw::factor(j + 1)), q[step][1]);
              constexpr uint32_t kMinusOne = 0xbf80bf80u;
              mma_m16n8k16(minus_sum, {kMinusOne, kMinusOne, kMinusOne, kMinusOne}, q0, q1);
              mma_m16n8k16(zeros, {zero0, scale0, zero1, scale1}, q[step][0], q[step][1]);  // only c0, c1 are of use
#pragma unroll
              for (int b = 0; b < kGroupBlocks; ++b)
                mma_m16n8k16(s[group * kGroupBlocks + b],
                             {Raw::get(words[b][0][w], j), Raw::get(words[b][1][w], j), Raw::get(words[b][0][w], j + 1),
                              Raw::get(words[b][1][w], j + 1)},
                             q0, q1);
            }
          }
        }
      }
      {
        const float offset[2] = {minus_sum[0] + zeros[0], minus_sum[1] + zeros[1]};
#pragma unroll
        for (int b = 0; b < kGroupBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[group * kGroupBlocks + b][e] += offset[e % 2];
      }
    }
  }

  // A tile's keys to weights, and its values into the state.
  __device__ __forceinline__ void quant_keys(const unsigned char* stage, float c, int lane, uint32_t (&weights)[4][2]) {
    float s[4][4] = {};
    score_tile(stage, lane, s);
    weigh<4, Shape::kBits == 8>(s, c, weights);
  }

  __device__ __forceinline__ void quant_values(const unsigned char* stage, int lane, const uint32_t (&weights)[4][2]) {
    constexpr int kHalf = Shape::kHalf, kBits = Shape::kBits, kHeadDim = Shape::kHeadDim;
    const int g = lane / 4, t = lane % 4;
    constexpr int kUnits = kHeadDim / 8 * kBits / 16;  // 16-bit units of a lane's run of value channels
    const unsigned char* codes = stage + g * (kHeadDim / 8 * kBits / 8);
    const int param = g * (kHeadDim / 8) / Shape::kGroup * 2;
    constexpr int kParamRow = kHeadDim / Shape::kGroup * 2;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      uint32_t pair[2][kUnits];  // [tokens t, 4+t | 8+t, 12+t][unit]: the unit of the first (low) and second token
      PairParams<kBits> params[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = b * 16 + half * 8 + t;
        const auto param_pair = [&](int offset) {
          const auto* at = reinterpret_cast<const uint16_t*>(stage + offset + token * kParamRow + param);
          return uint32_t(at[0]) | uint32_t(at[4 * kParamRow / 2]) << 16;
        };
        params[half] = PairParams<kBits>::make(param_pair(Shape::kScale), param_pair(Shape::kZero));
        const unsigned char* row = codes + token * Shape::kCodeRow;
        if constexpr (kUnits == 1) {
          pair[half][0] = uint32_t(*reinterpret_cast<const uint16_t*>(row)) |
                          uint32_t(*reinterpret_cast<const uint16_t*>(row + 4 * Shape::kCodeRow)) << 16;
        } else {
          uint32_t first[kUnits / 2], second[kUnits / 2];
          load_words(first, row);
          load_words(second, row + 4 * Shape::kCodeRow);
#pragma unroll
          for (int u = 0; u < kUnits; ++u)
            pair[half][u] = __byte_perm(first[u / 2], second[u / 2], u % 2 ? 0x7632u : 0x5410u);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int j = 0; j < kHalf; j += 2) {
          const uint32_t a[4] = {
              dequantize_pair<kBits>(pair[0][u], j, params[0]), dequantize_pair<kBits>(pair[0][u], j + 1, params[0]),
              dequantize_pair<kBits>(pair[1][u], j, params[1]), dequantize_pair<kBits>(pair[1][u], j + 1, params[1])};
          if constexpr (kBits == 8)
            mma_m16n8k16_half(o[(u * kHalf + j) / 2], a, weights[b][0], weights[b][1]);
          else
            mma_m16n8k16(o[(u * kHalf + j) / 2], a, weights[b][0], weights[b][1]);
        }
    }
  }

  // first: the tail index of the tile's first token; seen: how many tail tokens item rows 2t, 2t + 1 see.
  __device__ __forceinline__ void tail_keys(const unsigned char* stage, float c, int lane, int first,
                                            const int (&seen)[2], uint32_t (&weights)[4][2]) {
    constexpr int kHalf = Shape::kHalf, kRowBytes = Shape::kHeadDim * 2;
    const int g = lane / 4, t = lane % 4;
    float s[1][4] = {};
    const unsigned char* keys = stage + token_of_slot(g) * kRowBytes + t * (kRowBytes / 4);
#pragma unroll
    for (int w = 0; w < kSteps * 2 / kHalf; ++w) {
      uint32_t low[kHalf], high[kHalf];
      load_words(low, keys + w * 4 * kHalf);
      load_words(high, keys + 8 * kRowBytes + w * 4 * kHalf);
#pragma unroll
      for (int j = 0; j < kHalf; j += 2) {
        const uint32_t a[4] = {pair_halves<kHalf>(low, j), pair_halves<kHalf>(high, j), pair_halves<kHalf>(low, j + 1),
                               pair_halves<kHalf>(high, j + 1)};
        const int step = (w * kHalf + j) / 2;
        mma_m16n8k16(s[0], a, q[step][0], q[step][1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first + token_of_slot(g + e / 2 * 8) >= seen[e % 2]) s[0][e] = negative_infinity();
    uint32_t own[1][2];
    weigh<1, false>(s, c, own);
    weights[0][0] = own[0][0];
    weights[0][1] = own[0][1];
  }

  __device__ __forceinline__ void tail_values(const unsigned char* stage, int lane, const uint32_t (&weights)[4][2]) {
    constexpr int kRowBytes = Shape::kHeadDim * 2;
    const int g = lane / 4, t = lane % 4;
    constexpr int kWords = Shape::kHeadDim / 16;
    uint32_t v[4][kWords];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_words(v[i], stage + (t + 4 * i) * kRowBytes + g * (kRowBytes / 8));
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const uint32_t a[4] = {__byte_perm(v[0][n], v[1][n], 0x5410u), __byte_perm(v[0][n], v[1][n], 0x7632u),
                             __byte_perm(v[2][n], v[3][n], 0x5410u), __byte_perm(v[2][n], v[3][n], 0x7632u)};
      mma_m16n8k16(o[n], a, weights[0][0], weights[0][1]);
    }
  }

  __device__ void write(const PartialStates& partial, int64_t first_state, int rows, float c, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = l[r];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (2 * t + r >= rows) continue;
      const int64_t at = first_state + 2 * t + r;
      float* to = partial.o + at * Shape::kHeadDim + g * (Shape::kHeadDim / 8);
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) *reinterpret_cast<float2*>(to + n * 2) = make_float2(o[n][r], o[n][2 + r]);
      if (g == 0) partial.ml[at] = make_float2(m[r].stored(c), sum);
    }
  }
};

template <class Shape>
__global__ void __launch_bounds__(32 * Shape::kMaxWarps, 1)
    quant_attention_kernel(const __grid_constant__ QuantArgs args) {
  const QuantAttentionParams& p = args.p;
  unsigned char* smem = dynamic_smem();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  QuantLine line;
  line.place(reinterpret_cast<int*>(smem), p.requests);
  if (!p.tables_settled) wait_for_previous_kernel();
  build_line(line, p);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < QuantLine::ints(p.requests); i += blockDim.x)
      args.line[i] = reinterpret_cast<const int*>(smem)[i];

  const int worker = int(blockIdx.x) * int(blockDim.x / 32) + warp;
  const int run = line.run(p.requests, args.workers);
  const int64_t begin = int64_t(worker) * run;
  const int end = int(min(begin + run, int64_t(line.first_tile[p.requests])));
  if (begin >= end) return;

  unsigned char* stages = smem + Shape::line_bytes(p.requests) + warp * Shape::kWarpBytes;
  const float c = p.scale * kLog2e;
  LineCursor work, ahead;
  work.seek(line, p, int(begin));
  ahead = work;
  const char* page = ahead.page(p);
  copy_half<Shape, false>(p, line, ahead, page, smem_address(stages), lane);
  cp_async_commit();
  copy_half<Shape, true>(p, line, ahead, page, smem_address(stages + Shape::kHalfBytes), lane);
  cp_async_commit();
  const auto step_ahead = [&](int flat) {  // to tile `flat` of the line; returns its page
    if (++ahead.tile == ahead.tiles) ahead.seek(line, p, flat);
    return ahead.page(p);
  };
  if (begin + 1 < end) page = step_ahead(int(begin) + 1);

  QuantState<Shape> state;
  int seen[2] = {0, 0}, rows = 0;
  bool fresh = true;
  int place = 0;  // of this tile's keys; its values take the next of the three, the next tile's keys the one after
  const auto stage = [&](int after) {
    const int at = place + after;
    return stages + (at >= Shape::kHalves ? at - Shape::kHalves : at) * Shape::kHalfBytes;
  };
  for (int flat = int(begin); flat < end; ++flat) {
    if (flat + 1 < end) copy_half<Shape, false>(p, line, ahead, page, smem_address(stage(2)), lane);
    cp_async_commit();
    if (fresh) {
      state.start(p, line, work, lane);
      const int group = p.q_heads / p.kv_heads, query0 = line.row_offset[work.request];
      const int all = (line.row_offset[work.request + 1] - query0) * group, first = work.row_block * kItemRows;
      rows = all - first;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = first + lane % 4 * 2 + r;
        seen[r] = i < all ? p.row_position[query0 + i / group] + 1 - p.quant_len[work.request] : 0;
      }
      fresh = false;
    }
    cp_async_wait<2>();
    __syncwarp();  // every lane's copies of the keys have landed
    uint32_t weights[4][2];
    if (work.is_tail())
      state.tail_keys(stage(0), c, lane, (work.tile - work.quant_tiles) * kTailTokens, seen, weights);
    else
      state.quant_keys(stage(0), c, lane, weights);
    __syncwarp();  // the keys have been read
    if (flat + 1 < end) copy_half<Shape, true>(p, line, ahead, page, smem_address(stage(0)), lane);
    cp_async_commit();
    if (flat + 2 < end) page = step_ahead(flat + 2);  // on its way while the values are worked on
    cp_async_wait<2>();
    __syncwarp();
    if (work.is_tail())
      state.tail_values(stage(1), lane, weights);
    else
      state.quant_values(stage(1), lane, weights);
    if (++work.tile == work.tiles || flat + 1 == end) {
      state.write(args.partial, int64_t(worker + work.unit) * kItemRows, rows, c, lane);
      fresh = true;
      if (flat + 1 < end) work.seek(line, p, flat + 1);
    }
    __syncwarp();  // the values have been read
    place = place == 0 ? 2 : place - 1;
  }
}

// Which states a row has: those of its unit, one a run that crosses it.
struct UnitRuns {
  QuantAttentionParams p;
  const int* line;
  int workers;
  static constexpr bool kFromInputs = false;  // the line is the attention kernel's work

  __device__ StateRun states(int row, int head) const {
    QuantLine at;
    at.place(const_cast<int*>(line), p.requests);
    int lo = 0, hi = p.requests;
    if (row >= at.row_offset[hi]) return {};
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (at.row_offset[mid] <= row ? lo : hi) = mid;
    }
    const int tiles = at.tiles[lo];
    if (tiles == 0) return {};
    const int group = p.q_heads / p.kv_heads, run = at.run(p.requests, workers);
    const int i = (row - at.row_offset[lo]) * group + head % group;
    const int number = i / kItemRows * p.kv_heads + head / group;
    const int begin = at.first_tile[lo] + number * tiles;
    const int first = begin / run, last = (begin + tiles - 1) / run;  // workers
    return {int64_t(first + at.first_unit[lo] + number) * kItemRows + i % kItemRows, kItemRows, 0, last - first + 1};
  }
};

template <int kBits, class T>
struct SimpleQuantKeys {
  using Params = QuantAttentionParams;
  static __device__ Span span(const Params& p, int request, int, int, int last_position) {
    const int quantized = p.quant_len[request];
    return {0, quantized + max(0, last_position + 1 - quantized), 0, 0};
  }
  static __device__ int2 row_range(const Params&, const Span& s, int, int) { return {0, s.hi}; }

  struct Row {
    const Params& p;
    const T* keys = nullptr;  // of the tail
    const char* blob = nullptr;
    int slot;
    __device__ Row(const Params& params, const Span&, int request, int kv_head, int token) : p(params) {
      const int quantized = p.quant_len[request];
      slot = token % p.page_size;  // the tail too begins with a page
      if (token < quantized) {
        const auto layout = layout_of(p);
        blob = reinterpret_cast<const char*>(p.quant_table[request * p.quant_stride_request + token / p.page_size]) +
               kv_head * layout.head_bytes;
      } else {
        const int64_t page = p.tail_table[request * p.tail_stride_request + (token - quantized) / p.page_size];
        keys = reinterpret_cast<const T*>(page) + (int64_t(kv_head) * p.page_size + slot) * p.head_dim;
      }
    }
    static __device__ QuantPageLayout layout_of(const Params& p) {
      return QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, kBits, p.group, int(sizeof(T)));
    }
    __device__ float value(const char* codes, int d, float scale, float zero) const {
      const int byte = uint8_t(codes[int64_t(slot) * p.head_dim * kBits / 8 + d * kBits / 8]);
      return fmaf(float(byte >> d * kBits % 8 & ((1 << kBits) - 1)), scale, zero);
    }
    __device__ float k(int d) const {
      if (!blob) return to_float(keys[d]);
      const auto layout = layout_of(p);
      const auto* scale = reinterpret_cast<const T*>(blob + layout.code_bytes) + slot / p.group * p.head_dim + d;
      return value(blob, d, to_float(scale[0]), to_float(scale[layout.k_param_bytes / int(sizeof(T))]));
    }
    __device__ float v(int d) const {
      if (!blob) return to_float(keys[int64_t(p.kv_heads) * p.page_size * p.head_dim + d]);
      const auto layout = layout_of(p);
      const char* codes = blob + layout.code_bytes + 2 * layout.k_param_bytes;
      const auto* scale =
          reinterpret_cast<const T*>(codes + layout.code_bytes) + slot * (p.head_dim / p.group) + d / p.group;
      return value(codes, d, to_float(scale[0]), to_float(scale[layout.v_param_bytes / int(sizeof(T))]));
    }
  };
};

// The largest block the shape's tiles leave room for.
template <class Shape>
int quant_warps(const DeviceInfo& info, int requests) {
  return std::min(Shape::kMaxWarps, (info.smem_optin - Shape::line_bytes(requests)) / Shape::kWarpBytes);
}

int64_t max_units(const QuantAttentionParams& p) {
  return (int64_t(p.rows) * (p.q_heads / p.kv_heads) / kItemRows + p.requests) * p.kv_heads;
}

bool takes_tensor_cores(const QuantAttentionParams& p) {
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128) && p.page_size >= kQuantTokens &&
         (p.group == 32 || p.group == 64) && p.q_stride_row % 8 == 0 && p.q_stride_head % 8 == 0 && aligned16(p.q);
}

template <class Shape>
void launch_quant(const QuantAttentionParams& p, cudaStream_t stream) {
  constexpr auto kernel = quant_attention_kernel<Shape>;
  const DeviceInfo info = device_info();
  const int warps = quant_warps<Shape>(info, p.requests);
  VC_CHECK(warps >= 1, p.requests, " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const int workers = warps * info.multiprocessors;
  const int64_t states = (workers + max_units(p)) * kItemRows;
  const auto partial = PartialStates::at(p.workspace, states, Shape::kHeadDim);
  int* line = reinterpret_cast<int*>(partial.ml + states);
  allow_all_smem<kernel>(info);
  launch(
      kernel,
      {dim3(info.multiprocessors), dim3(32 * warps), size_t(Shape::line_bytes(p.requests) + warps * Shape::kWarpBytes)},
      info, stream, QuantArgs{p, partial, line, workers});
  launch(merge_states_kernel<Shape::kHeadDim, UnitRuns>, {dim3(p.q_heads, p.rows), dim3(32 * kMergeWarps)}, info,
         stream, UnitRuns{p, line, workers}, partial, static_cast<uint16_t*>(p.out));
}

template <int kHeadDim, int kBits>
void launch_for(const QuantAttentionParams& p, cudaStream_t stream) {
  if (p.group == 32)
    launch_quant<QuantShape<kHeadDim, kBits, 32>>(p, stream);
  else
    launch_quant<QuantShape<kHeadDim, kBits, 64>>(p, stream);
}

template <int kBits>
void launch_bits(const QuantAttentionParams& p, cudaStream_t stream) {
  if (!takes_tensor_cores(p))
    dispatch_element(
        p.dtype, [&](auto t) { launch_simple_attention<decltype(t), SimpleQuantKeys<kBits, decltype(t)>>(p, stream); });
  else if (p.head_dim == 64)
    launch_for<64, kBits>(p, stream);
  else
    launch_for<128, kBits>(p, stream);
}

}  // namespace

size_t quant_attention_workspace_bytes(const QuantAttentionParams& p) {
  if (!takes_tensor_cores(p)) return 0;
  const int64_t states = (int64_t(kMostWarps) * device_info().multiprocessors + max_units(p)) * kItemRows;
  return PartialStates::bytes(states, p.head_dim) + size_t(QuantLine::ints(p.requests)) * sizeof(int);
}

void quant_attention(const QuantAttentionParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  VC_CHECK(p.scale > 0.f, "scale is ", p.scale, "; attention needs a positive one.");
  switch (p.bits) {
    case 2:
      return launch_bits<2>(p, stream);
    case 4:
      return launch_bits<4>(p, stream);
    case 8:
      return launch_bits<8>(p, stream);
    default:
      throw Error(detail::concat("bits is ", p.bits, "; it must be 2, 4 or 8."));
  }
}

}  // namespace vericache::cuda
