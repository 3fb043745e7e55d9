// SPDX-License-Identifier: Apache-2.0
// Draft attention over quantized pages, dequantized tile by tile, then the full-precision tail.
#include "cpu/quant_attention.h"

#include "common/error.h"
#include "common/types.h"
#include "cpu/attention.h"

namespace vericache::cpu {
namespace {

template <class T, int kBits>
std::unique_ptr<KeySource> make_source(const QuantAttentionParams& p, int request, int kv_head) {
  using Front = QuantPages<T, kBits>;
  return std::make_unique<WithTail<Front, Pages<T>>>(
      Front(p.quant_table + request * p.quant_stride_request, p.kv_heads, kv_head, p.page_size, p.head_dim, p.group),
      Pages<T>(p.tail_table + request * p.tail_stride_request, p.kv_heads, kv_head, p.page_size, p.head_dim),
      tail_boundary(p.quant_len[request]));
}

}  // namespace

void quant_attention(const QuantAttentionParams& p) {
  AttentionJob job(p);
  job.source = [&](int request, int kv_head) {
    return dispatch(p.dtype, [&](auto t) -> std::unique_ptr<KeySource> {
      using T = decltype(t);
      return dispatch_bits(p.bits, [&]<int kBits>() { return make_source<T, kBits>(p, request, kv_head); });
    });
  };
  job.keys = [&](int request, int, int row) {
    const int64_t length = p.quant_len[request], boundary = tail_boundary(length);
    return KeyRanges{
        .begin = 0, .end = length, .tail_begin = boundary, .tail_end = boundary + p.row_position[row] + 1 - length};
  };
  attend(job);
}

}  // namespace vericache::cpu
