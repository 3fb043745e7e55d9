// SPDX-License-Identifier: Apache-2.0
// Counters in a workspace whose contents are unknown before a launch: a tag in the high word, the count in the low one.
//
// Some block of the launch sets kFreshCounter after its wait for the kernel before; adding to a counter that does not
// carry the tag yet is repeated; the last to add, or who has waited for it, clears it, so that no launch meets
// another's tag.
#pragma once

#include "fast_math.cuh"

namespace vericache::cuda {

using TaggedCounter = unsigned long long;
inline constexpr TaggedCounter kFreshCounter = TaggedCounter(kNoResult) << 32;

__device__ __forceinline__ bool is_tagged(TaggedCounter x) { return x >> 32 == kFreshCounter >> 32; }

// What an addition of one has returned, as the count before it.
__device__ __forceinline__ int counted(TaggedCounter* counter, TaggedCounter old) {
  while (!is_tagged(old)) old = atomicAdd(counter, 1ull);
  return int(old & 0xffffffffu);
}

// Adds one and returns the count before it. What this thread has written or seen before is seen by those who count
// more. sm_70 and later.
__device__ __forceinline__ int arrive(TaggedCounter* counter) {
  TaggedCounter old;
  do {
    asm volatile("atom.acq_rel.gpu.add.u64 %0, [%1], 1;" : "=l"(old) : "l"(counter) : "memory");
  } while (!is_tagged(old));
  return int(old & 0xffffffffu);
}

// Waits until so many have arrived. What they had written or seen is seen by this thread.
__device__ __forceinline__ void await(TaggedCounter* counter, int count) {
  TaggedCounter now;
  do {
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(counter) : "memory");
  } while (now != kFreshCounter + TaggedCounter(count));
}

}  // namespace vericache::cuda
