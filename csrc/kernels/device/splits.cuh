// SPDX-License-Identifier: Apache-2.0
// Where attention cuts the key axis, and how the pieces become work items of a persistent grid.
//
// Reduction order (R1), the part fixed here: keys are cut at absolute tokens, every kFineTokens up to
// kFineSplits * kFineTokens and every kCoarseTokens from there on. Short contexts so get enough pieces to fill the
// chip, long ones few partial results, and coarse pieces run first so that the fine ones even out the end. Nothing here
// depends on rows, batch or device. Held by bench/gpu/attention_check.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vericache::cuda {

inline constexpr int kTileTokens = 64;
inline constexpr int kGranuleTokens = 16;  // lies within one page: pages hold at least 16 tokens
inline constexpr int kFineTokens = 512;
inline constexpr int kFineSplits = 8;
inline constexpr int kCoarseTokens = 2048;

__host__ __device__ constexpr int split_of(int token) {
  constexpr int fine_end = kFineSplits * kFineTokens;
  return token < fine_end ? token / kFineTokens : kFineSplits + (token - fine_end) / kCoarseTokens;
}

__host__ __device__ constexpr int split_begin(int split) {
  constexpr int fine_end = kFineSplits * kFineTokens;
  return split < kFineSplits ? split * kFineTokens : fine_end + (split - kFineSplits) * kCoarseTokens;
}

__host__ __device__ constexpr int splits_for(int tokens) { return tokens > 0 ? split_of(tokens - 1) + 1 : 0; }

// The tokens a request's rows need between them: lo .. hi-1 but for hole_begin .. hole_end-1, which pad the end of a
// compressed part to a whole tile and are never read.
struct Span {
  int lo, hi, hole_begin, hole_end;
};

// Sixteen consecutive tokens of one KV head in memory: token i has K at `k + i * row` and V at `k + v_offset + i *
// row`.
struct Granule {
  const char* k;
  int v_offset;  // bytes
  int valid;     // the first `valid` tokens may be read
};

// One piece of work: the rows row_block of (request, KV head) against one split.
struct WorkItem {
  int unit, request, kv_head, split, row_block;
};

// The list of work items, rebuilt by every block from the device-side lengths: the launch depends on none of them, so
// it can sit in a CUDA graph. A unit is what has its own length: a request, or one KV head of a request.
template <class Keys>
struct Schedule {
  int* row_offset;  // [requests + 1]
  int* first_pos;   // [requests]: the lowest position of the request's rows
  int* last_pos;    // [requests]
  int* coarse;      // [units + 1]: items before this unit's, coarse splits
  int* fine;        // [units + 1]: the same, fine splits; they come after all coarse ones
  Span* span;       // [units]

  static __host__ __device__ int units(int requests, int kv_heads) {
    return Keys::kPerHead ? requests * kv_heads : requests;
  }
  static __host__ __device__ size_t bytes(int requests, int kv_heads) {
    const int u = units(requests, kv_heads);
    return size_t(u) * sizeof(Span) + sizeof(int) * size_t(3 * requests + 1 + 2 * (u + 1));
  }

  __device__ void place(void* memory, int requests, int kv_heads) {  // 16-byte aligned
    const int u = units(requests, kv_heads);
    span = static_cast<Span*>(memory);
    row_offset = reinterpret_cast<int*>(span + u);
    first_pos = row_offset + requests + 1;
    last_pos = first_pos + requests;
    coarse = last_pos + requests;
    fine = coarse + u + 1;
  }

  // Called by all threads of the block.
  __device__ void build(const typename Keys::Params& p, int rows_per_block) {
    const int group = p.q_heads / p.kv_heads;
    const int own_position = int(threadIdx.x) < p.rows ? p.row_position[threadIdx.x] : 0;  // loads beside the offsets
    for (int r = threadIdx.x; r <= p.requests; r += blockDim.x) {
      row_offset[r] = p.row_offsets[r];
      if (r < p.requests) {
        first_pos[r] = INT32_MAX;
        last_pos[r] = -1;
      }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < row_offset[p.requests]; row += blockDim.x) {
      const int r = request_of(row, p.requests);
      const int position = row == int(threadIdx.x) ? own_position : p.row_position[row];
      atomicMin(&first_pos[r], position);
      atomicMax(&last_pos[r], position);
    }
    __syncthreads();
    const int u_count = units(p.requests, p.kv_heads);
    for (int u = threadIdx.x; u < u_count; u += blockDim.x) {
      const int r = Keys::kPerHead ? u / p.kv_heads : u;
      const int rows = row_offset[r + 1] - row_offset[r];
      Span s{0, 0, 0, 0};
      if (rows > 0) s = Keys::span(p, r, Keys::kPerHead ? u % p.kv_heads : 0, first_pos[r], last_pos[r]);
      span[u] = s;
      const int each = rows_blocks(rows * group, rows_per_block) * (Keys::kPerHead ? 1 : p.kv_heads);
      const int first = first_split(s), last = splits_for(s.hi);
      fine[u] = max(0, min(last, kFineSplits) - first) * each;
      coarse[u] = max(0, last - max(first, kFineSplits)) * each;
    }
    __syncthreads();
    if (threadIdx.x < 64) {  // warp 0: coarse, warp 1: fine
      int* counts = threadIdx.x < 32 ? coarse : fine;
      const int lane = threadIdx.x % 32;
      int before = 0;
      for (int u = lane; u - lane < u_count; u += 32) {
        const int own = u < u_count ? counts[u] : 0;
        int sum = own;
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, step);
          if (lane >= step) sum += other;
        }
        if (u < u_count) counts[u] = before + sum - own;
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
      if (lane == 0) counts[u_count] = before;
    }
    __syncthreads();
  }

  __device__ int items(const typename Keys::Params& p) const {
    const int u = units(p.requests, p.kv_heads);
    return coarse[u] + fine[u];
  }

  // The first item of block `block`, when every block takes a run of neighbouring items of about equal length.
  __device__ int share(const typename Keys::Params& p, int block) const {
    constexpr int kWeight = kCoarseTokens / kFineTokens;
    const int u = units(p.requests, p.kv_heads);
    const int64_t total = int64_t(kWeight) * coarse[u] + fine[u];
    const int64_t start = (total * block + gridDim.x - 1) / gridDim.x;
    return int(start <= int64_t(kWeight) * coarse[u] ? (start + kWeight - 1) / kWeight
                                                     : start - int64_t(kWeight - 1) * coarse[u]);
  }

  __device__ WorkItem item(const typename Keys::Params& p, int rows_per_block, int index) const {
    const int u_count = units(p.requests, p.kv_heads);
    const bool is_coarse = index < coarse[u_count];
    const int* prefix = is_coarse ? coarse : fine;
    if (!is_coarse) index -= coarse[u_count];
    int lo = 0, hi = u_count;  // prefix[lo] <= index < prefix[hi]
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (prefix[mid] <= index ? lo : hi) = mid;
    }
    WorkItem w;
    w.unit = lo;
    w.request = Keys::kPerHead ? lo / p.kv_heads : lo;
    int local = index - prefix[lo];
    const int rows = row_offset[w.request + 1] - row_offset[w.request];
    const int blocks = rows_blocks(rows * (p.q_heads / p.kv_heads), rows_per_block);
    w.row_block = local % blocks;
    local /= blocks;
    if (Keys::kPerHead) {
      w.kv_head = lo % p.kv_heads;
    } else {
      w.kv_head = local % p.kv_heads;
      local /= p.kv_heads;
    }
    const int first = first_split(span[lo]);
    w.split = (is_coarse ? max(first, kFineSplits) : first) + local;
    return w;
  }

  __device__ int request_of(int row, int requests) const {
    int lo = 0, hi = requests;  // row_offset[lo] <= row < row_offset[hi]
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (row_offset[mid] <= row ? lo : hi) = mid;
    }
    return lo;
  }

  static __device__ int rows_blocks(int rows, int rows_per_block) {
    return (rows + rows_per_block - 1) / rows_per_block;
  }
  static __device__ int first_split(const Span& s) { return s.hi > s.lo ? split_of(s.lo) : splits_for(s.hi); }
};

}  // namespace vericache::cuda
