// SPDX-License-Identifier: Apache-2.0
// The consumer warps of warpgroup_attention.cuh: scores, weights and sums of tiles.
#pragma once

#include <type_traits>

#include "warpgroup_block.cuh"

namespace vericache::cuda {

template <class Keys, class Shape>
__device__ void WarpgroupBlock<Keys, Shape>::consume(int warp) const {
  constexpr int kParts = Shape::kParts, kSteps = Shape::kHeadDim / 16, kHalves = Shape::kHalves;
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = p.q_heads / p.kv_heads;
  const float c = __fmul_rn(p.scale, kLog2e);

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0 && schedule.items(p) > int(gridDim.x)) atomicExch(args.work, kFreshCounter);

  RingCursor ring;
  uint32_t q_parity = 0;
  int token = 0, end = 0;          // of the item
  int tight_lo = 0, tight_hi = 0;  // every row sees keys tight_lo .. tight_hi - 1
  int hole_begin = 0, hole_end = 0;
  bool active = false;  // this warpgroup has rows in the item
  int2 range[2] = {};   // of keys, of rows g and g + 8
  uint32_t q[kSteps][4];
  float s[32], o[32 * kParts];  // of o: channels 8 n + 2 t, + 1 of row g at 4 n, of row g + 8 at 4 n + 2
  float l[2];
  RunningMax m[2];

  // With 8 rows, warps 1 to 3 are there because wgmma takes four. Their q is zero, hence their scores, and zero is what
  // pack makes of those: they need not weigh, and zeros cost the tensor cores less power.
  const bool idle = Shape::kRows == 8 && warp > 0;

  // Both warpgroups wait for the same tiles. Left alone they would use the tensor cores at the same time and then weigh
  // at the same time; so they take turns at issuing, and one weighs while the other's products are made.
  constexpr bool kTakeTurns = Shape::kWarpgroups == 2;
  constexpr int kTurn[2] = {1, 2}, kTakers = 256;  // named barriers; of the first, one turn is passed ahead
  bool turns = false;                              // both warpgroups have rows in the item
  const auto take_turn = [&]() {
    if (!kTakeTurns || !turns) return;
    if (warp < 4)
      named_barrier(kTurn[0], kTakers);
    else
      named_barrier(kTurn[1], kTakers);
  };
  const auto pass_turn = [&]() {
    if (!kTakeTurns || !turns) return;
    if (warp < 4)
      named_barrier_arrive(kTurn[1], kTakers);
    else
      named_barrier_arrive(kTurn[0], kTakers);
  };
  if (kTakeTurns && warp >= 4) named_barrier_arrive(kTurn[0], kTakers);

  const auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
  };

  // A field of an item's record, read by the lane that arrives for the warp: what a barrier orders, it orders for that
  // lane first, and racecheck does not look further.
  const auto from_first_lane = [&](const volatile auto& field) {
    std::remove_cvref_t<decltype(field)> value{};
    if (lane == 0) value = field;
    return __shfl_sync(0xffffffffu, value, 0);
  };

  // What is needed at an item's end is read again then: registers are short between.
  const auto start = [&](const volatile ItemRecord& item) {
    const Span span{from_first_lane(item.span.lo), from_first_lane(item.span.hi), from_first_lane(item.span.hole_begin),
                    from_first_lane(item.span.hole_end)};
    const int local = warp * 16 + g;  // of the block's rows
    const int rows = from_first_lane(item.rows), request = from_first_lane(item.request);
    token = from_first_lane(item.token);
    end = from_first_lane(item.end);
    active = warp / 4 * 64 < rows;
    turns = rows > 64;
    tight_lo = from_first_lane(item.tight_lo);
    tight_hi = from_first_lane(item.tight_hi);
    hole_begin = span.hole_begin;
    hole_end = span.hole_end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = local + half * 8 < rows;
      range[half] = exists ? Keys::row_range(p, span, request, positions[local + half * 8]) : make_int2(0, 0);
      m[half].raw = negative_infinity();
      l[half] = 0.f;
    }
    const int row = (warp * 16 + lane / 8 % 2 * 8 + lane % 8) % Shape::kQRows;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(q[k],
                  swizzled(base + uint32_t(Smem::kQ + k / 4 * Shape::kQRows * 128), row, 128, k % 4 * 2 + lane / 16));
    if (idle) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] = 0;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + Smem::kQEmpty);
#pragma unroll
    for (int e = 0; e < 32 * kParts; ++e) o[e] = 0.f;
  };

  // A lane of an even t and its neighbour exchange halves, so that each has four channels in a row, of n and of n + 1:
  // a store touches the lines of 8 rows, however wide it is, and this way there are half as many.
  const auto finish = [&](const volatile ItemRecord& item) {
    const int split = from_first_lane(item.split), split_lo = split_begin(split), split_hi = split_begin(split + 1);
    const int64_t state = from_first_lane(item.state);
    const int skipped = from_first_lane(item.first_row) + warp * 16;
    const bool odd = t % 2 != 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float sum = l[half];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
      const int i = skipped + half * 8 + g;
      const bool seen = range[half].y > max(split_lo, range[half].x) && range[half].x < split_hi;
      const int64_t at = state + (int64_t(i / group) * p.q_heads + i % group) * args.max_splits;
      float* to = args.partial.o + at * Shape::kHeadDim + t / 2 * 4 + t % 2 * 8;
#pragma unroll
      for (int n = 0; n < 8 * kParts; n += 2) {
        const float* own = o + n * 4 + half * 2;
        const float x = __shfl_xor_sync(0xffffffffu, odd ? own[0] : own[4], 1);
        const float y = __shfl_xor_sync(0xffffffffu, odd ? own[1] : own[5], 1);
        const float4 four = {odd ? x : own[0], odd ? y : own[1], odd ? own[4] : x, odd ? own[5] : y};
        if (seen) store_float4(to + n * 8, four, args.state_policy);
      }
      if (seen && t == 0) args.partial.ml[at] = make_float2(m[half].stored(c), sum);
    }
  };

  const auto issue_scores = [&](int at) {
    const uint32_t slot = wgmma_operand_low(slot_address(at));
    wgmma_begin();
    wgmma_n64k16<Shape::kGroupBytes, false, false>(s, q[0], slot);
#pragma unroll
    for (int k16 = 1; k16 < kSteps; ++k16)
      wgmma_n64k16<Shape::kGroupBytes, false, true>(s, q[k16], slot + uint32_t(k16 / 4 * (1024 / 16) + 2 * (k16 % 4)));
    wgmma_commit();
  };

  using Weights = uint32_t[kTileTokens / 16][4];
  const auto issue_sums = [&](int at, const Weights& weights) {
    constexpr uint32_t kSixteenTokens = 2 * Shape::kGroupBytes / 16;
    const uint32_t address = slot_address(at);
    wgmma_begin();
#pragma unroll
    for (int k16 = 0; k16 < kTileTokens / 16; ++k16) {
      if constexpr (kParts == 2)
        wgmma_n128k16<Shape::kGroupBytes>(o, weights[k16], wgmma_blocks_low(address, 1024) + kSixteenTokens * k16);
      else
        wgmma_n64k16<Shape::kGroupBytes, true, true>(o, weights[k16],
                                                     wgmma_operand_low(address) + kSixteenTokens * k16);
    }
    wgmma_commit();
  };

  // Turns s from scores of the tile at `token` into weights; `rescale` is what multiplies the sums so far. The halves
  // go side by side, for one's latency hides behind the other; rows that do not exist go along, for a branch costs
  // more.
  const auto weigh = [&](float (&rescale)[2]) {
    if (token < tight_lo || token + kTileTokens > tight_hi || (token < hole_end && token + kTileTokens > hole_begin)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int key = token + i / 4 * 8 + t * 2 + i % 2, half = i / 2 % 2;
        if (half >= kHalves) continue;
        const bool visible = key >= range[half].x && key < range[half].y && (key < hole_begin || key >= hole_end);
        s[i] = visible ? s[i] : negative_infinity();
      }
    }
    float x[kHalves][4], reference[kHalves], sum[kHalves];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        x[half][n] = fmaxf(fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]),
                           fmaxf(s[(n + 4) * 4 + half * 2], s[(n + 4) * 4 + half * 2 + 1]));
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      x[half][0] = fmaxf(fmaxf(x[half][0], x[half][1]), fmaxf(x[half][2], x[half][3]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        x[half][0] = fmaxf(x[half][0], __shfl_xor_sync(0xffffffffu, x[half][0], step));
    rescale[1] = 1.f;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      rescale[half] = m[half].update(x[half][0], c);
      reference[half] = m[half].reference(c);
      sum[half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& w = s[n * 4 + half * 2 + e];
          w = softmax_weight(w, c, reference[half]);
          sum[half] = __fadd_rn(sum[half], w);
        }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) l[half] = __fmaf_rn(l[half], rescale[half], sum[half]);
  };
  // Only when the product before has ended: till then it reads its own.
  const auto pack = [&](Weights& weights) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights[n / 2][n % 2 * 2 + half] = pack_bf16(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]);
  };

  while (true) {
    mbarrier_wait(base + Smem::kQFull, q_parity);
    const volatile ItemRecord& item = records[q_parity];
    q_parity ^= 1;
    if (from_first_lane(item.rows) < 0) {
      if (kTakeTurns && warp < 4) named_barrier(kTurn[0], kTakers);  // the turn that nobody took
      break;
    }
    start(item);
    if (!active) {
      for (; token < end; token += kTileTokens) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mbarrier_wait(full + 8 * ring.slot, ring.parity);
          release(ring.slot);
          ring.next(args.slots);
        }
      }
      continue;
    }

    // An iteration begins by ending the sums of the tile before the last and ends by weighing the last tile: between
    // the two lies the loop's edge, over which the assembler moves nothing. Within one block it puts the wait before
    // the weighing, and both take their time one after the other.
    Weights weights;
    float rescale[2] = {1.f, 1.f};
    int summed = -1;  // the slot that the sums under way read
    const auto end_sums = [&]() {
      wgmma_wait();
      wgmma_settle(o);
      if (summed >= 0) release(summed);
    };
    const auto take_weights = [&]() {
      pack(weights);
      if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (int e = 0; e < 32 * kParts; ++e) o[e] = __fmul_rn(o[e], rescale[e % 4 / 2]);
      }
    };
    const auto weigh_scores = [&]() {
      wgmma_settle(s);
      release(ring.slot);
      ring.next(args.slots);
      if (idle)
        rescale[0] = rescale[1] = 1.f;
      else
        weigh(rescale);
    };

    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    take_turn();
    issue_scores(ring.slot);
    pass_turn();
    wgmma_wait();
    weigh_scores();
    for (token += kTileTokens; token < end; token += kTileTokens) {
      end_sums();
      take_weights();
      summed = ring.slot;
      const uint32_t sums_parity = ring.parity;
      ring.next(args.slots);
      mbarrier_wait(full + 8 * ring.slot, ring.parity);
      if (kTakeTurns) mbarrier_wait(full + 8 * summed, sums_parity);  // no waiting for data in one's turn
      take_turn();
      issue_scores(ring.slot);
      if (!kTakeTurns) mbarrier_wait(full + 8 * summed, sums_parity);
      issue_sums(summed, weights);
      pass_turn();
      wgmma_wait<1>();  // the scores
      weigh_scores();
    }
    end_sums();
    take_weights();
    summed = ring.slot;
    mbarrier_wait(full + 8 * summed, ring.parity);
    ring.next(args.slots);
    take_turn();
    issue_sums(summed, weights);
    pass_turn();
    end_sums();
    finish(item);
  }
}

}  // namespace vericache::cuda
