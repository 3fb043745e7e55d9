// SPDX-License-Identifier: Apache-2.0
// out = x @ w^T (+ bias) (+ residual) for float32 storage and for a k that is no multiple of 8: exact under R1, any
// shape, any alignment, and not fast. The fast kernel is linear.cu.
//
// Grid: (ceil(n / 8), ceil(rows / 8)). Block: 8 warps; warp i computes output column n = 8 * blockIdx.x + i for 8 rows.
// Shared memory: none.
//
// Reduction order (R1): lane l adds the products of k = l, l + 32, l + 64, ... by fused multiply-add, in that order,
// from zero; the 32 lanes are added by the butterfly lane ^ 16, 8, 4, 2, 1; then + bias, + residual, one rounding. It
// depends on k alone. Held by bench/gpu/dense_check.cu (linear_invariance).
#include "device/element.cuh"
#include "device/launch.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kWarps = 8, kRows = 8;

template <class T>
__global__ void __launch_bounds__(32 * kWarps) linear_lanes(const __grid_constant__ LinearParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, n = blockIdx.x * kWarps + threadIdx.x / 32;
  const int row0 = blockIdx.y * kRows;
  if (n >= p.n) return;
  const T* w = static_cast<const T*>(p.w) + int64_t(n) * p.k;
  const T* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    x[r] = static_cast<const T*>(p.x) + int64_t(min(row0 + r, p.rows - 1)) * p.x_stride_row;

  float sum[kRows] = {};
  for (int k = lane; k < p.k; k += 32) {
    const float weight = to_float(w[k]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = fmaf(to_float(x[r][k]), weight, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], mask);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane != r || row0 + r >= p.rows) continue;
    float v = sum[r];
    const int64_t row = row0 + r;
    if (p.bias) v += to_float(static_cast<const T*>(p.bias)[n]);
    if (p.residual) v += to_float(static_cast<const T*>(p.residual)[row * p.residual_stride_row + n]);
    if (p.out_float32)
      static_cast<float*>(p.out)[row * p.out_stride_row + n] = v;
    else
      static_cast<T*>(p.out)[row * p.out_stride_row + n] = from_float<T>(v);
  }
}

}  // namespace

void linear_simple(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(unsigned((p.n + kWarps - 1) / kWarps), unsigned((p.rows + kRows - 1) / kRows));
  shape.block = dim3(32 * kWarps);
  VC_CHECK(shape.grid.y <= 65535, "linear: ", p.rows, " rows in one call; at most ", 65535 * kRows, ".");
  dispatch_element(p.dtype, [&](auto t) { launch(linear_lanes<decltype(t)>, shape, info, stream, p); });
}

}  // namespace vericache::cuda
