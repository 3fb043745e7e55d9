// SPDX-License-Identifier: Apache-2.0
// Bulk copies of rows of q, K or V that lie anywhere in device memory (sm_90), in the 128-byte swizzle of
// device/wgmma.cuh; and a store with a policy of device/l2_policy.cuh.
//
// Pages are reached by raw addresses, and a tensor map has one base. So the map here describes all of the address space
// as one tensor of rows, from address 0: what is copied is chosen by the coordinates alone, an address cut in pieces.
// Dimensions of rows of q: 64 elements of a row, 2^31 rows, the parts of 64 elements of a row, and what is left of the
// address. Tokens of K or V come in groups of 8, parts side by side: 64 elements, 8 rows, parts, groups, the rest.
#pragma once

#include "tensor_map.cuh"

namespace vericache::cuda {

// Boxes of one part of box_rows rows.
inline CUtensorMap row_map(int head_dim, int box_rows) {
  const cuuint64_t row_bytes = cuuint64_t(head_dim) * 2, parts = cuuint64_t(head_dim) / 64;
  const cuuint64_t sizes[4] = {64, cuuint64_t(1) << 31, parts, 1024};
  const cuuint64_t strides[3] = {row_bytes, 128, row_bytes << 31};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1};
  return bf16_tensor_map(nullptr, 4, sizes, strides, box);
}

// Boxes of box_tokens (a multiple of 8) whole rows, in shared memory groups of 8 rows, each their first parts and then
// their second ones. The second dimension is longer than a group, for a box may begin at any row of one.
inline CUtensorMap token_map(int head_dim, int box_tokens) {
  const cuuint64_t row_bytes = cuuint64_t(head_dim) * 2, parts = cuuint64_t(head_dim) / 64;
  const cuuint64_t sizes[5] = {64, 15, parts, cuuint64_t(1) << 28, 1024};
  const cuuint64_t strides[4] = {row_bytes, 128, row_bytes * 8, row_bytes << 31};
  const cuuint32_t box[5] = {64, 8, cuuint32_t(parts), cuuint32_t(box_tokens) / 8, 1};
  return bf16_tensor_map(nullptr, 5, sizes, strides, box);
}

// An address, a multiple of the row's bytes, as coordinates. No box may reach beyond row kLastRow.
inline constexpr int kLastRow = 0x7fffffff;
struct RowPlace {
  int row, high;
};
template <int kHeadDim>
__host__ __device__ __forceinline__ RowPlace row_place(uint64_t address) {
  constexpr int kShift = kHeadDim == 128 ? 8 : 7;
  static_assert(kHeadDim * 2 == 1 << kShift);
  return {int(address >> kShift & kLastRow), int(address >> (kShift + 31))};
}

// Copies a box to dst, a multiple of 128: the swizzle goes by the address in shared memory, not by the row of the box.
// Its bytes count on `barrier`.
__device__ __forceinline__ void copy_rows(uint32_t dst, const CUtensorMap& map, RowPlace from, int part,
                                          uint32_t barrier, uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(&map), "r"(0), "r"(from.row), "r"(part), "r"(from.high), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

// The same of token_map: whole rows.
__device__ __forceinline__ void copy_tokens(uint32_t dst, const CUtensorMap& map, RowPlace from, uint32_t barrier,
                                            uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %2, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(&map), "r"(0), "r"(from.row & 7), "r"(from.row >> 3), "r"(from.high), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

__device__ __forceinline__ void store_float4(float* to, float4 v, uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w), "l"(policy)
               : "memory");
#endif
}

}  // namespace vericache::cuda
