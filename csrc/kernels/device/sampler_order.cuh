// SPDX-License-Identifier: Apache-2.0
// The sampler's total order, value descending and index ascending, as integers; and exact thresholds for functions that
// grow with a logit.
#pragma once

#include <cmath>
#include <cstdint>

namespace vericache::cuda {

constexpr int kIndexBits = 24;
constexpr uint32_t kIndexMask = (1u << kIndexBits) - 1;
constexpr uint32_t kAllLanes = 0xffffffffu;

// threadIdx.x, of which the compiler does not know that it stays the same: what follows from it is computed again
// rather than kept in registers, of which there are few.
__device__ __forceinline__ int fresh_thread() {
  int thread = int(threadIdx.x);
  asm volatile("" : "+r"(thread));
  return thread;
}

// A float's bits, ordered as unsigned integers like the values; -0 before +0.
__device__ __forceinline__ uint32_t float_to_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_to_float(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The same with -0 equal to +0.
__device__ __forceinline__ uint32_t ordered_bits(float x) { return float_to_key(x + 0.0f); }

__device__ __forceinline__ uint64_t place(float value, int32_t index) {
  return uint64_t(ordered_bits(value)) << kIndexBits | (kIndexMask - uint32_t(index));
}
__device__ __forceinline__ float value_at(uint64_t place) { return key_to_float(uint32_t(place >> kIndexBits)); }
__device__ __forceinline__ int32_t index_at(uint64_t place) {
  return int32_t(kIndexMask - (uint32_t(place) & kIndexMask));
}

// The largest x for which below(x) holds, where below(y) implies below(x) for x < y; -infinity if there is none. Called
// by whole warps, with the same arguments in every lane. A good guess saves the search.
template <class Below>
__device__ __forceinline__ float last_below(float guess, Below below) {
  const int lane = fresh_thread() % 32;
  constexpr uint32_t kLowest = 0x007fffffu, kHighest = 0xff800000u;  // the keys of -infinity and +infinity
  const uint32_t first = min(max(float_to_key(guess), kLowest + 16), kHighest - 16) - 16;
  const uint32_t near = __ballot_sync(kAllLanes, below(key_to_float(first + lane)));
  if ((near & 1u) != 0 && near >> 31 == 0) return key_to_float(first + __popc(near) - 1);
  uint32_t low = kLowest, high = kHighest;  // taken as below and as not below
  while (high - low > 1) {
    const uint32_t step = max((high - low) / 32, 1u), key = low + step * (lane + 1);
    const uint32_t passed = __popc(__ballot_sync(kAllLanes, key < high && below(key_to_float(key))));
    low += step * passed;
    if (passed < 32) high = min(high, low + step);
  }
  return key_to_float(low);
}

}  // namespace vericache::cuda
