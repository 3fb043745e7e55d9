// SPDX-License-Identifier: Apache-2.0
// The sampler's Gumbel noise -log(-log u), u = (n + 1/2) / 2^24 with n the upper 24 bits of a Philox word: exact in
// double precision, to within 1e-5 without it, and from above by one logarithm.
#pragma once

#include <cstdint>

#include "fast_math.cuh"

namespace vericache::cuda {

constexpr float kLargestGumbel = 17.3287f;  // that of u = 1 - 2^-25 is 17.32868

__device__ __forceinline__ float gumbel(uint32_t bits) {
  const double u = (double(bits >> 8) + 0.5) * 0x1p-24;
  return float(-log(-log(u)));
}

// -log u from the smaller of u and 1 - u.
__device__ __forceinline__ float gumbel_estimate(uint32_t bits) {
  const uint32_t n = bits >> 8;
  const float below = (float(n) + 0.5f) * 0x1p-24f, above = (float(0xffffffu - n) + 0.5f) * 0x1p-24f;
  return -logf(n < 0x800000u ? -logf(below) : -log1pf(-above));
}

// At least the noise, less 1e-5, since -log u >= 1 - u; close to it where the noise is large. Plus the offset.
__device__ __forceinline__ float gumbel_bound(uint32_t bits, float offset = 0.0f) {
  constexpr float kLog2 = 0.69314718f;
  return fmaf(-kLog2, fast_log2(float(~bits >> 8) + 0.5f), 24 * kLog2 + offset);
}

// More than estimates of a score, value / temperature + noise, are off by: rounding to float32 and the above.
__device__ __forceinline__ float score_margin(float score) { return 1e-3f + fabsf(score) * 1e-6f; }

}  // namespace vericache::cuda
