// SPDX-License-Identifier: Apache-2.0
// The tensor-core attention kernel of bf16 pages: softmax(q k^T * scale) v for the rows of every request, one partial
// state a (row, head, split). paged_attention.cu (full/verify) and kept_keys.cuh say where the tokens lie.
//
// Grid: at most one block a multiprocessor; each takes work items (request, KV head, split, row block) off the list of
// splits.cuh, its own share of it or, when there are many, one by one from a counter. The rows of an item are the query
// heads that share the KV head, times the request's query rows: item row i is query row i / group, head i % group; a
// row block has kRows of them.
//
// Block: producer warps, which only copy, and kRowWarps x kKeyWarps consumer warps. A row warp owns kRowTiles * 16
// rows; its kKeyWarps members share the tile: each scores 64 / kKeyWarps of its keys, exchanges maximum and weights
// through shared memory, and sums head_dim / kKeyWarps of the output channels.
//
// Shared memory: the weights [rows][64] bf16, the reductions [rows][4] float, row ranges, barriers, the schedule, then
// a ring of slots of one tile (64 tokens of K, or of V). Rows of a slot are head_dim * 2 bytes, of the weights 128;
// 16-byte chunk c of row r lies at chunk c ^ (r & 7): copies and ldmatrix are free of bank conflicts. Tokens that must
// not be read are zero-filled by the copy, so memory past a request's last token may hold anything.
//
// Reduction order (R1). Per row and split: tiles of 64 tokens in order, cut at absolute multiples of 64. A score is the
// chain mma(channels 0-15), mma(16-31), ... from zero; the weights of a tile enter o as the chain mma(tokens 0-15),
// mma(16-31), ...; l is four sums, one for each 16 tokens of a tile, each over 4 lanes of a fixed tree, added left to
// right at the end. Which warp does a step, how many rows ride along and how warps are arranged (Shape) change none of
// it. Partials merge as softmax_state.cuh says. Held by bench/gpu/attention_check.cu.
#pragma once

#include <algorithm>
#include <cstdint>

#include "barrier.cuh"
#include "cp_async.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "shared_memory.cuh"
#include "softmax_state.cuh"
#include "splits.cuh"

namespace vericache::cuda {

template <int kHeadDim_, int kRowWarps_, int kRowTiles_, int kKeyWarps_>
struct AttentionShape {
  static constexpr int kHeadDim = kHeadDim_, kRowWarps = kRowWarps_, kRowTiles = kRowTiles_, kKeyWarps = kKeyWarps_;
  static constexpr int kProducerWarps = 4;  // a whole warpgroup, so that it can give registers away
  static constexpr int kRows = kRowWarps * kRowTiles * 16;
  static constexpr int kConsumerWarps = kRowWarps * kKeyWarps;
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kSlotBytes = kTileTokens * kRowBytes;
  static constexpr int kMaxSlots = 192 * 1024 / kSlotBytes;  // more gains nothing; the merge's blocks need room beside
  static constexpr int kWarpKeys = kTileTokens / kKeyWarps, kWarpChannels = kHeadDim / kKeyWarps;
  static_assert(kWarpKeys % 16 == 0 && kWarpChannels % 16 == 0 && kTileTokens / kGranuleTokens % kProducerWarps == 0);
};

struct SlotTag {
  int item, token;  // the tile's first token; item -1: no more
};

// Offsets into dynamic shared memory; only the ring's place depends on the launch.
template <class Shape>
struct AttentionSmem {
  static constexpr int kWeights = 0;
  static constexpr int kReduce = kWeights + Shape::kRows * kTileTokens * 2;
  static constexpr int kRanges = kReduce + Shape::kRows * 4 * int(sizeof(float));
  static constexpr int kFull = kRanges + Shape::kRows * int(sizeof(int2));
  static constexpr int kEmpty = kFull + Shape::kMaxSlots * 8;
  static constexpr int kTags = kEmpty + Shape::kMaxSlots * 8;
  static constexpr int kMailbox = kTags + Shape::kMaxSlots * int(sizeof(SlotTag));
  static constexpr int kSchedule = (kMailbox + 2 * int(sizeof(int)) + 15) / 16 * 16;

  template <class Keys>
  static __host__ __device__ int ring(int requests, int kv_heads) {
    return (kSchedule + int(Schedule<Keys>::bytes(requests, kv_heads)) + 127) / 128 * 128;
  }
};

template <class Keys>
struct AttentionArgs {
  typename Keys::Params p;
  PartialStates partial;  // state (row, head, split) at index (row * q_heads + head) * max_splits + split
  int max_splits;
  int* next_item;  // zero at launch: items beyond the first of each block are handed out; null: see Schedule::share
  int slots;
};

template <class Keys, class Shape>
struct AttentionBlock {
  using Smem = AttentionSmem<Shape>;
  const AttentionArgs<Keys>& args;
  Schedule<Keys> schedule;
  uint32_t ring_base, weights, full, empty;
  float* reduce;
  int2* ranges;
  volatile SlotTag* tags;
  volatile int* mailbox;

  __device__ AttentionBlock(const AttentionArgs<Keys>& a, unsigned char* smem) : args(a) {
    const uint32_t base = smem_address(smem);
    ring_base = base + uint32_t(Smem::template ring<Keys>(a.p.requests, a.p.kv_heads));
    weights = base + Smem::kWeights;
    full = base + Smem::kFull;
    empty = base + Smem::kEmpty;
    reduce = reinterpret_cast<float*>(smem + Smem::kReduce);
    ranges = reinterpret_cast<int2*>(smem + Smem::kRanges);
    tags = reinterpret_cast<volatile SlotTag*>(smem + Smem::kTags);
    mailbox = reinterpret_cast<volatile int*>(smem + Smem::kMailbox);
    schedule.place(smem + Smem::kSchedule, a.p.requests, a.p.kv_heads);
  }

  __device__ void init_barriers() const {
    for (int s = threadIdx.x; s < args.slots; s += blockDim.x) {
      mbarrier_init(full + 8 * s, 32 * Shape::kProducerWarps + 1);  // + 1: the tag's writer
      mbarrier_init(empty + 8 * s, Shape::kConsumerWarps);
    }
  }

  __device__ void produce(int warp) const;
  __device__ void consume(int warp) const;

 private:
  __device__ int split_begin(int split) const { return schedule.splits().begin(split); }
  __device__ __forceinline__ int take_item(int warp, int previous, int& turn) const {
    if (args.next_item == nullptr) return previous + 1;
    int taken = 0;
    if (warp == 0 && threadIdx.x % 32 == 0) taken = atomicAdd(args.next_item, 1);
    if constexpr (Shape::kProducerWarps > 1) {
      // Two places taken in turn: a warp that runs ahead writes the other one, and waits for us before it comes back.
      if (warp == 0 && threadIdx.x % 32 == 0) mailbox[turn] = taken;
      named_barrier(15, 32 * Shape::kProducerWarps);
      taken = mailbox[turn];
      turn ^= 1;
    }
    return int(gridDim.x) + __shfl_sync(0xffffffffu, taken, 0);
  }
};

// Copies tiles in the order of the list; while one tile is issued, the next one's page addresses are on their way.
template <class Keys, class Shape>
__device__ void AttentionBlock<Keys, Shape>::produce(int warp) const {
  constexpr int kTokensAnInstruction = 512 / Shape::kRowBytes;
  constexpr int kGranules = kTileTokens / kGranuleTokens / Shape::kProducerWarps;
  const int lane = threadIdx.x % 32;
  const int row0 = lane / (Shape::kRowBytes / 16), chunk = lane % (Shape::kRowBytes / 16);
  const bool dealt = args.next_item == nullptr;
  const int items = dealt ? schedule.share(args.p, int(blockIdx.x) + 1) : schedule.items(args.p);
  const bool writes_tags = warp == 0 && lane == 0;
  RingCursor ring;
  int turn = 0;

  int item = dealt ? schedule.share(args.p, int(blockIdx.x)) : int(blockIdx.x), token = 0, end = 0;
  WorkItem work{};
  Span span{};
  const auto start_item = [&]() {
    if (item >= items) return false;
    work = schedule.item(args.p, Shape::kRows, item);
    span = schedule.span[work.unit];
    token = max(split_begin(work.split), span.lo / kTileTokens * kTileTokens);
    end = min(split_begin(work.split + 1), span.hi);
    return true;
  };
  const auto locate = [&]() {
    return Keys::granule(args.p, span, work.request, work.kv_head,
                         token + kGranuleTokens * (lane % (kTileTokens / kGranuleTokens)));
  };

  bool more = start_item();
  Granule next{};
  if (more) next = locate();
  while (more) {
    const Granule here = next;
    const SlotTag tag{item, token};
    token += kTileTokens;
    if (token >= end) {
      item = take_item(warp, item, turn);
      more = start_item();
    }
    if (more) next = locate();
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // K, then V
      mbarrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
      if (writes_tags) {
        tags[ring.slot].item = tag.item;
        tags[ring.slot].token = tag.token;
        mbarrier_arrive(full + 8 * ring.slot);
      }
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes);
#pragma unroll
      for (int i = 0; i < kGranules; ++i) {
        const int g = warp * kGranules + i;
        const uint64_t k = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(here.k), g);
        const int v_offset = __shfl_sync(0xffffffffu, here.v_offset, g);
        const int valid = __shfl_sync(0xffffffffu, here.valid, g);
        const char* from = reinterpret_cast<const char*>(k) + (part ? v_offset : 0) + lane * 16;
#pragma unroll
        for (int j = 0; j < kGranuleTokens / kTokensAnInstruction; ++j) {
          const int row = j * kTokensAnInstruction + row0;
          cp_async16(swizzled(slot, g * kGranuleTokens + row, Shape::kRowBytes, chunk), from + j * 512, row < valid);
        }
      }
      mbarrier_arrive_after_copies(full + 8 * ring.slot);
      ring.next(args.slots);
    }
  }
  mbarrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
  if (writes_tags) {
    tags[ring.slot].item = -1;
    mbarrier_arrive(full + 8 * ring.slot);
  }
  mbarrier_arrive(full + 8 * ring.slot);
}

template <class Keys, class Shape>
__device__ void AttentionBlock<Keys, Shape>::consume(int warp) const {
  constexpr int kHeadDim = Shape::kHeadDim, kTiles = Shape::kRowTiles, kKeyWarps = Shape::kKeyWarps;
  constexpr int kScoreTiles = Shape::kWarpKeys / 8, kOutTiles = Shape::kWarpChannels / 8;
  constexpr int kKeyGroups = Shape::kWarpKeys / 16;  // the sums of l this warp keeps
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, matrix = lane / 8, line = lane % 8;
  const int row_warp = warp / kKeyWarps, key_warp = warp % kKeyWarps;
  const int first_row = row_warp * kTiles * 16;  // within the block
  const int first_key = key_warp * Shape::kWarpKeys, first_channel = key_warp * Shape::kWarpChannels;
  const int group = p.q_heads / p.kv_heads;
  const float c = __fmul_rn(p.scale, kLog2e);
  const uint32_t own_weights = weights + uint32_t(first_row * kTileTokens * 2);
  const auto group_barrier = [&]() {
    if constexpr (kKeyWarps > 1)
      named_barrier(1 + row_warp, 32 * kKeyWarps);
    else
      __syncwarp();
  };

  RingCursor ring;
  int item = -2;                                                 // neither an item nor the end
  int tight_lo = 0, tight_hi = 0, hole_begin = 0, hole_end = 0;  // every row sees keys tight_lo .. tight_hi - 1
  bool active = false;                                           // this warp has rows in the item
  uint32_t q[kTiles][kHeadDim / 16][4];
  float o[kTiles][kOutTiles][4];
  float l[kTiles][2][kKeyGroups];
  RunningMax m[kTiles][2];

  const auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
  };

  // Looked up at the start and again at the end of an item: registers are short between.
  const auto start = [&]() {
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const Span span = schedule.span[work.unit];
    const int query0 = schedule.row_offset[work.request];
    const int item_rows = (schedule.row_offset[work.request + 1] - query0) * group;
    const int skipped = work.row_block * Shape::kRows + first_row;
    active = skipped < item_rows;
    if (!active) return;
    const int2 lowest = Keys::row_range(p, span, work.request, schedule.first_pos[work.request]);
    const int2 highest = Keys::row_range(p, span, work.request, schedule.last_pos[work.request]);
    tight_lo = highest.x;
    tight_hi = lowest.y;
    hole_begin = span.hole_begin;
    hole_end = span.hole_end;
    group_barrier();  // the ranges and reductions of the item before have been read
    if (key_warp == 0) {
      for (int i = lane; i < kTiles * 16; i += 32) {
        const int row = query0 + (skipped + i) / group;
        ranges[first_row + i] =
            skipped + i < item_rows ? Keys::row_range(p, span, work.request, p.row_position[row]) : make_int2(0, 0);
      }
    }
    group_barrier();
    const auto* q_base = static_cast<const uint16_t*>(p.q);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = skipped + r * 16 + half * 8 + g;
        const bool exists = i < item_rows;
        const int64_t at =
            exists ? (query0 + i / group) * p.q_stride_row + (work.kv_head * group + i % group) * p.q_stride_head : 0;
#pragma unroll
        for (int s = 0; s < kHeadDim / 16; ++s) {
#pragma unroll
          for (int k8 = 0; k8 < 2; ++k8) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(q_base + at + s * 16 + k8 * 8 + t * 2);
            q[r][s][k8 * 2 + half] = exists ? pair : 0u;
          }
        }
        m[r][half].raw = negative_infinity();
#pragma unroll
        for (int j = 0; j < kKeyGroups; ++j) l[r][half][j] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[r][n][e] = 0.f;
    }
  };

  const auto finish = [&]() {
    if (!active) return;
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const int query0 = schedule.row_offset[work.request];
    const int item_rows = (schedule.row_offset[work.request + 1] - query0) * group;
    // l: four lanes each, then the groups of 16 tokens left to right.
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kKeyGroups; ++j) {
          float sum = l[r][half][j];
          sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
          sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
          if (t == 0) reduce[(first_row + r * 16 + half * 8 + g) * 4 + key_warp * kKeyGroups + j] = sum;
        }
      }
    }
    group_barrier();
    const int split_lo = split_begin(work.split), split_hi = split_begin(work.split + 1);
    const int skipped = work.row_block * Shape::kRows + first_row;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local = r * 16 + half * 8 + g, i = skipped + local;
        const int2 range = ranges[first_row + local];
        if (i >= item_rows || range.y <= split_lo || range.x >= split_hi) continue;
        const int64_t row = query0 + i / group;
        const int64_t at = (row * p.q_heads + work.kv_head * group + i % group) * args.max_splits + work.split;
        float* to = args.partial.o + at * kHeadDim + first_channel + t * 2;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
          *reinterpret_cast<float2*>(to + n * 8) = make_float2(o[r][n][half * 2], o[r][n][half * 2 + 1]);
        if (key_warp == 0 && t == 0) {
          const float* sums = reduce + (first_row + local) * 4;
          const float total = __fadd_rn(__fadd_rn(__fadd_rn(sums[0], sums[1]), sums[2]), sums[3]);
          args.partial.ml[at] = make_float2(m[r][half].stored(c), total);
        }
      }
    }
  };

  while (true) {
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    const int tag_item = tags[ring.slot].item, token = tags[ring.slot].token;
    if (tag_item != item) {
      if (item >= 0) finish();
      item = tag_item;
      if (item < 0) break;
      start();
    }
    if (!active) {
      release(ring.slot);
      ring.next(args.slots);
      mbarrier_wait(full + 8 * ring.slot, ring.parity);
      release(ring.slot);
      ring.next(args.slots);
      continue;
    }

    // Scores of this warp's keys.
    float s[kTiles][kScoreTiles][4];
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][n][e] = 0.f;
    {
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes);
#pragma unroll
      for (int k16 = 0; k16 < kHeadDim / 16; ++k16) {
#pragma unroll
        for (int n = 0; n < kScoreTiles; n += 2) {
          uint32_t b[4];
          ldmatrix_x4(
              b, swizzled(slot, first_key + n * 8 + (matrix / 2) * 8 + line, Shape::kRowBytes, k16 * 2 + matrix % 2));
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            mma_m16n8k16(s[r][n], q[r][k16], b[0], b[1]);
            mma_m16n8k16(s[r][n + 1], q[r][k16], b[2], b[3]);
          }
        }
      }
    }
    release(ring.slot);
    ring.next(args.slots);

    if (token < tight_lo || token + kTileTokens > tight_hi || (token < hole_end && token + kTileTokens > hole_begin)) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        const int2 range[2] = {ranges[first_row + r * 16 + g], ranges[first_row + r * 16 + 8 + g]};
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = token + first_key + n * 8 + t * 2 + (e & 1);
            const bool visible = key >= range[e / 2].x && key < range[e / 2].y && (key < hole_begin || key >= hole_end);
            s[r][n][e] = visible ? s[r][n][e] : negative_infinity();
          }
      }
    }

    // The row's maximum over the tile.
    float tile_max[kTiles][2];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = negative_infinity();
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) x = fmaxf(x, fmaxf(s[r][n][half * 2], s[r][n][half * 2 + 1]));
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
        tile_max[r][half] = x;
        if (kKeyWarps > 1 && t == 0) reduce[(first_row + r * 16 + half * 8 + g) * 4 + key_warp] = x;
      }
    }
    if constexpr (kKeyWarps > 1) {
      group_barrier();
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* from = reduce + (first_row + r * 16 + half * 8 + g) * 4;
#pragma unroll
          for (int w = 0; w < kKeyWarps; ++w) tile_max[r][half] = fmaxf(tile_max[r][half], from[w]);
        }
      }
    }

    // Weights, and the factor for what has been summed so far.
    bool rescales = false;
    float rescale[kTiles][2];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rescale[r][half] = m[r][half].update(tile_max[r][half], c);
        rescales = rescales || rescale[r][half] != 1.f;
        const float reference = m[r][half].reference(c);
        const int row = r * 16 + half * 8 + g;
#pragma unroll
        for (int j = 0; j < kKeyGroups; ++j) {
          float w[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) w[e] = softmax_weight(s[r][2 * j + e / 2][half * 2 + e % 2], c, reference);
          const float sum = __fadd_rn(__fadd_rn(__fadd_rn(w[0], w[1]), w[2]), w[3]);
          l[r][half][j] = __fmaf_rn(l[r][half][j], rescale[r][half], sum);
#pragma unroll
          for (int n = 0; n < 2; ++n)
            store_shared(swizzled(own_weights, row, kTileTokens * 2, first_key / 8 + 2 * j + n) + 4 * t,
                         pack_bf16(w[2 * n], w[2 * n + 1]));
        }
      }
    }
    if (__any_sync(0xffffffffu, rescales)) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[r][n][e] = __fmul_rn(o[r][n][e], rescale[r][e / 2]);
    }
    group_barrier();

    // Weighted values of this warp's channels.
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    {
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes);
#pragma unroll
      for (int k16 = 0; k16 < kTileTokens / 16; ++k16) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
          ldmatrix_x4(a[r],
                      swizzled(own_weights, r * 16 + (matrix % 2) * 8 + line, kTileTokens * 2, k16 * 2 + matrix / 2));
#pragma unroll
        for (int n = 0; n < kOutTiles; n += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, swizzled(slot, k16 * 16 + (matrix % 2) * 8 + line, Shape::kRowBytes,
                                        first_channel / 8 + n + matrix / 2));
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            mma_m16n8k16(o[r][n], a[r], b[0], b[1]);
            mma_m16n8k16(o[r][n + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
    release(ring.slot);
    ring.next(args.slots);
  }
}

template <class Keys, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    split_attention_kernel(const __grid_constant__ AttentionArgs<Keys> args) {
  AttentionBlock<Keys, Shape> block(args, dynamic_smem());
  block.init_barriers();
  wait_for_previous_kernel();
  let_next_kernel_start();
  block.schedule.build(args.p, Shape::kRows);  // its barriers also order the barriers' initialization
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp < Shape::kConsumerWarps) {
    if constexpr (Shape::kConsumerWarps > 4) take_registers<216>();
    block.consume(warp);
  } else {
    if constexpr (Shape::kConsumerWarps > 4) give_registers<72>();
    block.produce(warp - Shape::kConsumerWarps);
  }
}

// Which splits a row has. Called by whole warps.
template <class Keys>
struct RowSplits {
  typename Keys::Params p;
  int max_splits;

  __device__ StateRun states(int row, int head) const {
    int lo = 0, hi = p.requests;
    if (row >= p.row_offsets[hi]) return {};
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (p.row_offsets[mid] <= row ? lo : hi) = mid;
    }
    const auto splits = Keys::splits(p);
    const int position = p.row_position[row];
    const Span span = Keys::span(p, lo, head / (p.q_heads / p.kv_heads), position, position);
    const int2 range = Keys::row_range(p, span, lo, position);
    if (range.y <= range.x) return {};
    return {(int64_t(row) * p.q_heads + head) * max_splits, splits.of(range.x), splits_for(splits, range.y)};
  }
};

template <class Keys>
__global__ void reset_counter_kernel(int* counter) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  *counter = 0;
}

// Workspace: the partial states, then the counter.
inline size_t split_attention_workspace_bytes(int64_t rows, int q_heads, int max_splits, int head_dim) {
  return PartialStates::bytes(rows * q_heads * max_splits, head_dim) + 256;
}

template <class Keys, class Shape>
void launch_split_attention(const typename Keys::Params& p, int max_splits, cudaStream_t stream) {
  constexpr int kHandedOutFrom = 4;  // items a block from which the counter pays for its reset
  constexpr auto kernel = split_attention_kernel<Keys, Shape>;
  const DeviceInfo info = device_info();
  VC_CHECK(p.q_stride_row % 2 == 0 && p.q_stride_head % 2 == 0 && reinterpret_cast<uintptr_t>(p.q) % 4 == 0,
           "q has strides ", p.q_stride_row, ", ", p.q_stride_head, " or an odd address; it must be 4-byte aligned.");
  const int ring = AttentionSmem<Shape>::template ring<Keys>(p.requests, p.kv_heads);
  const int slots = std::min(Shape::kMaxSlots, (info.smem_optin - ring) / Shape::kSlotBytes);
  VC_CHECK(slots >= 2, p.requests, " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const int group = p.q_heads / p.kv_heads;
  const int64_t bound = (int64_t(p.rows) * group / Shape::kRows + p.requests) * p.kv_heads * max_splits;
  const int grid = int(std::min<int64_t>(info.multiprocessors, std::max<int64_t>(bound, 1)));

  const int64_t states = int64_t(p.rows) * p.q_heads * max_splits;
  const auto partial = PartialStates::at(p.workspace, states, Shape::kHeadDim);
  AttentionArgs<Keys> args{p, partial, max_splits, nullptr, slots};
  if (bound >= int64_t(kHandedOutFrom) * grid) {
    args.next_item = reinterpret_cast<int*>(partial.ml + states);
    launch(reset_counter_kernel<Keys>, {dim3(1), dim3(1)}, info, stream, args.next_item);
  }
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(grid), dim3(Shape::kThreads), size_t(ring + slots * Shape::kSlotBytes)}, info, stream, args);
  launch_merge<Shape::kHeadDim>(RowSplits<Keys>{p, max_splits}, max_splits, p.rows, p.q_heads, partial, p.out, info,
                                stream);
}

}  // namespace vericache::cuda
