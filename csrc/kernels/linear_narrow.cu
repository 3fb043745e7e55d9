// SPDX-License-Identifier: Apache-2.0
// linear.cu's product for 1 to 64 rows of x ("tokens") where its plan has four parts of k and tiles of 128 or 192 rows
// of w: the same sums, bit for bit, in other blocks. For Hopper.
//
// Why: with 64 tokens three things cost linear.cu time. Its clusters of four lie two blocks to a multiprocessor on many
// of them; each block moves three quarters of a float32 tile through the cluster; and each warpgroup reads x from
// shared memory again. Here a block takes all four parts of a quarter of the tile, one after the other (nothing to
// exchange, no cluster; x is read by four times as many blocks), or two parts of a half (pairs of blocks; a third of
// the bytes to exchange), or one part of the tile (clusters of four, where x would weigh too much). narrow_group()
// chooses.
//
// The tokens take the 64-wide side of wgmma m64nNk16, w's rows its N: one warpgroup multiplies the whole tile and reads
// each operand once. Of fewer than 64 tokens only 8, 16 or 32 are copied; what lies behind them in shared memory goes
// into rows of the product that nobody uses.
//
// Grid: a block for each group of parts of each tile, the groups of a tile one cluster. Block: warpgroup 0 multiplies;
// one thread of warpgroup 1 copies; both add and write. Shared memory: a ring of stages, each one or four chunks of 64
// k, x [tokens][64] of them all, then w [kRows][64], in the layout of device/wgmma.cuh; at the end, over the ring, the
// sums (Shares below); then a barrier "full" and a barrier "empty" for each stage, and one for the sums that arrive.
//
// A stage is given back when the steps that read it are done, and the next stage's steps start before that if it has
// landed; if not, it is not waited for while this one is held back.
//
// Sums travel as bulk copies into the shared memory of the block that adds them, which waits for their bytes. The
// barrier of the cluster is split in two halves, so that it is waited for only before sending and before leaving.
//
// Reduction order (R1): that of linear.cu, ((p0 + p1) + p2) + p3 of the same parts, each the same chain of k16 steps;
// p0 + p1, or all, are added in registers. That the instruction's sum is the same with the operands' sides exchanged is
// held by bench/gpu/dense_check.cu (linear_invariance: 1 to 256 rows, of which those above 64 are linear.cu's).
#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/linear_out.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "linear_plan.h"

namespace vericache::cuda {
namespace {

constexpr int kChunkK = 64, kRowBytes = kChunkK * 2;  // k a chunk; bytes of a row of it
constexpr int kParts = 4, kTokens = 64;
constexpr int kMultiplying = 128, kThreads = 2 * kMultiplying;  // thread kMultiplying copies
constexpr int kMaxStages = 16;
constexpr int kBarrierBytes = 8 * (2 * kMaxStages + 1);
constexpr int kSharedSmem = 113 * 1024;  // of a block that leaves room for another

struct NarrowArgs {
  LinearParams p;
  int begin[kParts + 1];                       // first chunk of each part of k, and the end
  int box_tokens;                              // that are copied: 8, 16, 32 or 64
  int stages, stage_bytes, x_bytes, barriers;  // barriers: their offset in shared memory
  bool wide;                                   // bias, residual and out can be accessed 4 elements at a time
};

// Who adds which rows of a tile, and where the sums lie meanwhile. A sum is a part, or p0 + p1, or all four. Each block
// has room for all sums of its own rows [sum][64 tokens][pitch], then for what it sends [64 tokens][pitch of the
// owner].
template <int kRows, int kGroup>
struct Shares {
  static constexpr int kRanks = kParts / kGroup;
  static constexpr int kSums = kGroup == 1 ? 4 : kGroup == 2 ? 3 : 1;
  // Of a pair the second block has two sums, so the first, which gets two, adds a third of the rows.
  static constexpr int kFirstOfPair = kRows / 3 / 8 * 8;

  static __host__ __device__ constexpr int begin(int rank) {
    if (kGroup == 2) return rank == 0 ? 0 : rank == 1 ? kFirstOfPair : kRows;
    return rank * (kRows / kRanks);
  }
  static __host__ __device__ constexpr int rows(int rank) { return begin(rank + 1) - begin(rank); }
  // 8 more than a multiple of 16: a warp's stores meet no bank twice.
  static __host__ __device__ constexpr int pitch(int rank) { return rows(rank) + 8; }
  // A block's sums are rank, rank + 1, ..
  static __host__ __device__ constexpr int sums(int rank) { return kGroup == 2 ? rank + 1 : 1; }
  // Offsets in floats.
  static __host__ __device__ constexpr int own(int rank, int sum) { return sum * kTokens * pitch(rank); }
  static __host__ __device__ constexpr int sent(int rank, int owner, int i) {
    return own(rank, kSums) + (kGroup == 1 ? owner - (owner > rank) : i) * kTokens * pitch(owner);
  }
  static constexpr int floats() {
    if (kGroup == 4) return own(0, 1);
    if (kGroup == 1) return own(0, kSums + kRanks - 1);
    return std::max(sent(0, 1, sums(0)), sent(1, 0, sums(1)));
  }
};

// The copies of one block, stage after stage, part after part, by one thread.
template <int kRows, int kChunks>
struct StageCopier {
  const NarrowArgs& args;
  const CUtensorMap &w_map, &x_map;
  const uint32_t ring, full;
  const int n0, end_part;
  int part, chunk;  // of the next stage to copy

  __device__ __forceinline__ bool done() const { return part == end_part; }

  // `w`, `x`: which operands; the barrier expects both with w. A part's last stage may have chunks that are not used.
  __device__ void copy(int slot, bool w, bool x) const {
    const uint32_t stage = ring + slot * args.stage_bytes, barrier = full + 8 * slot;
    if (w) mbarrier_expect(barrier, args.stage_bytes);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int k = (chunk + c) * kChunkK;
      if (w) copy_box(stage + args.x_bytes + c * kRows * kRowBytes, w_map, k, n0, barrier);
      if (x) copy_box(stage + c * args.box_tokens * kRowBytes, x_map, k, 0, barrier);
    }
  }

  __device__ __forceinline__ void advance() {
    chunk += kChunks;
    if (chunk >= args.begin[part + 1]) chunk = args.begin[++part];
  }
};

// Warpgroup 0: the sums of this block's parts. acc[0] and acc[1] are p0 + p1 and nothing, or p2 and p3, of a pair's;
// else acc[0] is the block's only sum.
template <int kRows, int kGroup, int kChunks, int kKept>
__device__ __forceinline__ void multiply(const NarrowArgs& args, float (&acc)[kKept][kRows / 2], int rank,
                                         uint32_t ring, uint32_t full, uint32_t empty) {
  const int lane = threadIdx.x % 32;
  const auto give_back = [&](int slot) {
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    __syncwarp();
  };
#pragma unroll
  for (int kept = 0; kept < kKept; ++kept)
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) acc[kept][i] = 0.0f;
  const uint64_t next_x = args.box_tokens * (kRowBytes / 16);  // from chunk to chunk
  constexpr uint64_t kNextW = kRows * (kRowBytes / 16);
  BarrierSlot slot;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int chunks = args.begin[rank * kGroup + g + 1] - args.begin[rank * kGroup + g];
    float (&now)[kRows / 2] = acc[g < kKept ? g : 1];
    wgmma_settle(now);
    int held = -1;  // the stage whose steps may still run
    for (int chunk = 0; chunk < chunks; chunk += kChunks) {
      mbarrier_wait(full + 8 * slot.index, slot.parity);
      const uint32_t stage = ring + slot.index * args.stage_bytes;
      const uint64_t x = wgmma_operand(stage), w = wgmma_operand(stage + args.x_bytes);
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
      held = slot.index;
      slot.advance(args.stages);
      if (!__all_sync(0xffffffffu, mbarrier_done_now(full + 8 * slot.index, slot.parity))) {
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
    for (int i = 0; i < kRows / 2; ++i) acc[0][i] += acc[kKept - 1][i];
  }
}

// A warp's 16 tokens of the block's sums to shared memory, each owner's rows apart.
template <int kRows, int kGroup, int kKept>
__device__ __forceinline__ void spill(const float (&acc)[kKept][kRows / 2], float* sums, int rank) {
  using S = Shares<kRows, kGroup>;
  const int lane = threadIdx.x % 32, token = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < (kGroup == 2 ? 2 : 1); ++i) {
    if (i >= S::sums(rank)) break;
#pragma unroll
    for (int owner = 0; owner < S::kRanks; ++owner) {
      const int pitch = S::pitch(owner);
      float* dst = sums + (owner == rank ? S::own(rank, rank + i) : S::sent(rank, owner, i)) + token * pitch + column;
#pragma unroll
      for (int j = S::begin(owner) / 8; j < S::begin(owner + 1) / 8; ++j) {
        float* at = dst + 8 * j - S::begin(owner);
        *reinterpret_cast<float2*>(at) = make_float2(acc[i][4 * j], acc[i][4 * j + 1]);
        *reinterpret_cast<float2*>(at + 8 * pitch) = make_float2(acc[i][4 * j + 2], acc[i][4 * j + 3]);
      }
    }
  }
}

// One thread sends `warp`'s 16 tokens of the block's sums to their owners.
template <int kRows, int kGroup>
__device__ __forceinline__ void send(uint32_t sums, uint32_t arrived, int rank, int warp) {
  using S = Shares<kRows, kGroup>;
  for (int owner = 0; owner < S::kRanks; ++owner) {
    if (owner == rank) continue;
    const int first = warp * 16 * S::pitch(owner);
    for (int i = 0; i < S::sums(rank); ++i)
      copy_to_rank(map_to_rank(sums + 4 * (S::own(owner, rank + i) + first), owner),
                   sums + 4 * (S::sent(rank, owner, i) + first), 16 * S::pitch(owner) * 4, map_to_rank(arrived, owner));
  }
}

// kGroup: parts of k a block takes. kChunks: of a stage.
template <int kRows, int kGroup, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    linear_narrow_wgmma(const __grid_constant__ NarrowArgs args, const __grid_constant__ CUtensorMap w_map,
                        const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shares<kRows, kGroup>;
  constexpr bool kAlone = S::kRanks == 1;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int rank = int(blockIdx.x) % S::kRanks, n0 = int(blockIdx.x) / S::kRanks * kRows;
  const uint32_t ring = smem_address(smem), full = ring + args.barriers, empty = full + 8 * kMaxStages;
  const uint32_t arrived = empty + 8 * kMaxStages;
  if (ring % 1024 != 0) __trap();
  const int slices = (args.p.rows + 15) / 16;  // of 16 tokens: a warp's
  StageCopier<kRows, kChunks> copier{
      args, w_map, x_map, ring, full, n0, (rank + 1) * kGroup, rank * kGroup, args.begin[rank * kGroup]};
  let_next_kernel_start();
  if (threadIdx.x == kMultiplying) {
    for (int s = 0; s < args.stages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, kMultiplying / 32);
    }
    mbarrier_init(arrived, 1);
    mbarrier_init_fence();
    if (!kAlone) mbarrier_expect(arrived, (S::kSums - S::sums(rank)) * slices * 16 * S::pitch(rank) * 4);
    prefetch_map(x_map);
    if (args.p.w_settled) {  // w alone before the wait
      StageCopier<kRows, kChunks> first = copier;
      for (int s = 0; s < args.stages && !first.done(); ++s, first.advance()) first.copy(s, true, false);
    }
    wait_for_previous_kernel();
    for (int s = 0; s < args.stages && !copier.done(); ++s, copier.advance()) copier.copy(s, !args.p.w_settled, true);
  } else {
    wait_for_previous_kernel();
  }
  __syncthreads();  // the barriers are initialized

  float* sums = reinterpret_cast<float*>(smem);
  if (warp >= kMultiplying / 32) {
    if (threadIdx.x == kMultiplying) {
      for (BarrierSlot slot; !copier.done(); copier.advance(), slot.advance(args.stages)) {
        while (!mbarrier_done(empty + 8 * slot.index, slot.parity)) {
        }
        copier.copy(slot.index, true, true);
      }
    }
    __syncwarp();
    if (!kAlone) {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    constexpr int kKept = kGroup == 1 ? 1 : 2;
    float acc[kKept][kRows / 2];
    multiply<kRows, kGroup, kChunks>(args, acc, rank, ring, full, empty);
    named_barrier(1, kMultiplying);  // the whole ring has been used
    if (!kAlone) cluster_arrive();   // and may be overwritten by the others
    if (warp < slices) spill<kRows, kGroup>(acc, sums, rank);
    if (!kAlone) {
      fence_for_copies();
      __syncwarp();
      cluster_wait();  // so are theirs, and their barriers are initialized
      if (threadIdx.x % 32 == 0 && warp < slices) send<kRows, kGroup>(ring, arrived, rank, warp);
      __syncwarp();
    }
  }
  __syncthreads();  // the own sums are written
  if (!kAlone) {
    mbarrier_wait(arrived, 0);
    cluster_arrive();  // what the others sent has been received
  }

  const int first = S::begin(rank), vectors = S::rows(rank) / 4, pitch = S::pitch(rank);
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
  for (int i = threadIdx.x; i < args.p.rows * vectors; i += kThreads) {
    const int token = i / vectors, row = first + i % vectors * 4;
    if (n0 + row < args.p.n) finish4(args.p, args.wide, token, n0 + row, total(token, row));
  }
  if (!kAlone) cluster_wait();  // no block leaves while what it sent is being read
#else
  __trap();  // never launched elsewhere
#endif
}

template <int kRows, int kGroup, int kChunks>
void launch_narrow(const LinearParams& p, const LinearHopperPlan& plan, int box_tokens, const DeviceInfo& info,
                   cudaStream_t stream) {
  using S = Shares<kRows, kGroup>;
  NarrowArgs args{};
  args.p = p;
  for (int i = 0; i <= kParts; ++i) args.begin[i] = plan.part_begin(i);
  args.wide = can_access_wide(p);
  args.box_tokens = box_tokens;
  args.x_bytes = kChunks * box_tokens * kRowBytes;
  args.stage_bytes = args.x_bytes + kChunks * kRows * kRowBytes;
  const int budget = std::min(kSharedSmem, info.smem_optin) - kBarrierBytes;
  args.stages = std::min(kMaxStages, budget / args.stage_bytes);
  args.barriers = std::max(args.stages * args.stage_bytes, S::floats() * 4);
  VC_CHECK(args.stages >= 2 && args.barriers <= budget, "linear: a block may use ", budget,
           " bytes of shared memory on this GPU, ", std::max(2 * args.stage_bytes, S::floats() * 4), " are needed.");
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.smem = size_t(args.barriers + kBarrierBytes);
  shape.cluster = S::kRanks;
  shape.grid = dim3(unsigned((p.n + kRows - 1) / kRows * S::kRanks));
  const CUtensorMap w_map = bf16_matrix_map(p.w, p.n, p.k, p.k, kRows);
  const CUtensorMap x_map = bf16_matrix_map(p.x, p.rows, p.k, p.rows > 1 ? p.x_stride_row : p.k, box_tokens);
  allow_all_smem<linear_narrow_wgmma<kRows, kGroup, kChunks>>(info);
  launch(linear_narrow_wgmma<kRows, kGroup, kChunks>, shape, info, stream, args, w_map, x_map);
}

// Parts of k a block takes. Fewer, and x is read by fewer blocks; more, and fewer sums travel. No bits depend on it.
int narrow_group(int box_tokens, int k) {
  if (box_tokens <= 16) return 4;
  return k <= 8192 ? 2 : 1;
}

}  // namespace

bool linear_narrow(const LinearParams& p, const LinearHopperPlan& plan, const DeviceInfo& info, cudaStream_t stream) {
  if (plan.splits != kParts || p.swiglu || p.rows > kTokens) return false;
  const int box_tokens = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : 64;
  const auto go = [&]<int kPlanRows>() {
    switch (narrow_group(box_tokens, p.k)) {
      case 4:
        return launch_narrow<kPlanRows / 4, 4, 4>(p, plan, box_tokens, info, stream);
      case 2:
        return launch_narrow<kPlanRows / 2, 2, 1>(p, plan, box_tokens, info, stream);
      default:
        return launch_narrow<kPlanRows, 1, 1>(p, plan, box_tokens, info, stream);
    }
  };
  if (plan.rows == 192)
    go.template operator()<192>();
  else if (plan.rows == 128)
    go.template operator()<128>();
  else
    return false;
  return true;
}

}  // namespace vericache::cuda
