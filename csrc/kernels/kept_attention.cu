// SPDX-License-Identifier: Apache-2.0
// Draft attention over kept tokens: per-head compact pages, then the full-precision tail. The kernels are those of
// device/warpgroup_attention.cuh (Hopper) and device/split_attention.cuh (other GPUs), both bf16 with head_dim 64 and
// 128, and of device/simple_attention.cuh (the rest). Here: where a token lies, and where the key axis is cut. Tokens
// are numbered 0 .. kept_len-1 for the kept rows of a head, then, from the next multiple of the tile on, tail_start,
// tail_start + 1, ...; between them lies a hole that is never read.
//
// Reduction order: as in those kernels, but free of R1. Few units (request, KV head) of which one has dropped a token
// are cut into even pieces, one a block, so the cuts depend on the lengths and rows of the whole batch, its table
// widths and the number of multiprocessors; the same call gives the same bits, wherever the pages lie. Held by
// bench/gpu/attention_check.cu.
#include "device/element.cuh"
#include "device/simple_attention.cuh"
#include "device/split_attention.cuh"
#include "device/warpgroup_attention.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

// Even pieces, or AbsoluteSplits.
struct KeptSplits {
  int even;  // tokens a piece; 0: absolute
  static constexpr int kKinds = AbsoluteSplits::kKinds;

  __host__ __device__ constexpr int of(int token) const { return even > 0 ? token / even : AbsoluteSplits::of(token); }
  __host__ __device__ constexpr int begin(int split) const {
    return even > 0 ? split * even : AbsoluteSplits::begin(split);
  }
  // Even pieces are all of kind 0.
  __device__ int first_of(int kind) const { return even > 0 ? 0 : AbsoluteSplits::first_of(kind); }
  __device__ int weight(int kind) const { return even > 0 ? 1 : AbsoluteSplits::weight(kind); }
};

constexpr int kLeastTiles = 4;  // of an even piece

__host__ __device__ constexpr int tiles_of(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

struct KeptParams : KeptAttentionParams {
  int pieces = 0;       // whole even pieces wanted, of all units together; 0: absolute ones
  int least_tiles = 0;  // of an even piece, so that no unit has more pieces than there is memory for
  int max_splits = 0;   // of one unit
};

struct KeptKeys {
  using Params = KeptParams;
  using Splits = KeptSplits;
  static constexpr bool kPerHead = true;

  // Every warp of every block, of the merge too, comes to the same: a request's tail is measured by its last row. That
  // only sets a length; it need not be the longest tail. Where no head of the batch has dropped a token the cuts are
  // those of paged_attention, and so are the bits if every tail begins at a multiple of a tile: drafts of the
  // compressor `identity` are then never refused.
  static __device__ Splits splits(const Params& p) {
    if (p.pieces == 0) return {0};
    int tiles = 0;
    bool dropped = false;
    for (int unit = int(threadIdx.x) % 32; unit < p.requests * p.kv_heads; unit += 32) {
      const int request = unit / p.kv_heads, kept = p.kept_len[unit], start = p.tail_start[request];
      const int first = p.row_offsets[request], end = p.row_offsets[request + 1];
      if (end <= first) continue;
      tiles += tiles_of(kept) + tiles_of(max(0, p.row_position[end - 1] + 1 - start));
      dropped |= kept != start;
    }
    if (!__any_sync(0xffffffffu, dropped)) return {0};
    tiles = __reduce_add_sync(0xffffffffu, tiles);
    return {max(p.least_tiles, (tiles + p.pieces - 1) / p.pieces) * kTileTokens};
  }

  static __device__ __forceinline__ Span span(const Params& p, int request, int kv_head, int, int last_position) {
    const int kept = p.kept_len[request * p.kv_heads + kv_head];
    const int hole_end = (kept + kTileTokens - 1) / kTileTokens * kTileTokens;
    return {0, hole_end + max(0, last_position + 1 - p.tail_start[request]), kept, hole_end};
  }
  static __device__ __forceinline__ int2 row_range(const Params& p, const Span& s, int request, int position) {
    return {0, s.hole_end + max(0, position + 1 - p.tail_start[request])};
  }

  // Tokens before this one were written before the launch that precedes ours, if the caller says so.
  static __device__ __forceinline__ int settled_end(const Span& s, int) { return s.hole_end; }

  // Tokens from this one on that may be read, at least as far as its tile goes.
  static __device__ __forceinline__ int readable(const Span& s, int token) {
    return (token < s.hole_end ? s.hole_begin : s.hi) - token;
  }

  // The K and V rows of a token, as elements of `Bytes` bytes.
  struct Place {
    const char* k;
    int v_offset;
  };
  static __device__ __forceinline__ Place place(const Params& p, const Span& s, int request, int kv_head, int token,
                                                int bytes) {
    if (token < s.hole_end) {
      const int64_t page =
          p.kept_table[request * p.kept_stride_request + kv_head * p.kept_stride_head + token / p.page_size];
      return {reinterpret_cast<const char*>(page) + int64_t(token & (p.page_size - 1)) * p.head_dim * bytes,
              p.page_size * p.head_dim * bytes};
    }
    const int tail = token - s.hole_end;
    const int64_t page = p.tail_table[request * p.tail_stride_request + tail / p.page_size];
    return {reinterpret_cast<const char*>(page) +
                (int64_t(kv_head) * p.page_size + (tail & (p.page_size - 1))) * p.head_dim * bytes,
            p.kv_heads * p.page_size * p.head_dim * bytes};
  }
  static __device__ __forceinline__ Granule granule(const Params& p, const Span& s, int request, int kv_head,
                                                    int token) {
    const int valid = readable(s, token);
    if (valid <= 0) return {static_cast<const char*>(p.q), 0, 0};
    const Place at = place(p, s, request, kv_head, token, 2);
    return {at.k, at.v_offset, min(kGranuleTokens, valid)};
  }
};

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
  constexpr int kMostRows = 64;  // of a block
  const int units = std::max(1, p.requests * p.kv_heads), requests = std::max(1, p.requests);
  const int64_t item_rows = int64_t(p.rows) * (p.q_heads / p.kv_heads);
  const int blocks = int(device_info().multiprocessors / ((item_rows - 1) / (kMostRows * requests) + 1));
  const int tiles = tiles_of((p.max_kept_pages + p.max_tail_pages) * p.page_size) + 1;  // of one unit, with its hole
  KeptParams plan{p};
  const int absolute = splits_for(KeptSplits{0}, tiles * kTileTokens);
  plan.max_splits = absolute;
  if (4 * units > blocks) return plan;
  plan.pieces = blocks - units;
  // Memory for units of four times the mean length; if one is longer, all get longer pieces.
  const int even = std::min((tiles + kLeastTiles - 1) / kLeastTiles, 4 * plan.pieces / units + 1);
  plan.least_tiles = std::max(kLeastTiles, (tiles + even - 1) / even);
  plan.max_splits = std::max(absolute, even);
  return plan;
}

template <int kHeadDim>
void launch_for(const KeptParams& p, cudaStream_t stream) {
  const int64_t item_rows = int64_t(p.rows) * (p.q_heads / p.kv_heads);  // of all requests
  if (device_info().hopper) {
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
