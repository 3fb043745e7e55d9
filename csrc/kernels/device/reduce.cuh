// SPDX-License-Identifier: Apache-2.0
// Sums over a warp and a block in a fixed order: the butterfly lane ^ 16, 8, 4, 2, 1, then the same over the warps'
// sums. The order depends on the number of threads alone. The sums before a lane are for integers: they subtract.
#pragma once

namespace vericache::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The sum over the lanes before this one, in the order of the lanes; `total` is that of all.
template <class T>
__device__ __forceinline__ T warp_sum_before(T x, int lane, T& total) {
  T sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  total = __shfl_sync(0xffffffffu, sum, 31);
  return sum - x;
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
