// SPDX-License-Identifier: Apache-2.0
// Where attention cuts the key axis, and how the pieces become work items of a persistent grid.
//
// Reduction order (R1), the part fixed here: full and verify attention cut keys at absolute tokens (AbsoluteSplits).
// Short contexts so get enough pieces to fill the chip, long ones few partial results, and long pieces run first so
// that the short ones even out the end. Nothing here depends on rows, batch or device. Held by
// bench/gpu/attention_check.cu. Draft attention has cuts of its own (kept_keys.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace vericache::cuda {

inline constexpr int kTileTokens = 64;
inline constexpr int kGranuleTokens = 16;  // lies within one page: pages hold at least 16 tokens

// The tokens a request's rows need between them: lo .. hi-1 but for hole_begin .. hole_end-1, which pad the end of a
// compressed part to a whole tile and are never read.
struct Span {
  int lo, hi, hole_begin, hole_end;
};

// Pieces of 512 tokens up to 4096, of 2048 up to 65536, of 4096 from there on: where those begin, one request with 8 KV
// heads has as many tiles for each of 132 blocks as one of them; begun earlier, they would still run when all else has
// ended.
struct AbsoluteSplits {
  static constexpr int kShort = 512, kShortEnd = 4096, kMiddle = 2048, kMiddleEnd = 65536, kLong = 4096;  // tokens
  static constexpr int kShortSplits = kShortEnd / kShort;
  static constexpr int kMiddleSplits = kShortSplits + (kMiddleEnd - kShortEnd) / kMiddle;  // and all before
  static constexpr int kKinds = 3;                                                         // long, middle, short

  static __host__ __device__ constexpr int of(int token) {
    if (token < kShortEnd) return token / kShort;
    if (token < kMiddleEnd) return kShortSplits + (token - kShortEnd) / kMiddle;
    return kMiddleSplits + (token - kMiddleEnd) / kLong;
  }
  static __host__ __device__ constexpr int begin(int split) {
    if (split < kShortSplits) return split * kShort;
    if (split < kMiddleSplits) return kShortEnd + (split - kShortSplits) * kMiddle;
    return kMiddleEnd + (split - kMiddleSplits) * kLong;
  }
  // The first split of a kind, and how long its pieces are, in units of the shortest.
  static __device__ int first_of(int kind) { return kind == 0 ? kMiddleSplits : kind == 1 ? kShortSplits : 0; }
  static __device__ int weight(int kind) { return (kind == 0 ? kLong : kind == 1 ? kMiddle : kShort) / kShort; }
};
static_assert(AbsoluteSplits::begin(AbsoluteSplits::kShortSplits) == AbsoluteSplits::kShortEnd &&
              AbsoluteSplits::begin(AbsoluteSplits::kMiddleSplits) == AbsoluteSplits::kMiddleEnd);

// Splits that hold tokens 0 .. tokens - 1.
template <class Splits>
__host__ __device__ constexpr int splits_for(const Splits& splits, int tokens) {
  return tokens > 0 ? splits.of(tokens - 1) + 1 : 0;
}

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
// it can sit in a CUDA graph. A unit is what has its own length: a request, or one KV head of a request. Items are
// listed by kind of split, the longest kind first, then by unit.
template <class Keys>
struct Schedule {
  using Splits = typename Keys::Splits;
  static constexpr int kKinds = Splits::kKinds;
  int* row_offset;  // [requests + 1]
  int* first_pos;   // [requests]: the lowest position of the request's rows
  int* last_pos;    // [requests]
  int* before;      // [kKinds][units + 1]: items of a kind before this unit's
  Span* span;       // [units]
  Splits* cuts;     // one

  static __host__ __device__ int units(int requests, int kv_heads) {
    return Keys::kPerHead ? requests * kv_heads : requests;
  }
  static __host__ __device__ size_t bytes(int requests, int kv_heads) {
    const int u = units(requests, kv_heads);
    return size_t(u) * sizeof(Span) + sizeof(int) * size_t(3 * requests + 1 + kKinds * (u + 1)) + sizeof(Splits);
  }

  __device__ void place(void* memory, int requests, int kv_heads) {  // 16-byte aligned
    const int u = units(requests, kv_heads);
    span = static_cast<Span*>(memory);
    row_offset = reinterpret_cast<int*>(span + u);
    first_pos = row_offset + requests + 1;
    last_pos = first_pos + requests;
    before = last_pos + requests;
    cuts = reinterpret_cast<Splits*>(before + kKinds * (u + 1));
  }

  __device__ Splits splits() const {
    if constexpr (std::is_empty_v<Splits>)
      return {};
    else
      return *cuts;
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
    if constexpr (!std::is_empty_v<Splits>) {
      if (threadIdx.x < 32) {
        const Splits found = Keys::splits(p);
        if (threadIdx.x == 0) *cuts = found;
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
      for (int kind = 0; kind < kKinds; ++kind) {
        const int2 range = of_kind(s, kind);
        before[kind * (u_count + 1) + u] = max(0, range.y - range.x) * each;
      }
    }
    __syncthreads();
    if (threadIdx.x < 32 * kKinds) {  // a warp a kind
      int* counts = before + int(threadIdx.x) / 32 * (u_count + 1);
      const int lane = threadIdx.x % 32;
      int so_far = 0;
      for (int u = lane; u - lane < u_count; u += 32) {
        const int own = u < u_count ? counts[u] : 0;
        int all, before = warp_sum_before(own, lane, all);
        if (u < u_count) counts[u] = so_far + before;
        so_far += all;
      }
      if (lane == 0) counts[u_count] = so_far;
    }
    __syncthreads();
  }

  __device__ int items(const typename Keys::Params& p) const {
    const int u = units(p.requests, p.kv_heads);
    int all = 0;
    for (int kind = 0; kind < kKinds; ++kind) all += before[kind * (u + 1) + u];
    return all;
  }

  // The first item of block `block`, when every block takes a run of neighbouring items of about equal length.
  __device__ int share(const typename Keys::Params& p, int block) const {
    const int u = units(p.requests, p.kv_heads);
    const auto of = [&](int kind) { return before[kind * (u + 1) + u]; };
    int64_t total = 0;
    for (int kind = 0; kind < kKinds; ++kind) total += int64_t(splits().weight(kind)) * of(kind);
    int64_t start = (total * block + gridDim.x - 1) / gridDim.x;  // of the line of all items, each as long as it weighs
    int first = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      const int weight = splits().weight(kind);
      const int64_t length = int64_t(weight) * of(kind);
      if (start <= length) return first + int((start + weight - 1) / weight);
      start -= length;
      first += of(kind);
    }
    return first;
  }

  __device__ WorkItem item(const typename Keys::Params& p, int rows_per_block, int index) const {
    const int u_count = units(p.requests, p.kv_heads);
    int kind = 0;
    const int* prefix = before;
    while (kind + 1 < kKinds && index >= prefix[u_count]) {
      index -= prefix[u_count];
      prefix += u_count + 1;
      ++kind;
    }
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
    w.split = of_kind(span[lo], kind).x + local;
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
  // The splits of a kind that a unit has: x .. y-1, none if y <= x.
  __device__ int2 of_kind(const Span& s, int kind) const {
    if (s.hi <= s.lo) return {0, 0};
    const Splits cut = splits();
    const int first = max(cut.of(s.lo), cut.first_of(kind)), end = splits_for(cut, s.hi);
    return {first, kind == 0 ? end : min(end, cut.first_of(kind - 1))};
  }
};

inline constexpr int kSingleRows = 32;  // query rows at most of a SingleRequest

// What kernels for one request need of its rows, in place of a schedule. For whole warps: lane i has row i's position.
struct SingleRequest {
  int position, query0, end;

  template <class Params>
  static __device__ __forceinline__ SingleRequest load(const Params& p, int lane) {
    return {lane < p.rows ? p.row_position[lane] : -1, p.row_offsets[0], p.row_offsets[1]};
  }
  __device__ __forceinline__ int rows() const { return end - query0; }
  // The highest position. Apart from load(), so that more can be asked for between.
  __device__ __forceinline__ int last(int lane) const {
    return __reduce_max_sync(0xffffffffu, lane >= query0 && lane < end ? position : -1);
  }
};

}  // namespace vericache::cuda
