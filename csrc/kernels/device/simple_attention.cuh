// SPDX-License-Identifier: Apache-2.0
// Attention for what the tensor-core kernels do not take: float32 storage, other head_dims, other group sizes of a
// quantized cache. Written for exactness and shortness, not speed.
//
// out[row, head] = softmax(q k^T * scale) v. Grid: (q_heads, rows); block: kSimpleThreads threads.
// Shared memory: q, one tile of weights, reductions.
//
// Reduction order (R1): tiles of kSimpleThreads tokens at absolute multiples, in order; a score is one fma chain over
// head_dim, an output channel one fma chain over the tile's tokens; the tile's sum of weights is a fixed tree. The
// running maximum rescales between tiles. Nothing else of the launch enters a row.
// Held by bench/gpu/attention_check.cu.
#pragma once

#include "element.cuh"
#include "launch.cuh"
#include "softmax_state.cuh"

namespace vericache::cuda {

inline constexpr int kSimpleThreads = 128;
inline constexpr int kSimpleMaxHeadDim = 256;

// max or sum over the block: a tree over lanes, then the warps left to right. Every thread gets the result.
template <class Combine>
__device__ float block_reduce(float x, float* scratch, Combine combine) {
  for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();  // the scratch of the call before has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kSimpleThreads / 32; ++w) x = combine(x, scratch[w]);
  return x;
}

// Keys::Row is one token of one KV head: k(d) and v(d) as floats.
template <class T, class Keys>
__global__ void __launch_bounds__(kSimpleThreads)
    simple_attention_kernel(const __grid_constant__ typename Keys::Params p) {
  __shared__ float q[kSimpleMaxHeadDim];
  __shared__ float weights[kSimpleThreads];
  __shared__ float scratch[kSimpleThreads / 32];
  const int head = int(blockIdx.x), row = int(blockIdx.y), thread = int(threadIdx.x);
  const int kv_head = head / (p.q_heads / p.kv_heads);
  wait_for_previous_kernel();
  let_next_kernel_start();

  T* out = static_cast<T*>(p.out) + (int64_t(row) * p.q_heads + head) * p.head_dim;
  int request = 0, past = p.requests;
  const bool idle = row >= p.row_offsets[p.requests];
  while (past - request > 1) {
    const int mid = (request + past) / 2;
    (p.row_offsets[mid] <= row ? request : past) = mid;
  }
  Span span{};
  int2 range{0, 0};
  if (!idle) {
    const int position = p.row_position[row];
    span = Keys::span(p, request, kv_head, position, position);
    range = Keys::row_range(p, span, request, position);
    const T* from = static_cast<const T*>(p.q) + row * p.q_stride_row + head * p.q_stride_head;
    for (int d = thread; d < p.head_dim; d += kSimpleThreads) q[d] = to_float(from[d]);
  }
  __syncthreads();

  const float c = __fmul_rn(p.scale, kLog2e);
  RunningMax m{negative_infinity()};
  float l = 0.f, o[2] = {0.f, 0.f};
  for (int first = range.x / kSimpleThreads * kSimpleThreads; first < range.y; first += kSimpleThreads) {
    const int token = first + thread;
    const bool visible = token >= range.x && token < range.y && (token < span.hole_begin || token >= span.hole_end);
    float score = negative_infinity();
    if (visible) {
      const typename Keys::Row keys(p, span, request, kv_head, token);
      score = 0.f;
      for (int d = 0; d < p.head_dim; ++d) score = __fmaf_rn(q[d], keys.k(d), score);
    }
    const float tile_max = block_reduce(score, scratch, [](float a, float b) { return fmaxf(a, b); });
    const float rescale = m.update(tile_max, c);
    const float weight = softmax_weight(score, c, m.reference(c));
    weights[thread] = visible ? weight : -1.f;  // -1: not to be read
    l = __fmaf_rn(l, rescale, block_reduce(weight, scratch, [](float a, float b) { return __fadd_rn(a, b); }));
    for (int i = 0; i < 2; ++i) {
      const int d = thread + i * kSimpleThreads;
      if (d >= p.head_dim) continue;
      float sum = 0.f;
      for (int j = 0; j < kSimpleThreads; ++j) {
        if (weights[j] == -1.f) continue;
        sum = __fmaf_rn(weights[j], typename Keys::Row(p, span, request, kv_head, first + j).v(d), sum);
      }
      o[i] = __fmaf_rn(o[i], rescale, sum);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i) {
    const int d = thread + i * kSimpleThreads;
    if (d < p.head_dim) out[d] = from_float<T>(l == 0.f ? 0.f : __fdiv_rn(o[i], l));
  }
}

template <class T, class Keys>
void launch_simple_attention(const typename Keys::Params& p, cudaStream_t stream) {
  VC_CHECK(p.head_dim <= kSimpleMaxHeadDim, "head_dim is ", p.head_dim, "; attention takes up to ", kSimpleMaxHeadDim,
           ".");
  launch(simple_attention_kernel<T, Keys>, {dim3(p.q_heads, p.rows), dim3(kSimpleThreads)}, device_info(), stream, p);
}

}  // namespace vericache::cuda
