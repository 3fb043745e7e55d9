// SPDX-License-Identifier: Apache-2.0
// wgmma m64nNk16 (bf16 in, float32 out; sm_90a): a warpgroup of 4 warps multiplies 64 rows of A by N columns of B, both
// from shared memory.
//
// Operands: rows of 64 k (128 bytes), k contiguous, 16-byte chunk c of row r at chunk c ^ (r & 7); a tile starts at a
// multiple of 1024 bytes, 8 rows lie in 1024. This is the hardware's 128-byte swizzle.
// Result: with g = lane / 4 and t = lane % 4, warp w of the warpgroup holds in d[4 j + 0, 1] row 16 w + g, columns
// 8 j + 2 t, + 1; in d[4 j + 2, 3] row 16 w + g + 8.
//
// Order: between fence and wait the accumulators belong to the instruction. What ordinary stores or cp.async wrote to
// shared memory is seen after fence_for_async_proxy in the writing thread and a barrier.
#pragma once

#include <cstdint>

#include "wgmma_sums.cuh"

namespace vericache::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VC_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define VC_WGMMA(...) (void)0
#endif

__device__ __forceinline__ void wgmma_begin() { VC_WGMMA("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ __forceinline__ void wgmma_commit() { VC_WGMMA("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Waits until at most `kPending` of the warpgroup's latest groups are unfinished. Then wgmma_settle what it waited for.
template <int kPending = 0>
__device__ __forceinline__ void wgmma_wait() {
  VC_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving ordinary uses of the accumulators across it: after the wait, and before the first
// fence.
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Of a tile at shared address `address`; + 2 moves 16 k on. kApart: bytes from 8 rows to the next 8.
template <int kApart = 1024>
__device__ __forceinline__ constexpr uint64_t wgmma_operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(kApart >> 4) << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3ffff) >> 4);
}

// d += a b, 64 x N x 16, for d[N / 2]. VC_K16(N, N / 2, N / 2 + 1)
#define VC_K16(n, count, next)                                                             \
  __device__ __forceinline__ void wgmma_k16(float (&d)[count], uint64_t a, uint64_t b) {   \
    VC_WGMMA("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" VC_NAMES_##count \
             "}, %" #count ", %" #next ", 1, 1, 1, 0, 0;" : VC_SUMS_##count(d) : "l"(a),   \
             "l"(b));                                                                      \
  }
VC_K16(8, 4, 5)
VC_K16(16, 8, 9)
VC_K16(32, 16, 17)
VC_K16(48, 24, 25)
VC_K16(64, 32, 33)
VC_K16(96, 48, 49)
VC_K16(128, 64, 65)
VC_K16(160, 80, 81)
VC_K16(208, 104, 105)
VC_K16(224, 112, 113)
#undef VC_K16

#undef VC_WGMMA

}  // namespace vericache::cuda
