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

// One output.
__device__ __forceinline__ void finish1(const LinearParams& p, int64_t token, int n, float v) {
  if (p.bias) v += to_float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
  if (p.residual) v += to_float(static_cast<const __nv_bfloat16*>(p.residual)[token * p.residual_stride_row + n]);
  if (p.out_float32)
    static_cast<float*>(p.out)[token * p.out_stride_row + n] = v;
  else
    static_cast<__nv_bfloat16*>(p.out)[token * p.out_stride_row + n] = __float2bfloat16_rn(v);
}

// One output of SwiGLU, from the sums of its gate and its up.
__device__ __forceinline__ void finish_swiglu(const LinearParams& p, int64_t token, int n, float gate, float up) {
  if (p.bias) {
    const auto* bias = static_cast<const __nv_bfloat16*>(p.bias);
    gate += to_float(bias[n]);
    up += to_float(bias[p.n / 2 + n]);
  }
  const float v = silu_times(round_to<__nv_bfloat16>(gate), round_to<__nv_bfloat16>(up));
  static_cast<__nv_bfloat16*>(p.out)[token * p.out_stride_row + n] = __float2bfloat16_rn(v);
}

// Bias, residual, rounding and store of four neighbouring outputs n .. n+3 of one token.
__device__ __forceinline__ void finish4(const LinearParams& p, bool wide, int64_t token, int n, float4 sum) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  const auto* bias = static_cast<const __nv_bfloat16*>(p.bias);
  const auto* residual = static_cast<const __nv_bfloat16*>(p.residual) + token * p.residual_stride_row;
  if (wide && n + 4 <= p.n) {
    if (p.bias) add_run(v, bias + n);
    if (p.residual) add_run(v, residual + n);
    if (p.out_float32) {
      float* out = static_cast<float*>(p.out) + token * p.out_stride_row + n;
      *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      store_run(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride_row + n, v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i >= p.n) return;
    if (p.bias) v[i] += to_float(bias[n + i]);
    if (p.residual) v[i] += to_float(residual[n + i]);
    if (p.out_float32)
      static_cast<float*>(p.out)[token * p.out_stride_row + n + i] = v[i];
    else
      static_cast<__nv_bfloat16*>(p.out)[token * p.out_stride_row + n + i] = __float2bfloat16_rn(v[i]);
  }
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
