// SPDX-License-Identifier: Apache-2.0
// Attention over any key source: what paged, kept and quantized attention share.
//
// A unit is one query row of one query head. The units of a block share a request and a KV head, so a tile of keys is
// converted to float32 once for all of them. For each split of kSplit keys, cut at absolute multiples, a unit gets a
// softmax state from the keys of the split that it attends to; the states merge from left to right.
//
// Reduction order (R1): a unit's states depend on its q and its own keys alone (attention_tiles.h), its merges on its
// own splits. Blocks, threads, and whether states are merged at once or kept for later change no bit.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "common/params.h"
#include "cpu/key_source.h"

namespace vericache::cpu {

// The keys a row attends to: begin .. end - 1, then tail_begin .. tail_end - 1, where tail_begin is a multiple of
// kSplit and not below end. Either part may be empty.
struct KeyRanges {
  int64_t begin = 0, end = 0, tail_begin = 0, tail_end = 0;

  bool empty() const { return begin >= end && tail_begin >= tail_end; }
  int64_t first() const { return begin < end ? begin : tail_begin; }
  int64_t last() const { return tail_begin < tail_end ? tail_end : end; }  // one past
};

struct AttentionJob {
  const void* q;  // see params.h
  void* out;
  const int32_t* row_offsets;
  int64_t q_stride_row, q_stride_head;
  int32_t rows, requests, q_heads, kv_heads, head_dim;
  float scale;
  DType dtype;
  std::function<std::unique_ptr<KeySource>(int request, int kv_head)> source;
  std::function<KeyRanges(int request, int kv_head, int row)> keys;

  template <class Params>
  explicit AttentionJob(const Params& p)
      : q(p.q),
        out(p.out),
        row_offsets(p.row_offsets),
        q_stride_row(p.q_stride_row),
        q_stride_head(p.q_stride_head),
        rows(p.rows),
        requests(p.requests),
        q_heads(p.q_heads),
        kv_heads(p.kv_heads),
        head_dim(p.head_dim),
        scale(p.scale),
        dtype(p.dtype) {}
};

// A row without keys comes out as zeros, as do idle rows.
void attend(const AttentionJob& job);

}  // namespace vericache::cpu
