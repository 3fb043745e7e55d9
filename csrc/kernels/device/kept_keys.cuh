// SPDX-License-Identifier: Apache-2.0
// Where the tokens of kept attention lie, and where its key axis is cut. Tokens are numbered 0 .. kept_len-1 for the
// kept rows of a head, then, from the next multiple of the tile on, tail_start, tail_start + 1, ...; between them lies
// a hole that is never read.
#pragma once

#include "common/params.h"
#include "splits.cuh"

namespace vericache::cuda {

__host__ __device__ constexpr int ceil_of(int x, int by) { return (x + by - 1) / by; }

// Short pieces up to a token, then long ones; or AbsoluteSplits.
struct KeptSplits {
  int length;     // tokens of a long piece, a multiple of a tile; 0: absolute
  int short_end;  // a multiple of kShort
  static constexpr int kKinds = AbsoluteSplits::kKinds, kShort = AbsoluteSplits::kShort;

  // For many units, which are dealt: long ones first, short ones to even out the end.
  static __host__ __device__ constexpr KeptSplits dealt() { return {4096, 4096}; }

  __host__ __device__ constexpr int of(int token) const {
    if (length == 0) return AbsoluteSplits::of(token);
    return token < short_end ? token / kShort : short_end / kShort + (token - short_end) / length;
  }
  __host__ __device__ constexpr int begin(int split) const {
    if (length == 0) return AbsoluteSplits::begin(split);
    const int shorts = short_end / kShort;
    return split < shorts ? split * kShort : short_end + (split - shorts) * length;
  }
  // Long pieces are of kind 0, short ones of kind 1.
  __device__ int first_of(int kind) const {
    if (length == 0) return AbsoluteSplits::first_of(kind);
    return kind == 0 ? short_end / kShort : 0;
  }
  __device__ int weight(int kind) const {
    if (length == 0) return AbsoluteSplits::weight(kind);
    return kind == 0 ? max(1, length / kShort) : 1;
  }
};

struct KeptParams : KeptAttentionParams {
  int pieces = 0;       // whole even pieces wanted, of all units together; 0: KeptSplits::dealt(), or absolute ones
  int least_tiles = 0;  // of an even piece, so that no unit has more pieces than there is memory for
  int max_splits = 0;   // of one unit
};

struct KeptKeys {
  using Params = KeptParams;
  using Splits = KeptSplits;
  static constexpr bool kPerHead = true;

  static __host__ __device__ Splits of_many(bool as_full) { return as_full ? Splits{0, 0} : Splits::dealt(); }

  // Every warp of every block, of the merge too, comes to the same: a request's tail is measured by its last row. That
  // only sets a length; it need not be the longest tail.
  static __device__ Splits splits(const Params& p) {
    if (p.pieces == 0) return of_many(p.as_full);
    int tiles = 0;
    for (int unit = int(threadIdx.x) % 32; unit < p.requests * p.kv_heads; unit += 32) {
      const int request = unit / p.kv_heads, first = p.row_offsets[request], end = p.row_offsets[request + 1];
      if (end <= first) continue;
      const int tail = max(0, p.row_position[end - 1] + 1 - p.tail_start[request]);
      tiles += ceil_of(p.kept_len[unit], kTileTokens) + ceil_of(tail, kTileTokens);
    }
    tiles = __reduce_add_sync(0xffffffffu, tiles);
    return {max(p.least_tiles, ceil_of(tiles, p.pieces)) * kTileTokens, 0};
  }

  static __device__ __forceinline__ Span span(const Params& p, int request, int kv_head, int, int last_position) {
    const int kept = p.kept_len[request * p.kv_heads + kv_head];
    const int hole_end = ceil_of(kept, kTileTokens) * kTileTokens;
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

  // Bytes from a token's K to its V, whose elements have `bytes` each.
  static __device__ __forceinline__ int v_offset(const Params& p, const Span& s, int token, int bytes = 2) {
    return (token < s.hole_end ? 1 : p.kv_heads) * p.page_size * p.head_dim * bytes;
  }

  // The K and V rows of a token.
  struct Place {
    const char* k;
    int v_offset;
  };
  static __device__ __forceinline__ Place place(const Params& p, const Span& s, int request, int kv_head, int token,
                                                int bytes) {
    const bool kept = token < s.hole_end;
    const int at = kept ? token : token - s.hole_end;
    const int64_t* pages = kept ? p.kept_table + request * p.kept_stride_request + kv_head * p.kept_stride_head
                                : p.tail_table + request * p.tail_stride_request;
    const int64_t row = int64_t(kept ? 0 : kv_head) * p.page_size + (at & (p.page_size - 1));
    return {reinterpret_cast<const char*>(pages[at >> (31 - __clz(p.page_size))]) + row * p.head_dim * bytes,
            v_offset(p, s, token, bytes)};
  }
  static __device__ __forceinline__ Granule granule(const Params& p, const Span& s, int request, int kv_head,
                                                    int token) {
    const int valid = readable(s, token);
    if (valid <= 0) return {static_cast<const char*>(p.q), 0, 0};
    const Place at = place(p, s, request, kv_head, token, 2);
    return {at.k, at.v_offset, min(kGranuleTokens, valid)};
  }
};

}  // namespace vericache::cuda
