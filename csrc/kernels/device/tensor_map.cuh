// SPDX-License-Identifier: Apache-2.0
// Tensor maps and the bulk copies that use them (sm_90): one thread copies a box of a matrix into shared memory, in the
// 128-byte swizzle of device/wgmma.cuh; the bytes are counted by an mbarrier. What lies outside the matrix reads as
// zero and counts.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.h"

namespace vericache::cuda {

// Of bf16 elements, 64 of the first axis a box; base and strides (bytes, of the axes after the first) are multiples of
// 16. Legal while a stream is captured.
inline CUtensorMap bf16_tensor_map(const void* base, int axes, const cuuint64_t* sizes, const cuuint64_t* strides,
                                   const cuuint32_t* box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    VC_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    VC_CHECK(found == cudaDriverEntryPointSuccess && entry != nullptr,
             "the NVIDIA driver has no cuTensorMapEncodeTiled; a driver for CUDA 12.0 or later is needed.");
    return reinterpret_cast<Encode>(entry);
  }();
  CUtensorMap map{};
  constexpr cuuint32_t kSteps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(axes), const_cast<void*>(base),
                                 sizes, strides, box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  VC_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused a tensor of ", sizes[0], " x ", sizes[1],
           " elements, stride ", strides[0], " bytes, box ", box[0], " x ", box[1], " (CUresult ", int(result), ").");
  return map;
}

// A matrix [rows, cols], `stride` elements a row, in boxes of box_rows (at most 256) rows.
inline CUtensorMap bf16_matrix_map(const void* base, int64_t rows, int64_t cols, int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)};
  return bf16_tensor_map(base, 2, sizes, strides, box);
}

// A contiguous matrix [rows, cols] whose halves of rows (a multiple of 8 each) go together: a box has 8 rows of the
// first half, the same 8 of the second, the next 8 of the first, ... box_rows (a multiple of 16) in all.
// Axes: column, row in 8, half, 8 rows.
inline CUtensorMap bf16_halves_map(const void* base, int64_t rows, int64_t cols, int box_rows) {
  const cuuint64_t sizes[4] = {cuuint64_t(cols), 8, 2, cuuint64_t(rows) / 16};
  const cuuint64_t strides[3] = {cuuint64_t(cols) * 2, cuuint64_t(cols) * cuuint64_t(rows), cuuint64_t(cols) * 16};
  const cuuint32_t box[4] = {64, 8, 2, cuuint32_t(box_rows) / 16};
  return bf16_tensor_map(base, 4, sizes, strides, box);
}

// A contiguous matrix whose rows are heads of head_dim rows: a box has `run` pairs i, i + head_dim / 2 of the rows of
// each of box_heads heads; of each head 8 first rows, their 8 partners, the next 8 first rows, ... head_dim / 2 is a
// multiple of run, run of 8. Axes: column, row in 8, half of a head, 8 rows of a half, head.
inline CUtensorMap bf16_heads_map(const void* base, int heads, int head_dim, int64_t cols, int run, int box_heads) {
  const cuuint64_t row = cuuint64_t(cols) * 2, half = cuuint64_t(head_dim) / 2;
  const cuuint64_t sizes[5] = {cuuint64_t(cols), 8, 2, half / 8, cuuint64_t(heads)};
  const cuuint64_t strides[4] = {row, row * half, row * 8, row * half * 2};
  const cuuint32_t box[5] = {64, 8, 2, cuuint32_t(run) / 8, cuuint32_t(box_heads)};
  return bf16_tensor_map(base, 5, sizes, strides, box);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VC_SM90(...) asm volatile(__VA_ARGS__)
#else
#define VC_SM90(...) (void)0
#endif

// After mbarrier_init, before a barrier of the block: the copy engine sees the new barriers.
__device__ __forceinline__ void mbarrier_init_fence() { VC_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }

// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  VC_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// `policy`, here and below: of device/l2_policy.cuh.
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap& map, int col, int row, uint32_t barrier,
                                         uint64_t policy) {
  VC_SM90(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "l"(policy) : "memory");
}

// A box of bf16_halves_map; row: of its first half, a multiple of 8.
__device__ __forceinline__ void copy_halves(uint32_t dst, const CUtensorMap& map, int col, int row, uint32_t barrier,
                                            uint64_t policy) {
  VC_SM90(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %3, %4}], [%5], %6;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(0), "r"(row / 8), "r"(barrier), "l"(policy) : "memory");
}

// A box of bf16_heads_map; pair: the first of each head, a multiple of 8.
__device__ __forceinline__ void copy_heads(uint32_t dst, const CUtensorMap& map, int col, int pair, int head,
                                           uint32_t barrier, uint64_t policy) {
  VC_SM90(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %3, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(0), "r"(pair / 8), "r"(head), "r"(barrier), "l"(policy) : "memory");
}

// Fetches the map itself.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  VC_SM90("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#undef VC_SM90

}  // namespace vericache::cuda
