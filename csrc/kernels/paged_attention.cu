// SPDX-License-Identifier: Apache-2.0
// Full/verify attention (R1): every key of a row lies in full pages. The kernels, their grids and their order of
// reduction are those of device/warpgroup_attention.cuh (Hopper) and device/split_attention.cuh (other GPUs), both bf16
// with head_dim 64 and 128, and of device/simple_attention.cuh (the rest). Here: where a token lies, and which shape of
// block runs; the shape enters no row's bits.
//
// Rows of a request may come in any order of positions; bits of a row depend on its q, its position and the K/V bytes
// of the keys it sees. Pages past the highest position of a request are never read.
#include "device/element.cuh"
#include "device/simple_attention.cuh"
#include "device/split_attention.cuh"
#include "device/warpgroup_attention.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

struct PagedKeys {
  using Params = PagedAttentionParams;
  using Splits = AbsoluteSplits;
  // A page holds a power of two of tokens.
  static __device__ __forceinline__ int page_shift(const Params& p) { return 31 - __clz(p.page_size); }
  static constexpr bool kPerHead = false;

  static __device__ Splits splits(const Params&) { return {}; }
  static __device__ __forceinline__ Span span(const Params& p, int, int, int first_position, int last_position) {
    return {p.window > 0 ? max(0, first_position + 1 - p.window) : 0, last_position + 1, 0, 0};
  }
  // The tokens a row sees: x .. y-1.
  static __device__ __forceinline__ int2 row_range(const Params& p, const Span&, int, int position) {
    return {p.window > 0 ? max(0, position + 1 - p.window) : 0, position + 1};
  }
  // Tokens before this one were written before the launch that precedes ours, if the caller says so.
  static __device__ __forceinline__ int settled_end(const Span&, int first_position) { return first_position; }
  // Tokens from this one on that may be read, at least as far as its tile goes.
  static __device__ __forceinline__ int readable(const Span& s, int token) { return s.hi - token; }
  // Element offset of a token's K in its page.
  static __device__ __forceinline__ int64_t offset(const Params& p, int kv_head, int token) {
    return (int64_t(kv_head) * p.page_size + (token & (p.page_size - 1))) * p.head_dim;
  }
  static __device__ __forceinline__ int64_t page(const Params& p, int request, int token) {
    return p.page_table[request * p.table_stride_request + (token >> page_shift(p))];
  }
  static __device__ __forceinline__ Granule granule(const Params& p, const Span& s, int request, int kv_head,
                                                    int token) {
    if (token >= s.hi) return {static_cast<const char*>(p.q), 0, 0};
    return {reinterpret_cast<const char*>(page(p, request, token)) + offset(p, kv_head, token) * 2,
            p.kv_heads * p.page_size * p.head_dim * 2, min(kGranuleTokens, s.hi - token)};
  }
};

template <class T>
struct SimplePagedKeys : PagedKeys {
  struct Row {
    const T *keys, *values;
    __device__ Row(const Params& p, const Span&, int request, int kv_head, int token)
        : keys(reinterpret_cast<const T*>(page(p, request, token)) + offset(p, kv_head, token)),
          values(keys + int64_t(p.kv_heads) * p.page_size * p.head_dim) {}
    __device__ float k(int d) const { return to_float(keys[d]); }
    __device__ float v(int d) const { return to_float(values[d]); }
  };
};

bool takes_tensor_cores(const PagedAttentionParams& p) {
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128) && p.page_size >= kGranuleTokens;
}

int max_splits(const PagedAttentionParams& p) { return splits_for(AbsoluteSplits{}, p.max_pages * p.page_size); }

template <int kHeadDim>
void launch_for(const PagedAttentionParams& p, cudaStream_t stream) {
  const int64_t item_rows = int64_t(p.rows) * (p.q_heads / p.kv_heads);  // of all requests
  if (device_info().hopper) {
    if (item_rows <= 8 * int64_t(p.requests))
      launch_warpgroup_attention<PagedKeys, WarpgroupShape<kHeadDim, 8>>(p, max_splits(p), stream);
    else if (item_rows <= 64 * int64_t(p.requests))
      launch_warpgroup_attention<PagedKeys, WarpgroupShape<kHeadDim, 64>>(p, max_splits(p), stream);
    else
      launch_warpgroup_attention<PagedKeys, WarpgroupShape<kHeadDim, 128>>(p, max_splits(p), stream);
    return;
  }
  if (item_rows <= 16 * int64_t(p.requests))
    launch_split_attention<PagedKeys, AttentionShape<kHeadDim, 1, 1, 4>>(p, max_splits(p), stream);
  else if (item_rows <= 32 * int64_t(p.requests))
    launch_split_attention<PagedKeys, AttentionShape<kHeadDim, 1, 2, 4>>(p, max_splits(p), stream);
  else
    launch_split_attention<PagedKeys, AttentionShape<kHeadDim, 4, kHeadDim == 128 ? 1 : 2, 2>>(p, max_splits(p),
                                                                                               stream);
}

}  // namespace

size_t paged_attention_workspace_bytes(const PagedAttentionParams& p) {
  if (!takes_tensor_cores(p)) return 0;
  return std::max(split_attention_workspace_bytes(p.rows, p.q_heads, max_splits(p), p.head_dim),
                  warpgroup_attention_workspace_bytes(p.rows, p.q_heads, max_splits(p), p.head_dim));
}

void paged_attention(const PagedAttentionParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  VC_CHECK(p.scale > 0.f, "scale is ", p.scale, "; attention needs a positive one.");
  if (!takes_tensor_cores(p)) {
    dispatch_element(p.dtype,
                     [&](auto t) { launch_simple_attention<decltype(t), SimplePagedKeys<decltype(t)>>(p, stream); });
    return;
  }
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
