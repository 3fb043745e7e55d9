// SPDX-License-Identifier: Apache-2.0
// How kept_single.cuh cuts its request: every KV head into even pieces of one length, the shortest, of kLeastPieceTiles
// or more, that gives a block at most one piece. All warps of all blocks come to the same, each by itself, from one
// round of loads. A block does nothing meanwhile, so no integer is divided by one that is not known here.
#pragma once

#include "kept_keys.cuh"
#include "reduce.cuh"

namespace vericache::cuda {

inline constexpr int kLeastPieceTiles = 4;  // of 16 tokens

// ceil(x / by), exact for x below 2^21: what is cut off is at least 0.5 / by from a whole number.
__device__ __forceinline__ int ceil_by(int x, int by) {
  return int(__fdividef(float(x) + (float(by) - 0.5f), float(by)));
}

// For whole warps: a lane holds a KV head's length and pieces, and a row's position.
struct KeptRequest : SingleRequest {
  int last_position, tail_start, kept;
  int pieces, piece_tiles;
  int first_block;  // of this lane's head; the heads' pieces lie one behind the other

  __device__ __forceinline__ static KeptRequest load(const KeptAttentionParams& p, int blocks, int lane) {
    constexpr uint32_t kAll = 0xffffffffu;
    const bool own = lane < p.kv_heads;
    const int kept = own ? p.kept_len[lane] : 0, tail_start = p.tail_start[0];
    const auto request = SingleRequest::load(p, lane);
    const int last = request.last(lane), tail = max(0, last + 1 - tail_start);
    const int tiles =
        own && request.rows() > 0 ? ceil_of(ceil_of(kept, kTileTokens) * kTileTokens + tail, kGranuleTokens) : 0;
    // A head's first piece may not be whole, so with one piece less for each head a length is long enough. kAtOnce
    // lengths between are tried at a time, for their sums do not wait for each other.
    constexpr int kAtOnce = 4;
    const int all = __reduce_add_sync(kAll, tiles);
    int low = max(kLeastPieceTiles, ceil_by(all, blocks)), high = max(low, ceil_by(all, blocks - p.kv_heads));
    int pieces = -1;  // of length `high`, once it has been tried
    while (low < high || pieces < 0) {
      const int step = (high - low + kAtOnce) / (kAtOnce + 1);
      int own_pieces[kAtOnce], sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        own_pieces[i] = ceil_by(tiles, low + i * step);
        sums[i] = __reduce_add_sync(kAll, own_pieces[i]);
      }
      int next = low + (kAtOnce - 1) * step + 1;
#pragma unroll
      for (int i = kAtOnce - 1; i >= 0; --i)
        if (sums[i] <= blocks) high = low + i * step, next = high - step + 1, pieces = own_pieces[i];
      low = sums[0] <= blocks ? low : max(low, next);
      if (sums[0] <= blocks) high = low;
    }
    int all_pieces;
    const int first_block = warp_sum_before(pieces, lane, all_pieces);
    return {request, last, tail_start, kept, pieces, low, first_block};
  }

  // The head whose piece block `block` takes; p.kv_heads: none.
  __device__ __forceinline__ int head_of(const KeptAttentionParams& p, int block, int lane) const {
    return __popc(__ballot_sync(0xffffffffu, lane < p.kv_heads && first_block + pieces <= block));
  }
};

}  // namespace vericache::cuda
