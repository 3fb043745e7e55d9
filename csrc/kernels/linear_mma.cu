// SPDX-License-Identifier: Apache-2.0
// out = x @ w^T (+ bias) (+ residual): the batch-invariant matrix product of the decode and verify path.
//
// The weights are the long operand: at 1 to 64 rows of x the time is that of reading w once, so w takes the 16-wide
// side of mma.sync m16n8k16 and the rows of x ("tokens") its 8-wide side; 1 to 8 tokens cost one mma a 16 x 16 block.
//
// Work. A tile is 32 * warps rows of w. A cluster of `splits` blocks computes one tile for one block of up to 64
// tokens, block i of it over the i-th part of k, and adds its parts over distributed shared memory. Grid: one cluster a
// (tile, token block); without splits one block a multiprocessor, which walks its tiles with the copies of the next
// tile already in flight. Block: 32 * warps threads; warp i owns rows 32i .. 32i+31 of the tile and all tokens, so w
// is read from shared memory once.
// Shared memory: a ring of stages of 64 k, each w [tile rows][64] then x [tokens][64] bf16, filled by cp.async; 16-byte
// chunk c of row r lies at chunk c ^ (r & 7), which keeps copies and ldmatrix free of bank conflicts.
//
// Reduction order (R1): element (token, n) is sum over parts p = 0 .. splits-1, left to right, of the chain
// mma(k16 step 0), mma(k16 step 1), ... of part p, starting from zero; then + bias, then + residual; one rounding.
// warps, splits and the cut of k come from linear_plan(n, k) and from nothing else, and the mma is the same for every
// number of tokens. Held by bench/gpu/dense_check.cu (linear_invariance).
//
// float32 storage, and a k that is no multiple of 8, take linear_simple.cu.
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/linear_out.cuh"
#include "device/mma.cuh"
#include "launchers.h"
#include "linear_plan.h"

namespace vericache::cuda {

namespace {

constexpr int kStageK = 64;  // k a stage: 128 bytes a row, 8 chunks of 16
constexpr int kRowBytes = kStageK * 2;
constexpr int kMaxStages = 8;
constexpr int kStagePad = 4;            // floats after each token of a float32 tile: no bank conflicts
constexpr int kSplitSmem = 113 * 1024;  // two blocks of a split kernel fit a multiprocessor: see launch_tiles
constexpr int kMaxTokenTile = 64;

struct TileArgs {
  LinearParams p;
  LinearPlan plan;
  int token_blocks;
  int items;  // tiles * token_blocks; token block fastest, so that blocks that run together share their w
  int stages;
  bool wide;  // bias, residual and out can be accessed 4 elements at a time
};

// The copies of one block, in the order in which it consumes them: stage after stage of one item, item after item.
template <int kTokenTiles>
struct Loader {
  const TileArgs& args;
  const uint32_t smem;
  const int stage_bytes, w_bytes;
  const int k_begin, k_end;  // this part of k, in stages
  const int item_step;
  int item, kb;              // the next stage to copy
  int left;                  // stages not yet asked for
  int n_first, token_first;  // row of w and token of this thread's first copy of the item

  __device__ Loader(const TileArgs& a, uint32_t ring, int stage, int w, int begin, int end, int first_item, int step,
                    int stages)
      : args(a),
        smem(ring),
        stage_bytes(stage),
        w_bytes(w),
        k_begin(begin),
        k_end(end),
        item_step(step),
        item(first_item),
        kb(begin),
        left(stages) {
    locate();
  }

  // Warp i copies rows 32i .. 32i+31 of the tile, which it also consumes, 4 rows an instruction.
  __device__ __forceinline__ static int own_row() { return int(threadIdx.x) / 8 % 4 + int(threadIdx.x) / 32 * 32; }

  __device__ __forceinline__ void locate() {
    n_first = item / args.token_blocks * args.plan.tile_rows() + own_row();
    token_first = item % args.token_blocks * kMaxTokenTile;
  }

  __device__ __forceinline__ void w(int slot) const {
    const LinearParams& p = args.p;
    const int row = own_row(), chunk = threadIdx.x % 8, k = kb * kStageK + chunk * 8;
    const auto* base = static_cast<const __nv_bfloat16*>(p.w);
    const auto* src = base + int64_t(n_first) * p.k + k;
    const int64_t step = int64_t(4) * p.k;
    const int rows = k < p.k ? p.n - n_first : 0;  // of w, from the first on, that exist
    const uint32_t dst = smem + slot * stage_bytes + row * kRowBytes;
    const uint32_t even = (chunk ^ (row & 7)) << 4, odd = even ^ 64;  // rows 4 apart differ in bit 2 of the chunk
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool valid = 4 * i < rows;
      cp_async16(dst + 4 * i * kRowBytes + (i % 2 == 0 ? even : odd), valid ? src : base, valid);
      src += step;
    }
  }

  __device__ __forceinline__ void x(int slot) const {
    const LinearParams& p = args.p;
    const uint32_t dst = smem + slot * stage_bytes + w_bytes;
    for (int i = threadIdx.x; i < kTokenTiles * 64; i += blockDim.x) {
      const int row = i / 8, chunk = i % 8, k = kb * kStageK + chunk * 8;
      const bool valid = token_first + row < p.rows && k < p.k;
      const auto* src = static_cast<const __nv_bfloat16*>(p.x);
      if (valid) src += int64_t(token_first + row) * p.x_stride_row + k;
      cp_async16(dst + row * kRowBytes + ((chunk ^ (row & 7)) << 4), src, valid);
    }
  }

  __device__ __forceinline__ void advance() {
    --left;
    if (++kb == k_end) {
      kb = k_begin;
      item += item_step;
      locate();
    }
  }

  __device__ __forceinline__ void next(int slot) {
    if (left <= 0) return;
    w(slot);
    x(slot);
    advance();
  }
};

// 32 rows of w by 8 * kTokenTiles tokens by 64 k, from shared memory into a warp's accumulators.
template <int kTokenTiles>
__device__ __forceinline__ void multiply_stage(float (&acc)[2][kTokenTiles][4], uint32_t w_warp, uint32_t x) {
  const int lane = threadIdx.x % 32, swizzle = lane & 7;
  const uint32_t a_row = w_warp + (lane % 16) * kRowBytes;
  const uint32_t b_row = x + ((lane / 16) * 8 + lane % 8) * kRowBytes;
#pragma unroll
  for (int step = 0; step < kStageK / 16; ++step) {
    uint32_t a[2][4];
    const uint32_t a_chunk = ((2 * step + lane / 16) ^ swizzle) << 4;
    ldmatrix_x4(a[0], a_row + a_chunk);
    ldmatrix_x4(a[1], a_row + 16 * kRowBytes + a_chunk);
    const uint32_t b_chunk = ((2 * step + (lane / 8) % 2) ^ swizzle) << 4;
    if constexpr (kTokenTiles == 1) {
      uint32_t b[2];
      ldmatrix_x2(b, x + swizzle * kRowBytes + b_chunk);
      mma_m16n8k16(acc[0][0], a[0], b[0], b[1]);
      mma_m16n8k16(acc[1][0], a[1], b[0], b[1]);
    } else {
#pragma unroll
      for (int pair = 0; pair < kTokenTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, b_row + pair * 16 * kRowBytes + b_chunk);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16(acc[0][2 * pair + half], a[0], b[2 * half], b[2 * half + 1]);
          mma_m16n8k16(acc[1][2 * pair + half], a[1], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

// One 8-token tile of a warp's accumulators to shared memory, token-major, `pitch` floats a token.
template <int kTokenTiles>
__device__ __forceinline__ void spill_tile(const float (&acc)[2][kTokenTiles][4], int tile, float* dst, int pitch) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    dst[2 * t * pitch + 16 * half + g] = acc[half][tile][0];
    dst[(2 * t + 1) * pitch + 16 * half + g] = acc[half][tile][1];
    dst[2 * t * pitch + 16 * half + g + 8] = acc[half][tile][2];
    dst[(2 * t + 1) * pitch + 16 * half + g + 8] = acc[half][tile][3];
  }
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Adds the parts of a split tile. Each block of the cluster finishes 1/splits of the tile's rows, for all tokens.
template <int kTokenTiles>
__device__ void reduce_cluster(const TileArgs& args, const float (&acc)[2][kTokenTiles][4], float* partial, int item,
                               int rank) {
  const int rows = args.plan.tile_rows(), pitch = rows + kStagePad, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile)
    spill_tile<kTokenTiles>(acc, tile, partial + tile * 8 * pitch + warp * 32, pitch);
  cluster_barrier();  // all partial tiles are written

  const int token0 = item % args.token_blocks * kMaxTokenTile;
  const int tokens = min(args.p.rows - token0, 8 * kTokenTiles);
  const int n0 = item / args.token_blocks * rows;
  const int splits = args.plan.splits, share = rows / splits, vectors = share / 4;
  for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
    const int token = i / vectors, row = rank * share + i % vectors * 4;
    if (n0 + row >= args.p.n) continue;  // also: each load below is used before the block leaves
    const uint32_t address = smem_address(partial + token * pitch + row);
    const auto part = [&](int i) { return load_cluster_float4(map_to_rank(address, i)); };
    float4 sum = part(0);
    if (splits == 2) {
      sum = add4(sum, part(1));
    } else {
      const float4 p1 = part(1), p2 = part(2), p3 = part(3);
      sum = add4(add4(add4(sum, p1), p2), p3);
    }
    finish4(args.p, args.wide, token0 + token, n0 + row, sum);
  }
  cluster_barrier_after_reads();  // no block leaves while another reads its partial tile
}

// Writes a whole tile that was not split: through a private patch of shared memory, so that a warp's stores are runs of
// 32 neighbours.
template <int kTokenTiles>
__device__ void store_tile(const TileArgs& args, const float (&acc)[2][kTokenTiles][4], float* patch, int item) {
  constexpr int kPitch = 32 + kStagePad;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token0 = item % args.token_blocks * kMaxTokenTile;
  const int n = item / args.token_blocks * args.plan.tile_rows() + warp * 32 + lane % 8 * 4;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    spill_tile<kTokenTiles>(acc, tile, patch, kPitch);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 8 + 4 * half;
      const float4 sum = *reinterpret_cast<const float4*>(patch + token * kPitch + lane % 8 * 4);
      if (token0 + tile * 8 + token < args.p.rows && n < args.p.n)
        finish4(args.p, args.wide, token0 + tile * 8 + token, n, sum);
    }
    __syncwarp();
  }
}

template <int kTokenTiles, bool kSplit>
__global__ void __launch_bounds__(256, kSplit ? 2 : 1) linear_tiles(const __grid_constant__ TileArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  const LinearPlan& plan = args.plan;
  const int warp = threadIdx.x / 32;
  const int rank = kSplit ? int(blockIdx.x) % plan.splits : 0;
  const int first_item = kSplit ? int(blockIdx.x) / plan.splits : int(blockIdx.x);
  const int item_step = kSplit ? args.items : int(gridDim.x);
  const int w_bytes = plan.tile_rows() * kRowBytes;
  const int stage_bytes = w_bytes + kTokenTiles * 8 * kRowBytes;
  const int k_begin = plan.part_begin(rank), k_end = plan.part_begin(rank + 1);
  const int my_items = (args.items - first_item + item_step - 1) / item_step;

  Loader<kTokenTiles> loader(args, smem_address(smem), stage_bytes, w_bytes, k_begin, k_end, first_item, item_step,
                             my_items * (k_end - k_begin));
  const int ahead = args.stages - 1;
  if (args.p.w_settled) {
    // w alone before the wait: these copies join the group of the first stage, which is then complete when all are.
    Loader<kTokenTiles> early = loader;
    for (int s = 0; s < ahead && early.left > 0; ++s, early.advance()) early.w(s);
    wait_for_previous_kernel();
    for (int s = 0; s < ahead; ++s) {
      if (loader.left > 0) {
        loader.x(s);
        loader.advance();
      }
      cp_async_commit();
    }
  } else {
    wait_for_previous_kernel();
    for (int s = 0; s < ahead; ++s) {
      loader.next(s);
      cp_async_commit();
    }
  }
  let_next_kernel_start();

  float acc[2][kTokenTiles][4];
  int slot = 0, fill = ahead;
  for (int j = 0; j < my_items; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[half][tile][i] = 0.0f;

    for (int kb = k_begin; kb < k_end; ++kb) {
      cp_async_wait_pending(ahead - 1);
      // Makes this stage's copies by all threads visible, and says that all have finished the stage before, whose
      // slot is the one filled next.
      __syncthreads();
      loader.next(fill);
      cp_async_commit();
      const uint32_t stage = smem_address(smem) + slot * stage_bytes;
      multiply_stage<kTokenTiles>(acc, stage + warp * 32 * kRowBytes, stage + w_bytes);
      slot = slot + 1 == args.stages ? 0 : slot + 1;
      fill = fill + 1 == args.stages ? 0 : fill + 1;
    }

    const int item = first_item + j * item_step;
    if constexpr (kSplit) {
      cp_async_wait<0>();
      __syncthreads();  // the ring is idle: the partial tile takes its place
      reduce_cluster<kTokenTiles>(args, acc, reinterpret_cast<float*>(smem), item, rank);
    } else {
      float* patches = reinterpret_cast<float*>(smem + args.stages * stage_bytes);
      store_tile<kTokenTiles>(args, acc, patches + warp * 8 * (32 + kStagePad), item);
    }
  }
}

template <int kTokenTiles, bool kSplit>
void launch_tiles(TileArgs args, const DeviceInfo& info, cudaStream_t stream) {
  const LinearPlan& plan = args.plan;
  const int tile_rows = plan.tile_rows();
  const int stage_bytes = (tile_rows + kTokenTiles * 8) * kRowBytes;
  // A cluster's blocks must be resident together in one GPC. With room for two on a multiprocessor, all clusters of a
  // one-wave grid are resident whatever number of multiprocessors the GPCs have.
  const int budget = kSplit ? std::min(kSplitSmem, info.smem_optin) : info.smem_optin;
  const int extra = kSplit ? 0 : plan.warps * 8 * (32 + kStagePad) * 4;
  args.stages = std::min(kMaxStages, (budget - extra) / stage_bytes);
  VC_CHECK(args.stages >= 2, "linear: a block may use ", info.smem_optin, " bytes of shared memory on this GPU, ",
           2 * stage_bytes + extra, " are needed; supported are GPUs of compute capability 8.0 or later.");
  const int partial_bytes = kSplit ? kTokenTiles * 8 * (tile_rows + kStagePad) * 4 : 0;
  LaunchShape shape;
  shape.block = dim3(unsigned(32 * plan.warps));
  shape.smem = size_t(std::max(args.stages * stage_bytes + extra, partial_bytes));
  shape.cluster = kSplit ? plan.splits : 1;
  shape.grid = dim3(unsigned(kSplit ? args.items * plan.splits : std::min(args.items, info.multiprocessors)));
  allow_all_smem<linear_tiles<kTokenTiles, kSplit>>(info);
  launch(linear_tiles<kTokenTiles, kSplit>, shape, info, stream, args);
}

template <bool kSplit>
void launch_for_rows(const TileArgs& args, const DeviceInfo& info, cudaStream_t stream) {
  const int tokens = std::min(args.p.rows, kMaxTokenTile);
  if (tokens <= 8) return launch_tiles<1, kSplit>(args, info, stream);
  if (tokens <= 16) return launch_tiles<2, kSplit>(args, info, stream);
  if (tokens <= 32) return launch_tiles<4, kSplit>(args, info, stream);
  return launch_tiles<8, kSplit>(args, info, stream);
}

}  // namespace

void linear_mma(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream) {
  TileArgs args{};
  args.p = p;
  args.plan = linear_plan(p.n, p.k, info.hopper_or_later);
  args.token_blocks = (p.rows + kMaxTokenTile - 1) / kMaxTokenTile;
  args.items = args.plan.tiles * args.token_blocks;
  args.wide = can_access_wide(p);
  if (args.plan.splits > 1)
    launch_for_rows<true>(args, info, stream);
  else
    launch_for_rows<false>(args, info, stream);
}

}  // namespace vericache::cuda
