// SPDX-License-Identifier: Apache-2.0
// The end of the qkv product where QK-norm stands before the rotation (else linear_rope.cuh): bias, rounding, norm,
// rotation, and the store to q or to the row's page, with the bits of linear and rope_write one after the other.
//
// A norm needs all channels of a head. A tile is 32 pairs of one head; the blocks of a cluster have the tiles of a
// head, add the squares of their own channels and leave the sums in one another's shared memory.
//
// Reduction order (R1): that of rope_head.cuh. A thread has 4 neighbouring pairs, that is one or more of its lanes; 8
// neighbouring threads have a tile's; tiles are the lanes' highest bits.
#pragma once

#include "cluster.cuh"
#include "linear_rope.cuh"
#include "rope_head.cuh"

namespace vericache::cuda {

inline constexpr int kNormRun = 32;                // pairs of a tile
inline constexpr int kNormMostTiles = 4;           // of a head
inline constexpr int kNormThreads = kNormRun / 4;  // of a row

constexpr int norm_sums_bytes(int tokens) { return kNormMostTiles * tokens * 4; }

inline bool has_qk_norm(const RopeWriteParams& rope) { return rope.q_norm != nullptr || rope.k_norm != nullptr; }

// As the lanes of rope_head.cuh that own these pairs add them up.
__device__ __forceinline__ float sum_of_squares4(const float (&low)[4], const float (&high)[4], int head_dim) {
  if (head_dim == 256) return sum_of_squares<4>(low, high);
  if (head_dim == 128) return sum_of_squares<2>(low, high) + sum_of_squares<2>(low + 2, high + 2);
  return (sum_of_squares<1>(low, high) + sum_of_squares<1>(low + 1, high + 1)) +
         (sum_of_squares<1>(low + 2, high + 2) + sum_of_squares<1>(low + 3, high + 3));
}

// By all threads of the blocks that have the 2^tiles_log2 tiles of a head, after each has seen that the others run.
// `sums`: norm_sums_bytes(kTokens) of shared memory, at the same place in all. total(token, row): the sums of w's rows
// row .. row + 3 of the tile.
template <int kTokens, int kThreads, class Total>
__device__ __forceinline__ void finish_norm_rope(const RopeWriteParams& rope, const __nv_bfloat16* bias, int head,
                                                 int first_pair, int tiles_log2, int rows, float* sums,
                                                 const Total& total) {
  constexpr int kStep = kThreads / kNormThreads, kItems = kTokens / kStep;  // rows at a time; of a thread
  const int half = rope.head_dim / 2, v = int(threadIdx.x) % kNormThreads, token0 = int(threadIdx.x) / kNormThreads;
  const int pair = first_pair + 4 * v, row = v / 2 * 16 + v % 2 * 4;
  const auto* norm = static_cast<const __nv_bfloat16*>(head < rope.q_heads                   ? rope.q_norm
                                                       : head < rope.q_heads + rope.kv_heads ? rope.k_norm
                                                                                             : nullptr);
  if (norm == nullptr) {
    for (int token = token0; token < rows; token += kStep)
      finish_rope4(
          rope, bias, token, head, pair, [&] { return total(token, row); }, [&] { return total(token, row + 8); });
    return;
  }
  const int tiles = 1 << tiles_log2, own = first_pair / kNormRun;
  float weight_low[4], weight_high[4], low[kItems][4], high[kItems][4], cos[kItems][4], sin[kItems][4];
  __nv_bfloat16* dst[kItems];
  const __nv_bfloat16* of_pair = bias ? bias + head * rope.head_dim + pair : nullptr;
  load_run(norm + pair, weight_low), load_run(norm + half + pair, weight_high);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = token0 + i * kStep;
    dst[i] = nullptr;
    if (token < rows) {
      const int position = rope.row_position[token];
      dst[i] = rope_destination(rope, token, head, position);
      const int64_t at = int64_t(position) * half + pair;
      load_run(rope.cos + at, cos[i]), load_run(rope.sin + at, sin[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = token0 + i * kStep;
    const float4 l = token < rows ? total(token, row) : float4{}, h = token < rows ? total(token, row + 8) : float4{};
    round_sums(l, of_pair, low[i]), round_sums(h, of_pair ? of_pair + half : nullptr, high[i]);
    const float squares = sum_neighbours<kNormThreads>(sum_of_squares4(low[i], high[i], rope.head_dim));
    if (v < tiles) store_cluster_float(map_to_rank(smem_address(sums + own * kTokens + token), v), squares);
  }
  cluster_barrier();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (dst[i] == nullptr) continue;
    const float* of_tile = sums + token0 + i * kStep;
    float squares = of_tile[0];
    if (tiles_log2 > 0) squares += of_tile[kTokens];
    if (tiles_log2 > 1) squares += of_tile[2 * kTokens] + of_tile[3 * kTokens];
    const float scale = norm_scale(squares, rope.head_dim, rope.eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      low[i][j] = round_to<__nv_bfloat16>(low[i][j] * scale * weight_low[j]);
      high[i][j] = round_to<__nv_bfloat16>(high[i][j] * scale * weight_high[j]);
      rotate_pair(low[i][j], high[i][j], cos[i][j], sin[i][j]);
    }
    store_run(dst[i] + pair, low[i]), store_run(dst[i] + half + pair, high[i]);
  }
}

}  // namespace vericache::cuda
