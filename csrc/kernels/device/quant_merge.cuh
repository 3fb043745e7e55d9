// SPDX-License-Identifier: Apache-2.0
// From the states of warps to outputs. A block's warps leave their states of a unit in shared memory; the block merges
// them. If the unit lies in the block's run as a whole, that is the output; else the merged state goes to memory, and a
// second kernel, launched dependently, merges the states of such units (PartialStates): that of row i of unit u from
// block b lies at index (b + u) * kItemRows + i. quant_single.cuh shares the merging.
//
// Order: a block's warps by number; the states of a unit in key order, in runs of equal length if several warps share
// them, then the runs. All of it is fixed by the lengths, the counts of rows and heads and the number of
// multiprocessors: the same call gives the same bits (bench/gpu/quant_batch.cuh).
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "quant_state.cuh"
#include "shared_memory.cuh"
#include "state_sum.cuh"

namespace vericache::cuda {

// What a block needs to know of a unit to merge its warps' states.
struct QuantUnit {
  int number, rows;  // rows: of this unit
  int64_t query0;    // the first query row of its request
  int first_item;    // the request's item row that is its row 0
  int kv_head;
  bool whole;  // in this block's run

  __device__ __forceinline__ int64_t out_row(const QuantAttentionParams& p, int row) const {
    const int group = p.q_heads / p.kv_heads, i = first_item + row;
    return (query0 + i / group) * p.q_heads + kv_head * group + i % group;
  }
};

// By all threads of the block. `deposits`: `apart` bytes from warp to warp, of the warps w that has(w).
template <class Shape, class Has>
__device__ __forceinline__ void merge_deposits(const QuantAttentionParams& p, const PartialStates& states,
                                               const QuantUnit& unit, const unsigned char* deposits, int apart,
                                               const Has& has) {
  constexpr int kPieces = Shape::kHeadDim / 4;
  for (int task = threadIdx.x; task < unit.rows * kPieces; task += int(blockDim.x)) {
    const int row = task / kPieces, piece = task % kPieces;
    const auto sum = sum_deposits<Shape>(deposits, apart, has, row, piece);
    if (unit.whole)
      sum.store_normalized(static_cast<uint16_t*>(p.out) + unit.out_row(p, row) * Shape::kHeadDim + piece * 4);
    else
      sum.template store<Shape::kHeadDim>(states, (int64_t(blockIdx.x) + unit.number) * Shape::kItemRows + row, piece);
  }
}

// The states of one query row and head: `count` of them from index `first` on, kItemRows apart. None if a block has
// written the output already, or if the row has no keys (`empty`).
struct QuantStateRun {
  int64_t first;
  int count;
  bool empty;
};

__device__ __forceinline__ QuantStateRun states_of(const QuantAttentionParams& p, const QuantLine& line, int item_rows,
                                                   int row, int head) {
  const int r = row < line.row_offset[p.requests] ? line.request_of_row(row) : -1;
  if (r < 0 || line.tiles[r] == 0) return {0, 0, true};
  const int tiles = line.tiles[r], group = p.q_heads / p.kv_heads;
  const int item = (row - line.row_offset[r]) * group + head % group;
  const int number = item / item_rows * p.kv_heads + head / group;  // of the unit among the request's
  const int begin = line.first_tile[r] + number * tiles;
  const int first_block = line.block_of(begin), last_block = line.block_of(begin + tiles - 1);
  if (first_block == last_block) return {0, 0, false};
  return {(int64_t(first_block) + line.first_unit[r] + number) * item_rows + item % item_rows,
          last_block - first_block + 1, false};
}

// Shared memory of the kRowWarps warps that merge a row and head.
template <int kHeadDim, int kRowWarps>
struct MergeParts {
  float o[kRowWarps][kHeadDim];
  float2 ml[kRowWarps];
};

// Merges the states of a row and head and stores the output.
template <int kHeadDim, int kRowWarps>
__device__ __forceinline__ void merge_states(const QuantAttentionParams& p, const PartialStates& states, int item_rows,
                                             const QuantStateRun& run, int row, int head,
                                             MergeParts<kHeadDim, kRowWarps>& parts) {
  constexpr int kPer = kHeadDim / 32;             // channels a lane
  constexpr int kBatch = kRowWarps == 1 ? 4 : 5;  // more take too many registers
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int each = (run.count + kRowWarps - 1) / kRowWarps, from = warp % kRowWarps * each;
  auto sum = sum_states<kHeadDim, kBatch>(states, run.first, item_rows, from, min(run.count, from + each), lane);
  if constexpr (kRowWarps > 1) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) parts.o[warp][lane * kPer + j] = sum.o[j];
    if (lane == 0) parts.ml[warp] = make_float2(sum.reference, sum.l);
    __syncthreads();
    if (warp > 0) return;
    float largest = sum.reference;
#pragma unroll
    for (int w = 1; w < kRowWarps; ++w) largest = fmaxf(largest, parts.ml[w].x);
    sum.raise(largest);
#pragma unroll
    for (int w = 1; w < kRowWarps; ++w) {
      const float weight = sum.weight_of(parts.ml[w].x, largest);
      sum.l = fmaf(parts.ml[w].y, weight, sum.l);
      float o[kPer];
      load_channels(o, parts.o[w] + lane * kPer);
      sum.add(o, weight);
    }
  }
  sum.store_normalized(static_cast<uint16_t*>(p.out) + (int64_t(row) * p.q_heads + head) * kHeadDim + lane * kPer);
}

struct QuantMergeArgs {
  QuantAttentionParams p;
  PartialStates states;
  int blocks, item_rows, tail_tokens;  // of the kernel that makes the states
};

inline constexpr int kMergeWarps = 4;  // of a block

// Outputs of rows whose unit a block's end cuts, and zeros for rows without keys. Each row and head takes kRowWarps
// warps. Grid: all rows and heads over kMergeWarps / kRowWarps. Shared memory: the line.
//
// The line is built before the wait, beside the kernel that makes the states, from what was there before that kernel
// let this one start: it does so after its own wait. To find room beside most shapes of it, a thread here
// has at most 48 registers.
template <int kHeadDim, int kRowWarps>
__global__ void __launch_bounds__(32 * kMergeWarps, 10)
    quant_merge_kernel(const __grid_constant__ QuantMergeArgs args) {
  __shared__ MergeParts<kHeadDim, kRowWarps> parts;
  const QuantAttentionParams& p = args.p;
  const int warp = threadIdx.x / 32;
  let_next_kernel_start();  // it waits for this one's end, hence for the states
  QuantLine line;
  line.place(reinterpret_cast<int*>(dynamic_smem()), p.requests, args.blocks);
  line.build(p, args.item_rows, args.tail_tokens);
  const int index = int(blockIdx.x) * (kMergeWarps / kRowWarps) + warp / kRowWarps;
  const int row = index / p.q_heads, head = index % p.q_heads;
  const QuantStateRun run = row < p.rows ? states_of(p, line, args.item_rows, row, head) : QuantStateRun{0, 0, false};
  wait_for_previous_kernel();
  if (run.count == 0 && !run.empty) return;  // the same for all warps of a row and head

  merge_states(p, args.states, args.item_rows, run, row, head, parts);
}

// A block a row and head, unless there are units enough for most to consist of a few states: then a warp.
template <int kHeadDim>
void launch_quant_merge(const QuantMergeArgs& args, const DeviceInfo& info, cudaStream_t stream) {
  const auto with = [&]<int kRowWarps>() {
    constexpr auto kernel = quant_merge_kernel<kHeadDim, kRowWarps>;
    constexpr int kRows = kMergeWarps / kRowWarps;
    const int64_t all = int64_t(args.p.rows) * args.p.q_heads;
    allow_all_smem<kernel>(info);
    launch(kernel,
           {dim3(unsigned((all + kRows - 1) / kRows)), dim3(32 * kMergeWarps),
            size_t(QuantLine::ints(args.p.requests)) * sizeof(int)},
           info, stream, args);
  };
  const int64_t items = int64_t(args.p.rows) * (args.p.q_heads / args.p.kv_heads);
  const int64_t units = std::max<int64_t>(args.p.requests, items / args.item_rows) * args.p.kv_heads;
  if (args.blocks > 4 * units)
    with.template operator()<kMergeWarps>();
  else
    with.template operator()<1>();
}

}  // namespace vericache::cuda
