// SPDX-License-Identifier: Apache-2.0
// wgmma m64n64k16 and m64n128k16 (bf16 in, float32 out; sm_90a) with A in registers and B in shared memory. wgmma.cuh
// has the fences.
//
// A (64 x 16): warp w of the warpgroup holds rows 16 w .. 16 w + 15, as mma.cuh's A fragment; the result lies as
// wgmma.cuh says, so that neighbouring column tiles of a result are an A fragment of a next product.
// B, not transposed: columns are rows of shared memory, 128 bytes of 64 k each (wgmma_operand; + 2 moves 16 k on).
// B, transposed: 64 k are 64 rows of shared memory, 128 bytes of 64 columns each (the same; + 2 kApart / 16 moves 16 k
// on).
// kApart: bytes from 8 rows of shared memory to the next 8.
//
// An element of the result depends on its row of A, its column of B and its own old value alone, in an order that does
// not depend on the row's place: held by bench/gpu/attention_check.cu.
#pragma once

#include <cstdint>

#include "wgmma.cuh"
#include "wgmma_sums.cuh"

// Code that uses wgmma is compiled for this target alone; host code sees it too, to launch it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VERICACHE_HAS_WGMMA 1
#else
#define VERICACHE_HAS_WGMMA 0
#endif

namespace vericache::cuda {

// The low half of wgmma_operand: it alone differs between tiles, and offsets are added to it.
__device__ __forceinline__ uint32_t wgmma_operand_low(uint32_t address) { return uint32_t(wgmma_operand(address)); }

// d = a b (kAdd false) or d += a b; b as of wgmma_operand_low.
template <int kApart, bool kTransposed, bool kAdd>
__device__ __forceinline__ void wgmma_n64k16(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n .reg .pred p;\n .reg .b64 b;\n setp.ne.b32 p, %38, 0;\n mov.b64 b, {%36, %39};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" VC_NAMES_32
      "}, {%32, %33, %34, %35}, b, p, 1, 1, %37;\n}"
      : VC_SUMS_32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(int(kTransposed)), "n"(int(kAdd)),
        "n"(int(wgmma_operand<kApart>(0) >> 32)));
#endif
}

// Of 128 columns, transposed: columns 64-127 are a second block of rows, `block_bytes` behind the first.
__device__ __forceinline__ uint32_t wgmma_blocks_low(uint32_t address, int block_bytes) {
  return (address & 0x3ffff) >> 4 | uint32_t(block_bytes >> 4) << 16;
}

// d += a b, b transposed, as of wgmma_blocks_low.
template <int kApart>
__device__ __forceinline__ void wgmma_n128k16(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n .reg .b64 b;\n mov.b64 b, {%68, %69};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" VC_NAMES_64 "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"
      : VC_SUMS_64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(int(wgmma_operand<kApart>(0) >> 32)));
#endif
}

}  // namespace vericache::cuda
