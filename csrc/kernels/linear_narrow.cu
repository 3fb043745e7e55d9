// SPDX-License-Identifier: Apache-2.0
// linear.cu's product for 1 to 128 rows of x ("tokens") where its plan has two or four parts of k: the same sums, bit
// for bit, in other blocks; and linear_rope_write of the same shapes. For Hopper.
//
// Why: with 64 tokens three things cost linear.cu time. Its clusters lie two blocks to a multiprocessor on many of
// them; each block moves up to three quarters of a float32 tile through the cluster; and each warpgroup reads x from
// shared memory again. Here a block takes all parts of a smaller tile, one after the other: nothing to exchange, no
// cluster, but x is read by as many more blocks. With four parts and more than kSoloTokens a block takes two parts of a
// tile twice as large: pairs of blocks, which read x half as often and exchange a third of the bytes.
//
// Tiles are the smallest of 32, 48, 64 and 96 rows of w (pairs: 64 and 96) of which a multiprocessor gets but one.
//
// The tokens take the 64-wide side of wgmma m64nNk16, w's rows its N: one warpgroup multiplies the whole tile and reads
// each operand once. Tokens are copied in eights; what lies behind the last of them in shared memory goes into rows of
// the product that nobody uses. Two warpgroups multiply 65 to 128 tokens, 64 each, by the same w.
//
// Grid: a block, or a cluster of two, for each tile. Block: one or two warpgroups multiply; one thread of another
// copies; all add and write. Shared memory: a ring of stages, each one chunk of 64 k (pairs), two or four, x
// [tokens][64] of them all, then w [kRows][64], in the layout of device/wgmma.cuh; at the end, over the ring, the sums
// (Shares below); then a barrier "full" and a barrier "empty" for each stage, and one for the sums, a block's own and
// those that come from the other. A block takes all of a multiprocessor's shared memory where each can have its own,
// else half.
//
// A stage is given back when the steps that read it are done, and the next stage's steps start before that if it has
// landed; if not, it is not waited for while this one is held back.
//
// Sums travel as bulk copies into the shared memory of the block that adds them, which waits for their bytes. The
// barrier of the cluster is split in two halves, so that it is waited for only before sending and before leaving.
//
// linear_rope_write: a tile has 8 or 16 pairs of each of its heads (device/linear_rope.cuh); a block adds whole pairs.
// With QK-norm it has 32 pairs of one head, and the blocks of a head are a cluster (device/linear_qk_norm.cuh).
//
// Reduction order (R1): that of linear.cu, p0 + p1, or ((p0 + p1) + p2) + p3, of the same parts, each the same chain of
// k16 steps; p0 + p1, or all, are added in registers. That the instruction's sum is the same with the operands' sides
// exchanged is held by bench/gpu/dense_check.cu (linear_invariance: 1 to 256 rows, of which those above 128 are
// linear.cu's).
#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/l2_policy.cuh"
#include "device/launch.cuh"
#include "device/linear_out.cuh"
#include "device/linear_qk_norm.cuh"
#include "device/linear_rope.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "linear_plan.h"

namespace vericache::cuda {
namespace {

constexpr int kChunkK = 64, kRowBytes = kChunkK * 2;  // k a chunk; bytes of a row of it
constexpr int kMostParts = 4, kMostTokens = 128;
constexpr int kGroupTokens = 64;  // of a multiplying warpgroup
constexpr int kSoloTokens = 32;   // most tokens of a block with all of four parts
constexpr int kMaxStages = 16;
constexpr int kBarrierBytes = 8 * (2 * kMaxStages + 1);
constexpr int kEndBytes = kBarrierBytes + norm_sums_bytes(kGroupTokens);
constexpr int kSharedSmem = 113 * 1024;  // of a block that leaves room for another

enum class NarrowEnd { kStore, kRope, kNormRope };  // linear, linear_rope_write without QK-norm and with it

// kRows: of w in a tile. kGroup: parts of k a block takes. kRanks: blocks of a tile. kChunks: of a stage. kTokens: 64,
// or 128 in two warpgroups.
template <int kRows_, int kGroup_, int kRanks_, int kChunks_, int kTokens_, NarrowEnd kEnd_>
struct NarrowShape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kMultiplying = 2 * kTokens, kThreads = kMultiplying + 128;  // thread kMultiplying copies
  static constexpr int kRows = kRows_, kGroup = kGroup_, kRanks = kRanks_, kChunks = kChunks_;
  static constexpr NarrowEnd kEnd = kEnd_;
  static constexpr bool kRotates = kEnd != NarrowEnd::kStore;
  // The products read kTokens rows of x from each chunk, though fewer may be there: still within the stage.
  static_assert(kChunks * kRows + 8 >= kGroupTokens);
  // Pairs of each head in a tile that rotates.
  static constexpr int kRun = kEnd == NarrowEnd::kNormRope ? kNormRun : 32 / kGroup;
};
template <int kRows, int kParts, int kTokens, NarrowEnd kEnd>
using SoloShape = NarrowShape<kRows, kParts, 1, kParts == 4 ? 4 : 2, kTokens, kEnd>;
template <int kRows, int kTokens, NarrowEnd kEnd>
using PairShape = NarrowShape<kRows, 2, 2, 1, kTokens, kEnd>;
template <int kParts>
using NormShape = NarrowShape<2 * kNormRun, kParts, 1, 2, kGroupTokens, NarrowEnd::kNormRope>;

struct NarrowArgs {
  LinearParams p;
  int begin[kMostParts + 1];                   // first chunk of each part of k, and the end
  int box_tokens;                              // that are copied
  int stages, stage_bytes, x_bytes, barriers;  // barriers: their offset in shared memory
  bool wide;                                   // bias, residual and out can be accessed 4 elements at a time
  uint64_t w_policy;                           // of device/l2_policy.cuh
  int head_runs_log2;                          // RopeTile::make
  int norm_sums;                               // offset of finish_norm_rope's sums in shared memory
  RopeWriteParams rope;
};

// Who adds which rows of a tile, and where the sums lie meanwhile. A sum is all parts; of a pair of blocks p0 + p1, p2,
// p3. Each block has room for all sums of its own rows [sum][kTokens][pitch], then for what it sends [kTokens][pitch of
// the other].
template <class Shape>
struct Shares {
  static constexpr int kRows = Shape::kRows, kRanks = Shape::kRanks, kTokens = Shape::kTokens;
  static constexpr int kSums = kRanks == 1 ? 1 : 3;
  // Of a pair the second block has two sums, so the first, which gets two, adds a third of the rows. Multiples of 16:
  // low and high rows together.
  static constexpr int kFirst = kRanks == 1 ? kRows : kRows / 3 / 16 * 16;

  static __host__ __device__ constexpr int begin(int rank) { return rank == 0 ? 0 : rank == 1 ? kFirst : kRows; }
  static __host__ __device__ constexpr int rows(int rank) { return begin(rank + 1) - begin(rank); }
  // 8 more than a multiple of 16: a warp's stores meet no bank twice.
  static __host__ __device__ constexpr int pitch(int rank) { return rows(rank) + 8; }
  // A block's sums are rank, rank + 1, ..
  static __host__ __device__ constexpr int sums(int rank) { return rank + 1; }
  // Offsets in floats.
  static __host__ __device__ constexpr int own(int rank, int sum) { return sum * kTokens * pitch(rank); }
  static __host__ __device__ constexpr int sent(int rank, int i) {
    return own(rank, kSums) + i * kTokens * pitch(1 - rank);
  }
  static constexpr int floats() { return kRanks == 1 ? own(0, 1) : std::max(sent(0, sums(0)), sent(1, sums(1))); }
};

// The copies of one block, stage after stage, part after part, by one thread.
template <class Shape>
struct StageCopier {
  static constexpr int kRows = Shape::kRows, kChunks = Shape::kChunks;
  const NarrowArgs& args;
  const CUtensorMap &w_map, &x_map;
  const uint32_t ring, full;
  const int tile, end_part;
  int part, chunk;  // of the next stage to copy

  __device__ __forceinline__ bool done() const { return part == end_part; }

  // `w`, `x`: which operands; the barrier expects both with w. A part's last stage may have chunks that are not used.
  __device__ void copy(int slot, bool w, bool x) const {
    const uint32_t stage = ring + slot * args.stage_bytes, barrier = full + 8 * slot;
    const auto heads = RopeTile<Shape::kRun>::make(tile, kRows, args.head_runs_log2);
    if (w) mbarrier_expect(barrier, args.stage_bytes);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int k = (chunk + c) * kChunkK;
      const uint32_t w_dst = stage + args.x_bytes + c * kRows * kRowBytes;
      if (w && Shape::kRotates) copy_heads(w_dst, w_map, k, heads.first_pair, heads.first_head, barrier, args.w_policy);
      if (w && !Shape::kRotates) copy_box(w_dst, w_map, k, tile * kRows, barrier, args.w_policy);
      if (x) copy_box(stage + c * args.box_tokens * kRowBytes, x_map, k, 0, barrier, kDropAsUsual);
    }
  }

  __device__ __forceinline__ void advance() {
    chunk += kChunks;
    if (chunk >= args.begin[part + 1]) chunk = args.begin[++part];
  }
};

// Warpgroup 0: the sums of this block's parts. acc[0] is the only sum, or p0 + p1, or p2, and then acc[1] is p3.
template <class Shape>
__device__ __forceinline__ void multiply(const NarrowArgs& args, float (&acc)[2][Shape::kRows / 2], int rank,
                                         int warpgroup, uint32_t ring, uint32_t full, uint32_t empty) {
  constexpr int kRows = Shape::kRows, kGroup = Shape::kGroup, kChunks = Shape::kChunks;
  const int lane = threadIdx.x % 32;
  const auto give_back = [&](int slot) {
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    __syncwarp();
  };
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) acc[0][i] = acc[1][i] = 0.0f;
  const uint64_t next_x = args.box_tokens * (kRowBytes / 16);  // from chunk to chunk
  constexpr uint64_t kNextW = kRows * (kRowBytes / 16);
  const uint32_t own_x = Shape::kTokens == kGroupTokens ? 0 : warpgroup * kGroupTokens * kRowBytes;
  RingCursor cursor;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int chunks = args.begin[rank * kGroup + g + 1] - args.begin[rank * kGroup + g];
    float (&now)[kRows / 2] = acc[g == 0 ? 0 : 1];
    wgmma_settle(now);
    int held = -1;  // the stage whose steps may still run
    for (int chunk = 0; chunk < chunks; chunk += kChunks) {
      mbarrier_wait(full + 8 * cursor.slot, cursor.parity);
      const uint32_t stage = ring + cursor.slot * args.stage_bytes;
      const uint64_t x = wgmma_operand(stage + own_x), w = wgmma_operand(stage + args.x_bytes);
      const auto steps = [&](int c) {
#pragma unroll
        for (int step = 0; step < kChunkK / 16; ++step)
          wgmma_k16(now, x + c * next_x + 2 * step, w + c * kNextW + 2 * step);
      };
      if (kChunks == 1 || chunks - chunk >= kChunks) {
        wgmma_begin();
#pragma unroll
        for (int c = 0; c < kChunks; ++c) steps(c);
        wgmma_commit();
      } else {
        for (int c = 0; c < chunks - chunk; ++c) {
          wgmma_begin();
          steps(c);
          wgmma_commit();
        }
      }
      wgmma_wait<1>();
      if (held >= 0) give_back(held);
      held = cursor.slot;
      cursor.next(args.stages);
      if (!__all_sync(0xffffffffu, mbarrier_done_now(full + 8 * cursor.slot, cursor.parity))) {
        wgmma_wait();
        give_back(held);
        held = -1;
      }
    }
    wgmma_wait();
    if (held >= 0) give_back(held);
    wgmma_settle(now);
    if (kGroup == 4 && g > 0) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        acc[0][i] += now[i];
        now[i] = 0.0f;
      }
    }
  }
  if (kGroup == 2 && rank == 0) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) acc[0][i] += acc[1][i];
  }
}

// A warp's 16 tokens of the block's sums to shared memory, each owner's rows apart.
template <class Shape>
__device__ __forceinline__ void spill(const float (&acc)[2][Shape::kRows / 2], float* sums, int rank) {
  using S = Shares<Shape>;
  const int lane = threadIdx.x % 32, token = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < S::kRanks; ++i) {
    if (i >= S::sums(rank)) break;
#pragma unroll
    for (int owner = 0; owner < S::kRanks; ++owner) {
      const int pitch = S::pitch(owner);
      float* dst = sums + (owner == rank ? S::own(rank, rank + i) : S::sent(rank, i)) + token * pitch + column;
#pragma unroll
      for (int j = S::begin(owner) / 8; j < S::begin(owner + 1) / 8; ++j) {
        float* at = dst + 8 * j - S::begin(owner);
        *reinterpret_cast<float2*>(at) = make_float2(acc[i][4 * j], acc[i][4 * j + 1]);
        *reinterpret_cast<float2*>(at + 8 * pitch) = make_float2(acc[i][4 * j + 2], acc[i][4 * j + 3]);
      }
    }
  }
}

// One thread sends `warp`'s 16 tokens of the sums of the other's rows to it.
template <class Shape>
__device__ __forceinline__ void send(uint32_t sums, uint32_t arrived, int rank, int warp) {
  using S = Shares<Shape>;
  const int other = 1 - rank, first = warp * 16 * S::pitch(other);
  for (int i = 0; i < S::sums(rank); ++i)
    copy_to_rank(map_to_rank(sums + 4 * (S::own(other, rank + i) + first), other),
                 sums + 4 * (S::sent(rank, i) + first), 16 * S::pitch(other) * 4, map_to_rank(arrived, other));
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTokens == kGroupTokens ? 2 : 1)
    linear_narrow_wgmma(const __grid_constant__ NarrowArgs args, const __grid_constant__ CUtensorMap w_map,
                        const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shares<Shape>;
  constexpr int kRows = Shape::kRows, kGroup = Shape::kGroup;
  constexpr int kMultiplying = Shape::kMultiplying, kThreads = Shape::kThreads;
  constexpr bool kAlone = Shape::kRanks == 1;
  [[maybe_unused]] constexpr bool kNorm = Shape::kEnd == NarrowEnd::kNormRope;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int rank = int(blockIdx.x) % S::kRanks, tile = int(blockIdx.x) / S::kRanks;
  const uint32_t ring = smem_address(smem), full = ring + args.barriers, empty = full + 8 * kMaxStages;
  const uint32_t arrived = empty + 8 * kMaxStages;
  if (ring % 1024 != 0) __trap();
  const int slices = (args.p.rows + 15) / 16;  // of 16 tokens: a warp's
  using Copier = StageCopier<Shape>;
  Copier copier{args, w_map, x_map, ring, full, tile, (rank + 1) * kGroup, rank * kGroup, args.begin[rank * kGroup]};
  let_next_kernel_start();
  if (kNorm) cluster_arrive();  // has started, so that its shared memory can be written
  if (threadIdx.x == kMultiplying) {
    for (int s = 0; s < args.stages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, kMultiplying / 32);
    }
    mbarrier_init(arrived, kMultiplying + (kAlone ? 0 : 1));
    mbarrier_init_fence();
    if (!kAlone) mbarrier_expect(arrived, (S::kSums - S::sums(rank)) * slices * 16 * S::pitch(rank) * 4);
    prefetch_map(x_map);
    if (args.p.w_settled) {  // w alone before the wait
      Copier first = copier;
      for (int s = 0; s < args.stages && !first.done(); ++s, first.advance()) first.copy(s, true, false);
    }
    wait_for_previous_kernel();
    for (int s = 0; s < args.stages && !copier.done(); ++s, copier.advance()) copier.copy(s, !args.p.w_settled, true);
  } else {
    wait_for_previous_kernel();
    constexpr int kIdle = kMultiplying + 32;
    if (Shape::kRotates && threadIdx.x >= kIdle)
      prefetch_rope(args.rope, 0, args.p.rows, threadIdx.x - kIdle, kThreads - kIdle);
  }
  __syncthreads();  // the barriers are initialized

  float* sums = reinterpret_cast<float*>(smem);
  if (warp >= kMultiplying / 32) {
    if (threadIdx.x == kMultiplying) {
      for (RingCursor cursor; !copier.done(); copier.advance(), cursor.next(args.stages)) {
        while (!mbarrier_done(empty + 8 * cursor.slot, cursor.parity)) {
        }
        copier.copy(cursor.slot, true, true);
      }
    }
    __syncwarp();
    if (!kAlone) {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    float acc[2][kRows / 2];
    multiply<Shape>(args, acc, rank, warp / 4, ring, full, empty);
    named_barrier(1, kMultiplying);  // the whole ring has been used
    if (!kAlone) cluster_arrive();   // and may be overwritten by the others
    if (warp < slices) spill<Shape>(acc, sums, rank);
    mbarrier_arrive(arrived);
    if (!kAlone) {
      fence_for_async_proxy();
      __syncwarp();
      cluster_wait();  // so are theirs, and their barriers are initialized
      if (threadIdx.x % 32 == 0 && warp < slices) send<Shape>(ring, arrived, rank, warp);
      __syncwarp();
    }
  }
  mbarrier_wait(arrived, 0);      // the sums are here
  if (!kAlone) cluster_arrive();  // what the others sent has been received

  const int first = S::begin(rank), pitch = S::pitch(rank);
  const auto total = [&](int token, int row) {
    const auto sum = [&](int i) {
      return *reinterpret_cast<const float4*>(sums + S::own(rank, i) + token * pitch + row - first);
    };
    float4 v = sum(0);
#pragma unroll
    for (int i = 1; i < S::kSums; ++i) {
      const float4 next = sum(i);
      v = make_float4(v.x + next.x, v.y + next.y, v.z + next.z, v.w + next.w);
    }
    return v;
  };
  if constexpr (kNorm) {
    const auto head = RopeTile<Shape::kRun>::make(tile, kRows, args.head_runs_log2);
    cluster_wait();
    finish_norm_rope<Shape::kTokens, kThreads>(args.rope, static_cast<const __nv_bfloat16*>(args.p.bias),
                                               head.first_head, head.first_pair, args.head_runs_log2, args.p.rows,
                                               reinterpret_cast<float*>(smem + args.norm_sums), total);
  } else if constexpr (Shape::kRotates) {
    const auto heads = RopeTile<Shape::kRun>::make(tile, kRows, args.head_runs_log2);
    const int vectors = S::rows(rank) / 8;  // of 4 pairs
    for (int i = threadIdx.x; i < args.p.rows * vectors; i += kThreads) {
      const int token = i / vectors, v = i % vectors, row = first + v / 2 * 16 + v % 2 * 4;
      if (heads.head(row) * args.rope.head_dim >= args.p.n) continue;
      finish_rope4(
          args.rope, static_cast<const __nv_bfloat16*>(args.p.bias), token, heads.head(row), heads.pair(row),
          [&] { return total(token, row); }, [&] { return total(token, row + 8); });
    }
  } else {
    const int vectors = S::rows(rank) / 4;
    for (int i = threadIdx.x; i < args.p.rows * vectors; i += kThreads) {
      const int token = i / vectors, row = first + i % vectors * 4, n = tile * kRows + row;
      if (n < args.p.n) finish4(args.p, args.wide, token, n, total(token, row));
    }
  }
  if (!kAlone) cluster_wait();  // no block leaves while what it sent is being read
#else
  __trap();  // never launched elsewhere
#endif
}

template <class Shape>
bool launch_narrow(const LinearParams& p, const RopeWriteParams* rope, const LinearHopperPlan& plan,
                   const DeviceInfo& info, cudaStream_t stream) {
  using S = Shares<Shape>;
  using Tile = RopeTile<Shape::kRun>;
  constexpr int kRows = Shape::kRows, kChunks = Shape::kChunks;
  const int box_tokens = copied_tokens(p.rows);
  NarrowArgs args{};
  args.p = p;
  for (int i = 0; i <= plan.splits; ++i) args.begin[i] = plan.part_begin(i);
  args.wide = can_access_wide(p);
  args.w_policy = w_policy(p);
  args.box_tokens = box_tokens;
  args.x_bytes = kChunks * box_tokens * kRowBytes;
  args.stage_bytes = args.x_bytes + kChunks * kRows * kRowBytes;
  int tiles = (p.n + kRows - 1) / kRows;
  CUtensorMap w_map;
  int cluster = Shape::kRanks;
  if constexpr (Shape::kRotates) {
    args.rope = *rope;
    args.head_runs_log2 = Tile::runs_log2(rope->head_dim);
    tiles = Tile::count(*rope, kRows);
    w_map = bf16_heads_map(p.w, p.n / rope->head_dim, rope->head_dim, p.k, Shape::kRun, kRows / (2 * Shape::kRun));
    if (Shape::kEnd == NarrowEnd::kNormRope) cluster = 1 << args.head_runs_log2;  // a head
  } else {
    w_map = bf16_matrix_map(p.w, p.n, p.k, p.k, kRows);
  }
  const CUtensorMap x_map = bf16_matrix_map(p.x, p.rows, p.k, p.rows > 1 ? p.x_stride_row : p.k, box_tokens);
  const int blocks = tiles * Shape::kRanks;
  if (Shape::kTokens > kGroupTokens && blocks > info.multiprocessors) return false;  // one needs all of the memory
  const int most = blocks <= info.multiprocessors ? info.smem_optin : std::min(kSharedSmem, info.smem_optin);
  const int budget = most - kEndBytes;
  args.stages = std::min(kMaxStages, budget / args.stage_bytes);
  args.barriers = std::max(args.stages * args.stage_bytes, S::floats() * 4);
  VC_CHECK(args.stages >= 2 && args.barriers <= budget, "linear: a block may use ", budget,
           " bytes of shared memory on this GPU, ", std::max(2 * args.stage_bytes, S::floats() * 4), " are needed.");
  LaunchShape shape;
  shape.block = dim3(Shape::kThreads);
  args.norm_sums = args.barriers + kBarrierBytes;
  shape.smem = size_t(args.barriers + kEndBytes);
  shape.cluster = cluster;
  shape.grid = dim3(unsigned(blocks));
  allow_all_smem<linear_narrow_wgmma<Shape>>(info);
  launch(linear_narrow_wgmma<Shape>, shape, info, stream, args, w_map, x_map);
  return true;
}

// In the smallest tiles of which a multiprocessor gets but one; no bits depend on their size.
template <int kParts, NarrowEnd kEnd>
bool launch_tiles(const LinearParams& p, const RopeWriteParams* rope, const LinearHopperPlan& plan,
                  const DeviceInfo& info, cudaStream_t stream) {
  const auto launch_rows = [&]<int kRows>() {
    if (p.n > kRows * info.multiprocessors) return false;
    const bool more = p.rows > kGroupTokens;
    if constexpr (kParts == 4) {
      if (more) return launch_narrow<PairShape<2 * kRows, 128, kEnd>>(p, rope, plan, info, stream);
      if (p.rows > kSoloTokens) return launch_narrow<PairShape<2 * kRows, 64, kEnd>>(p, rope, plan, info, stream);
    } else {
      if (more) return launch_narrow<SoloShape<kRows, kParts, 128, kEnd>>(p, rope, plan, info, stream);
    }
    return launch_narrow<SoloShape<kRows, kParts, 64, kEnd>>(p, rope, plan, info, stream);
  };
  constexpr int kSmallest = 32;
  if (3 * p.n < kSmallest * info.multiprocessors) return false;  // too few blocks: slower than linear.cu
  if (launch_rows.template operator()<kSmallest>()) return true;
  constexpr bool kWholeHeads = kEnd == NarrowEnd::kStore || kParts == 4;  // of 48 rows
  if constexpr (kWholeHeads)
    if (launch_rows.template operator()<48>()) return true;
  if constexpr (kParts == 2) return launch_rows.template operator()<64>() || launch_rows.template operator()<96>();
  return false;
}

template <NarrowEnd kEnd>
bool launch_plan(const LinearParams& p, const RopeWriteParams* rope, const LinearHopperPlan& plan,
                 const DeviceInfo& info, cudaStream_t stream) {
  if (plan.splits == 4) return launch_tiles<4, kEnd>(p, rope, plan, info, stream);
  return plan.splits == 2 && launch_tiles<2, kEnd>(p, rope, plan, info, stream);
}

}  // namespace

bool fuses_qk_norm(const LinearParams& p) { return p.rows <= kGroupTokens && linear_hopper_plan(p.n, p.k).splits > 1; }

bool linear_narrow(const LinearParams& p, const RopeWriteParams* rope, const LinearHopperPlan& plan,
                   const DeviceInfo& info, cudaStream_t stream) {
  if (p.swiglu || p.rows > kMostTokens) return false;
  if (rope && has_qk_norm(*rope)) {
    return plan.splits == 4 ? launch_narrow<NormShape<4>>(p, rope, plan, info, stream)
                            : launch_narrow<NormShape<2>>(p, rope, plan, info, stream);
  }
  if (rope) return launch_plan<NarrowEnd::kRope>(p, rope, plan, info, stream);
  return launch_plan<NarrowEnd::kStore>(p, rope, plan, info, stream);
}

}  // namespace vericache::cuda
