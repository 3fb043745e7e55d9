// SPDX-License-Identifier: Apache-2.0
// The rotation of a pair with every rounding written out, unfused as the CPU kernel has it: rope_write and the linear
// kernel that rotates must agree in bits.
#pragma once

namespace vericache::cuda {

__device__ __forceinline__ void rotate_pair(float& low, float& high, float cos, float sin) {
  const float a = low, b = high;
  low = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
  high = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
}

}  // namespace vericache::cuda
