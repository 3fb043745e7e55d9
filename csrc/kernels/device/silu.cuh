// SPDX-License-Identifier: Apache-2.0
// silu(x) * y with every rounding written out: silu_mul and the linear kernel with SwiGLU must agree in bits.
#pragma once

namespace vericache::cuda {

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
}

}  // namespace vericache::cuda
