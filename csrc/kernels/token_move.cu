// SPDX-License-Identifier: Apache-2.0
// Copies K and V rows between full pages and head pages. Bytes move; no value is looked at.
//
// Grid: (ceil(capacity * vectors of a row / 256), kv_heads), a vector being 16 bytes. Block: 256 threads, one vector of
// K and the same one of V each, both asked for before either is written.
#include "common/types.h"
#include "device/launch.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kThreads = 256;

template <bool kGather>
__global__ void __launch_bounds__(kThreads) move_tokens(const __grid_constant__ TokenMoveParams p, int vectors) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int head = blockIdx.y;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int row = int(i / vectors), vector = int(i % vectors);
  if (row >= p.counts[head]) return;
  const int position = p.positions[head * p.positions_stride + row];
  const int64_t head_vectors = int64_t(p.page_size) * vectors;  // K or V of one head in one page
  uint4* full = reinterpret_cast<uint4*>(p.page_table[position / p.page_size]) + head * head_vectors +
                int64_t(position % p.page_size) * vectors + vector;
  uint4* kept = reinterpret_cast<uint4*>(p.head_table[head * p.head_stride + row / p.page_size]) +
                int64_t(row % p.page_size) * vectors + vector;
  const uint4* src = kGather ? full : kept;
  uint4* dst = kGather ? kept : full;
  const int64_t src_v = kGather ? p.kv_heads * head_vectors : head_vectors;
  const int64_t dst_v = kGather ? head_vectors : p.kv_heads * head_vectors;
  const uint4 k = src[0], v = src[src_v];
  dst[0] = k;
  dst[dst_v] = v;
}

template <bool kGather>
void run(const char* op, const TokenMoveParams& p, cudaStream_t stream) {
  if (p.capacity <= 0 || p.kv_heads <= 0) return;
  const int64_t row_bytes = int64_t(p.head_dim) * int64_t(dtype_size(p.dtype));
  VC_CHECK(row_bytes % 16 == 0, op, ": a row of head_dim ", p.head_dim, " has ", row_bytes,
           " bytes; it must be a multiple of 16.");
  const int vectors = int(row_bytes / 16);
  LaunchShape shape;
  shape.grid = dim3(unsigned((int64_t(p.capacity) * vectors + kThreads - 1) / kThreads), unsigned(p.kv_heads));
  shape.block = dim3(kThreads);
  launch(move_tokens<kGather>, shape, device_info(), stream, p, vectors);
}

}  // namespace

void gather_tokens(const TokenMoveParams& p, cudaStream_t stream) { run<true>("gather_tokens", p, stream); }
void scatter_tokens(const TokenMoveParams& p, cudaStream_t stream) { run<false>("scatter_tokens", p, stream); }

}  // namespace vericache::cuda
