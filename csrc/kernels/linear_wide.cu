// SPDX-License-Identifier: Apache-2.0
// linear.cu's product, with or without SwiGLU, for more than 128 rows of x ("tokens"), or 64 where its plan has one
// part of k: the same sums, bit for bit, in other blocks. For Hopper.
//
// Why: linear.cu takes 128 tokens at a time, so that each token block reads all of w again. And where k has four parts,
// clusters of four blocks that need a multiprocessor each leave some idle: of an H100's 132, 30 clusters fit, and a
// plan of 32 tiles takes two rounds. Here a tile has up to 256 tokens, and as many rows of w as one round needs, or
// two, ...
//
// The tokens take the 64-wide side of wgmma m64nNk16, w's rows its N: a warpgroup has 64 or 128 tokens and the whole
// tile's rows. Tokens are copied in eights; what lies behind the last of them in shared memory goes into rows of the
// product that nobody uses, and so it is with what lies behind the tile's rows of w.
//
// Grid: k in parts: a cluster for each tile and token block, a block for each part. k in one: a block a multiprocessor,
// which walks its tiles. Block: three warpgroups with 64 tokens, or two with 128; thread 0 copies too, for no register
// is left for a warp that would do nothing else. (k in one and up to 128 tokens: two warpgroups with 64.) Shared
// memory: a ring of stages, each one chunk of 64 k, x [tokens][64], then w [rows][64], in the layout of
// device/wgmma.cuh; at the end, over the ring, the sums of a part [tokens][pitch]; then a barrier "full" and a barrier
// "empty" for each stage.
//
// SwiGLU: a tile is half gate, half up, 8 rows of each in turn, as in linear.cu.
//
// Reduction order (R1): that of linear.cu, p0 + p1, or ((p0 + p1) + p2) + p3, of the same parts, each the same chain of
// k16 steps.
#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/l2_policy.cuh"
#include "device/launch.cuh"
#include "device/linear_out.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "linear_plan.h"

namespace vericache::cuda {
namespace {

constexpr int kChunkK = 64, kRowBytes = kChunkK * 2;  // k a stage; bytes of a row of it
constexpr int kStepTokens = 64;                       // of one wgmma
constexpr int kMaxStages = 6;
constexpr int kBarrierBytes = 8 * 2 * kMaxStages;

struct WideArgs {
  LinearParams p;
  int begin[5];                                // first chunk of each part of k, and the end
  int splits;                                  // parts
  int rows;                                    // of w in a tile, a multiple of 8, with SwiGLU of 16
  int token_blocks;                            // token block fastest, so that blocks that run together share their w
  int items;                                   // tiles * token_blocks
  int box_tokens;                              // of a token block that are copied
  int stages, stage_bytes, x_bytes, barriers;  // barriers: their offset in shared memory
  int pitch;                                   // of the sums, floats: a warp's stores meet no bank twice
  uint64_t w_policy;                           // of device/l2_policy.cuh
};

// A chunk of an item. A block's stages are the chunks of its part of k, item after item.
struct Place {
  int item, chunk;

  [[maybe_unused]] __device__ __forceinline__ Place after(int stages, int begin, int end, int item_step) const {
    Place next{item, chunk + stages};
    for (; next.chunk >= end; next.item += item_step) next.chunk -= end - begin;
    return next;
  }
};

// Starts the copies of a stage, by one thread. `w`, `x`: which operands; the barrier expects both with w.
template <int kTokens>
__device__ __forceinline__ void copy_stage(const WideArgs& args, const CUtensorMap& w_map, const CUtensorMap& x_map,
                                           uint32_t ring, int slot, Place from, bool w, bool x) {
  const uint32_t stage = ring + slot * args.stage_bytes, barrier = ring + args.barriers + 8 * slot;
  const int n0 = from.item / args.token_blocks * args.rows, k = from.chunk * kChunkK;
  if (w) {
    mbarrier_expect(barrier, args.stage_bytes);
    if (args.p.swiglu)
      copy_halves(stage + args.x_bytes, w_map, k, n0 / 2, barrier, args.w_policy);
    else
      copy_box(stage + args.x_bytes, w_map, k, n0, barrier, args.w_policy);
  }
  if (x) copy_box(stage, x_map, k, from.item % args.token_blocks * kTokens, barrier, kDropAsUsual);
}

// Which tokens of the token block a warp has in wgmma m: 16, from here on.
template <int kSteps>
__device__ __forceinline__ int first_token(int warp, int m) {
  return (warp / 4 * kSteps + m) * kStepTokens + warp % 4 * 16;
}

// Writes an item of one part from the accumulators.
template <int kSteps, int kRows>
__device__ __forceinline__ void store_item(const WideArgs& args, const float (&acc)[kSteps][kRows / 2], int warp,
                                           int n0, int token0, int tokens) {
  const int g = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < kSteps; ++m) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int token = first_token<kSteps>(warp, m) + g + 8 * low;
      if (token >= tokens) continue;
      if (args.p.swiglu) {
#pragma unroll
        for (int j = 0; j < kRows / 16; ++j) {
          const int n = n0 / 2 + 8 * j + column;
          if (16 * j >= args.rows || n >= args.p.n / 2) break;
          const float gate[2] = {acc[m][8 * j + 2 * low], acc[m][8 * j + 2 * low + 1]};
          const float up[2] = {acc[m][8 * j + 4 + 2 * low], acc[m][8 * j + 5 + 2 * low]};
          finish_swiglu_run(args.p, token0 + token, n, gate, up);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const int n = n0 + 8 * j + column;
          if (8 * j >= args.rows || n >= args.p.n) break;
          float v[2] = {acc[m][4 * j + 2 * low], acc[m][4 * j + 2 * low + 1]};
          finish_run(args.p, token0 + token, n, v);
        }
      }
    }
  }
}

// Adds and writes the parts of an item: each block of the cluster for its share of the tokens.
template <int kSteps, int kRows>
__device__ __forceinline__ void add_in_cluster(const WideArgs& args, const float (&acc)[kSteps][kRows / 2], float* sums,
                                               int warp, int rank, int n0, int token0, int tokens) {
#pragma unroll
  for (int m = 0; m < kSteps; ++m) {
    const int first = first_token<kSteps>(warp, m);
    if (first >= tokens) break;
    float* dst = sums + (first + threadIdx.x % 32 / 4) * args.pitch + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      if (8 * j >= args.rows) break;
      *reinterpret_cast<float2*>(dst + 8 * j) = make_float2(acc[m][4 * j], acc[m][4 * j + 1]);
      *reinterpret_cast<float2*>(dst + 8 * j + 8 * args.pitch) = make_float2(acc[m][4 * j + 2], acc[m][4 * j + 3]);
    }
  }
  cluster_barrier();  // all sums are written

  // Two vectors a thread at a time: loads from other blocks take long.
  constexpr int kAtOnce = 2, kMostParts = 4;
  const int share = (tokens + args.splits - 1) / args.splits, first = rank * share;
  const int vectors = args.rows / (args.p.swiglu ? 8 : 4), items = max(0, min(tokens - first, share)) * vectors;
  const bool swiglu = args.p.swiglu;
  for (int begin = threadIdx.x; begin < items; begin += (swiglu ? 1 : kAtOnce) * blockDim.x) {
    float4 part[kAtOnce][kMostParts];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      // With SwiGLU one vector: of its gates, then of its ups.
      const int i = begin + (swiglu ? 0 : a * int(blockDim.x));
      const int v = i % vectors, row = swiglu ? v / 2 * 16 + v % 2 * 4 + 8 * a : 4 * v;
      const uint32_t at = smem_address(sums + (first + i / vectors) * args.pitch + row);
#pragma unroll
      for (int r = 0; r < kMostParts; ++r)
        part[a][r] = i < items && r < args.splits ? load_cluster_float4(map_to_rank(at, r)) : float4{};
    }
    const auto total = [&](int a) { return add_parts(args.splits, [&](int r) { return part[a][r]; }); };
    if (swiglu) {
      const float4 g = total(0), u = total(1);
      const float gate[4] = {g.x, g.y, g.z, g.w}, up[4] = {u.x, u.y, u.z, u.w};
      const int v = begin % vectors, n = n0 / 2 + 4 * v;
      if (n < args.p.n / 2) finish_swiglu_run(args.p, token0 + first + begin / vectors, n, gate, up);
    } else {
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) {
        const int i = begin + a * int(blockDim.x), n = n0 + i % vectors * 4;
        if (i < items && n < args.p.n) finish4(args.p, true, token0 + first + i / vectors, n, total(a));
      }
    }
  }
  cluster_barrier_after_reads();  // no block leaves while another reads its sums
}

// kGroups: warpgroups. kSteps: 64 tokens each of a warpgroup. kRows: most rows of w in a tile. kSplit: k in parts.
template <int kGroups, int kSteps, int kRows, bool kSplit>
__global__ void __launch_bounds__(128 * kGroups, 1)
    linear_wide_wgmma(const __grid_constant__ WideArgs args, const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTokens = kGroups * kSteps * kStepTokens;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warp = threadIdx.x / 32, warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0);
  const int rank = kSplit ? int(blockIdx.x) % args.splits : 0;
  const int first_item = kSplit ? int(blockIdx.x) / args.splits : int(blockIdx.x);
  const int item_step = kSplit ? args.items : int(gridDim.x);
  const uint32_t ring = smem_address(smem), full = ring + args.barriers, empty = full + 8 * kMaxStages;
  if (ring % 1024 != 0) __trap();
  const int begin = args.begin[rank], end = args.begin[rank + 1];
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 4 * kGroups);
    }
    mbarrier_init_fence();
    prefetch_map(x_map);
    const auto fill = [&](bool w, bool x) {
      Place next{first_item, begin};
      for (int s = 0; s < args.stages && next.item < args.items; ++s, next = next.after(1, begin, end, item_step))
        copy_stage<kTokens>(args, w_map, x_map, ring, s, next, w, x);
    };
    if (args.p.w_settled) fill(true, false);
    wait_for_previous_kernel();
    fill(!args.p.w_settled, true);
  } else {
    wait_for_previous_kernel();
  }
  __syncthreads();  // the barriers are initialized

  const uint32_t own_x = warpgroup * kSteps * kStepTokens * kRowBytes;
  RingCursor cursor;
  // Gives back the stage before the cursor's, whose chunk was at `used`, and asks for what comes next in its place.
  const auto give_back = [&](Place used) {
    const bool wrapped = cursor.slot == 0;
    const int slot = wrapped ? args.stages - 1 : cursor.slot - 1;
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * slot);
    if (threadIdx.x == 0) {
      const Place next = used.after(args.stages, begin, end, item_step);
      if (next.item < args.items) {
        while (!mbarrier_done(empty + 8 * slot, cursor.parity ^ (wrapped ? 1 : 0))) {
        }
        copy_stage<kTokens>(args, w_map, x_map, ring, slot, next, true, true);
      }
    }
    __syncwarp();
  };
  for (int item = first_item; item < args.items; item += item_step) {
    float acc[kSteps][kRows / 2];
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) acc[m][i] = 0.0f;
      wgmma_settle(acc[m]);
    }
    for (int chunk = begin; chunk < end; ++chunk) {
      mbarrier_wait(full + 8 * cursor.slot, cursor.parity);
      const uint32_t stage = ring + cursor.slot * args.stage_bytes;
      const uint64_t x = wgmma_operand(stage + own_x), w = wgmma_operand(stage + args.x_bytes);
      wgmma_begin();
#pragma unroll
      for (int step = 0; step < kChunkK / 16; ++step) {
#pragma unroll
        for (int m = 0; m < kSteps; ++m)
          wgmma_k16(acc[m], x + m * kStepTokens * (kRowBytes / 16) + 2 * step, w + 2 * step);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the steps of the stage before this one are done
      if (chunk > begin) give_back({item, chunk - 1});
      cursor.next(args.stages);
    }
    wgmma_wait();
#pragma unroll
    for (int m = 0; m < kSteps; ++m) wgmma_settle(acc[m]);

    const int n0 = item / args.token_blocks * args.rows, token0 = item % args.token_blocks * kTokens;
    const int tokens = min(args.p.rows - token0, kTokens);
    if constexpr (kSplit) {
      __syncthreads();  // the whole ring has been used
      add_in_cluster<kSteps, kRows>(args, acc, reinterpret_cast<float*>(smem), warp, rank, n0, token0, tokens);
    } else {
      give_back({item, end - 1});
      store_item<kSteps, kRows>(args, acc, warp, n0, token0, tokens);
    }
  }
#else
  __trap();  // never launched elsewhere
#endif
}

template <int kGroups, int kSteps, int kRows, bool kSplit>
void launch_wide(WideArgs args, const DeviceInfo& info, cudaStream_t stream) {
  constexpr int kTokens = kGroups * kSteps * kStepTokens;
  const LinearParams& p = args.p;
  args.x_bytes = args.box_tokens * kRowBytes;
  args.stage_bytes = args.x_bytes + args.rows * kRowBytes;
  // The products read kTokens rows of x and kRows of w of each stage, though fewer may be there.
  const int extra = std::max({0, (kTokens - args.box_tokens - args.rows) * kRowBytes, (kRows - args.rows) * kRowBytes});
  args.pitch = args.rows | 8;
  const int budget = info.smem_optin - kBarrierBytes;
  args.stages = std::min(kMaxStages, (budget - extra) / args.stage_bytes);
  const int sums = kSplit ? kTokens * args.pitch * 4 : 0;
  args.barriers = std::max(args.stages * args.stage_bytes + extra, sums);
  VC_CHECK(args.stages >= 2 && args.barriers <= budget, "linear: a block may use ", budget,
           " bytes of shared memory on this GPU, ", std::max(2 * args.stage_bytes + extra, sums), " are needed.");
  LaunchShape shape;
  shape.block = dim3(128 * kGroups);
  shape.smem = size_t(args.barriers + kBarrierBytes);
  shape.cluster = args.splits;
  shape.grid = dim3(unsigned(kSplit ? args.items * args.splits : std::min(args.items, info.multiprocessors)));
  const CUtensorMap w_map =
      p.swiglu ? bf16_halves_map(p.w, p.n, p.k, args.rows) : bf16_matrix_map(p.w, p.n, p.k, p.k, args.rows);
  const CUtensorMap x_map = bf16_matrix_map(p.x, p.rows, p.k, p.x_stride_row, args.box_tokens);
  allow_all_smem<linear_wide_wgmma<kGroups, kSteps, kRows, kSplit>>(info);
  launch(linear_wide_wgmma<kGroups, kSteps, kRows, kSplit>, shape, info, stream, args, w_map, x_map);
}

template <int kGroups, int kSteps>
void launch_one_part(const WideArgs& args, const DeviceInfo& info, cudaStream_t stream) {
  if (args.rows <= 96) return launch_wide<kGroups, kSteps, 96, false>(args, info, stream);
  launch_wide<kGroups, kSteps, 224, false>(args, info, stream);
}

template <int kGroups, int kSteps>
void launch_parts(const WideArgs& args, const DeviceInfo& info, cudaStream_t stream) {
  if (args.splits == 1) return launch_one_part<kGroups, kSteps>(args, info, stream);
  if (args.rows <= 96) return launch_wide<kGroups, kSteps, 96, true>(args, info, stream);
  if (args.rows <= 160) return launch_wide<kGroups, kSteps, 160, true>(args, info, stream);
  launch_wide<kGroups, kSteps, 208, true>(args, info, stream);
}

}  // namespace

bool linear_wide(const LinearParams& p, const LinearHopperPlan& plan, const DeviceInfo& info, cudaStream_t stream) {
  constexpr int kMostTokens = 256;
  if (!can_access_wide(p) || p.n % (p.swiglu ? 16 : 4) != 0) return false;
  if (p.rows <= (plan.splits == 1 ? 64 : 128)) return false;
  WideArgs args{};
  args.p = p;
  args.splits = plan.splits;
  for (int i = 0; i <= plan.splits; ++i) args.begin[i] = plan.part_begin(i);
  args.w_policy = w_policy(p);
  args.token_blocks = (p.rows + kMostTokens - 1) / kMostTokens;
  const int most = (p.rows + args.token_blocks - 1) / args.token_blocks;  // tokens of a block
  const int tokens = most <= 128 && plan.splits == 1 ? 128 : most <= 192 ? 192 : kMostTokens;
  args.box_tokens = std::min(tokens, copied_tokens(p.rows));
  // As few rows as one round of clusters allows, or two rounds, ... Of clusters of four a GPU holds fewer than it has
  // multiprocessors for.
  const int fit = plan.splits == 4 ? info.multiprocessors / 4 * 10 / 11 : info.multiprocessors / plan.splits;
  const int most_rows = plan.splits == 1 ? 224 : 208, unit = p.swiglu ? 16 : 8;
  for (int rounds = 1;; ++rounds) {
    const int tiles = std::max(1, rounds * fit / args.token_blocks);
    args.rows = ((p.n + tiles - 1) / tiles + unit - 1) / unit * unit;
    if (args.rows <= most_rows) break;
  }
  args.items = (p.n + args.rows - 1) / args.rows * args.token_blocks;
  if (tokens == 128)
    launch_one_part<2, 1>(args, info, stream);
  else if (tokens == 192)
    launch_parts<3, 1>(args, info, stream);
  else
    launch_parts<2, 2>(args, info, stream);
  return true;
}

}  // namespace vericache::cuda
