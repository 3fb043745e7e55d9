// SPDX-License-Identifier: Apache-2.0
// Sums over a warp and a block in a fixed order: the butterfly lane ^ 16, 8, 4, 2, 1, then the same over the warps'
// sums. The order depends on the number of threads alone.
#pragma once

namespace vericache::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Every thread gets the sum. `scratch` is 32 elements of shared memory, free again after the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}

}  // namespace vericache::cuda
