// SPDX-License-Identifier: Apache-2.0
// window_scores for what the tensor-core kernel does not take: float32 storage, other head_dims, unaligned rows. Short,
// not fast.
//
// Grid: (tiles of kSimpleWindowKeys tokens, q_heads); block: kSimpleWindowWarps warps. A lane is a token, a warp takes
// the queries w, w + kSimpleWindowWarps, ... Shared memory: the tile in float32; the warps' sums.
//
// Reduction order: a score is one fma chain over head_dim; a tile's state is a butterfly over its tokens; a token's
// weights are one fma chain over each warp's queries, oldest first, then the warps left to right.
#pragma once

#include "element.cuh"
#include "launch.cuh"
#include "softmax_state.cuh"
#include "window_state.cuh"

namespace vericache::cuda {

inline constexpr int kSimpleWindowKeys = 32, kSimpleWindowWarps = 4, kSimpleWindowHeadDim = 256;

template <class T, bool kSums>
__global__ void __launch_bounds__(32 * kSimpleWindowWarps)
    simple_window_kernel(const __grid_constant__ WindowScoresParams p, WindowScratch scratch) {
  __shared__ float keys[kSimpleWindowKeys][kSimpleWindowHeadDim + 1];  // odd rows: a column is free of bank conflicts
  __shared__ float sums[kSimpleWindowWarps][kSimpleWindowKeys];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, head = int(blockIdx.y);
  const int64_t first = int64_t(blockIdx.x) * kSimpleWindowKeys, token = first + lane;
  const T* k = static_cast<const T*>(p.k) + head / (p.q_heads / p.kv_heads) * p.k_stride_head;
  for (int i = warp; i < kSimpleWindowKeys; i += kSimpleWindowWarps)
    for (int d = lane; d < p.head_dim; d += 32)
      keys[i][d] = first + i < p.tokens ? to_float(k[(first + i) * p.k_stride_token + d]) : 0.f;
  __syncthreads();

  const float c = __fmul_rn(p.scale, kLog2e);
  float sum = 0.f;
  for (int w = warp; w < p.window; w += kSimpleWindowWarps) {
    const T* q = static_cast<const T*>(p.queries) + w * p.q_stride_row + head * p.q_stride_head;
    float score = 0.f;
    for (int d = 0; d < p.head_dim; ++d) score = __fmaf_rn(to_float(q[d]), keys[lane][d], score);
    if (token > p.tokens - p.window + w) score = negative_infinity();
    const int64_t row = int64_t(head) * p.window + w;
    if constexpr (kSums) {
      const float2 n = scratch.normalizers[row];
      sum = __fmaf_rn(softmax_weight(score, c, n.x), n.y, sum);
    } else {
      RunningMax m{score};
      for (int step = 16; step > 0; step /= 2) m.raw = fmaxf(m.raw, __shfl_xor_sync(0xffffffffu, m.raw, step));
      float l = softmax_weight(score, c, m.reference(c));
      for (int step = 16; step > 0; step /= 2) l = __fadd_rn(l, __shfl_xor_sync(0xffffffffu, l, step));
      if (lane == 0) scratch.partial[row * scratch.splits + blockIdx.x] = make_float2(m.stored(c), l);
    }
  }
  if constexpr (kSums) {
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || token >= p.tokens) return;
    for (int other = 1; other < kSimpleWindowWarps; ++other) sum = __fadd_rn(sum, sums[other][lane]);
    p.out[int64_t(head) * p.tokens + token] = sum;
  }
}

template <class T>
void launch_simple_window(const WindowScoresParams& p, const WindowScratch& scratch, cudaStream_t stream) {
  VC_CHECK(p.head_dim <= kSimpleWindowHeadDim, "head_dim is ", p.head_dim, "; window_scores takes up to ",
           kSimpleWindowHeadDim, ".");
  const DeviceInfo info = device_info();
  const LaunchShape shape{dim3(unsigned(scratch.splits), unsigned(p.q_heads)), dim3(32 * kSimpleWindowWarps)};
  launch(simple_window_kernel<T, false>, shape, info, stream, p, scratch);
  launch_window_merge(p, scratch, info, stream);
  launch(simple_window_kernel<T, true>, shape, info, stream, p, scratch);
}

}  // namespace vericache::cuda
