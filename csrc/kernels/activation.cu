// SPDX-License-Identifier: Apache-2.0
// out = silu(gate) * up, element by element; no reduction.
//
// Grid: (ceil(packs of a row / 256), rows up to 65535, then a stride). Block: 256 threads, 16 bytes of out each.
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/silu.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) silu_mul_rows(const __grid_constant__ SiluMulParams p, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kSize;
  if (first >= p.dim) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride_row + first;
    const T* up = gate + p.dim;
    T* out = static_cast<T*>(p.out) + row * p.dim + first;
    if (aligned) {
      float g[kSize], u[kSize];
      Pack<T>::load(gate).unpack(g);
      Pack<T>::load(up).unpack(u);
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] = silu_times(g[i], u[i]);
      Pack<T>::pack(g).store(out);
    } else {
      for (int i = 0; i < kSize && first + i < p.dim; ++i)
        out[i] = from_float<T>(silu_times(to_float(gate[i]), to_float(up[i])));
    }
  }
}

}  // namespace

void silu_mul(const SiluMulParams& p, cudaStream_t stream) {
  if (p.rows <= 0 || p.dim <= 0) return;
  const DeviceInfo info = device_info();
  dispatch_element(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned =
        p.dim % Pack<T>::kSize == 0 && aligned16(p.out) && rows_aligned16(p.gate_up, p.gate_up_stride_row, sizeof(T));
    const int packs = (p.dim + Pack<T>::kSize - 1) / Pack<T>::kSize;
    LaunchShape shape;
    shape.grid = dim3(unsigned((packs + kThreads - 1) / kThreads), unsigned(std::min(p.rows, 65535)));
    shape.block = dim3(kThreads);
    launch(silu_mul_rows<T>, shape, info, stream, p, aligned);
  });
}

}  // namespace vericache::cuda
