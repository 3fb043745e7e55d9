// SPDX-License-Identifier: Apache-2.0
// Softmax weights against a maximum that may be stale, for draft attention: 2^(x - reference), where any reference is
// right that keeps weights in range. It is raised to the running maximum only when a weight would exceed 2^kMost, which
// saves lanes an exchange a tile.
#pragma once

#include "fast_math.cuh"
#include "softmax_state.cuh"

namespace vericache::cuda {

// `reference`: of this lane's two columns, -infinity before the first key; log2 units. kStep: lanes that differ in this
// bit, or a higher one, have other keys of the same columns.
// weigh(from): makes `packed`, pairs of bf16 or fp16 (kHalf), against the references `from`. largest(r): of this lane's
// x of column r. rescale(by): of the two columns, for all that has been summed up so far.
template <bool kHalf, int kMost, int kStep, int kBlocks, class Weigh, class Largest, class Rescale>
__device__ __forceinline__ void weigh_against_stale(float (&reference)[2], const uint32_t (&packed)[kBlocks][2],
                                                    const Weigh& weigh, const Largest& largest,
                                                    const Rescale& rescale) {
  const auto larger = [](uint32_t a, uint32_t b) { return kHalf ? max_half2(a, b) : max_bf16x2(a, b); };
  weigh(reference);
  uint32_t most = larger(packed[0][0], packed[0][1]);
#pragma unroll
  for (int b = 1; b < kBlocks; ++b) most = larger(most, larger(packed[b][0], packed[b][1]));
  // Positive floats compare as integers; infinities and NaN, which the first tile gives, are above.
  constexpr uint32_t kLimit = uint32_t((kHalf ? 15 : 127) + kMost) << (kHalf ? 10 : 7);
  if (!__any_sync(0xffffffffu, (most & 0x7fffu) > kLimit || (most >> 16 & 0x7fffu) > kLimit)) return;
  float next[2], by[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x = largest(r);
#pragma unroll
    for (int step = kStep; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    x = fmaxf(x, reference[r]);
    next[r] = x == negative_infinity() ? 0.f : x;
    by[r] = fast_exp2(reference[r] - next[r]);
    reference[r] = x;
  }
  rescale(by);
  weigh(next);
}

}  // namespace vericache::cuda
