// SPDX-License-Identifier: Apache-2.0
// residual_out = x (+ residual), rounded; out = residual_out / rms(residual_out) * weight, in one pass over memory.
//
// Grid: one block a row. Block: ceil(dim / pack) threads rounded up to a warp, at most 1024; a pack is 16 bytes of T,
// and thread t owns packs t, t + threads, ..., at most kMaxPacks, which stay in registers between the two phases.
// Shared memory: 32 floats.
//
// Reduction order (R1): a thread adds the squares of its elements in ascending order by fused multiply-add; then the
// butterflies of device/reduce.cuh. It depends on dim and T alone, not on alignment: an unaligned row is only loaded
// in smaller pieces. Held by bench/gpu/dense_check.cu (norm_*).
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kMaxPacks = 4, kMaxThreads = 1024;

// Elements first .. first+kSize-1 of a row of `dim`; those past the end read as zero and are not written.
template <class T>
__device__ __forceinline__ void load_pack(const T* row, int first, int dim, bool aligned, float (&x)[Pack<T>::kSize]) {
  if (aligned && first + Pack<T>::kSize <= dim) return Pack<T>::load(row + first).unpack(x);
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) x[i] = first + i < dim ? to_float(row[first + i]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_pack(T* row, int first, int dim, bool aligned, const Pack<T>& pack) {
  if (aligned && first + Pack<T>::kSize <= dim) return pack.store(row + first);
  float x[Pack<T>::kSize];
  pack.unpack(x);
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i)
    if (first + i < dim) row[first + i] = from_float<T>(x[i]);
}

template <class T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads) norm_rows(const __grid_constant__ RmsNormParams p, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  __shared__ float scratch[32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride_row;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride_row;
  const T* weight = static_cast<const T*>(p.weight);

  // The weight is asked for early, to share the first wait, while there are registers for it.
  constexpr bool kEarlyWeight = kPacks <= 2;
  float v[kPacks][kSize], w[kEarlyWeight ? kPacks : 1][kSize], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int first = (threadIdx.x + i * blockDim.x) * kSize;
    load_pack(x, first, p.dim, aligned, v[i]);
    if constexpr (kEarlyWeight) load_pack(weight, first, p.dim, aligned, w[i]);
    if (p.residual != nullptr) {
      float r[kSize];
      load_pack(residual, first, p.dim, aligned, r);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[i][j] += r[j];
      const Pack<T> sum = Pack<T>::pack(v[i]);
      sum.unpack(v[i]);  // the norm is that of the rounded sum
      store_pack(static_cast<T*>(p.residual_out) + row * p.dim, first, p.dim, aligned, sum);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) squares = fmaf(v[i][j], v[i][j], squares);
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / float(p.dim) + p.eps);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int first = (threadIdx.x + i * blockDim.x) * kSize;
    if constexpr (!kEarlyWeight) load_pack(weight, first, p.dim, aligned, w[0]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[i][j] = v[i][j] * scale * w[kEarlyWeight ? i : 0][j];
    store_pack(static_cast<T*>(p.out) + row * p.dim, first, p.dim, aligned, Pack<T>::pack(v[i]));
  }
}

template <class T>
void launch_norm(const RmsNormParams& p, cudaStream_t stream) {
  const int packs = (p.dim + Pack<T>::kSize - 1) / Pack<T>::kSize;
  const int each = (packs + kMaxThreads - 1) / kMaxThreads;
  VC_CHECK(each <= kMaxPacks, "rms_norm: dim is ", p.dim, "; at most ", kMaxPacks * kMaxThreads * Pack<T>::kSize,
           " for ", sizeof(T), "-byte elements.");
  const bool aligned = rows_aligned16(p.x, p.x_stride_row, sizeof(T)) && aligned16(p.weight) &&
                       rows_aligned16(p.out, p.dim, sizeof(T)) &&
                       (p.residual == nullptr || (rows_aligned16(p.residual, p.residual_stride_row, sizeof(T)) &&
                                                  rows_aligned16(p.residual_out, p.dim, sizeof(T))));
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.rows));
  shape.block = dim3(unsigned((packs + each - 1) / each + 31) / 32 * 32);
  const DeviceInfo info = device_info();
  switch (each) {
    case 1:
      return launch(norm_rows<T, 1>, shape, info, stream, p, aligned);
    case 2:
      return launch(norm_rows<T, 2>, shape, info, stream, p, aligned);
    default:
      return launch(norm_rows<T, kMaxPacks>, shape, info, stream, p, aligned);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows <= 0 || p.dim <= 0) return;
  dispatch_element(p.dtype, [&](auto t) { launch_norm<decltype(t)>(p, stream); });
}

}  // namespace vericache::cuda
