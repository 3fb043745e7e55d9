// SPDX-License-Identifier: Apache-2.0
// Thread-block clusters (sm_90 and later): the barrier, and reads of, stores and copies to another block's shared
// memory. On an older GPU a launch has no cluster, each block is its own cluster of one, and these work on the block
// alone.
#pragma once

#include <cstdint>

namespace vericache::cuda {

// All threads of the cluster arrive; their earlier writes to shared memory are then visible to the whole cluster.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same without making writes visible, which costs a fence: enough to say that this block has finished reading from
// the others, where what was read has been used.
__device__ __forceinline__ void cluster_barrier_after_reads() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The two halves of a barrier of the cluster that makes no writes visible; every thread calls both. Arriving says that
// this block has finished with what the others may now overwrite, or need no longer keep.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address, for load_cluster and copy_to_rank, of what `address` (of this block's shared memory) is in block `rank`
// of the cluster.
__device__ __forceinline__ uint32_t map_to_rank(uint32_t address, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return address;
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VC_SHARED_CLUSTER "shared::cluster"
#else
#define VC_SHARED_CLUSTER "shared"
#endif

__device__ __forceinline__ float4 load_cluster_float4(uint32_t address) {
  float4 v;
  asm volatile("ld." VC_SHARED_CLUSTER ".v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_cluster_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld." VC_SHARED_CLUSTER ".u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t load_cluster_u64(uint32_t address) {
  uint64_t v;
  asm volatile("ld." VC_SHARED_CLUSTER ".u64 %0, [%1];" : "=l"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_cluster_float(uint32_t address, float v) {
  asm volatile("st." VC_SHARED_CLUSTER ".f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

__device__ __forceinline__ void store_cluster_float4(uint32_t address, float4 v) {
  asm volatile("st." VC_SHARED_CLUSTER ".v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_cluster_u64(uint32_t address, uint64_t v) {
  asm volatile("st." VC_SHARED_CLUSTER ".u64 [%0], %1;" ::"r"(address), "l"(v) : "memory");
}

#undef VC_SHARED_CLUSTER

// One thread copies `bytes` (a multiple of 16) of this block's shared memory to `dst` of another block, whose `barrier`
// counts them; both addresses are from map_to_rank. What ordinary stores wrote to src needs fence_for_async_proxy in
// the writing thread first. src is free again when the other block has seen its barrier complete, and says so.
__device__ __forceinline__ void copy_to_rank(uint32_t dst, uint32_t src, int bytes, uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
      "r"(src), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

}  // namespace vericache::cuda
