// SPDX-License-Identifier: Apache-2.0
// The end of a linear kernel: bias, residual, the one rounding, the store; or SwiGLU. And what the L2 should keep for
// it.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "element.cuh"
#include "l2_policy.cuh"
#include "silu.cuh"

namespace vericache::cuda {

// For w, which is read once and would push x and the output out of the L2; not where blocks share it, nor where the
// output has no room there either (logits of many rows: 3% slower).
inline uint64_t w_policy(const LinearParams& p) {
  constexpr int64_t kOutInL2 = int64_t(16) << 20;
  const int64_t out_bytes = int64_t(p.rows) * p.n * (p.out_float32 ? 4 : 2);
  return p.rows <= 128 && out_bytes <= kOutInL2 ? kDropFirst : kDropAsUsual;
}

// part(i) is the value of part i; left to right.
template <class F>
__device__ __forceinline__ float4 add_parts(int splits, F part) {
  const auto add = [](float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
  const float4 p0 = part(0), p1 = part(1);
  if (splits == 2) return add(p0, p1);
  const float4 p2 = part(2), p3 = part(3);
  return add(add(add(p0, p1), p2), p3);
}

// One output.
__device__ __forceinline__ void finish1(const LinearParams& p, int64_t token, int n, float v) {
  if (p.bias) v += to_float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
  if (p.residual) v += to_float(static_cast<const __nv_bfloat16*>(p.residual)[token * p.residual_stride_row + n]);
  if (p.out_float32)
    static_cast<float*>(p.out)[token * p.out_stride_row + n] = v;
  else
    static_cast<__nv_bfloat16*>(p.out)[token * p.out_stride_row + n] = __float2bfloat16_rn(v);
}

// One value of SwiGLU, from the sums of its gate and its up.
__device__ __forceinline__ float swiglu_of(const LinearParams& p, int n, float gate, float up) {
  if (p.bias) {
    const auto* bias = static_cast<const __nv_bfloat16*>(p.bias);
    gate += to_float(bias[n]);
    up += to_float(bias[p.n / 2 + n]);
  }
  return silu_times(round_to<__nv_bfloat16>(gate), round_to<__nv_bfloat16>(up));
}

// One output of SwiGLU.
__device__ __forceinline__ void finish_swiglu(const LinearParams& p, int64_t token, int n, float gate, float up) {
  static_cast<__nv_bfloat16*>(p.out)[token * p.out_stride_row + n] = __float2bfloat16_rn(swiglu_of(p, n, gate, up));
}

// Two or four neighbouring outputs n, n + 1, .. of one token, where can_access_wide: bias, residual, rounding, store.
template <int kCount>
__device__ __forceinline__ void finish_run(const LinearParams& p, int64_t token, int n, float (&v)[kCount]) {
  if (p.bias) add_run(v, static_cast<const __nv_bfloat16*>(p.bias) + n);
  if (p.residual) add_run(v, static_cast<const __nv_bfloat16*>(p.residual) + token * p.residual_stride_row + n);
  if (p.out_float32)
    store_run(static_cast<float*>(p.out) + token * p.out_stride_row + n, v);
  else
    store_run(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride_row + n, v);
}
// The same of SwiGLU.
template <int kCount>
__device__ __forceinline__ void finish_swiglu_run(const LinearParams& p, int64_t token, int n,
                                                  const float (&gate)[kCount], const float (&up)[kCount]) {
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = swiglu_of(p, n + i, gate[i], up[i]);
  store_run(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride_row + n, v);
}

// Four outputs, of which some may be past the end. wide: can_access_wide.
__device__ __forceinline__ void finish4(const LinearParams& p, bool wide, int64_t token, int n, float4 sum) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  if (wide && n + 4 <= p.n) return finish_run(p, token, n, v);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (n + i < p.n) finish1(p, token, n + i, v[i]);
}

// Whether bias, residual and out can be accessed 4 elements at a time.
inline bool can_access_wide(const LinearParams& p) {
  const auto ok = [](const void* ptr, int64_t stride, int bytes) {
    return ptr == nullptr || (reinterpret_cast<uintptr_t>(ptr) % (4 * bytes) == 0 && stride % 4 == 0);
  };
  return ok(p.bias, 0, 2) && ok(p.residual, p.residual_stride_row, 2) &&
         ok(p.out, p.out_stride_row, p.out_float32 ? 4 : 2);
}

}  // namespace vericache::cuda
