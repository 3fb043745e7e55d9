// SPDX-License-Identifier: Apache-2.0
// out = x @ w^T (+ bias) (+ residual): the batch-invariant matrix product of the decode and verify path, for Hopper.
//
// The weights are the long operand: at 1 to 64 rows of x the time is that of reading w once, so w takes the 64-wide
// side of wgmma m64nNk16 and the rows of x ("tokens") its N side, 8 to 128 wide. An output element sees the same chain
// of k16 steps whatever N is.
//
// Work. linear_hopper_plan cuts n into tiles and k into 1, 2 or 4 parts. One part: one block a multiprocessor walks its
// tiles, with all of the shared memory. More: a block takes one part of a tile, a cluster has all parts and adds them
// over distributed shared memory; a block takes at most half of a multiprocessor's shared memory, so that the next
// kernel's blocks fill theirs while this one ends.
// Block: a warpgroup for each 64 rows of its tile, with all tokens.
// Shared memory: a ring of stages of one or two chunks of 64 k, each stage its chunks' w [tile rows][64], then their x
// [tokens][64], bf16 in the layout of device/wgmma.cuh, filled by one thread, a box for each [..][64]
// (device/tensor_map.cuh); then a barrier for each stage. A stage costs the copying side about as much with two chunks
// as with one, so two where enough stages are left. No bits depend on it: only the waits between the steps differ.
//
// Reduction order (R1): element (token, n) is sum over parts p = 0 .. splits-1, left to right, of the chain
// wgmma(k16 step 0), wgmma(k16 step 1), ... of part p, starting from zero; then + bias, then + residual; one rounding.
// The cut of k comes from linear_hopper_plan(n, k) and from nothing else. That the instruction's sum over 16 k depends
// on neither N nor the place in the tile is held by bench/gpu/dense_check.cu (linear_invariance).
//
// SwiGLU: a tile is half gate, half up, 8 rows of each in turn, so that a thread's accumulators hold a gate and its up.
// The sums are those of the plain product. A half that is no multiple of 8 rows goes through the workspace to silu_mul,
// as with the kernels below.
//
// linear_rope_write: a tile has 32 pairs of each of its heads (device/linear_rope.cuh); else as with SwiGLU. Where that
// does not fit (another head_dim, an odd alignment, QK-norm, more than 128 rows) and with the kernels for other GPUs
// and for float32: linear, then rope_write.
//
// Up to 128 rows of x where k has several parts: linear_narrow.cu, the same sums, rotated or not; QK-norm up to 64.
// More rows, and more than 64 where k has one part: linear_wide.cu, the same sums; not rotated. Other GPUs:
// linear_mma.cu. float32 storage, and a k that is no multiple of 8: linear_simple.cu.
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
#include "launchers.h"
#include "linear_plan.h"

namespace vericache::cuda {

// Runs the product and returns true if it has a launch for it. rope: null, or where and how the product goes on.
bool linear_narrow(const LinearParams& p, const RopeWriteParams* rope, const LinearHopperPlan& plan,
                   const DeviceInfo& info, cudaStream_t stream);
// Whether it has one for a product that QK-norm follows.
bool fuses_qk_norm(const LinearParams& p);
// Runs the product and returns true if more rows, or other tiles, are better there.
bool linear_wide(const LinearParams& p, const LinearHopperPlan& plan, const DeviceInfo& info, cudaStream_t stream);
void linear_mma(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream);
void linear_simple(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream);

namespace {

constexpr int kChunkK = 64, kRowBytes = kChunkK * 2;  // k a chunk; bytes of a row of it
constexpr int kMaxStages = 8, kMaxThreads = 512;
constexpr int kRopeRun = 32;             // pairs of a head a tile, with linear_rope_write
constexpr int kPad = 4;                  // floats after each token of a float32 tile: no bank conflicts
constexpr int kSharedSmem = 113 * 1024;  // of a block that leaves room for another
constexpr int kStreamSmem = 176 * 1024;  // of a block that does not: more on its way slows memory

struct WgmmaArgs {
  LinearParams p;
  int begin[5];  // first chunk of each part of k; begin[splits] is the end
  int splits;    // parts of k
  int rows;      // of w in a block's tile
  int token_blocks;
  int items;  // tiles * token_blocks; token block fastest, so that blocks that run together share their w
  int stages, stage_bytes, w_bytes, barriers;  // barriers: their offset in shared memory
  bool wide;                                   // bias, residual and out can be accessed 4 elements at a time
  uint64_t w_policy;                           // of device/l2_policy.cuh
  bool has_rope;                               // linear_rope_write
  int head_runs_log2;                          // RopeTile<kRopeRun>::make
  RopeWriteParams rope;
};

// A warpgroup's accumulators to shared memory, token-major: rows first .. first + 63 of `rows`.
template <int kTokens>
__device__ __forceinline__ void spill(const float (&acc)[kTokens / 2], float* dst, int first, int rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, pitch = rows + kPad;
  const int row = first + threadIdx.x % 128 / 32 * 16 + g;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= rows) break;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      dst[(8 * j + 2 * t) * pitch + row + 8 * half] = acc[4 * j + 2 * half];
      dst[(8 * j + 2 * t + 1) * pitch + row + 8 * half] = acc[4 * j + 2 * half + 1];
    }
  }
}

// Adds and writes the parts of a tile: each block of the cluster 1 / splits of its rows, for all tokens.
template <int kTokens>
__device__ void add_in_cluster(const WgmmaArgs& args, const float (&acc)[kTokens / 2], float* partial, int item,
                               int rank) {
  const int rows = args.rows, pitch = rows + kPad;
  spill<kTokens>(acc, partial, threadIdx.x / 128 * 64, rows);
  cluster_barrier();  // all partial tiles are written
  const int token0 = item % args.token_blocks * kTokens, n0 = item / args.token_blocks * rows;
  const int tokens = min(args.p.rows - token0, kTokens), share = rows / args.splits;
  const auto total = [&](int token, int row) {
    const uint32_t address = smem_address(partial + token * pitch + row);
    return add_parts(args.splits, [&](int part) { return load_cluster_float4(map_to_rank(address, part)); });
  };
  // Each load is used before the block leaves.
  if (args.p.swiglu) {
    const int vectors = share / 8;  // of 4 gates
    for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
      const int token = i / vectors, v = i % vectors, row = rank * share + v / 2 * 16 + v % 2 * 4;
      const int n = n0 / 2 + row / 16 * 8 + row % 8;
      if (n >= args.p.n / 2) continue;
      const float4 gate = total(token, row), up = total(token, row + 8);
      finish_swiglu(args.p, token0 + token, n, gate.x, up.x);
      finish_swiglu(args.p, token0 + token, n + 1, gate.y, up.y);
      finish_swiglu(args.p, token0 + token, n + 2, gate.z, up.z);
      finish_swiglu(args.p, token0 + token, n + 3, gate.w, up.w);
    }
  } else if (args.has_rope) {
    const auto tile = RopeTile<kRopeRun>::make(item / args.token_blocks, rows, args.head_runs_log2);
    const int vectors = share / 8;  // of 4 pairs
    for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
      const int token = i / vectors, v = i % vectors, row = rank * share + v / 2 * 16 + v % 2 * 4;
      if (tile.head(row) * args.rope.head_dim >= args.p.n) continue;
      finish_rope4(
          args.rope, static_cast<const __nv_bfloat16*>(args.p.bias), token0 + token, tile.head(row), tile.pair(row),
          [&] { return total(token, row); }, [&] { return total(token, row + 8); });
    }
  } else {
    const int vectors = share / 4;
    for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
      const int token = i / vectors, row = rank * share + i % vectors * 4;
      if (n0 + row < args.p.n) finish4(args.p, args.wide, token0 + token, n0 + row, total(token, row));
    }
  }
  cluster_barrier_after_reads();  // no block leaves while another reads its partial tile
}

// write(token, j, i) for each of a thread's tokens that exist: token 8 j + 2 t + i of its tile.
template <int kTokens, class F>
__device__ __forceinline__ void for_tokens(int token0, int rows, F write) {
  int token = token0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token < rows) write(token, j, i);
      token += i == 0 ? 1 : 7;
      asm volatile("" : "+r"(token));  // else all addresses are computed first, and do not fit the registers
    }
  }
}

// Writes a tile of one part from the accumulators.
template <int kTokens>
__device__ void store_tile(const WgmmaArgs& args, const float (&acc)[kTokens / 2], int item) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int token0 = item % args.token_blocks * kTokens, n0 = item / args.token_blocks * args.rows;
  if (args.p.swiglu) {
    const int n = n0 / 2 + warp * 8 + g;
    if (warp * 16 >= args.rows || n >= args.p.n / 2) return;
    for_tokens<kTokens>(token0, args.p.rows, [&](int token, int j, int i) {
      finish_swiglu(args.p, token, n, acc[4 * j + i], acc[4 * j + 2 + i]);
    });
    return;
  }
  if (args.has_rope) {
    const auto tile = RopeTile<kRopeRun>::make(item / args.token_blocks, args.rows, args.head_runs_log2);
    const int row = warp * 16 + g, head = tile.head(row), pair = tile.pair(row);
    if (head * args.rope.head_dim >= args.p.n) return;
    for_tokens<kTokens>(token0, args.p.rows, [&](int token, int j, int i) {
      finish_rope1(args.rope, static_cast<const __nv_bfloat16*>(args.p.bias), token, head, pair, acc[4 * j + i],
                   acc[4 * j + 2 + i]);
    });
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + g + 8 * half, n = n0 + row;
    if (row >= args.rows || n >= args.p.n) return;
    for_tokens<kTokens>(token0, args.p.rows,
                        [&](int token, int j, int i) { finish1(args.p, token, n, acc[4 * j + 2 * half + i]); });
  }
}

// The copies of one block, stage after stage of an item, item after item, by one thread.
template <int kTokens, int kChunks>
struct BoxLoader {
  const WgmmaArgs& args;
  const CUtensorMap &w_map, &x_map;
  const uint32_t ring, barriers;
  const int first_chunk, steps, item_step;
  int item, kb = 0;  // of the next stage to copy

  __device__ __forceinline__ bool done() const { return item >= args.items; }

  // `w`, `x`: which operands; the barrier expects both with w. A part's last stage may have chunks that are not used.
  __device__ void copy(int slot, bool w, bool x) const {
    const uint32_t stage = ring + slot * args.stage_bytes, barrier = barriers + 8 * slot;
    const int tile = item / args.token_blocks, n0 = tile * args.rows, token0 = item % args.token_blocks * kTokens;
    const auto heads = RopeTile<kRopeRun>::make(tile, args.rows, args.head_runs_log2);
    if (w) mbarrier_expect(barrier, args.stage_bytes);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int k = (first_chunk + kb * kChunks + c) * kChunkK;
      const uint32_t w_dst = stage + c * args.rows * kRowBytes;
      if (w && args.p.swiglu) copy_halves(w_dst, w_map, k, n0 / 2, barrier, args.w_policy);
      if (w && args.has_rope) copy_heads(w_dst, w_map, k, heads.first_pair, heads.first_head, barrier, args.w_policy);
      if (w && !args.p.swiglu && !args.has_rope) copy_box(w_dst, w_map, k, n0, barrier, args.w_policy);
      if (x) copy_box(stage + args.w_bytes + c * kTokens * kRowBytes, x_map, k, token0, barrier, kDropAsUsual);
    }
  }

  __device__ __forceinline__ void advance() {
    if (++kb == steps) {
      kb = 0;
      item += item_step;
    }
  }
};

// kSplit: k has more than one part, and a cluster a block for each. kChunks: of a stage.
template <int kTokens, bool kSplit, int kChunks>
__global__ void __launch_bounds__(kMaxThreads, (kSplit && kTokens <= 64) ? 2 : 1)
    linear_wgmma(const __grid_constant__ WgmmaArgs args, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  const int rank = kSplit ? int(blockIdx.x) % args.splits : 0;
  const int first_item = kSplit ? int(blockIdx.x) / args.splits : int(blockIdx.x);
  const int item_step = kSplit ? args.items : int(gridDim.x);
  const int first_chunk = args.begin[rank], chunks = args.begin[rank + 1] - first_chunk;
  const int steps = (chunks + kChunks - 1) / kChunks;

  const uint32_t ring = smem_address(smem), barriers = ring + args.barriers;
  if (ring % 1024 != 0) __trap();
  BoxLoader<kTokens, kChunks> loader{args, w_map, x_map, ring, barriers, first_chunk, steps, item_step, first_item};
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) mbarrier_init(barriers + 8 * s, 1);
    mbarrier_init_fence();
    prefetch_map(x_map);
    if (args.p.w_settled) {  // w alone before the wait
      BoxLoader<kTokens, kChunks> first = loader;
      for (int s = 0; s < args.stages && !first.done(); ++s, first.advance()) first.copy(s, true, false);
    }
    wait_for_previous_kernel();
    for (int s = 0; s < args.stages && !loader.done(); ++s, loader.advance()) loader.copy(s, !args.p.w_settled, true);
  } else {
    wait_for_previous_kernel();
    if (args.has_rope && threadIdx.x >= 64) {
      const int token0 = first_item % args.token_blocks * kTokens;
      prefetch_rope(args.rope, token0, min(args.p.rows - token0, kTokens), threadIdx.x - 64, blockDim.x - 64);
    }
  }
  __syncthreads();  // the barriers are initialized

  const uint32_t own_w = warpgroup * 64 * kRowBytes;
  const uint64_t next_a = args.rows * (kRowBytes / 16), next_b = kTokens * (kRowBytes / 16);  // from chunk to chunk
  float acc[kTokens / 2];
  int slot = 0;
  uint32_t parity = 0;
  for (int item = first_item; item < args.items; item += item_step) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;

    for (int kb = 0; kb < steps; ++kb) {
      mbarrier_wait(barriers + 8 * slot, parity);
      const uint32_t stage = ring + slot * args.stage_bytes;
      const uint64_t a = wgmma_operand(stage + own_w), b = wgmma_operand(stage + args.w_bytes);
      const auto multiply = [&]<int kFirst, int kEnd>() {
        wgmma_settle(acc);
        wgmma_begin();
#pragma unroll
        for (int c = kFirst; c < kEnd; ++c) {
#pragma unroll
          for (int step = 0; step < kChunkK / 16; ++step)
            wgmma_k16(acc, a + c * next_a + 2 * step, b + c * next_b + 2 * step);
        }
        wgmma_commit();
        wgmma_wait();
        wgmma_settle(acc);
      };
      static_assert(kChunks <= 2);
      if (kChunks == 1 || chunks - kb * kChunks > 1)
        multiply.template operator()<0, kChunks>();
      else
        multiply.template operator()<0, 1>();
      __syncthreads();  // all have used the stage
      if (threadIdx.x == 0 && !loader.done()) {
        loader.copy(slot, true, true);
        loader.advance();
      }
      __syncwarp();
      if (++slot == args.stages) {
        slot = 0;
        parity ^= 1;
      }
    }

    if constexpr (kSplit)
      add_in_cluster<kTokens>(args, acc, reinterpret_cast<float*>(smem), item, rank);
    else
      store_tile<kTokens>(args, acc, item);
  }
#else
  __trap();  // never launched elsewhere
#endif
}

template <int kTokens, bool kSplit, int kChunks>
void launch_wgmma(WgmmaArgs args, const DeviceInfo& info, cudaStream_t stream) {
  const int groups = (args.rows + 63) / 64;  // warpgroups
  args.w_bytes = kChunks * args.rows * kRowBytes;
  args.stage_bytes = args.w_bytes + kChunks * kTokens * kRowBytes;
  // The last wgmma of a stage reads 64 rows though the tile may end sooner; what it reads there is not used.
  const int extra = std::max(0, 64 * groups - args.rows - kChunks * kTokens) * kRowBytes;
  const int budget = std::min(info.smem_optin, kTokens > 64 ? info.smem_optin : kSplit ? kSharedSmem : kStreamSmem);
  args.stages = std::min(kMaxStages, (budget - extra - kMaxStages * 8) / args.stage_bytes);
  // Two chunks a stage if that leaves three stages, or two with all of the shared memory: what was fastest.
  if constexpr (kChunks > 1) {
    if (args.stages < (kSplit ? 3 : 2)) return launch_wgmma<kTokens, kSplit, 1>(args, info, stream);
  }
  VC_CHECK(args.stages >= 2, "linear: a block may use ", budget, " bytes of shared memory on this GPU, ",
           2 * args.stage_bytes + extra + kMaxStages * 8, " are needed.");
  const int partial = kSplit ? kTokens * (args.rows + kPad) * 4 : 0;
  args.barriers = std::max(args.stages * args.stage_bytes + extra, partial);
  LaunchShape shape;
  shape.block = dim3(unsigned(128 * groups));
  shape.smem = size_t(args.barriers + kMaxStages * 8);
  shape.cluster = kSplit ? args.splits : 1;
  shape.grid = dim3(unsigned(kSplit ? args.items * args.splits : std::min(args.items, info.multiprocessors)));
  const CUtensorMap w_map = args.has_rope ? bf16_heads_map(args.p.w, args.p.n / args.rope.head_dim, args.rope.head_dim,
                                                           args.p.k, kRopeRun, args.rows / (2 * kRopeRun))
                            : args.p.swiglu ? bf16_halves_map(args.p.w, args.p.n, args.p.k, args.rows)
                                            : bf16_matrix_map(args.p.w, args.p.n, args.p.k, args.p.k, args.rows);
  const CUtensorMap x_map =
      bf16_matrix_map(args.p.x, args.p.rows, args.p.k, args.p.rows > 1 ? args.p.x_stride_row : args.p.k, kTokens);
  allow_all_smem<linear_wgmma<kTokens, kSplit, kChunks>>(info);
  launch(linear_wgmma<kTokens, kSplit, kChunks>, shape, info, stream, args, w_map, x_map);
}

// rope: null, or where and how the product goes on.
void linear_hopper(const LinearParams& p, const RopeWriteParams* rope, const DeviceInfo& info, cudaStream_t stream) {
  const LinearHopperPlan plan = linear_hopper_plan(p.n, p.k);
  if (linear_narrow(p, rope, plan, info, stream)) return;
  if (!rope && linear_wide(p, plan, info, stream)) return;
  WgmmaArgs args{};
  args.p = p;
  args.splits = plan.splits;
  for (int i = 0; i <= plan.splits; ++i) args.begin[i] = plan.part_begin(i);
  args.rows = rope ? plan.rope_rows() : p.swiglu ? plan.swiglu_rows() : plan.rows;
  args.wide = can_access_wide(p);
  args.w_policy = w_policy(p);
  const int tokens = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : p.rows <= 64 ? 64 : 128;
  args.token_blocks = (p.rows + tokens - 1) / tokens;
  int tiles = (p.n + args.rows - 1) / args.rows;
  if (rope) {
    args.has_rope = true, args.rope = *rope;
    args.head_runs_log2 = RopeTile<kRopeRun>::runs_log2(rope->head_dim);
    tiles = RopeTile<kRopeRun>::count(*rope, args.rows);
  }
  args.items = tiles * args.token_blocks;
  const auto go = [&]<int kTokens>() {
    constexpr int kMostChunks = kTokens <= 64 ? 2 : 1;  // two have not been timed with 128 tokens
    if (plan.splits > 1) return launch_wgmma<kTokens, true, kMostChunks>(args, info, stream);
    launch_wgmma<kTokens, false, kMostChunks>(args, info, stream);
  };
  switch (tokens) {
    case 8:
      return go.template operator()<8>();
    case 16:
      return go.template operator()<16>();
    case 32:
      return go.template operator()<32>();
    case 64:
      return go.template operator()<64>();
    default:
      return go.template operator()<128>();
  }
}

bool takes_simple(const LinearParams& p) { return p.dtype == DType::kFloat32 || p.k % 8 != 0 || p.k == 0; }

// SwiGLU in the product's own kernel.
bool fuses_swiglu(const LinearParams& p, const DeviceInfo& info) {
  return info.hopper && !takes_simple(p) && p.n % 16 == 0;
}

// Rotation and page write in the product's own kernel.
bool fuses_rope(const LinearRopeWriteParams& p, const DeviceInfo& info) {
  constexpr int kMostRows = 128;  // beyond, linear_wide.cu and another launch are faster
  if (!info.hopper || takes_simple(p.product) || !can_fuse_rope(p.rope, p.product.bias)) return false;
  if (p.product.rows > kMostRows) return false;
  return !has_qk_norm(p.rope) || fuses_qk_norm(p.product);
}

// Another kernel for an unaligned x would be another order of addition for the same product.
void check_alignment(const LinearParams& p) {
  VC_CHECK(rows_aligned16(p.x, p.x_stride_row, 2) && aligned16(p.w), "linear: the rows of x (stride ", p.x_stride_row,
           " elements) and w must start at multiples of 16 bytes; make them contiguous.");
}

size_t product_bytes(const LinearParams& p) {
  return size_t(p.rows) * size_t(p.n) * (p.dtype == DType::kFloat32 ? 4 : 2);
}

}  // namespace

size_t linear_workspace_bytes(const LinearParams& p) {
  if (!p.swiglu || fuses_swiglu(p, device_info())) return 0;
  return product_bytes(p);
}

void linear(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 0 || p.n <= 0) return;
  const DeviceInfo info = device_info();
  if (p.swiglu && !fuses_swiglu(p, info)) {
    LinearParams plain = p;
    plain.swiglu = false, plain.out = p.workspace, plain.out_stride_row = p.n;
    linear(plain, stream);
    return silu_mul({p.workspace, p.out, p.n, p.rows, p.n / 2, p.dtype}, stream);
  }
  if (takes_simple(p)) return linear_simple(p, info, stream);
  check_alignment(p);
  if (info.hopper) return linear_hopper(p, nullptr, info, stream);
  linear_mma(p, info, stream);
}

size_t linear_rope_write_workspace_bytes(const LinearRopeWriteParams& p) {
  return fuses_rope(p, device_info()) ? 0 : product_bytes(p.product);
}

void linear_rope_write(const LinearRopeWriteParams& p, cudaStream_t stream) {
  if (p.product.rows <= 0) return;
  const DeviceInfo info = device_info();
  if (fuses_rope(p, info)) {
    check_alignment(p.product);
    return linear_hopper(p.product, &p.rope, info, stream);
  }
  LinearParams plain = p.product;
  plain.out = p.workspace, plain.out_stride_row = plain.n;
  linear(plain, stream);
  RopeWriteParams rope = p.rope;
  rope.qkv = p.workspace, rope.qkv_stride_row = plain.n;
  rope_write(rope, stream);
}

}  // namespace vericache::cuda
