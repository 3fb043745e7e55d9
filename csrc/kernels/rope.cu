// SPDX-License-Identifier: Apache-2.0
// QK-norm (optional), rotary embedding and the write of K and V into their page, in one launch.
//
// Grid: (ceil(heads / 4), rows up to 65535, then a stride), heads = q_heads + 2 * kv_heads in the order of qkv. Block:
// 4 warps, one head a warp (device/rope_head.cuh). Shared memory: none.
//
// Reduction order (R1): that of device/rope_head.cuh. Held by bench/gpu/dense_check.cu (rope_write_*).
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/rope_head.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kWarps = 4;

// One head of one row by one warp. `dst` is null where nothing is to be written.
template <class T, int kPairs>
__device__ __forceinline__ void move_head(const RopeWriteParams& p, const T* src, const T* weight, bool rotate,
                                          int64_t position, T* dst) {
  const int half = p.head_dim / 2, channel = kPairs * int(threadIdx.x % 32);
  const bool active = channel < half;
  RopeLane<kPairs> x;
  if (active) x.load(src, channel, half);
  if (rotate && weight != nullptr) {
    RopeLane<kPairs> w;
    if (active) w.load(weight, channel, half);
    x.template norm<T>(w, p.head_dim, p.eps);
  }
  if (!active || dst == nullptr) return;
  if (rotate) {
    float cos[kPairs], sin[kPairs];
    load_run(p.cos + position * half + channel, cos);
    load_run(p.sin + position * half + channel, sin);
    x.rotate(cos, sin);
  }
  x.store(dst, channel, half);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kWarps) rope_rows(const __grid_constant__ RopeWriteParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int head = blockIdx.x * kWarps + threadIdx.x / 32;
  if (head >= p.q_heads + 2 * p.kv_heads) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* src = static_cast<const T*>(p.qkv) + row * p.qkv_stride_row + int64_t(head) * p.head_dim;
    const int64_t position = p.row_position[row];
    if (head < p.q_heads) {
      T* dst = static_cast<T*>(p.q_out) + (row * p.q_heads + head) * p.head_dim;
      move_head<T, kPairs>(p, src, static_cast<const T*>(p.q_norm), true, position, dst);
      continue;
    }
    T* page = reinterpret_cast<T*>(p.row_page[row]);
    if (page == nullptr) continue;
    const int kv = head - p.q_heads;  // K heads, then V heads: the order of a page too
    T* dst = page + (int64_t(kv) * p.page_size + position % p.page_size) * p.head_dim;
    move_head<T, kPairs>(p, src, static_cast<const T*>(p.k_norm), kv < p.kv_heads, position, dst);
  }
}

}  // namespace

void rope_write(const RopeWriteParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return;
  VC_CHECK(p.head_dim % 2 == 0 && p.head_dim > 0 && p.head_dim <= 256, "rope_write: head_dim is ", p.head_dim,
           "; it must be even and at most 256.");
  const int half = p.head_dim / 2, pairs = rope_pairs(p.head_dim);
  VC_CHECK(half % pairs == 0, "rope_write: head_dim is ", p.head_dim,
           "; above 64 it must be a multiple of 4, above 128 of "
           "8.");
  const DeviceInfo info = device_info();
  LaunchShape shape;
  shape.grid = dim3(unsigned((p.q_heads + 2 * p.kv_heads + kWarps - 1) / kWarps), unsigned(std::min(p.rows, 65535)));
  shape.block = dim3(32 * kWarps);
  dispatch_element(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto aligned = [&](const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % (sizeof(T) * pairs) == 0; };
    VC_CHECK(aligned(p.qkv) && p.qkv_stride_row % pairs == 0 && aligned(p.q_norm) && aligned(p.k_norm) &&
                 aligned(p.q_out) && reinterpret_cast<uintptr_t>(p.cos) % (4 * pairs) == 0 &&
                 reinterpret_cast<uintptr_t>(p.sin) % (4 * pairs) == 0,
             "rope_write: qkv, the norm weights, cos, sin and q_out must start at multiples of ", pairs,
             " elements; make them contiguous.");
    switch (pairs) {
      case 1:
        return launch(rope_rows<T, 1>, shape, info, stream, p);
      case 2:
        return launch(rope_rows<T, 2>, shape, info, stream, p);
      default:
        return launch(rope_rows<T, 4>, shape, info, stream, p);
    }
  });
}

}  // namespace vericache::cuda
