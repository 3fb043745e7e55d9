// SPDX-License-Identifier: Apache-2.0
// Barriers for producer and consumer warps: mbarriers in shared memory (sm_80 and later), named barriers, and the
// arrival of a thread's cp.async copies on an mbarrier.
//
// A barrier completes a phase when its expected number of arrivals has come; phases alternate parity 0, 1, 0, ...
// mbarrier_wait(b, parity) returns once the phase of that parity is complete; on a fresh barrier, waiting for parity 1
// returns at once. Waiting acquires and arriving releases, so what was written before an arrival is seen after the
// wait.
#pragma once

#include <cstdint>

namespace vericache::cuda {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// This thread arrives when all cp.async copies it has issued so far have landed. It counts as one of the expected
// arrivals (noinc).
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether a phase is complete, said at once.
__device__ __forceinline__ bool mbarrier_done_now(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

// The same, but it may sleep a while before it says no.
__device__ __forceinline__ bool mbarrier_done(uint32_t barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
#else
  return mbarrier_done_now(barrier, parity);
#endif
}

// For whole warps, which it leaves converged: ldmatrix and mma demand it.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_done(barrier, parity)) {
  }
  __syncwarp();
}

// A place in a ring of slots that have a barrier each, and the parity of that barrier's phase.
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int slots) {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

// What this thread's ordinary stores and cp.async wrote to shared memory is seen by wgmma and by bulk copies, after a
// barrier that their issuer passes (sm_90 and later, where there are such).
__device__ __forceinline__ void fence_for_async_proxy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Barrier `id` (1 .. 15) among `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives there without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between the warpgroups of a block (sm_90a; elsewhere nothing happens and the compiler's even share
// stays). kCount: registers a thread, a multiple of 8. Every warp of the warpgroup must call it.
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace vericache::cuda
