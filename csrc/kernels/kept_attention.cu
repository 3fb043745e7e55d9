// SPDX-License-Identifier: Apache-2.0
// Draft attention over kept tokens: per-head compact pages, then the full-precision tail. Where a token lies:
// device/kept_keys.cuh. One request of few KV heads and rows runs in device/kept_single.cuh; else the kernels are those
// of device/warpgroup_attention.cuh (Hopper) and device/split_attention.cuh (other GPUs), all bf16, with head_dim 64
// and 128 (kept_single: 128), and of device/simple_attention.cuh (the rest).
//
// Reduction order: as in those kernels, but free of R1. Few units (request, KV head) are cut into even pieces, one a
// block, so the cuts depend on the lengths and rows of the whole batch, its table widths and the number of
// multiprocessors; many units into pieces of two lengths (KeptSplits::dealt), one by one from a counter. The same call
// gives the same bits, wherever the pages lie. With `as_full` the cuts are those of full attention, hence the bits too
// where no head has dropped a token and tails begin at multiples of a tile: drafts of the compressor `identity` are
// then never refused. Held by bench/gpu/attention_check.cu.
#include "device/element.cuh"
#include "device/kept_single.cuh"
#include "device/simple_attention.cuh"
#include "device/split_attention.cuh"
#include "device/warpgroup_attention.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

template <class T>
struct SimpleKeptKeys : KeptKeys {
  struct Row {
    const T *keys, *values;
    __device__ Row(const Params& p, const Span& s, int request, int kv_head, int token) {
      const Place at = place(p, s, request, kv_head, token, int(sizeof(T)));
      keys = reinterpret_cast<const T*>(at.k);
      values = reinterpret_cast<const T*>(at.k + at.v_offset);
    }
    __device__ float k(int d) const { return to_float(keys[d]); }
    __device__ float v(int d) const { return to_float(values[d]); }
  };
};

bool takes_tensor_cores(const KeptAttentionParams& p) {
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128) && p.page_size >= kGranuleTokens;
}

// How the key axis is cut. A unit ends with a piece that is not whole, so with one whole piece less for each unit there
// is at most one piece a block. With more units than a quarter of the blocks these ends would leave too much to chance.
KeptParams planned(const KeptAttentionParams& p) {
  constexpr int kMostRows = 64, kLeastTiles = 4;  // of a block; of an even piece
  const int units = std::max(1, p.requests * p.kv_heads), requests = std::max(1, p.requests);
  const int64_t item_rows = int64_t(p.rows) * (p.q_heads / p.kv_heads);
  const int blocks = int(device_info().multiprocessors / ((item_rows - 1) / (kMostRows * requests) + 1));
  const int tiles =
      ceil_of((p.max_kept_pages + p.max_tail_pages) * p.page_size, kTileTokens) + 1;  // of one unit, with its hole
  KeptParams plan{p};
  plan.max_splits = splits_for(KeptKeys::of_many(p.as_full), tiles * kTileTokens);
  if (4 * units > blocks || p.as_full) return plan;
  plan.pieces = blocks - units;
  // Memory for units of four times the mean length; if one is longer, all get longer pieces.
  const int even = std::min(ceil_of(tiles, kLeastTiles), 4 * plan.pieces / units + 1);
  plan.least_tiles = std::max(kLeastTiles, ceil_of(tiles, even));
  plan.max_splits = std::max(plan.max_splits, even);
  return plan;
}

template <int kHeadDim>
void launch_for(const KeptParams& p, cudaStream_t stream) {
  const int64_t item_rows = int64_t(p.rows) * (p.q_heads / p.kv_heads);  // of all requests
  const DeviceInfo info = device_info();
  if (info.hopper) {
    if constexpr (kHeadDim == 128) {
      if (takes_kept_single(p, info)) return launch_kept_single<KeptSingleShape<kHeadDim, 11, 4>>(p, info, stream);
    }
    if (item_rows <= 8 * int64_t(p.requests))
      launch_warpgroup_attention<KeptKeys, WarpgroupShape<kHeadDim, 8>>(p, p.max_splits, stream);
    else
      launch_warpgroup_attention<KeptKeys, WarpgroupShape<kHeadDim, 64>>(p, p.max_splits, stream);
    return;
  }
  if (item_rows <= 16 * int64_t(p.requests))
    launch_split_attention<KeptKeys, AttentionShape<kHeadDim, 1, 1, 4>>(p, p.max_splits, stream);
  else
    launch_split_attention<KeptKeys, AttentionShape<kHeadDim, 1, 2, 4>>(p, p.max_splits, stream);
}

}  // namespace

size_t kept_attention_workspace_bytes(const KeptAttentionParams& p) {
  if (!takes_tensor_cores(p)) return 0;
  const int max_splits = planned(p).max_splits;
  const DeviceInfo info = device_info();
  if (takes_kept_single(p, info)) return kept_single_workspace_bytes(p, info);
  return std::max(split_attention_workspace_bytes(p.rows, p.q_heads, max_splits, p.head_dim),
                  warpgroup_attention_workspace_bytes(p.rows, p.q_heads, max_splits, p.head_dim));
}

void kept_attention(const KeptAttentionParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  VC_CHECK(p.scale > 0.f, "scale is ", p.scale, "; attention needs a positive one.");
  if (!takes_tensor_cores(p)) {
    dispatch_element(p.dtype,
                     [&](auto t) { launch_simple_attention<decltype(t), SimpleKeptKeys<decltype(t)>>({p}, stream); });
    return;
  }
  switch (p.head_dim) {
    case 64:
      return launch_for<64>(planned(p), stream);
    case 128:
      return launch_for<128>(planned(p), stream);
    default:
      throw Error(detail::concat("head_dim ", p.head_dim, " has no tensor-core attention; use 64 or 128."));
  }
}

}  // namespace vericache::cuda
