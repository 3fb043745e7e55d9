// SPDX-License-Identifier: Apache-2.0
// The attention of split_attention.cuh for Hopper (sm_90a): the same list of work items, splits and partial states,
// with wgmma. Its bits differ from that kernel's; what must agree is every row count and batch on one device.
//
// Block: one or two consumer warpgroups of 64 item rows each (16 a warp), and a producer warpgroup that only copies.
// One row or 64, the instructions are the same; rows that do not exist cost no exponentials. A row's scores, weights
// and sums stay in the registers of one quad of lanes: consumer warps exchange nothing.
//
// Shared memory: a ring of slots of one tile (64 tokens of K, or of V), each head_dim / 64 parts of [64 tokens][128
// bytes] in the hardware's 128-byte swizzle; barriers; tags; the schedule. Tokens that must not be read are zero-filled
// by the copy, so memory past a request's last token may hold anything.
//
// A slot is full when all copies into it have landed; consumers then fence for wgmma, which reads by another proxy.
//
// Reduction order (R1). Per row and split: tiles of 64 tokens in order, cut at absolute multiples of 64. A score is the
// chain of wgmma k-steps over channels 0-15, 16-31, ...; the weights of a tile enter o as the chain over its tokens
// 0-15, ...; l adds a lane's 16 weights of a tile left to right, and the four lanes of the quad at the end. Which
// warpgroup does it, and how many rows ride along, changes none of it. Partials merge as softmax_state.cuh says.
// Held by bench/gpu/attention_check.cu.
//
// Merge: with few rows a unit the block that finishes a unit's last split merges it (counters, below); with many a
// kernel of its own does. Both add in the same order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "split_attention.cuh"
#include "wgmma_rs.cuh"

namespace vericache::cuda {

template <int kHeadDim_, int kWarpgroups_, int kBlocks_>
struct WarpgroupShape {
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_, kBlocks = kBlocks_;  // blocks a multiprocessor
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kConsumerWarps = 4 * kWarpgroups, kProducerWarps = 4;
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);
  static constexpr int kParts = kHeadDim / 64, kPartBytes = kTileTokens * 128;
  static constexpr int kSlotBytes = kParts * kPartBytes;
  static constexpr int kSlots = 192 * 1024 / kBlocks / kSlotBytes;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 216 : 184, kProducerRegisters = 72;
  static constexpr bool kMovesRegisters = kWarpgroups == 2 || kBlocks == 2;
};

// Counters of one launch, in the workspace, whose contents are unknown before it. A counter is a tag in the high word
// and a count in the low one. Block 0 sets them to (tag, 0); adding to one that does not carry the tag yet is repeated;
// the last to add clears it, so that no launch meets another's tags. The tag is a NaN no arithmetic makes.
using TaggedCounter = unsigned long long;
inline constexpr TaggedCounter kFreshCounter = 0xffa5c3e1ull << 32;

__device__ __forceinline__ int add_one(TaggedCounter* counter) {
  while (true) {
    const TaggedCounter old = atomicAdd(counter, 1ull);
    if (old >> 32 == kFreshCounter >> 32) return int(old & 0xffffffffu);
  }
}

template <class Keys>
struct WarpgroupArgs {
  typename Keys::Params p;
  PartialStates partial;  // state (row, head, split) at index (row * q_heads + head) * max_splits + split
  TaggedCounter* work;    // items handed out beyond the first of each block
  TaggedCounter* merges;  // by unit (row block, request, KV head): splits finished; null: a kernel merges
  int max_splits;
};

template <class Shape>
struct WarpgroupSmem {
  static constexpr int kFull = Shape::kSlots * Shape::kSlotBytes;
  static constexpr int kEmpty = kFull + Shape::kSlots * 8;
  static constexpr int kTags = kEmpty + Shape::kSlots * 8;
  static constexpr int kMailbox = kTags + Shape::kSlots * int(sizeof(SlotTag));  // 2 for producers, 1 for consumers
  static constexpr int kSchedule = (kMailbox + 3 * int(sizeof(int)) + 15) / 16 * 16;

  template <class Keys>
  static size_t bytes(int requests, int kv_heads) {
    return kSchedule + Schedule<Keys>::bytes(requests, kv_heads) + 1024;  // the ring begins at a multiple of 1024
  }
};

// Sums a row's states in the order of softmax_state.cuh. By one warp; `first` is the index of split 0.
template <int kHeadDim>
__device__ void merge_row(const PartialStates& partial, int64_t first, int begin, int end, uint16_t* out, int lane) {
  constexpr int kPer = kHeadDim / 32, kAhead = 2 * kMergeGroup;  // states loaded before the first is used
  float largest = negative_infinity();
  for (int s = begin + lane; s < end; s += 32) largest = fmaxf(largest, __ldcg(partial.ml + first + s).x);
  const float* o_from = partial.o + first * kHeadDim + lane * kPer;
  float sum_l = 0.f, sum_o[kPer] = {};
  bool reduced = false;
  for (int base = begin / kMergeGroup * kMergeGroup; base < end; base += kAhead) {
    float2 ml[kAhead], values[kAhead][kPer / 2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = base + i;
      const bool mine = s >= begin && s < end;
      ml[i] = mine ? __ldcg(partial.ml + first + s) : make_float2(negative_infinity(), 0.f);
#pragma unroll
      for (int j = 0; j < kPer / 2; ++j)
        values[i][j] =
            mine ? __ldcg(reinterpret_cast<const float2*>(o_from + int64_t(s) * kHeadDim) + j) : make_float2(0.f, 0.f);
    }
    if (!reduced) {
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      if (largest == negative_infinity()) largest = 0.f;
      reduced = true;
    }
#pragma unroll
    for (int group = 0; group < kAhead; group += kMergeGroup) {
      float l = 0.f, o[kPer] = {};
#pragma unroll
      for (int i = group; i < group + kMergeGroup; ++i) {
        const float weight = fast_exp2(__fsub_rn(ml[i].x, largest));
        l = __fmaf_rn(ml[i].y, weight, l);
#pragma unroll
        for (int j = 0; j < kPer / 2; ++j) {
          o[2 * j] = __fmaf_rn(values[i][j].x, weight, o[2 * j]);
          o[2 * j + 1] = __fmaf_rn(values[i][j].y, weight, o[2 * j + 1]);
        }
      }
      sum_l = __fadd_rn(sum_l, l);
#pragma unroll
      for (int j = 0; j < kPer; ++j) sum_o[j] = __fadd_rn(sum_o[j], o[j]);
    }
  }
  const bool any = sum_l > 0.f || sum_l != sum_l;
#pragma unroll
  for (int j = 0; j < kPer; j += 2)
    *reinterpret_cast<uint32_t*>(out + lane * kPer + j) =
        pack_bf16(any ? __fdiv_rn(sum_o[j], sum_l) : 0.f, any ? __fdiv_rn(sum_o[j + 1], sum_l) : 0.f);
}

template <class Keys, class Shape>
struct WarpgroupBlock {
  using Smem = WarpgroupSmem<Shape>;
  const WarpgroupArgs<Keys>& args;
  Schedule<Keys> schedule;
  uint32_t ring_base, full, empty;
  volatile SlotTag* tags;
  volatile int* mailbox;

  __device__ WarpgroupBlock(const WarpgroupArgs<Keys>& a, unsigned char* smem) : args(a) {
    const uint32_t base = smem_address(smem), pad = (1024 - base % 1024) % 1024;
    smem += pad;
    ring_base = base + pad;
    full = ring_base + Smem::kFull;
    empty = ring_base + Smem::kEmpty;
    tags = reinterpret_cast<volatile SlotTag*>(smem + Smem::kTags);
    mailbox = reinterpret_cast<volatile int*>(smem + Smem::kMailbox);
    schedule.place(smem + Smem::kSchedule, a.p.requests, a.p.kv_heads);
  }

  __device__ void init_barriers() const {
    if (threadIdx.x < Shape::kSlots) {
      mbarrier_init(full + 8 * threadIdx.x, 32 * Shape::kProducerWarps + 1);  // + 1: the tag's writer
      mbarrier_init(empty + 8 * threadIdx.x, Shape::kConsumerWarps);
    }
  }

  __device__ void produce(int warp) const;
  __device__ void consume(int warp) const;

 private:
  __device__ int splits(int unit) const {
    const Span& s = schedule.span[unit];
    return splits_for(s.hi) - Schedule<Keys>::first_split(s);
  }
  __device__ TaggedCounter* merge_counter(int request, int row_block, int kv_head) const {
    const int group = args.p.q_heads / args.p.kv_heads;
    return args.merges + (schedule.row_offset[request] * group / Shape::kRows + request + row_block) * args.p.kv_heads +
           kv_head;
  }
  __device__ int row_blocks(int request) const {
    const int rows = schedule.row_offset[request + 1] - schedule.row_offset[request];
    return Schedule<Keys>::rows_blocks(rows * (args.p.q_heads / args.p.kv_heads), Shape::kRows);
  }

  // The rest of the block's duties when blocks merge: fresh counters, zeros for rows without keys.
  __device__ void prepare(int thread, int threads) const {
    const auto& p = args.p;
    const int group = p.q_heads / p.kv_heads;
    if (blockIdx.x == 0 && thread == 0 && schedule.items(p) > int(gridDim.x)) atomicExch(args.work, kFreshCounter);
    if (args.merges == nullptr) return;
    auto* out = static_cast<uint32_t*>(p.out);
    const auto clear = [&](int row, int head, int heads) {
      uint32_t* at = out + (int64_t(row) * p.q_heads + head) * Shape::kHeadDim / 2;
      for (int i = thread; i < heads * Shape::kHeadDim / 2; i += threads) at[i] = 0;
    };
    for (int row = schedule.row_offset[p.requests] + int(blockIdx.x); row < p.rows; row += int(gridDim.x))
      clear(row, 0, p.q_heads);
    const int heads = Keys::kPerHead ? p.kv_heads : 1;
    if (blockIdx.x == 0) {
      for (int i = thread; i < p.requests * p.kv_heads; i += threads) {
        const int request = i / p.kv_heads, head = i % p.kv_heads;
        if (splits(Keys::kPerHead ? i : request) <= 1) continue;
        for (int b = 0; b < row_blocks(request); ++b) atomicExch(merge_counter(request, b, head), kFreshCounter);
      }
    }
    for (int u = int(blockIdx.x); u < p.requests * heads; u += int(gridDim.x)) {
      if (splits(u) > 0) continue;
      const int request = u / heads;
      for (int row = schedule.row_offset[request]; row < schedule.row_offset[request + 1]; ++row)
        Keys::kPerHead ? clear(row, u % heads * group, group) : clear(row, 0, p.q_heads);
    }
  }

  // By the warpgroup that has written an item's states: merges the unit if these were its last.
  __device__ void merge_if_last(const WorkItem& work, int warp, int lane) const {
    const auto& p = args.p;
    named_barrier(1, 128);
    const int expected = splits(work.unit);
    if (expected > 1) {
      if (warp == 0 && lane == 0) {
        __threadfence();  // after the barrier: of all threads' states
        TaggedCounter* counter = merge_counter(work.request, work.row_block, work.kv_head);
        const bool last = add_one(counter) == expected - 1;
        if (last) *counter = 0;
        __threadfence();
        mailbox[2] = last;
      }
      named_barrier(1, 128);
      if (!mailbox[2]) return;
    }
    const Span span = schedule.span[work.unit];
    const int group = p.q_heads / p.kv_heads, query0 = schedule.row_offset[work.request];
    const int item_rows = (schedule.row_offset[work.request + 1] - query0) * group;
    const int end = min(item_rows, (work.row_block + 1) * Shape::kRows);
    for (int i = work.row_block * Shape::kRows + warp; i < end; i += 4) {
      const int64_t row = query0 + i / group, at = row * p.q_heads + work.kv_head * group + i % group;
      const int2 range = Keys::row_range(p, span, work.request, p.row_position[row]);
      const bool any = range.y > range.x;
      merge_row<Shape::kHeadDim>(args.partial, at * args.max_splits, any ? split_of(range.x) : 0,
                                 any ? splits_for(range.y) : 0, static_cast<uint16_t*>(p.out) + at * Shape::kHeadDim,
                                 lane);
    }
  }

  __device__ int take_item(int warp, int items, int& turn) const {
    if (items <= int(gridDim.x)) return items;
    // Two places taken in turn: a warp that runs ahead writes the other one, and waits for us before it comes back.
    if (warp == 0 && threadIdx.x % 32 == 0) {
      const int ticket = add_one(args.work);
      if (ticket == items - 1) *args.work = 0;  // every block takes one ticket too many: this is the last
      mailbox[turn] = ticket;
    }
    named_barrier(15, 32 * Shape::kProducerWarps);
    const int ticket = mailbox[turn];
    turn ^= 1;
    return int(gridDim.x) + __shfl_sync(0xffffffffu, ticket, 0);
  }
};

// Copies tiles in the order of the list; while one tile is issued, the next one's page addresses are on their way.
template <class Keys, class Shape>
__device__ void WarpgroupBlock<Keys, Shape>::produce(int warp) const {
  constexpr int kRowBytes = Shape::kHeadDim * 2, kRowChunks = kRowBytes / 16;
  constexpr int kTokensAnInstruction = 32 / kRowChunks;
  static_assert(kTileTokens / kGranuleTokens == Shape::kProducerWarps);
  const int lane = threadIdx.x % 32;
  const int row0 = warp * kGranuleTokens + lane / kRowChunks, chunk = lane % kRowChunks;
  const int items = schedule.items(args.p);
  const bool writes_tags = warp == 0 && lane == 0;
  RingCursor ring;
  int turn = 0;

  int item = int(blockIdx.x), token = 0, end = 0;
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
    return Keys::granule(args.p, span, work.request, work.kv_head, token + kGranuleTokens * warp);
  };

  bool more = start_item();
  Granule next{};
  if (more) next = locate();
  wait_for_previous_kernel();  // K and V may be its work
  while (more) {
    const Granule here = next;
    const SlotTag tag{item, token};
    token += kTileTokens;
    if (token >= end) {
      item = take_item(warp, items, turn);
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
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes + chunk / 8 * Shape::kPartBytes);
      const char* from = here.k + (part ? here.v_offset : 0) + lane * 16;
#pragma unroll
      for (int j = 0; j < kGranuleTokens / kTokensAnInstruction; ++j)
        cp_async16(swizzled(slot, row0 + j * kTokensAnInstruction, 128, chunk % 8), from + j * 512,
                          lane / kRowChunks + j * kTokensAnInstruction < here.valid);
      mbarrier_arrive_after_copies(full + 8 * ring.slot);
      ring.next(Shape::kSlots);
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
__device__ void WarpgroupBlock<Keys, Shape>::consume(int warp) const {
  constexpr int kParts = Shape::kParts, kSteps = Shape::kHeadDim / 16;
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = p.q_heads / p.kv_heads;
  const float c = __fmul_rn(p.scale, kLog2e);

  wait_for_previous_kernel();
  let_next_kernel_start();
  prepare(int(threadIdx.x), 32 * Shape::kConsumerWarps);

  RingCursor ring;
  int item = -2;                   // neither an item nor the end
  int tight_lo = 0, tight_hi = 0;  // every row sees keys tight_lo .. tight_hi - 1
  int hole_begin = 0, hole_end = 0;
  int halves = 0;       // of this warp's 16 rows that exist
  bool active = false;  // this warpgroup has rows in the item
  int2 range[2] = {};   // of keys, of rows g and g + 8
  uint32_t q[kSteps][4];
  float o[kParts][32];
  float l[2];
  RunningMax m[2];

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
    const int skipped = work.row_block * Shape::kRows + warp * 16;
    active = skipped - warp % 4 * 16 < item_rows;
    halves = skipped >= item_rows ? 0 : skipped + 8 >= item_rows ? 1 : 2;
    tight_lo = Keys::row_range(p, span, work.request, schedule.last_pos[work.request]).x;
    tight_hi = Keys::row_range(p, span, work.request, schedule.first_pos[work.request]).y;
    hole_begin = span.hole_begin;
    hole_end = span.hole_end;
    const auto* q_base = static_cast<const uint16_t*>(p.q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = skipped + half * 8 + g;
      const bool exists = i < item_rows;
      const int row = query0 + i / group;
      range[half] = exists ? Keys::row_range(p, span, work.request, p.row_position[row]) : make_int2(0, 0);
      const int64_t at = exists ? row * p.q_stride_row + (work.kv_head * group + i % group) * p.q_stride_head : 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k8 = 0; k8 < 2; ++k8) {
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(q_base + at + s * 16 + k8 * 8 + t * 2);
          q[s][k8 * 2 + half] = exists ? pair : 0u;
        }
      }
      m[half].raw = negative_infinity();
      l[half] = 0.f;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int e = 0; e < 32; ++e) o[part][e] = 0.f;
  };

  const auto finish = [&]() {
    if (!active) return;
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const int query0 = schedule.row_offset[work.request];
    const int split_lo = split_begin(work.split), split_hi = split_begin(work.split + 1);
    const int skipped = work.row_block * Shape::kRows + warp * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = l[half];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
      const int i = skipped + half * 8 + g;
      if (range[half].y <= max(split_lo, range[half].x) || range[half].x >= split_hi) continue;
      const int64_t row = query0 + i / group;
      const int64_t at = (row * p.q_heads + work.kv_head * group + i % group) * args.max_splits + work.split;
      float* to = args.partial.o + at * Shape::kHeadDim + t * 2;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int n = 0; n < 8; ++n)
          *reinterpret_cast<float2*>(to + part * 64 + n * 8) =
              make_float2(o[part][n * 4 + half * 2], o[part][n * 4 + half * 2 + 1]);
      if (t == 0) args.partial.ml[at] = make_float2(m[half].stored(c), sum);
    }
    if constexpr (Shape::kWarpgroups == 1) {
      if (args.merges != nullptr) merge_if_last(work, warp, lane);
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
      ring.next(Shape::kSlots);
      mbarrier_wait(full + 8 * ring.slot, ring.parity);
      release(ring.slot);
      ring.next(Shape::kSlots);
      continue;
    }

    float s[32];
    {
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes);
      fence_for_wgmma();
      wgmma_begin();
      wgmma_n64k16<false, false>(s, q[0], wgmma_operand(slot));
#pragma unroll
      for (int k16 = 1; k16 < kSteps; ++k16)
        wgmma_n64k16<false, true>(s, q[k16], wgmma_operand(slot + k16 / 4 * Shape::kPartBytes) + 2 * (k16 % 4));
      wgmma_commit();
      wgmma_wait();
    }
    release(ring.slot);
    ring.next(Shape::kSlots);

    const bool masks =
        token < tight_lo || token + kTileTokens > tight_hi || (token < hole_end && token + kTileTokens > hole_begin);
    uint32_t weights[kTileTokens / 16][4];
    float rescale[2] = {1.f, 1.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half >= halves) {  // rows that do not exist
#pragma unroll
        for (int k16 = 0; k16 < kTileTokens / 16; ++k16) weights[k16][half] = weights[k16][2 + half] = 0u;
        continue;
      }
      if (masks) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = token + n * 8 + t * 2 + e;
            const bool visible = key >= range[half].x && key < range[half].y && (key < hole_begin || key >= hole_end);
            float& x = s[n * 4 + half * 2 + e];
            x = visible ? x : negative_infinity();
          }
      }
      float x = negative_infinity();
#pragma unroll
      for (int n = 0; n < 8; ++n) x = fmaxf(x, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      rescale[half] = m[half].update(x, c);
      const float reference = m[half].reference(c);
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float w0 = softmax_weight(s[n * 4 + half * 2], c, reference);
        const float w1 = softmax_weight(s[n * 4 + half * 2 + 1], c, reference);
        sum = __fadd_rn(__fadd_rn(sum, w0), w1);
        weights[n / 2][n % 2 * 2 + half] = pack_bf16(w0, w1);
      }
      l[half] = __fmaf_rn(l[half], rescale[half], sum);
    }
    if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int e = 0; e < 32; ++e) o[part][e] = __fmul_rn(o[part][e], rescale[e % 4 / 2]);
    }

    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    {
      const uint32_t slot = ring_base + uint32_t(ring.slot * Shape::kSlotBytes);
      fence_for_wgmma();
      wgmma_begin();
#pragma unroll
      for (int k16 = 0; k16 < kTileTokens / 16; ++k16)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          wgmma_n64k16<true, true>(o[part], weights[k16], wgmma_operand(slot + part * Shape::kPartBytes) + 128 * k16);
      wgmma_commit();
      wgmma_wait();
    }
    release(ring.slot);
    ring.next(Shape::kSlots);
  }
}

template <class Keys, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    warpgroup_attention_kernel(const __grid_constant__ WarpgroupArgs<Keys> args) {
#if VERICACHE_HAS_WGMMA
  WarpgroupBlock<Keys, Shape> block(args, dynamic_smem());
  block.init_barriers();
  if (!args.p.tables_settled) wait_for_previous_kernel();
  block.schedule.build(args.p, Shape::kRows);  // its barriers also order the barriers' initialization
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp < Shape::kConsumerWarps) {
    if constexpr (Shape::kMovesRegisters) take_registers<Shape::kConsumerRegisters>();
    block.consume(warp);
  } else {
    if constexpr (Shape::kMovesRegisters) give_registers<Shape::kProducerRegisters>();
    block.produce(warp - Shape::kConsumerWarps);
  }
#endif
}

// Counters behind the partial states.
inline size_t warpgroup_attention_workspace_bytes(int64_t rows, int requests, int q_heads, int kv_heads, int max_splits,
                                                  int head_dim) {
  const int64_t counters = 1 + (rows * (q_heads / kv_heads) / 64 + requests + 1) * kv_heads;
  return PartialStates::bytes(rows * q_heads * max_splits, head_dim) + size_t(counters) * sizeof(TaggedCounter);
}

template <class Keys, class Shape>
void launch_warpgroup_attention(const typename Keys::Params& p, int max_splits, bool merge_in_kernel,
                                cudaStream_t stream) {
  constexpr auto kernel = warpgroup_attention_kernel<Keys, Shape>;
  const DeviceInfo info = device_info();
  const size_t smem = WarpgroupSmem<Shape>::template bytes<Keys>(p.requests, p.kv_heads);
  VC_CHECK(smem <= size_t(info.smem_optin), p.requests,
           " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const bool shares = smem + 1024 <= size_t(info.smem_optin + 1024) / Shape::kBlocks;  // 1024: the system's, a block
  const int group = p.q_heads / p.kv_heads;
  const int64_t bound = (int64_t(p.rows) * group / Shape::kRows + p.requests) * p.kv_heads * max_splits;
  const int grid =
      int(std::min<int64_t>(info.multiprocessors * (shares ? Shape::kBlocks : 1), std::max<int64_t>(bound, 1)));

  const int64_t states = int64_t(p.rows) * p.q_heads * max_splits;
  const auto partial = PartialStates::at(p.workspace, states, Shape::kHeadDim);
  auto* counters = reinterpret_cast<TaggedCounter*>(partial.ml + states);
  merge_in_kernel = merge_in_kernel && Shape::kWarpgroups == 1;
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(grid), dim3(Shape::kThreads), smem}, info, stream,
         WarpgroupArgs<Keys>{p, partial, counters, merge_in_kernel ? counters + 1 : nullptr, max_splits});
  if (!merge_in_kernel)
    launch(merge_states_kernel<Shape::kHeadDim, RowSplits<Keys>>, {dim3(p.q_heads, p.rows), dim3(32 * kMergeWarps)},
           info, stream, RowSplits<Keys>{p, max_splits}, partial, static_cast<uint16_t*>(p.out));
}

// On the current device.
inline bool has_wgmma() {
  static std::atomic<int> known[64];  // 0: not read yet; 1: no; 2: yes
  const DeviceInfo info = device_info();
  int state = info.device < 64 ? known[info.device].load(std::memory_order_relaxed) : 0;
  if (state == 0) {
    int major = 0;
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, info.device));
    state = 1 + (major == 9);
    if (info.device < 64) known[info.device].store(state, std::memory_order_relaxed);
  }
  return state == 2;
}

}  // namespace vericache::cuda
