// SPDX-License-Identifier: Apache-2.0
// The producer warp of warpgroup_attention.cuh.
#pragma once

#include "warpgroup_block.cuh"

namespace vericache::cuda {

// Copies tiles in the order of the list. The memory must never wait for this warp: a lane looks up the place of one
// box, 32 boxes ahead, and the item after this one is claimed, and its first boxes are looked up, while tiles of this
// one are still to come.
template <class Keys, class Shape>
__device__ void WarpgroupBlock<Keys, Shape>::produce() const {
  constexpr uint32_t kAll = 0xffffffffu;
  constexpr int kClaim = 6, kLookUp = 3;  // tiles before an item's end
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, box_rows = args.box_rows, boxes = kTileTokens / box_rows, batch = 32 / boxes;
  const int items = schedule.items(p), own_box = lane % boxes;
  const bool claims = items > int(gridDim.x);
  RingCursor ring;
  uint32_t q_parity = 1;
  bool waited = false;  // for the kernel before, whose work q is, and K and V that are not settled may be
  const auto wait_once = [&]() {
    if (!waited) wait_for_previous_kernel();
    waited = true;
  };

  // An item to come: this lane's box of the first batch. What else is known of it is looked up again when it begins,
  // for registers are short.
  struct Plan {
    int item, v_offset;
    const char* k;
  };
  const auto locate = [&](const WorkItem& work, int token) {
    return Keys::granule(p, schedule.span[work.unit], work.request, work.kv_head, token + lane * box_rows);
  };
  const auto look_up = [&](int item) {
    Plan plan{item, 0, nullptr};
    if (item >= items) return plan;
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const Granule box = locate(work, first_token(work, schedule.span[work.unit]));
    plan.k = box.k;
    plan.v_offset = box.v_offset;
    return plan;
  };

  Plan plan = look_up(int(blockIdx.x));
  while (plan.item < items) {
    const WorkItem work = schedule.item(p, Shape::kRows, plan.item);
    const Span span = schedule.span[work.unit];
    const int token0 = first_token(work, span),
              tiles = (end_token(work, span) - token0 + kTileTokens - 1) / kTileTokens;
    const int settled_tokens = p.cache_settled ? Keys::settled_end(span, schedule.first_pos[work.request]) - token0 : 0;
    const int settled = max(settled_tokens, 0) / kTileTokens;
    // While the kernel before runs, as many tiles as the ring takes come first.
    const int tiles_before_q = min(waited ? 1 : args.slots / 2, tiles);
    const int claim_at = max(tiles - kClaim, tiles_before_q), look_up_at = max(tiles - kLookUp, tiles_before_q);
    TaggedCounter ticket = 0;
    Plan next{};
    const auto send_q = [&]() {
      wait_once();
      mbarrier_wait(base + Smem::kQEmpty, q_parity);
      q_parity ^= 1;  // now the parity that consumers wait for
      copy_q(work, span, records[q_parity]);
    };
    const auto claim = [&]() {
      if (claims && lane == 0) ticket = atomicAdd(args.work, 1ull);
    };
    const auto look_ahead = [&]() {
      int item = items;
      if (claims) {
        if (lane == 0) {
          item = int(gridDim.x) + counted(args.work, ticket);
          if (item == int(gridDim.x) + items - 1) *args.work = 0;  // each block claims one too many: this is the last
        }
        item = __shfl_sync(kAll, item, 0);
      }
      next = look_up(item);
    };

    for (int first = 0; first < tiles; first += batch) {
      if (first > 0) {
        const Granule box = locate(work, token0 + first * kTileTokens);
        plan.k = box.k;
        plan.v_offset = box.v_offset;
      }
      const int box_token = token0 + first * kTileTokens + lane * box_rows;
      const uint64_t k = reinterpret_cast<uint64_t>(plan.k), v = k + uint64_t(int64_t(plan.v_offset));
      const RowPlace k_place = row_place<Shape::kHeadDim>(k), v_place = row_place<Shape::kHeadDim>(v);
      const uint32_t good =
          __ballot_sync(kAll, Keys::readable(span, box_token / kTileTokens * kTileTokens) >= kTileTokens &&
                                  ((k | v) & (Shape::kHeadDim * 2 - 1)) == 0 && k_place.high == v_place.high &&
                                  max(k_place.row, v_place.row) <= kLastRow - kTileTokens);
      const int count = min(batch, tiles - first);
      for (int i = 0; i < count; ++i) {
        const int tile = first + i;
        if (tile == tiles_before_q) send_q();
        if (tile >= settled) wait_once();
        if (tile == claim_at) claim();
        if (tile == look_up_at) look_ahead();
        const uint32_t own_boxes = ((1u << boxes) - 1) << i * boxes;
        const bool whole = (good & own_boxes) == own_boxes;
        const int from = i * boxes + own_box, high = __shfl_sync(kAll, k_place.high, from);
        const int rows[2] = {__shfl_sync(kAll, k_place.row, from), __shfl_sync(kAll, v_place.row, from)};
#pragma unroll
        for (int part = 0; part < 2; ++part) {  // K, then V
          mbarrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
          const uint32_t slot = slot_address(ring.slot), barrier = full + 8 * ring.slot;
          if (!whole) copy_part_of_tile(work, span, token0 + tile * kTileTokens, part, slot);
          if (lane == 0) {
            if (whole)
              mbarrier_expect(barrier, Shape::kSlotBytes);
            else
              mbarrier_arrive(barrier);
          }
          if (boxes > 1) __syncwarp();  // bytes are announced before they come
          if (whole && lane < boxes)
            copy_tokens(slot + uint32_t(lane * (kGranuleTokens / 8 * Shape::kGroupBytes)), args.map, {rows[part], high},
                        barrier, args.kv_policy);
          ring.next(args.slots);
        }
      }
    }
    if (tiles_before_q == tiles) send_q();
    if (claim_at >= tiles) claim();
    if (look_up_at >= tiles) look_ahead();
    plan = next;
  }
  mbarrier_wait(base + Smem::kQEmpty, q_parity);
  if (lane == 0) {
    records[q_parity ^ 1].rows = -1;
    mbarrier_arrive(base + Smem::kQFull);
  }
  mbarrier_arrive(base + Smem::kQFull);
}

}  // namespace vericache::cuda
