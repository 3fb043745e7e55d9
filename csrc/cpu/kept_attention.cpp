// SPDX-License-Identifier: Apache-2.0
// Draft attention over the kept tokens of each head (head pages), then the full-precision tail.
#include "cpu/kept_attention.h"

#include "common/types.h"
#include "cpu/attention.h"

namespace vericache::cpu {

void kept_attention(const KeptAttentionParams& p) {
  const auto kept_len = [&](int request, int kv_head) { return p.kept_len[int64_t(request) * p.kv_heads + kv_head]; };
  AttentionJob job(p);
  job.source = [&](int request, int kv_head) {
    return dispatch(p.dtype, [&](auto t) -> std::unique_ptr<KeySource> {
      using Source = Pages<decltype(t)>;
      const int64_t* kept = p.kept_table + request * p.kept_stride_request + kv_head * p.kept_stride_head;
      return std::make_unique<WithTail<Source, Source>>(
          Source(kept, 1, 0, p.page_size, p.head_dim),
          Source(p.tail_table + request * p.tail_stride_request, p.kv_heads, kv_head, p.page_size, p.head_dim),
          tail_boundary(kept_len(request, kv_head)));
    });
  };
  job.keys = [&](int request, int kv_head, int row) {
    const int64_t kept = kept_len(request, kv_head), boundary = tail_boundary(kept);
    return KeyRanges{.begin = 0,
                     .end = kept,
                     .tail_begin = boundary,
                     .tail_end = boundary + p.row_position[row] + 1 - p.tail_start[request]};
  };
  attend(job);
}

}  // namespace vericache::cpu
