// SPDX-License-Identifier: Apache-2.0
// cp.async (sm_80 and later): 16-byte copies from global to shared memory that pass by the registers and the L1.
#pragma once

#include <cstdint>

#include "l2_policy.cuh"

namespace vericache::cuda {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Without an L2 prefetch hint: asking for 256 bytes cost a stream that reads every byte 8% of the memory's rate
// (4.30 instead of 4.67 TB/s on an H200).
//
// Copies 16 bytes, or writes 16 zero bytes and reads nothing when `valid` is false (src must still be a legal address).
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Copies 16 bytes that are read once: they leave the L2 first.
__device__ __forceinline__ void cp_async16_once(uint32_t dst, const void* src) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(kDropFirst)
               : "memory");
#else
  cp_async16(dst, src, true);
#endif
}

// Copies 4 bytes.
__device__ __forceinline__ void cp_async4(uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are still in flight. Other threads see the bytes only
// after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same for a count known at run time, 0 .. 6.
__device__ __forceinline__ void cp_async_wait_pending(int pending) {
  switch (pending) {
    case 0:
      return cp_async_wait<0>();
    case 1:
      return cp_async_wait<1>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<3>();
    case 4:
      return cp_async_wait<4>();
    case 5:
      return cp_async_wait<5>();
    default:
      return cp_async_wait<6>();
  }
}

}  // namespace vericache::cuda
