// SPDX-License-Identifier: Apache-2.0
#include "cpu/activation.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vericache::cpu {

void silu_mul(const SiluMulParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(p.rows, 1 + (1 << 13) / p.dim, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride_row;
        const T* up = gate + p.dim;
        T* out = static_cast<T*>(p.out) + row * p.dim;
        for_lanes(p.dim, [&](int64_t i, int n) {
          const f32x16 g = load_n(gate + i, n);
          store_n(out + i, g / (f32x16(1.0f) + exp(f32x16(0.0f) - g)) * load_n(up + i, n), n);
        });
      }
    });
  });
}

}  // namespace vericache::cpu
