// SPDX-License-Identifier: Apache-2.0
// Draft attention over the kept tokens of each head (head pages), then the full-precision tail.
#include "cpu/kept_attention.h"

#include "common/types.h"
#include "cpu/attention.h"

namespace vericache::cpu {

void kept_attention(const KeptAttentionParams& p) {
  const auto kept_len = [&](int request, int kv_head) { return p.kept_len[int64_t(request) * p.kv_heads + kv_head]; };
  // Nothing of a head has been dropped, and the caller wants the bits of paged_attention: no cut before the tail.
  const auto as_full = [&](int request, int64_t kept) { return p.as_full && kept == p.tail_start[request]; };
  AttentionJob job(p);
  job.source = [&](int request, int kv_head) {
    return dispatch(p.dtype, [&](auto t) -> std::unique_ptr<KeySource> {
      using Source = Pages<decltype(t)>;
      const int64_t kept = kept_len(request, kv_head);
      const int64_t* table = p.kept_table + request * p.kept_stride_request + kv_head * p.kept_stride_head;
      return std::make_unique<WithTail<Source, Source>>(
          Source(table, 1, 0, p.page_size, p.head_dim),
          Source(p.tail_table + request * p.tail_stride_request, p.kv_heads, kv_head, p.page_size, p.head_dim),
          as_full(request, kept) ? kept : tail_boundary(kept));
    });
  };
  job.keys = [&](int request, int kv_head, int row) {
    const int64_t kept = kept_len(request, kv_head), boundary = tail_boundary(kept);
    if (as_full(request, kept)) return KeyRanges{.begin = 0, .end = p.row_position[row] + 1};
    return KeyRanges{.begin = 0,
                     .end = kept,
                     .tail_begin = boundary,
                     .tail_end = boundary + p.row_position[row] + 1 - p.tail_start[request]};
  };
  attend(job);
}

}  // namespace vericache::cpu
