// SPDX-License-Identifier: Apache-2.0
// Quantized attention for one request, where the time between two calls' bytes counts most. For Hopper.
//
// There is no line to build: every unit is cut into equal pieces, one a block, and every piece leaves a state, an empty
// one if it has no tiles, so that the merge depends on no length. Rings: quant_ring.cuh.
//
// A multiprocessor holds one block: its start, that is lengths, page addresses and first half tile, one after another,
// follows the end of the block before it. So no division stands before the first load, q is asked for before the rest
// of the ring and awaited after it, and only rows that exist are merged.
//
// Until the wait for the kernel before, a warp has one half on its way at a time, and some warps none. The merge of the
// call before runs meanwhile, and its loads and stores queue behind whatever has been asked of the memory: whole rings
// at once would be 7 to 9 us of it.
//
// Grid: one block a multiprocessor. Shared memory: the rings, in which the warps' states are left at the end. Order: as
// in quant_merge.cuh; a unit's states by piece. Fixed by the lengths, the counts of rows and heads and the number of
// multiprocessors. Held by bench/gpu/quant_batch.cuh.
#pragma once

#include "quant_merge.cuh"
#include "quant_ring.cuh"
#include "splits.cuh"

namespace vericache::cuda {

struct QuantSingleArgs {
  QuantAttentionParams p;
  QuantBlob blob;
  PartialStates states;  // row i from block b: index b * kItemRows + i
  QuantPieces pieces;
};

// kEarlyWarps: those that ask for tiles before the wait for the kernel before. kEarlyHalves: how many of their ring, of
// short runs; what is not asked for early follows q.
template <class Tile_, int kEarlyWarps_, int kEarlyHalves_>
struct QuantSingleShape : Tile_ {
  using Tile = Tile_;
  static constexpr int kEarlyWarps = kEarlyWarps_, kEarlyHalves = kEarlyHalves_;
  static constexpr int kShortRun = 3 * Tile::kWarps;  // tiles of a block at most
  static_assert(Tile::kStateBytes <= Tile::kRingBytes);
  static_assert(Tile::kWarps * Tile::kRingBytes <= 227 * 1024);  // what a block may have
  static_assert(kEarlyHalves >= 1 && kEarlyHalves <= Tile::kHalves && kEarlyWarps <= Tile::kWarps);
};

// Of a thread: 12 warps and a block of the merge (4 warps, 48 registers) leave each of the multiprocessor's four parts
// of 16384 registers room for three such warps and one of the merge.
inline constexpr int kSingleRegisters = 152;

template <class Shape>
__global__ void __maxnreg__(kSingleRegisters) quant_single_kernel(const __grid_constant__ QuantSingleArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWarps = Shape::kWarps, kHalves = Shape::kHalves;
  const QuantAttentionParams& p = args.p;
  unsigned char* smem = dynamic_smem();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!p.tables_settled) wait_for_previous_kernel();
  let_next_kernel_start();  // the merge reads nothing before its own wait that is not there by now
  const auto request = SingleRequest::load(p, lane);
  const int quant_len = p.quant_len[0];
  const int unit = args.pieces.unit_of(int(blockIdx.x)), piece = int(blockIdx.x) - args.pieces.first(unit);
  const int group = p.q_heads / p.kv_heads;
  int kv_head = unit, first_item = 0;
  for (; kv_head >= p.kv_heads; kv_head -= p.kv_heads) first_item += Shape::kItemRows;
  const int last = request.last(lane), quant_tiles = quant_len / kQuantTokens;
  const int items = request.rows() * group, tail = max(0, last + 1 - quant_tiles * kQuantTokens);
  const int tiles = first_item < items ? quant_tiles + (tail + Shape::kTailTokens - 1) / Shape::kTailTokens : 0;
  const int begin = args.pieces.begin(unit, tiles, piece), end = args.pieces.begin(unit, tiles, piece + 1);
  const int most = end - begin <= Shape::kShortRun ? Shape::kEarlyHalves : kHalves;
  const int early = warp < Shape::kEarlyWarps || !p.cache_settled ? most : 0;

  const int turns = (end - begin - warp + kWarps - 1) / kWarps;
  QuantRing<typename Shape::Tile> ring{{smem + warp * Shape::kRingBytes}, p, args.blob, lane, 2 * turns};
  const auto locate = [&](int turn) {
    const int tile = begin + warp + (turn + lane) * kWarps;
    if (tile < end) ring.set(page_of<Shape>(p, args.blob, 0, tile, quant_tiles), kv_head, tile, quant_tiles);
  };
  locate(0);
  ring.fill(
      early, [&] { return p.cache_settled && begin + warp + ring.next_turn() * kWarps < quant_tiles; },
      [&] { ring.copy_next(locate); });
  using State = QuantState<typename Shape::Tile>;
  const uint16_t* q_row = State::q_row(p, request.query0, first_item, items, kv_head, lane);
  wait_for_previous_kernel();

  if (begin + warp < end) {
    const float c = p.scale * kLog2e;
    const typename State::Query query(q_row, lane);
#pragma unroll 1
    while (ring.next < kHalves) ring.copy_next(locate);  // behind q on its way, not behind its arrival
    State state;
    state.start(query);
    for (int tile = begin + warp; tile < end; tile += kWarps) {
      if (tile < quant_tiles) {
        ring.take(state, c, locate);
      } else {
        const int skipped = (tile - quant_tiles) * Shape::kTailTokens + quant_tiles * kQuantTokens;
        int seen[2];
        state.count_seen(seen, p, request.query0, first_item, items, skipped, lane);
        ring.take_tail(state, c, last + 1 - skipped, seen, locate);
      }
    }
    auto* o = reinterpret_cast<float*>(smem + warp * Shape::kRingBytes);
    state.deposit(o, reinterpret_cast<float2*>(o + Shape::kItemRows * Shape::kHeadDim), lane);
  } else {
    deposit_nothing<typename Shape::Tile>(smem + warp * Shape::kRingBytes, lane);
  }
  __syncthreads();  // deposits are there
  QuantUnit part{};
  part.rows = min(Shape::kItemRows, items - first_item);
  merge_deposits<typename Shape::Tile>(p, args.states, part, smem, Shape::kRingBytes, EveryWarp{});
#else
  __trap();  // never launched elsewhere
#endif
}

// The outputs, a block a row and head. What it reads before the wait was there before the kernel that makes the states
// let this one start. A thread has at most 48 registers, so that a block finds room beside that kernel.
template <class Shape>
__global__ void __launch_bounds__(32 * kMergeWarps, 10)
    quant_single_merge_kernel(const __grid_constant__ QuantSingleArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ MergeParts<Shape::kHeadDim, kMergeWarps> parts;
  const QuantAttentionParams& p = args.p;
  let_next_kernel_start();  // it waits for this one's end, hence for the states
  const int row = int(blockIdx.x) / p.q_heads, head = int(blockIdx.x) % p.q_heads, group = p.q_heads / p.kv_heads;
  const int query0 = p.row_offsets[0], item = (row - query0) * group + head % group;
  QuantStateRun run{0, 0, true};
  if (row >= query0 && row < p.row_offsets[1]) {
    const int unit = item / Shape::kItemRows * p.kv_heads + head / group;
    run = {int64_t(args.pieces.first(unit)) * Shape::kItemRows + item % Shape::kItemRows, args.pieces.count(unit),
           false};
  }
  wait_for_previous_kernel();
  merge_states(p, args.states, Shape::kItemRows, run, row, head, parts);
#else
  __trap();
#endif
}

}  // namespace vericache::cuda
