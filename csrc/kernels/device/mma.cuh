// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.sync m16n8k16 (bf16 in, float32 out; sm_80 and later).
//
// Fragments, with g = lane / 4 and t = lane % 4: A (16 x 16, row-major) a0: row g, k 2t..2t+1; a1: row g + 8;
// a2, a3: the same rows, k + 8. B (16 x 8, k contiguous for each column) b0: column g, k 2t..2t+1; b1: k + 8.
// C (16 x 8) c0, c1: row g, columns 2t, 2t+1; c2, c3: row g + 8.
//
// An element of C depends on its row of A, its column of B and its own old value alone, and the order in which the 16
// products are added does not depend on where in the tile it sits: bench/gpu/dense_check.cu tests this on the device.
#pragma once

#include <cstdint>

namespace vericache::cuda {

// Where 16-byte chunk `chunk` of a row lies, so that ldmatrix and copies are free of bank conflicts.
__device__ __forceinline__ uint32_t swizzled(uint32_t base, int row, int row_bytes, int chunk) {
  return base + uint32_t(row * row_bytes + ((chunk ^ (row & 7)) << 4));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Each 8 x 8 matrix transposed on the way: with rows of [k][n] in memory, the B fragments b0, b1 of two n-tiles.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Transposes the 8 x 8 matrix of 16-bit elements whose row g the lanes 4g .. 4g+3 hold, two elements each.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a b
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with a and b in fp16.
__device__ __forceinline__ void mma_m16n8k16_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace vericache::cuda
