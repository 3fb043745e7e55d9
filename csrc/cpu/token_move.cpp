// SPDX-License-Identifier: Apache-2.0
// Copies K and V rows between full pages and head pages; bytes move, no value is looked at.
#include "cpu/token_move.h"

#include <algorithm>
#include <cstring>

#include "common/types.h"
#include "cpu/parallel.h"

namespace vericache::cpu {
namespace {

// Rows of a head go to threads in runs of this many.
constexpr int kRunRows = 64;

template <bool kGather>
void move_tokens(const TokenMoveParams& p) {
  const int64_t row_bytes = int64_t(p.head_dim) * int64_t(dtype_size(p.dtype));
  const int64_t head_bytes = row_bytes * p.page_size;  // K or V rows of one head in one page
  const auto move = [&](int head, int row) {
    const int64_t position = p.positions[head * p.positions_stride + row];
    char* full = reinterpret_cast<char*>(p.page_table[position / p.page_size]) + head * head_bytes +
                 position % p.page_size * row_bytes;
    char* kept =
        reinterpret_cast<char*>(p.head_table[head * p.head_stride + row / p.page_size]) + row % p.page_size * row_bytes;
    for (int half = 0; half < 2; ++half, full += p.kv_heads * head_bytes, kept += head_bytes)
      kGather ? std::memcpy(kept, full, size_t(row_bytes)) : std::memcpy(full, kept, size_t(row_bytes));
  };
  const int64_t runs = (p.capacity + kRunRows - 1) / kRunRows;
  parallel_for(runs * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int head = int(i / runs), first = int(i % runs) * kRunRows;
      for (int row = first; row < std::min(first + kRunRows, p.counts[head]); ++row) move(head, row);
    }
  });
}

}  // namespace

void gather_tokens(const TokenMoveParams& p) { move_tokens<true>(p); }
void scatter_tokens(const TokenMoveParams& p) { move_tokens<false>(p); }

}  // namespace vericache::cpu
