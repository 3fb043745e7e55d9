// SPDX-License-Identifier: Apache-2.0
// QK-norm and rotation of a head by a warp: lane l owns the kPairs pairs kPairs * l .. of the half-split rotation, that
// is channels i and i + head_dim / 2; lanes past the half own none. linear_qk_norm.cuh gives the same bits.
//
// Reduction order (R1): a lane adds the squares of its low channels, then of its high ones, by fused multiply-add; then
// lanes by the butterfly lane ^ 1, 2, 4, 8, 16, neighbours first. It depends on head_dim alone.
#pragma once

#include "element.cuh"
#include "rotate.cuh"

namespace vericache::cuda {

// Pairs of a lane.
constexpr int rope_pairs(int head_dim) { return head_dim <= 64 ? 1 : head_dim <= 128 ? 2 : 4; }

template <int kPairs>
__device__ __forceinline__ float sum_of_squares(const float* low, const float* high) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) sum = fmaf(low[j], low[j], sum);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) sum = fmaf(high[j], high[j], sum);
  return sum;
}

// The sum over 2, 4, .. kLanes neighbours, at all of them.
template <int kLanes>
__device__ __forceinline__ float sum_neighbours(float x) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

__device__ __forceinline__ float norm_scale(float squares, int head_dim, float eps) {
  return 1.0f / sqrtf(squares / float(head_dim) + eps);
}

// What a lane has of a head: channels or norm weights.
template <int kPairs>
struct RopeLane {
  float low[kPairs] = {}, high[kPairs] = {};

  // From channel 0 of a head; `channel`: this lane's first.
  template <class T>
  __device__ __forceinline__ void load(const T* head, int channel, int half) {
    load_run(head + channel, low);
    load_run(head + half + channel, high);
  }
  template <class T>
  __device__ __forceinline__ void store(T* head, int channel, int half) const {
    store_run(head + channel, low);
    store_run(head + half + channel, high);
  }
  // Called by whole warps. `weight` as loaded; lanes that own no pair hold zeros.
  template <class T>
  __device__ __forceinline__ void norm(const RopeLane& weight, int head_dim, float eps) {
    const float scale = norm_scale(sum_neighbours<32>(sum_of_squares<kPairs>(low, high)), head_dim, eps);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      low[j] = round_to<T>(low[j] * scale * weight.low[j]);
      high[j] = round_to<T>(high[j] * scale * weight.high[j]);
    }
  }
  __device__ __forceinline__ void rotate(const float (&cos)[kPairs], const float (&sin)[kPairs]) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) rotate_pair(low[j], high[j], cos[j], sin[j]);
  }
};

}  // namespace vericache::cuda
