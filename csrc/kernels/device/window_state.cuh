// SPDX-License-Identifier: Apache-2.0
// What the two passes of window_scores hand to each other: softmax states of every query and split of the keys, and
// what they come to.
//
// Reduction order of the merge: M is the largest m; lane i of a warp adds l * 2^(m - M) of splits i, i + 32, ... in
// ascending order; then the butterfly of device/reduce.cuh. It depends on the number of splits alone.
#pragma once

#include "common/params.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "softmax_state.cuh"

namespace vericache::cuda {

// Row h * window + w is query w of head h.
struct WindowScratch {
  float2* partial;      // [rows, splits]: m (-inf without a visible key), l; see softmax_state.cuh
  float2* normalizers;  // [rows]: the query's m, and 1 / (window * l): a weight is 2^(x - m) times that
  uint4* fragments;     // queries as mma operands; the tensor-core kernel alone
  int splits;
};

inline constexpr int kWindowMergeRows = 4;  // a block, a warp each

static __global__ void __launch_bounds__(32 * kWindowMergeRows)
    window_merge_kernel(WindowScratch scratch, int64_t rows, int window) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t row = int64_t(blockIdx.x) * kWindowMergeRows + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (row >= rows) return;
  const float2* partial = scratch.partial + row * scratch.splits;
  float largest = negative_infinity();
  for (int s = lane; s < scratch.splits; s += 32) largest = fmaxf(largest, partial[s].x);
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (largest == negative_infinity()) largest = 0.f;
  float l = 0.f;
  for (int s = lane; s < scratch.splits; s += 32)
    l = __fmaf_rn(partial[s].y, fast_exp2(__fsub_rn(partial[s].x, largest)), l);
  l = warp_sum(l);
  if (lane == 0) scratch.normalizers[row] = make_float2(largest, __fdiv_rn(1.f, __fmul_rn(l, float(window))));
}

inline void launch_window_merge(const WindowScoresParams& p, const WindowScratch& scratch, const DeviceInfo& info,
                                cudaStream_t stream) {
  const int64_t rows = int64_t(p.q_heads) * p.window;
  launch(window_merge_kernel,
         {dim3(unsigned((rows + kWindowMergeRows - 1) / kWindowMergeRows)), dim3(32 * kWindowMergeRows)}, info, stream,
         scratch, rows, p.window);
}

}  // namespace vericache::cuda
