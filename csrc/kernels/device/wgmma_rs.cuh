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
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31 "
      "}, {%32, %33, %34, %35}, b, p, 1, 1, %37;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
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
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(int(wgmma_operand<kApart>(0) >> 32)));
#endif
}

}  // namespace vericache::cuda
