// SPDX-License-Identifier: Apache-2.0
// The attention of split_attention.cuh for Hopper (sm_90a): the same list of work items, splits and partial states,
// with wgmma. Its bits differ from that kernel's; what must agree is every row count and batch on one device.
//
// Block: one or two consumer warpgroups of 64 item rows each (16 a warp), and a producer warp, one of a warpgroup
// that gives its registers away. One row or 64, the
// instructions are the same; rows that do not exist cost no exponentials. A row's scores, weights and sums stay in the
// registers of one quad of lanes: consumer warps exchange nothing.
//
// Shared memory: a ring of slots of one tile (64 tokens of K, or of V), each head_dim / 64 parts of [64 tokens][128
// bytes] in the hardware's 128-byte swizzle; q of an item, in parts of the same form, and the positions of its rows;
// barriers; tags; the schedule. Whole tiles come as bulk copies, whose bytes the slot's barrier counts. A tile with
// tokens that must not be read is copied by the producer's lanes, which put zeros there, so that memory past a
// request's last token may hold anything.
//
// Reduction order (R1). Per row and split: tiles of 64 tokens in order, cut at absolute multiples of 64. A score is the
// chain of wgmma k-steps over channels 0-15, 16-31, ...; the weights of a tile enter o as the chain over its tokens
// 0-15, ...; l adds a lane's 16 weights of a tile left to right, and the four lanes of the quad at the end. Which
// warpgroup does it, and how many rows ride along, changes none of it. Partials merge as softmax_state.cuh says, in a
// kernel of their own. Held by bench/gpu/attention_check.cu.
//
// While the warps weigh the scores of one tile, the tensor cores already work on the sums of the tile before and on the
// scores of this one's successor: that changes when a product is made, not what enters it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "row_copy.cuh"
#include "split_attention.cuh"
#include "wgmma_rs.cuh"

namespace vericache::cuda {

// kRows: item rows a block takes at a time; 8 where requests have so few, 64 and 128 with one and two warpgroups. With
// 8 the rows g + 8 of a warp's fragments are nobody's, warps 1 to 3 repeat warp 0, and two blocks share a
// multiprocessor: while one begins or ends an item, the other keeps the memory busy.
template <int kHeadDim_, int kRows_, int kBlocks_ = 1>
struct WarpgroupShape {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kHalves = kRows == 8 ? 1 : 2;
  static constexpr int kWarpgroups = kRows == 128 ? 2 : 1, kBlocks = kBlocks_;
  static constexpr int kQRows = kRows == 8 ? 16 : kRows;
  static constexpr int kConsumerWarps = 4 * kWarpgroups, kProducerWarps = 4;
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);
  static constexpr int kParts = kHeadDim / 64, kPartBytes = kTileTokens * 128;
  static constexpr int kSlotBytes = kParts * kPartBytes;
  static constexpr int kSlots = (kBlocks == 2 ? 96 : 160) * 1024 / kSlotBytes;
  static_assert(kSlots % 2 == 0);  // K in even slots, V in odd ones
  // Registers a thread at the start are those of 384 threads a multiprocessor where one block with one warpgroup runs,
  // so that the merge's blocks find room beside it.
  static constexpr int kBoundThreads = kBlocks == 2 ? kThreads : 384;
  static constexpr int kConsumerRegisters = kBlocks == 1 ? 200 : kHeadDim == 128 ? 176 : 144;
  static constexpr int kProducerRegisters = kBlocks == 2 ? 256 - kConsumerRegisters : kWarpgroups == 2 ? 104 : 120;
};

// Items handed out beyond the first of each block, counted in the workspace, whose contents are unknown before a
// launch: a tag in the high word, the count in the low one. Block 0 sets (tag, 0); adding to one that does not carry
// the tag yet is repeated; the last to add clears it, so that no launch meets another's tag, a NaN no arithmetic makes.
using TaggedCounter = unsigned long long;
inline constexpr TaggedCounter kFreshCounter = 0xffa5c3e1ull << 32;

// What an addition of one has returned, as the count before it.
__device__ __forceinline__ int counted(TaggedCounter* counter, TaggedCounter old) {
  while (old >> 32 != kFreshCounter >> 32) old = atomicAdd(counter, 1ull);
  return int(old & 0xffffffffu);
}

template <class Keys>
struct WarpgroupArgs {
  typename Keys::Params p;
  PartialStates partial;  // state (row, head, split) at index (row * q_heads + head) * max_splits + split
  TaggedCounter* work;
  int max_splits;
  int box_rows;  // of `map`: 64, whole rows; or kGranuleTokens, one part
  CUtensorMap map;
};

template <class Shape>
struct WarpgroupSmem {
  static constexpr int kQ = Shape::kSlots * Shape::kSlotBytes;  // the ring comes first
  static constexpr int kPositions = kQ + Shape::kQRows * Shape::kHeadDim * 2;
  static constexpr int kFull = kPositions + Shape::kQRows * int(sizeof(int));
  static constexpr int kEmpty = kFull + Shape::kSlots * 8;
  static constexpr int kQFull = kEmpty + Shape::kSlots * 8, kQEmpty = kQFull + 8;
  static constexpr int kTags = kQEmpty + 8;
  static constexpr int kSchedule = (kTags + Shape::kSlots * int(sizeof(int)) + 15) / 16 * 16;

  template <class Keys>
  static size_t bytes(int requests, int kv_heads) {
    return kSchedule + Schedule<Keys>::bytes(requests, kv_heads) + 1024;  // the ring begins at a multiple of 1024
  }
};

template <class Keys, class Shape>
struct WarpgroupBlock {
  using Smem = WarpgroupSmem<Shape>;
  const WarpgroupArgs<Keys>& args;
  Schedule<Keys> schedule;
  uint32_t base, full, empty;
  volatile int* tags;  // of a tile of K: its item; -1: no more
  const volatile int* positions;

  __device__ WarpgroupBlock(const WarpgroupArgs<Keys>& a, unsigned char* smem) : args(a) {
    const uint32_t pad = (1024 - smem_address(smem) % 1024) % 1024;
    smem += pad;
    base = smem_address(smem);
    full = base + Smem::kFull;
    empty = base + Smem::kEmpty;
    tags = reinterpret_cast<volatile int*>(smem + Smem::kTags);
    positions = reinterpret_cast<const volatile int*>(smem + Smem::kPositions);
    schedule.place(smem + Smem::kSchedule, a.p.requests, a.p.kv_heads);
  }

  __device__ void init_barriers() const {
    if (threadIdx.x < Shape::kSlots) {
      mbarrier_init(full + 8 * threadIdx.x, 1);
      mbarrier_init(empty + 8 * threadIdx.x, Shape::kConsumerWarps);
    }
    if (threadIdx.x == 0) {
      mbarrier_init(base + Smem::kQFull, 32);
      mbarrier_init(base + Smem::kQEmpty, Shape::kConsumerWarps);
    }
  }

  __device__ void produce() const;
  __device__ void consume(int warp) const;

 private:
  __device__ int first_token(const WorkItem& work, const Span& span) const {
    return max(split_begin(work.split), span.lo / kTileTokens * kTileTokens);
  }
  __device__ int end_token(const WorkItem& work, const Span& span) const {
    return min(split_begin(work.split + 1), span.hi);
  }

  // q of an item, and its rows' positions; rows beyond the last, where a warp has some, are zero.
  __device__ void copy_q(const WorkItem& work) const {
    constexpr int kRowChunks = Shape::kHeadDim / 8;
    const auto& p = args.p;
    const int group = p.q_heads / p.kv_heads, query0 = schedule.row_offset[work.request];
    const int first = work.row_block * Shape::kRows;
    const int rows = min(Shape::kRows, (schedule.row_offset[work.request + 1] - query0) * group - first);
    const auto* q_base = static_cast<const uint16_t*>(p.q);
#pragma unroll 1
    for (int i = int(threadIdx.x) % 32; i < (rows + 15) / 16 * 16 * kRowChunks; i += 32) {
      const int local = i / kRowChunks, chunk = i % kRowChunks, item_row = first + local;
      const int64_t at = (query0 + item_row / group) * p.q_stride_row +
                         (work.kv_head * group + item_row % group) * p.q_stride_head + chunk * 8;
      cp_async16(swizzled(base + uint32_t(Smem::kQ + chunk / 8 * Shape::kQRows * 128), local, 128, chunk % 8),
                 q_base + (local < rows ? at : 0), local < rows);
    }
#pragma unroll 1
    for (int i = int(threadIdx.x) % 32; i < rows; i += 32)
      cp_async4(base + uint32_t(Smem::kPositions + i * 4), p.row_position + query0 + (first + i) / group);
    mbarrier_arrive_after_copies(base + Smem::kQFull);
  }

  // A tile of K, or of V, by this warp's lanes; zeros where nothing may be read.
  __device__ void copy_part_of_tile(const WorkItem& work, const Span& span, int token, bool v, uint32_t slot) const {
    constexpr int kRowChunks = Shape::kHeadDim / 8, kTokensAnInstruction = 32 / kRowChunks;
    const int lane = threadIdx.x % 32, row0 = lane / kRowChunks, chunk = lane % kRowChunks;
    const uint32_t to = slot + uint32_t(chunk / 8 * Shape::kPartBytes);
    for (int first = 0; first < kTileTokens; first += kGranuleTokens) {
      const Granule from = Keys::granule(args.p, span, work.request, work.kv_head, token + first);
      const char* base = from.k + (v ? from.v_offset : 0) + lane * 16;
#pragma unroll
      for (int j = 0; j < kGranuleTokens; j += kTokensAnInstruction)
        cp_async16(swizzled(to, first + row0 + j, 128, chunk % 8), base + j * Shape::kHeadDim * 2,
                   row0 + j < from.valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_for_wgmma();
    __syncwarp();
  }
};

// Copies tiles in the order of the list. The memory must never wait for this warp: a lane looks up the place of one
// box, 32 boxes ahead, and the item after this one is claimed, and its first boxes are looked up, while tiles of this
// one are still to come.
template <class Keys, class Shape>
__device__ void WarpgroupBlock<Keys, Shape>::produce() const {
  constexpr uint32_t kAll = 0xffffffffu;
  constexpr int kClaim = 6, kLookUp = 3;  // tiles before an item's end
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, box_rows = args.box_rows, boxes = kTileTokens / box_rows, batch = 32 / boxes;
  const int items = schedule.items(p), own_box = lane % boxes;
  const bool claims = items > int(gridDim.x);
  RingCursor ring;
  uint32_t q_parity = 1;
  bool waited = false;  // for the kernel before, whose work q is, and K and V that are not settled may be
  const auto wait_once = [&]() {
    if (!waited) wait_for_previous_kernel();
    waited = true;
  };

  // An item to come: this lane's box of the first batch. What else is known of it is looked up again when it begins,
  // for registers are short.
  struct Plan {
    int item, v_offset;
    const char* k;
  };
  const auto locate = [&](const WorkItem& work, int token) {
    return Keys::granule(p, schedule.span[work.unit], work.request, work.kv_head, token + lane * box_rows);
  };
  const auto look_up = [&](int item) {
    Plan plan{item, 0, nullptr};
    if (item >= items) return plan;
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const Granule box = locate(work, first_token(work, schedule.span[work.unit]));
    plan.k = box.k;
    plan.v_offset = box.v_offset;
    return plan;
  };

  Plan plan = look_up(int(blockIdx.x));
  while (plan.item < items) {
    const WorkItem work = schedule.item(p, Shape::kRows, plan.item);
    const Span span = schedule.span[work.unit];
    const int token0 = first_token(work, span),
              tiles = (end_token(work, span) - token0 + kTileTokens - 1) / kTileTokens;
    const int settled_tokens = p.cache_settled ? Keys::settled_end(span, schedule.first_pos[work.request]) - token0 : 0;
    const int settled = max(settled_tokens, 0) / kTileTokens;
    // While the kernel before runs, as many tiles as the ring takes come first.
    const int tiles_before_q = min(waited ? 1 : Shape::kSlots / 2, tiles);
    const int claim_at = max(tiles - kClaim, tiles_before_q), look_up_at = max(tiles - kLookUp, tiles_before_q);
    TaggedCounter ticket = 0;
    Plan next{};
    const auto send_q = [&]() {
      wait_once();
      mbarrier_wait(base + Smem::kQEmpty, q_parity);
      copy_q(work);
      q_parity ^= 1;
    };
    const auto claim = [&]() {
      if (claims && lane == 0) ticket = atomicAdd(args.work, 1ull);
    };
    const auto look_ahead = [&]() {
      int item = items;
      if (claims) {
        if (lane == 0) {
          item = int(gridDim.x) + counted(args.work, ticket);
          if (item == int(gridDim.x) + items - 1) *args.work = 0;  // each block claims one too many: this is the last
        }
        item = __shfl_sync(kAll, item, 0);
      }
      next = look_up(item);
    };

    for (int first = 0; first < tiles; first += batch) {
      if (first > 0) {
        const Granule box = locate(work, token0 + first * kTileTokens);
        plan.k = box.k;
        plan.v_offset = box.v_offset;
      }
      const int box_token = token0 + first * kTileTokens + lane * box_rows;
      const uint64_t k = reinterpret_cast<uint64_t>(plan.k), v = k + uint64_t(int64_t(plan.v_offset));
      const RowPlace k_place = row_place<Shape::kHeadDim>(k), v_place = row_place<Shape::kHeadDim>(v);
      const uint32_t good =
          __ballot_sync(kAll, Keys::readable(span, box_token / kTileTokens * kTileTokens) >= kTileTokens &&
                                  ((k | v) & (Shape::kHeadDim * 2 - 1)) == 0 && k_place.high == v_place.high);
      const int count = min(batch, tiles - first);
      for (int i = 0; i < count; ++i) {
        const int tile = first + i;
        if (tile == tiles_before_q) send_q();
        if (tile >= settled) wait_once();
        if (tile == claim_at) claim();
        if (tile == look_up_at) look_ahead();
        const uint32_t own_boxes = ((1u << boxes) - 1) << i * boxes;
        const bool whole = (good & own_boxes) == own_boxes;
        const int from = i * boxes + own_box, high = __shfl_sync(kAll, k_place.high, from);
        const int rows[2] = {__shfl_sync(kAll, k_place.row, from), __shfl_sync(kAll, v_place.row, from)};
#pragma unroll
        for (int part = 0; part < 2; ++part) {  // K, then V
          mbarrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
          const uint32_t slot = base + uint32_t(ring.slot * Shape::kSlotBytes), barrier = full + 8 * ring.slot;
          if (!whole) copy_part_of_tile(work, span, token0 + tile * kTileTokens, part, slot);
          if (lane == 0) {
            if (part == 0) tags[ring.slot] = plan.item;
            if (whole)
              mbarrier_expect(barrier, Shape::kSlotBytes);
            else
              mbarrier_arrive(barrier);
          }
          if (boxes > 1) __syncwarp();  // bytes are announced before they come
          if (whole && lane < boxes) {
            if (boxes == 1) {
              copy_rows(slot, args.map, {rows[part], high}, 0, barrier);
            } else {
#pragma unroll
              for (int piece = 0; piece < Shape::kParts; ++piece)
                copy_rows(slot + uint32_t(piece * Shape::kPartBytes + lane * kGranuleTokens * 128), args.map,
                          {rows[part], high}, piece, barrier);
            }
          }
          ring.next(Shape::kSlots);
        }
      }
    }
    if (tiles_before_q == tiles) send_q();
    if (claim_at >= tiles) claim();
    if (look_up_at >= tiles) look_ahead();
    plan = next;
  }
  mbarrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
  if (lane == 0) {
    tags[ring.slot] = -1;
    mbarrier_arrive(full + 8 * ring.slot);
  }
}

template <class Keys, class Shape>
__device__ void WarpgroupBlock<Keys, Shape>::consume(int warp) const {
  constexpr int kParts = Shape::kParts, kSteps = Shape::kHeadDim / 16, kHalves = Shape::kHalves;
  const auto& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = p.q_heads / p.kv_heads;
  const float c = __fmul_rn(p.scale, kLog2e);

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0 && schedule.items(p) > int(gridDim.x)) atomicExch(args.work, kFreshCounter);

  RingCursor ring;
  uint32_t q_parity = 0;
  int token = 0, end = 0;          // of the item
  int tight_lo = 0, tight_hi = 0;  // every row sees keys tight_lo .. tight_hi - 1
  int hole_begin = 0, hole_end = 0;
  bool active = false;  // this warpgroup has rows in the item
  int2 range[2] = {};   // of keys, of rows g and g + 8
  uint32_t q[kSteps][4];
  float s[32], o[kParts][32];
  float l[2];
  RunningMax m[2];

  const auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
  };

  // Looked up at the start and again at the end of an item: registers are short between.
  const auto start = [&](int item) {
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const Span span = schedule.span[work.unit];
    token = first_token(work, span);
    end = end_token(work, span);
    const int query0 = schedule.row_offset[work.request];
    const int item_rows = (schedule.row_offset[work.request + 1] - query0) * group;
    const int local = warp * 16 + g;  // of the block's rows
    const int rows = min(Shape::kRows, item_rows - work.row_block * Shape::kRows);
    active = warp / 4 * 64 < rows;
    tight_lo = Keys::row_range(p, span, work.request, schedule.last_pos[work.request]).x;
    tight_hi = Keys::row_range(p, span, work.request, schedule.first_pos[work.request]).y;
    hole_begin = span.hole_begin;
    hole_end = span.hole_end;
    mbarrier_wait(base + Smem::kQFull, q_parity);
    q_parity ^= 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = local + half * 8 < rows;
      range[half] = exists ? Keys::row_range(p, span, work.request, positions[local + half * 8]) : make_int2(0, 0);
      m[half].raw = negative_infinity();
      l[half] = 0.f;
    }
    const int row = (warp * 16 + lane / 8 % 2 * 8 + lane % 8) % Shape::kQRows;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(q[k],
                  swizzled(base + uint32_t(Smem::kQ + k / 4 * Shape::kQRows * 128), row, 128, k % 4 * 2 + lane / 16));
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + Smem::kQEmpty);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int e = 0; e < 32; ++e) o[part][e] = 0.f;
  };

  const auto finish = [&](int item) {
    const WorkItem work = schedule.item(p, Shape::kRows, item);
    const int query0 = schedule.row_offset[work.request];
    const int split_lo = split_begin(work.split), split_hi = split_begin(work.split + 1);
    const int skipped = work.row_block * Shape::kRows + warp * 16;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
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
  };

  const auto issue_scores = [&](int at) {
    const uint32_t slot = wgmma_operand_low(base + uint32_t(at * Shape::kSlotBytes));
    wgmma_begin();
    wgmma_n64k16<false, false>(s, q[0], slot);
#pragma unroll
    for (int k16 = 1; k16 < kSteps; ++k16)
      wgmma_n64k16<false, true>(s, q[k16], slot + uint32_t(k16 / 4 * Shape::kPartBytes / 16 + 2 * (k16 % 4)));
    wgmma_commit();
  };

  using Weights = uint32_t[kTileTokens / 16][4];
  const auto issue_sums = [&](int at, const Weights& weights) {
    const uint32_t slot = wgmma_operand_low(base + uint32_t(at * Shape::kSlotBytes));
    wgmma_begin();
#pragma unroll
    for (int k16 = 0; k16 < kTileTokens / 16; ++k16)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        wgmma_n64k16<true, true>(o[part], weights[k16], slot + uint32_t(part * Shape::kPartBytes / 16 + 128 * k16));
    wgmma_commit();
  };

  // Turns s from scores of the tile at `token` into weights; `rescale` is what multiplies the sums so far. The halves
  // go side by side, for one's latency hides behind the other; rows that do not exist go along, for a branch costs
  // more.
  const auto weigh = [&](float (&rescale)[2]) {
    if (token < tight_lo || token + kTileTokens > tight_hi || (token < hole_end && token + kTileTokens > hole_begin)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int key = token + i / 4 * 8 + t * 2 + i % 2, half = i / 2 % 2;
        if (half >= kHalves) continue;
        const bool visible = key >= range[half].x && key < range[half].y && (key < hole_begin || key >= hole_end);
        s[i] = visible ? s[i] : negative_infinity();
      }
    }
    float x[kHalves][4], reference[kHalves], sum[kHalves];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        x[half][n] = fmaxf(fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]),
                           fmaxf(s[(n + 4) * 4 + half * 2], s[(n + 4) * 4 + half * 2 + 1]));
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      x[half][0] = fmaxf(fmaxf(x[half][0], x[half][1]), fmaxf(x[half][2], x[half][3]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        x[half][0] = fmaxf(x[half][0], __shfl_xor_sync(0xffffffffu, x[half][0], step));
    rescale[1] = 1.f;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      rescale[half] = m[half].update(x[half][0], c);
      reference[half] = m[half].reference(c);
      sum[half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& w = s[n * 4 + half * 2 + e];
          w = softmax_weight(w, c, reference[half]);
          sum[half] = __fadd_rn(sum[half], w);
        }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) l[half] = __fmaf_rn(l[half], rescale[half], sum[half]);
  };
  // Only when the product before has ended: till then it reads its own.
  const auto pack = [&](Weights& weights) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights[n / 2][n % 2 * 2 + half] = pack_bf16(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]);
  };

  while (true) {
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    const int item = tags[ring.slot];
    if (item < 0) break;
    start(item);
    if (!active) {
      for (; token < end; token += kTileTokens) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mbarrier_wait(full + 8 * ring.slot, ring.parity);
          release(ring.slot);
          ring.next(Shape::kSlots);
        }
      }
      continue;
    }

    Weights weights;
    float rescale[2];
    issue_scores(ring.slot);
    wgmma_wait_pending<0>();
    wgmma_settle(s);
    release(ring.slot);
    ring.next(Shape::kSlots);
    weigh(rescale);  // nothing summed yet: nothing to rescale
    pack(weights);
    for (token += kTileTokens; token < end; token += kTileTokens) {
      const int sums_slot = ring.slot;
      const uint32_t sums_parity = ring.parity;
      ring.next(Shape::kSlots);
      mbarrier_wait(full + 8 * ring.slot, ring.parity);
      issue_scores(ring.slot);
      mbarrier_wait(full + 8 * sums_slot, sums_parity);
      issue_sums(sums_slot, weights);
      wgmma_wait_pending<1>();  // the scores
      wgmma_settle(s);
      release(ring.slot);
      ring.next(Shape::kSlots);
      weigh(rescale);
      wgmma_wait_pending<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) wgmma_settle(o[part]);
      release(sums_slot);
      pack(weights);
      if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int e = 0; e < 32; ++e) o[part][e] = __fmul_rn(o[part][e], rescale[e % 4 / 2]);
      }
    }
    mbarrier_wait(full + 8 * ring.slot, ring.parity);
    issue_sums(ring.slot, weights);
    wgmma_wait_pending<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) wgmma_settle(o[part]);
    release(ring.slot);
    ring.next(Shape::kSlots);
    finish(item);
  }
}

template <class Keys, class Shape>
__global__ void __launch_bounds__(Shape::kBoundThreads, Shape::kBlocks)
    warpgroup_attention_kernel(const __grid_constant__ WarpgroupArgs<Keys> args) {
#if VERICACHE_HAS_WGMMA
  WarpgroupBlock<Keys, Shape> block(args, dynamic_smem());
  block.init_barriers();
  mbarrier_init_fence();
  if (!args.p.tables_settled) wait_for_previous_kernel();
  block.schedule.build(args.p, Shape::kRows);  // its barriers also order the barriers' initialization
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp < Shape::kConsumerWarps) {
    take_registers<Shape::kConsumerRegisters>();
    block.consume(warp);
  } else {
    give_registers<Shape::kProducerRegisters>();
    if (warp == Shape::kConsumerWarps) block.produce();
  }
#endif
}

// A counter behind the partial states.
inline size_t warpgroup_attention_workspace_bytes(int64_t rows, int q_heads, int max_splits, int head_dim) {
  return PartialStates::bytes(rows * q_heads * max_splits, head_dim) + sizeof(TaggedCounter);
}

template <class Keys, class Shape>
void launch_warpgroup_attention(const typename Keys::Params& p, int max_splits, cudaStream_t stream) {
  constexpr auto kernel = warpgroup_attention_kernel<Keys, Shape>;
  const DeviceInfo info = device_info();
  const size_t smem = WarpgroupSmem<Shape>::template bytes<Keys>(p.requests, p.kv_heads);
  VC_CHECK(smem <= size_t(info.smem_optin), p.requests,
           " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const int group = p.q_heads / p.kv_heads;
  const int64_t bound = (int64_t(p.rows) * group / Shape::kRows + p.requests) * p.kv_heads * max_splits;
  const int grid = int(std::min<int64_t>(info.multiprocessors * Shape::kBlocks, std::max<int64_t>(bound, 1)));

  const int64_t states = int64_t(p.rows) * p.q_heads * max_splits;
  const auto partial = PartialStates::at(p.workspace, states, Shape::kHeadDim);
  const bool boxes_of_tiles = p.page_size >= kTileTokens;
  static const CUtensorMap maps[2] = {row_map(Shape::kHeadDim, kGranuleTokens, false),
                                      row_map(Shape::kHeadDim, kTileTokens, true)};
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(grid), dim3(Shape::kThreads), smem}, info, stream,
         WarpgroupArgs<Keys>{p, partial, reinterpret_cast<TaggedCounter*>(partial.ml + states), max_splits,
                             boxes_of_tiles ? kTileTokens : kGranuleTokens, maps[boxes_of_tiles]});
  launch_merge<Shape::kHeadDim>(RowSplits<Keys>{p, max_splits}, max_splits, p.rows, p.q_heads, partial, p.out, info,
                                stream);
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
