// SPDX-License-Identifier: Apache-2.0
// The consumer warps of warpgroup_attention.cuh: scores, weights and sums of tiles.
#pragma once

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
  float s[32], o[kParts][32];
  float l[2];
  RunningMax m[2];

  const auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
  };

  // Looked up at the start and again at the end of an item: registers are short between.
  const auto start = [&](int index) {
    const WorkItem work = schedule.item(p, Shape::kRows, index);
    const Span span = schedule.span[work.unit];
    token = first_token(work, span);
    end = end_token(work, span);
    const int query0 = schedule.row_offset[work.request];
    const int item_rows = (schedule.row_offset[work.request + 1] - query0) * group;
    const int local = warp * 16 + g;  // of the block's rows
    const int rows = min(Shape::kRows, item_rows - work.row_block * Shape::kRows);
    active = warp / 4 * 64 < rows;
    tight_lo = Keys::row_range(p, span, work.request, schedule.last_pos[work.request]).x;
    tight_hi = Keys::row_range(p, span, work.request, schedule.first_pos[work.request]).y;
    hole_begin = span.hole_begin;
    hole_end = span.hole_end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = local + half * 8 < rows;
      range[half] = exists ? Keys::row_range(p, span, work.request, positions[local + half * 8]) : make_int2(0, 0);
      m[half].raw = negative_infinity();
      l[half] = 0.f;
    }
    const int row = (warp * 16 + lane / 8 % 2 * 8 + lane % 8) % Shape::kQRows;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(q[k],
                  swizzled(base + uint32_t(Smem::kQ + k / 4 * Shape::kQRows * 128), row, 128, k % 4 * 2 + lane / 16));
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + Smem::kQEmpty);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int e = 0; e < 32; ++e) o[part][e] = 0.f;
  };

  const auto finish = [&](int index) {
    const WorkItem work = schedule.item(p, Shape::kRows, index);
    const int query0 = schedule.row_offset[work.request];
    const int split_lo = split_begin(work.split), split_hi = split_begin(work.split + 1);
    const int skipped = work.row_block * Shape::kRows + warp * 16;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float sum = l[half];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
      const int i = skipped + half * 8 + g;
      if (range[half].y <= max(split_lo, range[half].x) || range[half].x >= split_hi) continue;
      const int64_t row = query0 + i / group;
      const int64_t at = (row * p.q_heads + work.kv_head * group + i % group) * args.max_splits + work.split;
      float* to = args.partial.o + at * Shape::kHeadDim + t * 2;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int n = 0; n < 8; ++n)
          *reinterpret_cast<float2*>(to + part * 64 + n * 8) =
              make_float2(o[part][n * 4 + half * 2], o[part][n * 4 + half * 2 + 1]);
      if (t == 0) args.partial.ml[at] = make_float2(m[half].stored(c), sum);
    }
  };

  const auto issue_scores = [&](int at) {
    const uint32_t slot = wgmma_operand_low(base + uint32_t(at * Shape::kSlotBytes));
    wgmma_begin();
    wgmma_n64k16<false, false>(s, q[0], slot);
#pragma unroll
    for (int k16 = 1; k16 < kSteps; ++k16)
      wgmma_n64k16<false, true>(s, q[k16], slot + uint32_t(k16 / 4 * Shape::kPartBytes / 16 + 2 * (k16 % 4)));
    wgmma_commit();
  };

  using Weights = uint32_t[kTileTokens / 16][4];
  const auto issue_sums = [&](int at, const Weights& weights) {
    const uint32_t slot = wgmma_operand_low(base + uint32_t(at * Shape::kSlotBytes));
    wgmma_begin();
#pragma unroll
    for (int k16 = 0; k16 < kTileTokens / 16; ++k16)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        wgmma_n64k16<true, true>(o[part], weights[k16], slot + uint32_t(part * Shape::kPartBytes / 16 + 128 * k16));
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
    q_parity ^= 1;
    // Read by the lane that arrives for the warp below: what a barrier orders, it orders for that lane first.
    const int index = __shfl_sync(0xffffffffu, lane == 0 ? *item : 0, 0);
    if (index < 0) break;
    start(index);
    if (!active) {
      for (; token < end; token += kTileTokens) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mbarrier_wait(full + 8 * ring.slot, ring.parity);
          release(ring.slot);
          ring.next(Shape::kSlots);
        }
      }
      continue;
    }

    Weights weights;
    float rescale[2];
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    issue_scores(ring.slot);
    wgmma_wait_pending<0>();
    wgmma_settle(s);
    release(ring.slot);
    ring.next(Shape::kSlots);
    weigh(rescale);  // nothing summed yet: nothing to rescale
    pack(weights);
    for (token += kTileTokens; token < end; token += kTileTokens) {
      const int sums_slot = ring.slot;
      const uint32_t sums_parity = ring.parity;
      ring.next(Shape::kSlots);
      mbarrier_wait(full + 8 * ring.slot, ring.parity);
      issue_scores(ring.slot);
      mbarrier_wait(full + 8 * sums_slot, sums_parity);
      issue_sums(sums_slot, weights);
      wgmma_wait_pending<1>();  // the scores
      wgmma_settle(s);
      release(ring.slot);
      ring.next(Shape::kSlots);
      weigh(rescale);
      wgmma_wait_pending<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) wgmma_settle(o[part]);
      release(sums_slot);
      pack(weights);
      if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int e = 0; e < 32; ++e) o[part][e] = __fmul_rn(o[part][e], rescale[e % 4 / 2]);
      }
    }
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    issue_sums(ring.slot, weights);
    wgmma_wait_pending<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) wgmma_settle(o[part]);
    release(ring.slot);
    ring.next(Shape::kSlots);
    finish(index);
  }
}

}  // namespace vericache::cuda
