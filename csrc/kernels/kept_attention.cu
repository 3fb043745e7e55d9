// SPDX-License-Identifier: Apache-2.0
// Draft attention over kept tokens: per-head compact pages, then the full-precision tail. The kernels are those of
// device/warpgroup_attention.cuh (Hopper) and device/split_attention.cuh (other GPUs), both bf16 with head_dim 64 and
// 128, and of device/simple_attention.cuh (the rest). Here: where a token lies. Tokens are numbered 0 .. kept_len-1 for
// the kept rows of a head, then, from the next multiple of the tile on, tail_start, tail_start + 1, ...; between them
// lies a hole that is never read.
#include "device/element.cuh"
#include "device/simple_attention.cuh"
#include "device/split_attention.cuh"
#include "device/warpgroup_attention.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

struct KeptKeys {
  using Params = KeptAttentionParams;
  static constexpr bool kPerHead = true;

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

int max_splits(const KeptAttentionParams& p) {
  return splits_for((p.max_kept_pages + p.max_tail_pages) * p.page_size + kTileTokens);
}

template <int kHeadDim>
void launch_for(const KeptAttentionParams& p, cudaStream_t stream) {
  if (device_info().hopper) {
    if (int64_t(p.rows) * (p.q_heads / p.kv_heads) <= 8 * int64_t(p.requests))
      launch_few_rows<KeptKeys, kHeadDim>(p, max_splits(p), stream);
    else
      launch_warpgroup_attention<KeptKeys, WarpgroupShape<kHeadDim, 64>>(p, max_splits(p), stream);
    return;
  }
  if (int64_t(p.rows) * (p.q_heads / p.kv_heads) <= 16 * int64_t(p.requests))
    launch_split_attention<KeptKeys, AttentionShape<kHeadDim, 1, 1, 4>>(p, max_splits(p), stream);
  else
    launch_split_attention<KeptKeys, AttentionShape<kHeadDim, 1, 2, 4>>(p, max_splits(p), stream);
}

}  // namespace

size_t kept_attention_workspace_bytes(const KeptAttentionParams& p) {
  if (!takes_tensor_cores(p)) return 0;
  return std::max(split_attention_workspace_bytes(p.rows, p.q_heads, max_splits(p), p.head_dim),
                  warpgroup_attention_workspace_bytes(p.rows, p.q_heads, max_splits(p), p.head_dim));
}

void kept_attention(const KeptAttentionParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  VC_CHECK(p.scale > 0.f, "scale is ", p.scale, "; attention needs a positive one.");
  if (!takes_tensor_cores(p)) {
    dispatch_element(p.dtype,
                     [&](auto t) { launch_simple_attention<decltype(t), SimpleKeptKeys<decltype(t)>>(p, stream); });
    return;
  }
  VC_CHECK(p.q_stride_row % 2 == 0 && p.q_stride_head % 2 == 0 && reinterpret_cast<uintptr_t>(p.q) % 4 == 0,
           "q has strides ", p.q_stride_row, ", ", p.q_stride_head, " or an odd address; it must be 4-byte aligned.");
  switch (p.head_dim) {
    case 64:
      return launch_for<64>(p, stream);
    case 128:
      return launch_for<128>(p, stream);
    default:
      throw Error(detail::concat("head_dim ", p.head_dim, " has no tensor-core attention; use 64 or 128."));
  }
}

}  // namespace vericache::cuda
