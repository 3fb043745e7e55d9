// SPDX-License-Identifier: Apache-2.0
// A block of warpgroup_attention.cuh: its shapes, its shared memory, and what its producer and consumers both need.
#pragma once

#include <cstdint>

#include "l2_policy.cuh"
#include "row_copy.cuh"
#include "split_attention.cuh"
#include "tagged_counter.cuh"
#include "wgmma_rs.cuh"

namespace vericache::cuda {

// kRows: item rows a block takes at a time; 8 where requests have so few, 64 and 128 with one and two warpgroups. With
// 8 the rows g + 8 of a warp's fragments are nobody's, and warps 1 to 3 have none at all.
template <int kHeadDim_, int kRows_>
struct WarpgroupShape {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kHalves = kRows == 8 ? 1 : 2;
  static constexpr int kWarpgroups = kRows == 128 ? 2 : 1;
  static constexpr int kQRows = kRows == 8 ? 16 : kRows;
  static constexpr int kConsumerWarps = 4 * kWarpgroups, kProducerWarps = 4;
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);
  static constexpr int kParts = kHeadDim / 64, kGroupBytes = kParts * 1024;  // group: of 8 tokens
  static constexpr int kSlotBytes = kTileTokens / 8 * kGroupBytes;

  // Slots of the ring: K in even ones, V in odd ones. Memory reads slower the more is asked of it beyond what it takes
  // to keep it busy, so one warpgroup asks for what comes in 5 us at its full rate: 128 KB on an H100, 192 on an H200.
  // Two, which hold a slot longer, need more. So many requests that their schedule needs the room get fewer.
  static constexpr int kFewestSlots = 4, kUsualSlots = (kWarpgroups == 2 ? 160 : 128) * 1024 / kSlotBytes;
  static constexpr int kMostSlots = kWarpgroups == 1 ? 192 * 1024 / kSlotBytes : kUsualSlots;
  static_assert(kUsualSlots % 2 == 0 && kMostSlots % 2 == 0);
  static int slots(const DeviceInfo& info) {
    const double bytes = 5e-6 * info.memory_rate() / info.multiprocessors;
    return std::clamp(2 * int(bytes / (2 * kSlotBytes) + 0.5), kUsualSlots, kMostSlots);
  }
  // Registers a thread at the start are those of 384 threads a multiprocessor, so that the merge's blocks find room
  // beside a block with one warpgroup.
  static constexpr int kBoundThreads = 384;
  static constexpr int kConsumerRegisters = 200, kProducerRegisters = kWarpgroups == 2 ? 104 : 120;
};

template <class Keys>
struct WarpgroupArgs {
  typename Keys::Params p;
  PartialStates partial;  // state (row, head, split) at index (row * q_heads + head) * max_splits + split
  TaggedCounter* work;    // items handed out beyond the first of each block; block 0 sets it
  int max_splits;
  int slots;                         // of the ring
  int box_rows;                      // tokens of a box of `map`: kTileTokens or kGranuleTokens
  uint64_t kv_policy, state_policy;  // of l2_policy.cuh
  bool q_boxes;                      // q comes in boxes of q_map: one part of the rows of a KV head's query heads
  CUtensorMap map, q_map;
};

// What consumers must know of an item; the producer has looked it up anyway.
struct ItemRecord {
  Span span;
  int64_t state;  // of the request's first row and the KV head's first query head
  int rows;       // of this block; -1: no more items
  int first_row;  // of the request's, row * group + head
  int request, split;
  int token, end;          // tiles from token on, keys up to end
  int tight_lo, tight_hi;  // every row sees keys tight_lo .. tight_hi - 1
};

template <class Shape>
struct WarpgroupSmem {
  static constexpr int kQ = 0;
  static constexpr int kPositions = kQ + Shape::kQRows * Shape::kHeadDim * 2;
  static constexpr int kFull = kPositions + Shape::kQRows * int(sizeof(int));
  static constexpr int kEmpty = kFull + Shape::kMostSlots * 8;
  static constexpr int kQFull = kEmpty + Shape::kMostSlots * 8, kQEmpty = kQFull + 8;
  static constexpr int kItems = (kQEmpty + 8 + 15) / 16 * 16;
  static constexpr int kRing = (kItems + 2 * int(sizeof(ItemRecord)) + 1023) / 1024 * 1024;

  // The schedule lies behind the ring.
  static __host__ __device__ int schedule(int slots) { return kRing + slots * Shape::kSlotBytes; }
  template <class Keys>
  static size_t bytes(int slots, int requests, int kv_heads) {
    return schedule(slots) + Schedule<Keys>::bytes(requests, kv_heads) + 1024;  // it all begins at a multiple of 1024
  }
};

template <class Keys, class Shape>
struct WarpgroupBlock {
  using Smem = WarpgroupSmem<Shape>;
  const WarpgroupArgs<Keys>& args;
  Schedule<Keys> schedule;
  uint32_t base, full, empty;
  volatile ItemRecord* records;  // of the item whose q is there, and of the one before it or after it
  const volatile int* positions;

  __device__ WarpgroupBlock(const WarpgroupArgs<Keys>& a, unsigned char* smem) : args(a) {
    const uint32_t pad = (1024 - smem_address(smem) % 1024) % 1024;
    smem += pad;
    base = smem_address(smem);
    full = base + Smem::kFull;
    empty = base + Smem::kEmpty;
    records = reinterpret_cast<volatile ItemRecord*>(smem + Smem::kItems);
    positions = reinterpret_cast<const volatile int*>(smem + Smem::kPositions);
    schedule.place(smem + Smem::schedule(a.slots), a.p.requests, a.p.kv_heads);
  }

  __device__ void init_barriers() const {
    if (int(threadIdx.x) < args.slots) {
      mbarrier_init(full + 8 * threadIdx.x, 1);
      mbarrier_init(empty + 8 * threadIdx.x, Shape::kConsumerWarps);
    }
    if (threadIdx.x == 0) {
      mbarrier_init(base + Smem::kQFull, 33);  // the lanes' copies, and the item
      mbarrier_init(base + Smem::kQEmpty, Shape::kConsumerWarps);
    }
  }

  // Rows of q that no item fills are zero, or an earlier item's: nobody uses what comes of them, but it is finite.
  __device__ void clear_q(unsigned char* smem) const {
    const uint32_t pad = base - smem_address(smem);
    auto* q = reinterpret_cast<uint4*>(smem + pad + Smem::kQ);
    for (int i = threadIdx.x; i < Shape::kQRows * Shape::kHeadDim / 8; i += int(blockDim.x)) q[i] = uint4{};
    fence_for_async_proxy();  // the copy engine writes there next
  }

  __device__ void produce() const;
  __device__ void consume(int warp) const;

 private:
  __device__ __forceinline__ uint32_t slot_address(int slot) const {
    return base + uint32_t(Smem::kRing + slot * Shape::kSlotBytes);
  }
  __device__ int split_begin(int split) const { return schedule.splits().begin(split); }
  __device__ int first_token(const WorkItem& work, const Span& span) const {
    return max(split_begin(work.split), span.lo / kTileTokens * kTileTokens);
  }
  __device__ int end_token(const WorkItem& work, const Span& span) const {
    return min(split_begin(work.split + 1), span.hi);
  }

  // An item's q, its rows' positions and its record.
  __device__ void copy_q(const WorkItem& work, const Span& span, volatile ItemRecord& record) const {
    constexpr int kRowChunks = Shape::kHeadDim / 8;
    const auto& p = args.p;
    const int group = p.q_heads / p.kv_heads, query0 = schedule.row_offset[work.request];
    const int first = work.row_block * Shape::kRows;
    const int rows = min(Shape::kRows, (schedule.row_offset[work.request + 1] - query0) * group - first);
    const auto* q_base = static_cast<const uint16_t*>(p.q);
    const int boxes = args.q_boxes ? rows / group * Shape::kParts : 0;
    // A warp that copies 128 rows by itself takes so long that the ring runs dry.
#pragma unroll 1
    for (int i = int(threadIdx.x) % 32; i < boxes; i += 32) {
      const int query = i / Shape::kParts, part = i % Shape::kParts;
      const auto* from =
          q_base + (query0 + first / group + query) * p.q_stride_row + int64_t(work.kv_head) * group * Shape::kHeadDim;
      copy_rows(base + uint32_t(Smem::kQ + (part * Shape::kQRows + query * group) * 128), args.q_map,
                row_place<Shape::kHeadDim>(reinterpret_cast<uint64_t>(from)), part, base + Smem::kQFull, kDropAsUsual);
    }
#pragma unroll 1
    for (int i = int(threadIdx.x) % 32; !args.q_boxes && i < rows * kRowChunks; i += 32) {
      const int local = i / kRowChunks, chunk = i % kRowChunks, item_row = first + local;
      const int64_t at = (query0 + item_row / group) * p.q_stride_row +
                         (work.kv_head * group + item_row % group) * p.q_stride_head + chunk * 8;
      cp_async16(swizzled(base + uint32_t(Smem::kQ + chunk / 8 * Shape::kQRows * 128), local, 128, chunk % 8),
                 q_base + at, true);
    }
#pragma unroll 1
    for (int i = int(threadIdx.x) % 32; i < rows; i += 32)
      cp_async4(base + uint32_t(Smem::kPositions + i * 4), p.row_position + query0 + (first + i) / group);
    mbarrier_arrive_after_copies(base + Smem::kQFull);
    if (threadIdx.x % 32 == 0) {
      record.span.lo = span.lo;
      record.span.hi = span.hi;
      record.span.hole_begin = span.hole_begin;
      record.span.hole_end = span.hole_end;
      record.state = (int64_t(query0) * p.q_heads + work.kv_head * group) * args.max_splits + work.split;
      record.rows = rows;
      record.first_row = first;
      record.request = work.request;
      record.split = work.split;
      record.token = first_token(work, span);
      record.end = end_token(work, span);
      record.tight_lo = Keys::row_range(p, span, work.request, schedule.last_pos[work.request]).x;
      record.tight_hi = Keys::row_range(p, span, work.request, schedule.first_pos[work.request]).y;
      // Some of the bytes may have come before they are announced: the phase waits for this arrival.
      mbarrier_expect(base + Smem::kQFull, boxes * group * 128);
    }
  }

  // A tile of K, or of V, by this warp's lanes; zeros where nothing may be read.
  __device__ void copy_part_of_tile(const WorkItem& work, const Span& span, int token, bool v, uint32_t slot) const {
    constexpr int kRowChunks = Shape::kHeadDim / 8, kTokensAnInstruction = 32 / kRowChunks;
    const int lane = threadIdx.x % 32, row0 = lane / kRowChunks, chunk = lane % kRowChunks;
    const uint32_t to = slot + uint32_t(chunk / 8 * 1024);
#pragma unroll 1  // rare, and registers are short
    for (int first = 0; first < kTileTokens; first += kGranuleTokens) {
      const Granule from = Keys::granule(args.p, span, work.request, work.kv_head, token + first);
      const char* base = from.k + (v ? from.v_offset : 0) + lane * 16;
#pragma unroll 1
      for (int j = 0; j < kGranuleTokens; j += kTokensAnInstruction) {
        const int row = first + row0 + j;
        cp_async16(swizzled(to + uint32_t(row / 8 * Shape::kGroupBytes), row % 8, 128, chunk % 8),
                   base + j * Shape::kHeadDim * 2, row0 + j < from.valid);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_for_async_proxy();
    __syncwarp();
  }
};

}  // namespace vericache::cuda
