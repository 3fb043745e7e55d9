// SPDX-License-Identifier: Apache-2.0
// The attention of split_attention.cuh for Hopper (sm_90a): the same list of work items, splits and partial states,
// with wgmma. Its bits differ from that kernel's; what must agree is every row count and batch on one device.
//
// Block: one or two consumer warpgroups of 64 item rows each (16 a warp), and a producer warp, one of a warpgroup that
// gives its registers away. One row or 64, the instructions are the same. A row's scores, weights and sums stay in the
// registers of one quad of lanes: consumer warps exchange nothing.
//
// Shared memory: a ring of slots of one tile (64 tokens of K, or of V): groups of 8 tokens, each head_dim / 64 parts of
// [8 tokens][128 bytes] in the hardware's 128-byte swizzle, so that the memory is asked for both halves of a row soon
// after each other; an item's record, its q in parts of [rows][128 bytes], and the positions of its rows; barriers; the
// schedule. Whole tiles come as bulk copies, whose bytes the slot's barrier counts. A tile with tokens that must not be
// read is copied by the producer's lanes, which put zeros there, so that memory past a request's last token may hold
// anything.
//
// Reduction order (R1). Per row and split: tiles of 64 tokens in order, cut at absolute multiples of 64. A score is the
// chain of wgmma k-steps over channels 0-15, 16-31, ...; the weights of a tile enter o as the chain over its tokens
// 0-15, ...; l adds a lane's 16 weights of a tile left to right, and the four lanes of the quad at the end. Which
// warpgroup does it, and how many rows ride along, changes none of it. Partials merge as softmax_state.cuh says, in a
// kernel of their own. Held by bench/gpu/attention_check.cu.
//
// While the warps weigh the scores of one tile, the tensor cores work on the sums of the tile before, and of two
// warpgroups on the other's products: that changes when a product is made, not what enters it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "element.cuh"
#include "warpgroup_consume.cuh"
#include "warpgroup_produce.cuh"

namespace vericache::cuda {

template <class Keys, class Shape>
__global__ void __launch_bounds__(Shape::kBoundThreads, 1)
    warpgroup_attention_kernel(const __grid_constant__ WarpgroupArgs<Keys> args) {
#if VERICACHE_HAS_WGMMA
  WarpgroupBlock<Keys, Shape> block(args, dynamic_smem());
  block.init_barriers();
  mbarrier_init_fence();
  block.clear_q(dynamic_smem());
  if (!args.p.tables_settled) wait_for_previous_kernel();
  block.schedule.build(args.p, Shape::kRows);  // its barriers also order what was initialized
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp < Shape::kConsumerWarps) {
    take_registers<Shape::kConsumerRegisters>();
    block.consume(warp);
  } else {
    give_registers<Shape::kProducerRegisters>();
    if (warp == Shape::kConsumerWarps) block.produce();
  }
#endif
}

inline constexpr int kMaxGroup = 16;  // of query heads a KV head, for copies of q in boxes

inline constexpr size_t kStatesInL2 = size_t(40) << 20;  // of 50 MB

// A counter behind the partial states.
inline size_t warpgroup_attention_workspace_bytes(int64_t rows, int q_heads, int max_splits, int head_dim) {
  return PartialStates::bytes(rows * q_heads * max_splits, head_dim) + sizeof(TaggedCounter);
}

// Whether a KV head's query heads of one row are a box: their rows follow one another, at multiples of a row.
template <int kHeadDim, class Params>
bool has_q_boxes(const Params& p, int rows_per_block) {
  const int group = p.q_heads / p.kv_heads;
  const auto first = reinterpret_cast<uint64_t>(p.q);
  const uint64_t last = first + uint64_t(p.rows) * uint64_t(p.q_stride_row) * 2;
  return rows_per_block % group == 0 && group <= kMaxGroup && p.q_stride_head == kHeadDim &&
         p.q_stride_row % kHeadDim == 0 && first % (kHeadDim * 2) == 0 &&
         row_place<kHeadDim>(first).high == row_place<kHeadDim>(last).high;
}

template <class Keys, class Shape>
void launch_warpgroup_attention(const typename Keys::Params& p, int max_splits, cudaStream_t stream) {
  constexpr auto kernel = warpgroup_attention_kernel<Keys, Shape>;
  const DeviceInfo info = device_info();
  const auto smem_of = [&](int slots) {
    return WarpgroupSmem<Shape>::template bytes<Keys>(slots, p.requests, p.kv_heads);
  };
  int slots = Shape::slots(info);
  while (slots > Shape::kFewestSlots && smem_of(slots) > size_t(info.smem_optin)) slots -= 2;
  const size_t smem = smem_of(slots);
  VC_CHECK(q_aligned16(p), "q has strides ", p.q_stride_row, ", ", p.q_stride_head,
           " elements or starts off a multiple of 16 bytes; make it contiguous.");
  VC_CHECK(smem <= size_t(info.smem_optin), p.requests,
           " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const int group = p.q_heads / p.kv_heads;
  const int64_t bound = (int64_t(p.rows) * group / Shape::kRows + p.requests) * p.kv_heads * max_splits;
  const int grid = int(std::min<int64_t>(info.multiprocessors, std::max<int64_t>(bound, 1)));

  const int64_t states = int64_t(p.rows) * p.q_heads * max_splits;
  const auto partial = PartialStates::at(p.workspace, states, Shape::kHeadDim);
  const bool boxes_of_tiles = p.page_size >= kTileTokens;
  static const CUtensorMap maps[2] = {token_map(Shape::kHeadDim, kGranuleTokens),
                                      token_map(Shape::kHeadDim, kTileTokens)};
  static const auto q_maps = [] {
    std::array<CUtensorMap, kMaxGroup + 1> of_group{};
    for (int rows = 1; rows <= kMaxGroup; ++rows) of_group[rows] = row_map(Shape::kHeadDim, rows);
    return of_group;
  }();
  // K and V, read once, would push states out of the L2 before the merge reads them; where the L2 has no room for the
  // states either, they had better share it.
  const bool fits = PartialStates::bytes(states, Shape::kHeadDim) <= kStatesInL2;
  const bool q_boxes = has_q_boxes<Shape::kHeadDim>(p, Shape::kRows);
  allow_all_smem<kernel>(info);
  launch(
      kernel, {dim3(grid), dim3(Shape::kThreads), smem}, info, stream,
      WarpgroupArgs<Keys>{p, partial, reinterpret_cast<TaggedCounter*>(partial.ml + states), max_splits, slots,
                          boxes_of_tiles ? kTileTokens : kGranuleTokens, fits ? kDropFirst : kDropAsUsual,
                          fits ? kDropLast : kDropAsUsual, q_boxes, maps[boxes_of_tiles], q_maps[q_boxes ? group : 0]});
  launch_merge<Shape::kHeadDim>(RowSplits<Keys>{p, max_splits}, max_splits, p.rows, p.q_heads, partial, p.out, info,
                                stream);
}

}  // namespace vericache::cuda
