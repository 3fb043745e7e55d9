// SPDX-License-Identifier: Apache-2.0
// The end of the qkv product where it goes straight to rope_write's outputs: bias, rounding, rotation, and the store to
// q or to the row's page. The sum is rounded to bfloat16 before it is rotated, so the bits are those of linear and
// rope_write one after the other. With QK-norm: linear_qk_norm.cuh.
//
// Tiles. An output of a rotation needs channels i and i + head_dim / 2 of its head: a pair. A tile has a run of 8, 16
// or 32 pairs from each of a few heads (bf16_heads_map): of each head 8 low rows, their 8 high rows, the next 8 low
// rows, ...; then the next head. So a thread of wgmma holds both of a pair, as with SwiGLU. V's heads lie the same way,
// unrotated.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "element.cuh"
#include "rotate.cuh"

namespace vericache::cuda {

// Whether linear_rope_write has a fused form; else it is linear, then rope_write.
inline bool can_fuse_rope(const RopeWriteParams& rope, const void* bias) {
  const auto aligned = [](const void* ptr, int bytes) { return reinterpret_cast<uintptr_t>(ptr) % bytes == 0; };
  return (rope.head_dim == 64 || rope.head_dim == 128 || rope.head_dim == 256) && aligned(rope.cos, 16) &&
         aligned(rope.sin, 16) && aligned(rope.q_out, 8) && aligned(bias, 8) && aligned(rope.q_norm, 8) &&
         aligned(rope.k_norm, 8);
}

// Which heads and pairs a tile has. kRun: pairs of a head, 2 * kRun rows of w.
template <int kRun>
struct RopeTile {
  int first_head, first_pair;

  // Log2 of the runs a head has.
  static int runs_log2(int head_dim) {
    int log2 = 0;
    while (2 * kRun << log2 < head_dim) ++log2;
    return log2;
  }
  static int count(const RopeWriteParams& rope, int tile_rows) {
    const int heads = rope.q_heads + 2 * rope.kv_heads, tile_heads = tile_rows / (2 * kRun);
    return (heads + tile_heads - 1) / tile_heads << runs_log2(rope.head_dim);
  }
  __device__ __forceinline__ static RopeTile make(int tile, int tile_rows, int runs_log2) {
    return {(tile >> runs_log2) * (tile_rows / (2 * kRun)), (tile & ((1 << runs_log2) - 1)) * kRun};
  }
  // Of the pair whose low row is `row` of the tile.
  __device__ __forceinline__ int head(int row) const { return first_head + row / (2 * kRun); }
  __device__ __forceinline__ int pair(int row) const { return first_pair + row % (2 * kRun) / 16 * 8 + row % 8; }
};

// Brings what the end of these rows will read into the L2; by threads that have nothing to do yet.
__device__ __forceinline__ void prefetch_rope(const RopeWriteParams& rope, int token0, int tokens, int thread,
                                              int threads) {
#if defined(__CUDA_ARCH__)
  const int half = rope.head_dim / 2, lines = half / 32;  // of 128 bytes
  for (int i = thread; i < tokens * lines; i += threads) {
    const int row = token0 + i / lines;
    const int64_t at = int64_t(rope.row_position[row]) * half + i % lines * 32;
    asm volatile(
        "prefetch.global.L2 [%0];\n"
        "prefetch.global.L2 [%1];\n"
        "prefetch.global.L2 [%2];" ::"l"(rope.row_page + row),
        "l"(rope.cos + at), "l"(rope.sin + at));
  }
#endif
}

// Where channel 0 of a head of a row goes; null: nowhere.
__device__ __forceinline__ __nv_bfloat16* rope_destination(const RopeWriteParams& rope, int64_t row, int head,
                                                           int position) {
  if (head < rope.q_heads) return static_cast<__nv_bfloat16*>(rope.q_out) + (row * rope.q_heads + head) * rope.head_dim;
  auto* page = reinterpret_cast<__nv_bfloat16*>(rope.row_page[row]);
  if (page == nullptr) return nullptr;
  // K heads, then V heads: the order of a page too.
  const int slot = int(unsigned(position) % unsigned(rope.page_size));
  return page + (int64_t(head - rope.q_heads) * rope.page_size + slot) * rope.head_dim;
}

__device__ __forceinline__ bool is_rotated(const RopeWriteParams& rope, int head) {
  return head < rope.q_heads + rope.kv_heads;
}

// linear's output of four neighbouring channels, from their sums. bias: at the first of them, or null.
__device__ __forceinline__ void round_sums(float4 sum, const __nv_bfloat16* bias, float (&x)[4]) {
  x[0] = sum.x, x[1] = sum.y, x[2] = sum.z, x[3] = sum.w;
  if (bias) add_run(x, bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = round_to<__nv_bfloat16>(x[i]);
}

// One pair of one row, from its two sums.
__device__ __forceinline__ void finish_rope1(const RopeWriteParams& rope, const __nv_bfloat16* bias, int64_t row,
                                             int head, int pair, float low, float high) {
  const int half = rope.head_dim / 2, position = rope.row_position[row];
  __nv_bfloat16* dst = rope_destination(rope, row, head, position);
  if (dst == nullptr) return;
  if (bias) {
    low += to_float(bias[head * rope.head_dim + pair]);
    high += to_float(bias[head * rope.head_dim + half + pair]);
  }
  low = round_to<__nv_bfloat16>(low), high = round_to<__nv_bfloat16>(high);
  if (is_rotated(rope, head)) {
    const int64_t at = int64_t(position) * half + pair;
    rotate_pair(low, high, rope.cos[at], rope.sin[at]);
  }
  dst[pair] = __float2bfloat16_rn(low);
  dst[half + pair] = __float2bfloat16_rn(high);
}

// Four neighbouring pairs of one row. low() and high() give the sums; they are not called where nothing is written, and
// what they load is used.
template <class Low, class High>
__device__ __forceinline__ void finish_rope4(const RopeWriteParams& rope, const __nv_bfloat16* bias, int64_t row,
                                             int head, int pair, Low low_sums, High high_sums) {
  const int half = rope.head_dim / 2, position = rope.row_position[row];
  __nv_bfloat16* dst = rope_destination(rope, row, head, position);
  if (dst == nullptr) return;
  float4 c{}, s{};
  const bool rotated = is_rotated(rope, head);
  if (rotated) {
    const int64_t at = int64_t(position) * half + pair;
    c = *reinterpret_cast<const float4*>(rope.cos + at);
    s = *reinterpret_cast<const float4*>(rope.sin + at);
  }
  const float4 l = low_sums(), h = high_sums();
  const __nv_bfloat16* of_pair = bias ? bias + head * rope.head_dim + pair : nullptr;
  float low[4], high[4];
  round_sums(l, of_pair, low), round_sums(h, of_pair ? of_pair + half : nullptr, high);
  const float cos[4] = {c.x, c.y, c.z, c.w}, sin[4] = {s.x, s.y, s.z, s.w};
  if (rotated) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rotate_pair(low[i], high[i], cos[i], sin[i]);
  }
  store_run(dst + pair, low), store_run(dst + half + pair, high);
}

}  // namespace vericache::cuda
