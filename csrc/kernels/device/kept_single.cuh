// SPDX-License-Identifier: Apache-2.0
// Kept attention for one request of few units, where the time between two calls' bytes counts most. For Hopper.
//
// Every KV head is cut into even pieces of one length, the shortest, of kLeastPieceTiles or more, that gives a block at
// most one piece. A block's warps take turns at tiles of 16 tokens and work alone until the piece ends; then one warp a
// row merges their states, leaves the result in memory and counts (tagged_counter.cuh); whose count completes the
// head's pieces merges them. So the next call's wait ends with the last block. A head's first block sets its counters;
// every block waits for one of a lower number.
//
// A warp's ring (half_ring.cuh) is filled before the wait for the kernel before.
//
// Grid: one block a multiprocessor. Shared memory: the rings, in which the warps' states are left at the end. Order: a
// warp's tiles as they come, a block's warps by number, a row's states by piece, kKeptStatesAtOnce at a time,
// whichever block merges them. Fixed by the lengths, the counts of rows and heads and the number of multiprocessors.
// Held by bench/gpu/attention_check.cu.
#pragma once

#include "half_ring.cuh"
#include "kept_keys.cuh"
#include "kept_state.cuh"
#include "launch.cuh"
#include "shared_memory.cuh"
#include "state_sum.cuh"
#include "tagged_counter.cuh"

namespace vericache::cuda {

struct KeptSingleArgs {
  KeptParams p;
  PartialStates states;    // row i from block b: index b * kItemRows + i
  TaggedCounter* arrived;  // of row i of head h: index h * kItemRows + i
};

// What one of 8 heads, half as long again as the mean, has on 132 multiprocessors.
inline constexpr int kKeptStatesAtOnce = 24;
inline constexpr int kLeastPieceTiles = 4;

// The request, for whole warps: a lane holds a KV head's length and pieces, and a row's position. One round of loads.
struct KeptRequest : SingleRequest {
  int last_position, tail_start, kept, pieces, piece_tiles;

  __device__ __forceinline__ static KeptRequest load(const KeptAttentionParams& p, int blocks, int lane) {
    constexpr uint32_t kAll = 0xffffffffu;
    const bool own = lane < p.kv_heads;
    const int kept = own ? p.kept_len[lane] : 0, tail_start = p.tail_start[0];
    const auto request = SingleRequest::load(p, lane);
    const int last = request.last(lane), tail = max(0, last + 1 - tail_start);
    const int tiles =
        own && request.rows() > 0 ? ceil_of(ceil_of(kept, kTileTokens) * kTileTokens + tail, kGranuleTokens) : 0;
    // The shortest length that gives a block at most one piece. A head ends with a piece that may not be whole, so with
    // one piece less for each head it is long enough.
    const int all = __reduce_add_sync(kAll, tiles);
    int low = max(kLeastPieceTiles, ceil_of(all, blocks)),
        high = max(kLeastPieceTiles, ceil_of(all, blocks - p.kv_heads));
    while (low < high) {
      const int length = (low + high) / 2;
      if (__reduce_add_sync(kAll, ceil_of(tiles, length)) <= blocks)
        high = length;
      else
        low = length + 1;
    }
    return {request, last, tail_start, kept, ceil_of(tiles, low), low};
  }
};

template <class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 1)
    kept_single_kernel(const __grid_constant__ KeptSingleArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWarps = Shape::kWarps, kTokens = Shape::kTokens;
  constexpr uint32_t kAll = 0xffffffffu;
  const KeptParams& p = args.p;
  unsigned char* smem = dynamic_smem();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.q_heads / p.kv_heads;
  if (!p.tables_settled) wait_for_previous_kernel();
  const auto request = KeptRequest::load(p, int(gridDim.x), lane);

  // Which piece: heads lie one behind the other.
  int sum = request.pieces;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  const int kv_head = __popc(__ballot_sync(kAll, sum <= int(blockIdx.x)));
  const bool works = kv_head < p.kv_heads;
  const int first_block = __shfl_sync(kAll, sum - request.pieces, kv_head % 32);
  const int pieces = __shfl_sync(kAll, request.pieces, kv_head % 32);
  const int piece = int(blockIdx.x) - first_block;
  const int kept = __shfl_sync(kAll, request.kept, kv_head % 32), hole_end = ceil_of(kept, kTileTokens) * kTileTokens;
  const Span span{0, hole_end + max(0, request.last_position + 1 - request.tail_start), kept, hole_end};
  const int begin = piece * request.piece_tiles * kTokens;
  const int end = works ? min(begin + request.piece_tiles * kTokens, span.hi) : begin;
  const int tiles = ceil_of(end - begin, kTokens);

  HalfRing<Shape::kHalves, Shape::kHalfBytes> ring{smem + warp * Shape::kBytes};
  const auto token_of = [&](int turn) { return begin + (warp + turn * kWarps) * kTokens; };
  const auto next_token = [&] { return token_of(ring.next_turn()); };
  const auto locate = [&](int turn) {
    const int token = token_of(turn + lane);
    if (token < end) ring.from = KeptKeys::granule(p, span, 0, kv_head, token).k;
  };
  const auto copy_half = [&](const char* at, uint32_t to) {
    const int token = next_token(), valid = KeptKeys::readable(span, token);
    if (valid > 0 && ring.next_is_value()) at += KeptKeys::v_offset(p, span, token);
    Shape::copy_half(at, to, valid, lane);
  };
  const auto copy_next = [&] { ring.copy_next(next_token() < end, locate, copy_half); };
  locate(0);
  ring.fill(Shape::kHalves, [&] { return p.cache_settled && next_token() < span.hole_end; }, copy_next);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int items = works ? request.rows() * group : 0, first_head = kv_head * group;
  TaggedCounter* arrived = args.arrived + kv_head * Shape::kItemRows;
  if (piece == 0 && int(threadIdx.x) < items) atomicExch(arrived + threadIdx.x, kFreshCounter);

  if (warp < tiles) {
    const float c = __fmul_rn(p.scale, kLog2e);
    KeptState<Shape> state;
    const int column = lane / 4;
    state.start(column < items
                    ? static_cast<const uint16_t*>(p.q) + (request.query0 + column / group) * p.q_stride_row +
                          (first_head + column % group) * p.q_stride_head
                    : nullptr,
                lane);
    int row_end[2];  // of columns 2t, 2t + 1
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = lane % 4 * 2 + r;
      const int position = __shfl_sync(kAll, request.position, min(request.query0 + i / group, 31));
      row_end[r] = i < items ? span.hole_end + position + 1 - request.tail_start : 0;
    }
    for (int token = token_of(0); token < end; token += kWarps * kTokens) {
      int seen[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) seen[r] = (token < span.hole_end ? span.hole_begin : row_end[r]) - token;
      uint32_t weights[2];
      state.keys(smem_address(ring.arrived()), c, lane, seen, weights);
      ring.release(copy_next);
      state.values(smem_address(ring.arrived()), lane, weights);
      ring.release(copy_next);
    }
    state.deposit(smem + warp * Shape::kBytes, c, lane);
  }
  __syncthreads();  // deposits are there
  for (int row = warp; row < items; row += kWarps) {
    const uint32_t present = (1u << min(tiles, kWarps)) - 1;
    sum_deposits<Shape>(smem, Shape::kBytes, present, row, lane)
        .template store<Shape::kHeadDim>(args.states, int64_t(blockIdx.x) * Shape::kItemRows + row, lane);
    __syncwarp();  // every lane has stored its part
    int before = lane == 0 ? arrive(arrived + row) : 0;
    before = __shfl_sync(kAll, before, 0);
    if (before < pieces - 1) continue;
    if (lane == 0) arrived[row] = 0;
    __syncwarp();  // lane 0 has seen the others' states, now every lane does
    const auto whole = sum_states<Shape::kHeadDim, kKeptStatesAtOnce>(
        args.states, int64_t(first_block) * Shape::kItemRows + row, Shape::kItemRows, 0, pieces, lane);
    const int64_t out_row = int64_t(request.query0 + row / group) * p.q_heads + first_head + row % group;
    whole.store_normalized(static_cast<uint16_t*>(p.out) + out_row * Shape::kHeadDim + lane * 4);
  }
  // Zeros for idle rows, and where there is nothing to see.
  if (blockIdx.x == gridDim.x - 1) {
    for (int i = warp; i < p.rows * p.q_heads; i += kWarps) {
      const int row = i / p.q_heads, own_pieces = __shfl_sync(kAll, request.pieces, i % p.q_heads / group);
      const bool idle = row < request.query0 || row >= request.end;
      if (idle || own_pieces == 0)
        StateSum<4>().store_normalized(static_cast<uint16_t*>(p.out) + int64_t(i) * Shape::kHeadDim + lane * 4);
    }
  }
#else
  __trap();  // never launched elsewhere
#endif
}

// Whether it is for this call.
inline bool takes_kept_single(const KeptAttentionParams& p, const DeviceInfo& info) {
  return info.hopper && p.head_dim == 128 && p.requests == 1 && p.rows * (p.q_heads / p.kv_heads) <= 8 &&
         p.kv_heads <= 32 && 4 * p.kv_heads <= info.multiprocessors && !p.as_full;
}

inline int64_t kept_single_states(const DeviceInfo& info) { return int64_t(info.multiprocessors) * 8; }

inline size_t kept_single_workspace_bytes(const KeptAttentionParams& p, const DeviceInfo& info) {
  return PartialStates::bytes(kept_single_states(info), p.head_dim) + p.kv_heads * 8 * sizeof(TaggedCounter);
}

template <class Shape>
void launch_kept_single(const KeptParams& p, const DeviceInfo& info, cudaStream_t stream) {
  constexpr auto kernel = kept_single_kernel<Shape>;
  VC_CHECK(p.q_stride_row % 2 == 0 && p.q_stride_head % 2 == 0 && reinterpret_cast<uintptr_t>(p.q) % 4 == 0,
           "q has strides ", p.q_stride_row, ", ", p.q_stride_head, " or an odd address; it must be 4-byte aligned.");
  const auto states = PartialStates::at(p.workspace, kept_single_states(info), Shape::kHeadDim);
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(info.multiprocessors), dim3(32 * Shape::kWarps), size_t(Shape::kWarps * Shape::kBytes)}, info,
         stream, KeptSingleArgs{p, states, reinterpret_cast<TaggedCounter*>(states.ml + kept_single_states(info))});
}

}  // namespace vericache::cuda
