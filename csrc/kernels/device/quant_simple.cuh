// SPDX-License-Identifier: Apache-2.0
// Where device/simple_attention.cuh finds the keys of a quantized cache: other storage, head_dims, page and group sizes
// than device/quant_tile.cuh takes.
#pragma once

#include "common/code_planes.h"
#include "element.cuh"
#include "simple_attention.cuh"

namespace vericache::cuda {

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
      const auto* block = reinterpret_cast<const uint8_t*>(codes);
      if constexpr (CodePlanes<kBits>::kSplit) {
        const uint32_t four = CodePlanes<kBits>::load4(block, slot, d / 4, p.page_size, p.head_dim);
        return fmaf(float(four >> d % 4 * 8 & 0xffu), scale, zero);
      } else {
        const int byte = block[int64_t(slot) * p.head_dim * kBits / 8 + d * kBits / 8];
        return fmaf(float(byte >> d * kBits % 8 & ((1 << kBits) - 1)), scale, zero);
      }
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

}  // namespace vericache::cuda
