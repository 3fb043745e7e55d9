// SPDX-License-Identifier: Apache-2.0
// Kept attention for one request of few units, where the time between two calls' bytes counts most. For Hopper.
//
// A block takes one piece of a KV head (kept_request.cuh). Its warps take turns at tiles of 16 tokens and work alone
// until the piece ends; then one warp a row merges their states and leaves the result in memory, and the block is done:
// the next call's block can start in its place. The block of a head's first piece, which is as short as the cut leaves
// it, merges the head's pieces. The next call's wait ends with the last of these.
//
// Nothing counts finished pieces, which would be two ways to the L2 more: a block marks its states before it makes them
// (state_sum.cuh), and who merges loads them until no mark is left. One more warp of each block sees to that: it marks,
// counts, and for the first piece waits until all pieces of the head have been marked (tagged_counter.cuh), long before
// the first state comes. Every block waits for one of a lower number alone, but the first piece's, which waits for its
// head's others: two places on the GPU are enough for them not to wait for ever.
//
// A warp's ring (half_ring.cuh) is filled before the wait for the kernel before; once the warp beside says that it is
// over, as it is for a block that could not start earlier, all at once. q comes through shared memory, for the warp
// beside asks for it before rings that are filled late are in its way.
//
// Grid: one block a multiprocessor. Shared memory: the rings, in which the warps' states are left at the end, then q.
// Order: a warp's tiles as they come, a block's warps by number, a row's states by piece, in kMergeParts runs if there
// are warps enough, kStatesAtOnce at a time, then the runs. Fixed by the lengths, the counts of rows and heads and the
// number of multiprocessors. Held by bench/gpu/attention_check.cu.
#pragma once

#include "barrier.cuh"
#include "half_ring.cuh"
#include "kept_request.cuh"
#include "kept_state.cuh"
#include "launch.cuh"
#include "shared_memory.cuh"
#include "state_sum.cuh"
#include "tagged_counter.cuh"

namespace vericache::cuda {

struct KeptSingleArgs {
  KeptParams p;
  int group;              // query heads a KV head
  PartialStates states;   // row i from block b: index b * kItemRows + i
  TaggedCounter* marked;  // pieces of each head
};

inline constexpr int kMergeParts = 3, kStatesAtOnce = 8;

// A head's rows, and who has a part in it.
struct KeptHead {
  int number, first_block, pieces, items;
  int64_t query0;

  __device__ __forceinline__ uint16_t* out(const KeptSingleArgs& args, int row) const {
    const int token = row / args.group;
    const int64_t at = (query0 + token) * args.p.q_heads + number * args.group + row - token * args.group;
    return static_cast<uint16_t*>(args.p.out) + at * args.p.head_dim;
  }
};

// What the warp beside the others does: says when the kernel before is over, sends for q, marks this block's states.
template <class Shape>
__device__ __forceinline__ void kept_attend(const KeptSingleArgs& args, const KeptHead& head, uint32_t query,
                                            uint32_t query_full, uint32_t over, int lane) {
  const KeptParams& p = args.p;
  constexpr int kEach = Shape::kItemRows / 2;  // half a warp copies a row
  const uint16_t* from[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int item = max(0, min(i * 2 + lane / 16, head.items - 1)), token = item / args.group;
    from[i] = static_cast<const uint16_t*>(p.q) + (head.query0 + token) * p.q_stride_row +
              (head.number * args.group + item - token * args.group) * p.q_stride_head + lane % 16 * 8;
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (lane == 0) mbarrier_arrive(over);
  if (head.items == 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = i * 2 + lane / 16;
    cp_async16(Shape::place(query, row, lane % 16), from[i], row < head.items);
  }
  mbarrier_arrive_after_copies(query_full);
  const int64_t first_state = int64_t(blockIdx.x) * Shape::kItemRows;
  for (int row = 0; row < head.items; ++row) mark_state<Shape::kHeadDim>(args.states, first_state + row, lane);
  TaggedCounter* marked = args.marked + head.number;
  const bool merges = int(blockIdx.x) == head.first_block;
  if (merges && lane == 0) atomicExch(marked, kFreshCounter);
  __syncwarp();  // every lane has marked its part
  if (lane == 0) {
    arrive(marked);
    if (merges) {
      await(marked, head.pieces);
      *marked = 0;
    }
  }
  __syncwarp();
}

// The outputs of a head, by all threads of the block of its first piece.
template <class Shape>
__device__ __forceinline__ void kept_merge(const KeptSingleArgs& args, const KeptHead& head, unsigned char* smem,
                                           int warp, int lane) {
  constexpr int kWarps = Shape::kWarps + 1, kRow = Shape::kHeadDim + 4;
  const int parts = head.items * kMergeParts <= kWarps ? kMergeParts : 1;
  const int row = warp / parts, part = warp % parts, each = ceil_of(head.pieces, parts);
  static_assert(Shape::kStateBytes + kWarps * kRow * 4 <= Shape::kBytes);
  auto* exchanged = reinterpret_cast<float*>(smem + Shape::kStateBytes) + warp * kRow;
  StateSum<4> sum;
  if (row < head.items) {
    sum = sum_states<Shape::kHeadDim, kStatesAtOnce, true>(
        args.states, int64_t(head.first_block) * Shape::kItemRows + row, Shape::kItemRows, part * each,
        min(head.pieces, (part + 1) * each), lane);
    if (part > 0) sum.store_shared(exchanged, lane);
  }
  __syncthreads();
  if (row >= head.items || part > 0) return;
  for (int i = 1; i < parts; ++i) sum.add_shared(exchanged + i * kRow, lane);
  sum.store_normalized(head.out(args, row) + lane * 4);
}

template <class Shape>
__global__ void __launch_bounds__(32 * (Shape::kWarps + 1), 1)
    kept_single_kernel(const __grid_constant__ KeptSingleArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWarps = Shape::kWarps, kTokens = Shape::kTokens, kHalves = Shape::kHalves;
  constexpr uint32_t kAll = 0xffffffffu;
  __shared__ uint64_t barriers[2];
  const KeptParams& p = args.p;
  unsigned char* smem = dynamic_smem();
  const uint32_t query = smem_address(smem) + Shape::kQuery, query_full = smem_address(&barriers[0]);
  const uint32_t over = smem_address(&barriers[1]);  // the kernel before is
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!p.tables_settled) wait_for_previous_kernel();
  const auto request = KeptRequest::load(p, int(gridDim.x), lane);
  if (threadIdx.x == 0) {
    mbarrier_init(query_full, 32);
    mbarrier_init(over, 1);
  }
  const int number = request.head_of(p, int(blockIdx.x), lane);
  const auto of_head = [&](int x) { return __shfl_sync(kAll, x, number % 32); };
  const KeptHead head{number, of_head(request.first_block), of_head(request.pieces),
                      number < p.kv_heads ? request.rows() * args.group : 0, request.query0};
  const int kept = of_head(request.kept), hole_end = ceil_of(kept, kTileTokens) * kTileTokens;
  const Span span{0, hole_end + max(0, request.last_position + 1 - request.tail_start), kept, hole_end};
  // This block's piece: its end from the head's end back, for the first one is the one that may not be whole.
  const int length = request.piece_tiles * kTokens;
  const int after = (head.pieces - 1 - (int(blockIdx.x) - head.first_block)) * length;
  const int all = ceil_of(span.hi, kTokens) * kTokens;
  const int begin = max(0, all - after - length), end = head.items > 0 ? min(all - after, span.hi) : begin;
  const int tiles = ceil_of(end - begin, kTokens);

  HalfRing<kHalves, Shape::kHalfBytes> ring{smem + warp * Shape::kBytes};
  const auto token_of = [&](int turn) { return begin + (warp + turn * kWarps) * kTokens; };
  const auto next_token = [&] { return token_of(ring.next_turn()); };
  const auto locate = [&](int turn) {
    const int token = token_of(turn + lane);
    if (token < end) ring.from = KeptKeys::granule(p, span, 0, number, token).k;
  };
  const auto copy_half = [&](const char* at, uint32_t to) {
    const int token = next_token(), valid = KeptKeys::readable(span, token);
    if (valid > 0 && ring.next_is_value()) at += KeptKeys::v_offset(p, span, token);
    Shape::copy_half(at, to, valid, lane);
  };
  const auto copy_next = [&] { ring.copy_next(next_token() < end, locate, copy_half); };
  __syncthreads();  // what thread 0 has set is there
  if (warp == kWarps) {
    kept_attend<Shape>(args, head, query, query_full, over, lane);
  } else if (warp < tiles) {
    locate(0);
    int row_end[2];  // of columns 2t, 2t + 1
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = lane % 4 * 2 + r;
      const int position = __shfl_sync(kAll, request.position, min(request.query0 + i / args.group, 31));
      row_end[r] = i < head.items ? span.hole_end + position + 1 - request.tail_start : 0;
    }
#pragma unroll 1
    while (ring.next < kHalves && __shfl_sync(kAll, mbarrier_done_now(over, 0), 0) == 0)
      ring.fill_next(p.cache_settled && next_token() < span.hole_end, copy_next);
    wait_for_previous_kernel();
#pragma unroll 1
    while (ring.next < kHalves) copy_next();

    const float c = p.scale * kLog2e;
    KeptState<Shape> state;
    mbarrier_wait(query_full, 0);
    state.start(query, lane);
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
    state.deposit(smem + warp * Shape::kBytes, lane);
  } else {
    deposit_nothing<Shape>(smem + warp * Shape::kBytes, lane);
  }
  __syncthreads();  // deposits are there, and marks of all the head's pieces if this block merges them
  if (warp < head.items)
    sum_deposits<Shape>(smem, Shape::kBytes, EveryWarp{}, warp, lane)
        .template store<Shape::kHeadDim>(args.states, int64_t(blockIdx.x) * Shape::kItemRows + warp, lane);
  if (head.items > 0 && int(blockIdx.x) == head.first_block) kept_merge<Shape>(args, head, smem, warp, lane);
  // Zeros for idle rows, and where there is nothing to see.
  if (blockIdx.x == gridDim.x - 1) {
    for (int i = warp; i < p.rows * p.q_heads; i += kWarps + 1) {
      const int row = i / p.q_heads, pieces = __shfl_sync(kAll, request.pieces, i % p.q_heads / args.group);
      const bool idle = row < request.query0 || row >= request.end;
      if (idle || pieces == 0)
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
         p.kv_heads <= 32 && 4 * p.kv_heads <= info.multiprocessors && !p.as_full && q_aligned16(p);
}

inline int64_t kept_single_states(const DeviceInfo& info) { return int64_t(info.multiprocessors) * 8; }

inline size_t kept_single_workspace_bytes(const KeptAttentionParams& p, const DeviceInfo& info) {
  return PartialStates::bytes(kept_single_states(info), p.head_dim) + p.kv_heads * sizeof(TaggedCounter);
}

template <class Shape>
void launch_kept_single(const KeptParams& p, const DeviceInfo& info, cudaStream_t stream) {
  constexpr auto kernel = kept_single_kernel<Shape>;
  const auto states = PartialStates::at(p.workspace, kept_single_states(info), Shape::kHeadDim);
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(info.multiprocessors), dim3(32 * (Shape::kWarps + 1)), size_t(Shape::kSmem)}, info, stream,
         KeptSingleArgs{p, p.q_heads / p.kv_heads, states,
                        reinterpret_cast<TaggedCounter*>(states.ml + kept_single_states(info))});
}

}  // namespace vericache::cuda
