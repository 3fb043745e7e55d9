// SPDX-License-Identifier: Apache-2.0
// Dynamic shared memory, and stores by 32-bit shared address.
#pragma once

#include <cstdint>

namespace vericache::cuda {

__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char vericache_smem[];
  return vericache_smem;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

}  // namespace vericache::cuda
