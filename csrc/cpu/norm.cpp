// SPDX-License-Identifier: Apache-2.0
#include "cpu/norm.h"

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vericache::cpu {
namespace {

template <class T>
void norm_row(const RmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride_row;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.dim;
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride_row;
    T* sum = static_cast<T*>(p.residual_out) + row * p.dim;
    for_lanes(p.dim, [&](int64_t i, int n) { store_n(sum + i, load_n(x + i, n) + load_n(residual + i, n), n); });
    x = sum;
  }
  f32x16 squares(0.0f);
  for_lanes(p.dim, [&](int64_t i, int n) {
    const f32x16 v = load_n(x + i, n);
    squares = fma(v, v, squares);
  });
  const f32x16 scale(1.0f / std::sqrt(hsum(squares) / float(p.dim) + p.eps));
  for_lanes(p.dim, [&](int64_t i, int n) { store_n(out + i, load_n(x + i, n) * scale * load_n(weight + i, n), n); });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  dispatch(p.dtype, [&](auto t) {
    parallel_for(p.rows, 1 + (1 << 14) / p.dim, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) norm_row<decltype(t)>(p, row);
    });
  });
}

}  // namespace vericache::cpu
