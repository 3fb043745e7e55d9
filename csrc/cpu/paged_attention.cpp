// SPDX-License-Identifier: Apache-2.0
// Full/verify attention, and prefill's: all keys of a row lie in full pages. Its order of reduction is attention.h's.
#include "cpu/paged_attention.h"

#include <algorithm>

#include "common/types.h"
#include "cpu/attention.h"

namespace vericache::cpu {

void paged_attention(const PagedAttentionParams& p) {
  AttentionJob job(p);
  job.source = [&](int request, int kv_head) {
    return dispatch(p.dtype, [&](auto t) -> std::unique_ptr<KeySource> {
      return std::make_unique<Pages<decltype(t)>>(p.page_table + request * p.table_stride_request, p.kv_heads, kv_head,
                                                  p.page_size, p.head_dim);
    });
  };
  job.keys = [&](int, int, int row) {
    const int64_t end = int64_t(p.row_position[row]) + 1;
    return KeyRanges{.begin = p.window > 0 ? std::max<int64_t>(0, end - p.window) : 0, .end = end};
  };
  attend(job);
}

}  // namespace vericache::cpu
