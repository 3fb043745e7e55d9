// SPDX-License-Identifier: Apache-2.0
// out = x @ w^T (+ bias) (+ residual): the batch-invariant matrix product of the decode and verify path, for Hopper.
//
// The weights are the long operand: at 1 to 64 rows of x the time is that of reading w once, so w takes the 64-wide
// side of wgmma m64nNk16 and the rows of x ("tokens") its N side, 8 to 128 wide. An output element sees the same chain
// of k16 steps whatever N is.
//
// Work. linear_hopper_plan cuts n into tiles and k into 1, 2 or 4 parts. Few tokens ("flat"): a block computes all
// parts of a short tile, one warpgroup each, and adds them in its shared memory. More tokens ("tall"): x would be read
// too often, so a block takes one part of a tile `parts` times taller, a cluster has all parts and adds them over
// distributed shared memory. One part: no adding, and one block a multiprocessor walks its tiles.
// Block: a warpgroup for each 64 rows of its tile (tall) or for each part (flat). Warpgroup i owns all tokens.
// Shared memory: a ring of stages of 64 k, each w [parts in block][tile rows][64] then x [parts][tokens][64] bf16,
// filled by cp.async in the layout of device/wgmma.cuh. It takes at most half of a multiprocessor's, so that the next
// kernel's blocks fill theirs while this one ends.
//
// Reduction order (R1): element (token, n) is sum over parts p = 0 .. splits-1, left to right, of the chain
// wgmma(k16 step 0), wgmma(k16 step 1), ... of part p, starting from zero; then + bias, then + residual; one rounding.
// The cut of k comes from linear_hopper_plan(n, k) and from nothing else. That the instruction's sum over 16 k depends
// on neither N nor the place in the tile is held by bench/gpu/dense_check.cu (linear_invariance).
//
// Other GPUs take linear_mma.cu; float32 storage, and a k that is no multiple of 8, linear_simple.cu.
#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/linear_out.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "launchers.h"
#include "linear_plan.h"

namespace vericache::cuda {

LinearTuning linear_tuning;

void linear_mma(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream);
void linear_simple(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream);

namespace {

constexpr int kStageK = 64, kChunks = kStageK / 8;  // k a stage; 16-byte chunks of a row of it
constexpr int kRowBytes = kStageK * 2;
constexpr int kMaxStages = 8;
constexpr int kPad = 4;                  // floats after each token of a float32 tile: no bank conflicts
enum class Cut { kWalk, kFlat, kTall };  // one part; all parts in a block; all parts in a cluster

constexpr int kMaxThreads = 512,
              kCopies = 4;  // 16-byte copies of w a thread and stage: 64 rows by 8 chunks a warpgroup

struct WgmmaArgs {
  LinearParams p;
  int begin[5];  // first stage of each part of k; begin[splits] is the end
  int splits;    // parts of k
  int parts;     // of them in one block: splits (flat) or 1 (tall)
  int rows;      // of w in a block's tile
  int token_blocks;
  int items;  // tiles * token_blocks; token block fastest, so that blocks that run together share their w
  int stages, stage_bytes, w_bytes, barriers;  // barriers: their offset in shared memory
  int early, l2_stages, fence, once;
  bool wide;  // bias, residual and out can be accessed 4 elements at a time
};

// The copies of one block, stage after stage of an item, item after item, in the order in which it consumes them.
template <int kTokens, bool kFlat>
struct StageLoader {
  const WgmmaArgs& args;
  const uint32_t smem;
  const int first_part, steps, item_step;
  int item, kb = 0;  // of the next stage to copy
  // This thread's copies of w: at stage 0 of the item, in 16-byte chunks; and the stages in which that chunk exists, -1
  // if the tile has no such row. Without parts the copies are a fixed step apart and one of each says all.
  uint32_t offset[kFlat ? kCopies : 1];
  int limit[kFlat ? kCopies : 1];

  __device__ StageLoader(const WgmmaArgs& a, uint32_t ring, int first, int part_steps, int first_item, int step)
      : args(a), smem(ring), first_part(first), steps(part_steps), item_step(step), item(first_item) {
    locate();
  }

  __device__ __forceinline__ bool done() const { return item >= args.items; }

  __device__ __forceinline__ void locate() {
    const LinearParams& p = args.p;
    const int chunk = threadIdx.x % 8, chunks = p.k / 8, n0 = item / args.token_blocks * args.rows;
#pragma unroll
    for (int i = 0; i < (kFlat ? kCopies : 1); ++i) {
      const int v = threadIdx.x / 8 + i * (blockDim.x / 8);
      const int local = kFlat ? v / args.rows : 0, n = n0 + (kFlat ? v % args.rows : v);
      limit[i] = -1;
      if (local >= args.parts) continue;
      const int begin = args.begin[first_part + local], end = args.begin[first_part + local + 1];
      limit[i] = max(0, min(end - begin, (chunks - begin * kChunks - chunk + kChunks - 1) / kChunks));
      if (kFlat && n >= p.n) limit[i] = 0;
      offset[i] = uint32_t(int64_t(n) * chunks + begin * kChunks + chunk);
    }
  }

  __device__ __forceinline__ void w(int slot) const {
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8, row_step = blockDim.x / 8;
    const uint32_t dst = smem + slot * args.stage_bytes + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    const auto* base = static_cast<const uint4*>(args.p.w);
    if constexpr (kFlat) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (limit[i] < 0) continue;
        const bool valid = kb < limit[i];
        cp_async16_stream(dst + i * row_step * kRowBytes, valid ? base + offset[i] + kb * kChunks : base, valid);
      }
    } else {
      const int existing = kb < limit[0] ? args.p.n - item / args.token_blocks * args.rows : 0;
      const uint4* src = base + offset[0] + kb * kChunks;
      const int64_t step = int64_t(row_step) * (args.p.k / 8);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (row + i * row_step >= args.rows) break;
        const bool valid = row + i * row_step < existing;
        cp_async16_stream(dst + i * row_step * kRowBytes, valid ? src : base, valid);
        src += step;
      }
    }
  }

  __device__ __forceinline__ void x(int slot) const {
    const LinearParams& p = args.p;
    const uint32_t dst = smem + slot * args.stage_bytes + args.w_bytes;
    const int token0 = item % args.token_blocks * kTokens;
    for (int i = threadIdx.x; i < args.parts * kTokens * kChunks; i += blockDim.x) {
      const int row = i / kChunks, chunk = i % kChunks, part = first_part + row / kTokens;
      const int token = token0 + row % kTokens, stage = args.begin[part] + kb, k = stage * kStageK + chunk * 8;
      const bool valid = token < p.rows && stage < args.begin[part + 1] && k < p.k;
      const auto* src = static_cast<const __nv_bfloat16*>(p.x);
      if (valid) src += int64_t(token) * p.x_stride_row + k;
      cp_async16(dst + row * kRowBytes + ((chunk ^ (row & 7)) << 4), src, valid);
    }
  }

  // Brings stages from .. from + count - 1 of the first item as far as the L2, which is where all writes meet: right
  // whatever an earlier kernel still writes.
  __device__ void to_l2(int from, int count) const {
    const LinearParams& p = args.p;
    const int v = threadIdx.x, local = v / args.rows, n = item / args.token_blocks * args.rows + v % args.rows;
    if (local >= args.parts || n >= p.n) return;
    const int begin = args.begin[first_part + local], end = args.begin[first_part + local + 1];
    const int64_t first = int64_t(begin + from) * kStageK,
                  last = min(int64_t(min(begin + from + count, end)) * kStageK, int64_t(p.k));
    if (first >= last) return;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto* src = static_cast<const __nv_bfloat16*>(p.w) + int64_t(n) * p.k + first;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(int(last - first) * 2) : "memory");
#endif
  }

  __device__ __forceinline__ void advance() {
    if (++kb == steps) {
      kb = 0;
      item += item_step;
      locate();
    }
  }

  __device__ __forceinline__ void next(int slot) {
    if (done()) return;
    w(slot);
    x(slot);
    advance();
  }
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

// part(i) is the value of part i; left to right.
template <class F>
__device__ __forceinline__ float4 add_parts(int splits, F part) {
  const auto add = [](float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
  const float4 p0 = part(0), p1 = part(1);
  if (splits == 2) return add(p0, p1);
  const float4 p2 = part(2), p3 = part(3);
  return add(add(add(p0, p1), p2), p3);
}

// Adds and writes the parts of a flat tile.
template <int kTokens>
__device__ void add_in_block(const WgmmaArgs& args, const float (&acc)[kTokens / 2], float* partial, int item) {
  const int rows = args.rows, pitch = rows + kPad;
  spill<kTokens>(acc, partial + threadIdx.x / 128 * kTokens * pitch, 0, rows);
  __syncthreads();
  const int token0 = item % args.token_blocks * kTokens, n0 = item / args.token_blocks * rows;
  const int tokens = min(args.p.rows - token0, kTokens), vectors = rows / 4;
  for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
    const int token = i / vectors, row = i % vectors * 4;
    if (n0 + row >= args.p.n) continue;
    const float4 sum = add_parts(args.splits, [&](int part) {
      return *reinterpret_cast<const float4*>(partial + (part * kTokens + token) * pitch + row);
    });
    finish4(args.p, args.wide, token0 + token, n0 + row, sum);
  }
}

// Adds and writes the parts of a tall tile: each block of the cluster 1 / splits of its rows, for all tokens.
template <int kTokens>
__device__ void add_in_cluster(const WgmmaArgs& args, const float (&acc)[kTokens / 2], float* partial, int item,
                               int rank) {
  const int rows = args.rows, pitch = rows + kPad;
  spill<kTokens>(acc, partial, threadIdx.x / 128 * 64, rows);
  cluster_barrier();  // all partial tiles are written
  const int token0 = item % args.token_blocks * kTokens, n0 = item / args.token_blocks * rows;
  const int tokens = min(args.p.rows - token0, kTokens), share = rows / args.splits, vectors = share / 4;
  for (int i = threadIdx.x; i < tokens * vectors; i += blockDim.x) {
    const int token = i / vectors, row = rank * share + i % vectors * 4;
    if (n0 + row >= args.p.n) continue;  // also: each load below is used before the block leaves
    const uint32_t address = smem_address(partial + token * pitch + row);
    finish4(args.p, args.wide, token0 + token, n0 + row,
            add_parts(args.splits, [&](int part) { return load_cluster_float4(map_to_rank(address, part)); }));
  }
  cluster_barrier_after_reads();  // no block leaves while another reads its partial tile
}

// Writes a tile of one part from the accumulators.
template <int kTokens>
__device__ void store_tile(const WgmmaArgs& args, const float (&acc)[kTokens / 2], int item) {
  const int lane = threadIdx.x % 32, t = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4;
  const int token0 = item % args.token_blocks * kTokens, n0 = item / args.token_blocks * args.rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = n0 + row + 8 * half;
    if (row + 8 * half >= args.rows || n >= args.p.n) break;
    int token = token0 + 2 * t;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token < args.p.rows) finish1(args.p, token, n, acc[4 * j + 2 * half + i]);
        token += i == 0 ? 1 : 7;
        asm volatile("" : "+r"(token));  // else all addresses are computed first, and do not fit the registers
      }
    }
  }
}

template <int kTokens, Cut kCut>
__global__ void __launch_bounds__(kMaxThreads, kTokens <= 64 ? 2 : 1)
    linear_wgmma(const __grid_constant__ WgmmaArgs args) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  constexpr bool kFlat = kCut == Cut::kFlat, kCluster = kCut == Cut::kTall;
  const int rank = kCluster ? int(blockIdx.x) % args.splits : 0;
  const int first_item = kCluster ? int(blockIdx.x) / args.splits : int(blockIdx.x);
  const int item_step = kCluster ? args.items : int(gridDim.x);
  const int part = kFlat ? warpgroup : rank, part_steps = args.begin[part + 1] - args.begin[part];
  int steps = part_steps;
  if (kFlat)
    for (int i = 0; i < args.parts; ++i) steps = max(steps, args.begin[i + 1] - args.begin[i]);

  const uint32_t ring = smem_address(smem);
  if (ring % 1024 != 0) __trap();
  StageLoader<kTokens, kFlat> loader(args, ring, rank, steps, first_item, item_step);
  const int ahead = args.stages - 1;
  if (args.early) let_next_kernel_start();
  if (args.p.w_settled) {
    // w alone before the wait: these copies join the group of the first stage, which is then complete when all are.
    StageLoader<kTokens, kFlat> first = loader;
    for (int s = 0; s < ahead && !first.done(); ++s, first.advance()) first.w(s);
    if (args.l2_stages) loader.to_l2(ahead, args.l2_stages);
    wait_for_previous_kernel();
    for (int s = 0; s < ahead; ++s) {
      if (!loader.done()) {
        loader.x(s);
        loader.advance();
      }
      cp_async_commit();
    }
  } else {
    if (args.l2_stages) loader.to_l2(0, ahead + args.l2_stages);
    wait_for_previous_kernel();
    for (int s = 0; s < ahead; ++s) {
      loader.next(s);
      cp_async_commit();
    }
  }
  if (!args.early) let_next_kernel_start();

  const uint32_t own_w = kFlat ? part * args.rows * kRowBytes : warpgroup * 64 * kRowBytes;
  const uint32_t own_x = args.w_bytes + (kFlat ? part * kTokens * kRowBytes : 0);
  float acc[kTokens / 2];
  int slot = 0;
  for (int item = first_item; item < args.items; item += item_step) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;

    for (int kb = 0; kb < steps; ++kb) {
      cp_async_wait_pending(ahead - 1);
      if (args.fence) fence_for_wgmma();
      // Makes this stage's copies by all threads visible, and says that all have finished the stage before, whose
      // slot is the one filled next.
      __syncthreads();
      const bool mine = kb < part_steps;
      if (mine) {
        const uint32_t stage = ring + slot * args.stage_bytes;
        const uint64_t a = wgmma_operand(stage + own_w), b = wgmma_operand(stage + own_x);
        wgmma_settle(acc);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < kStageK / 16; ++step) wgmma_k16(acc, a + 2 * step, b + 2 * step);
        wgmma_commit();
      }
      loader.next(slot == 0 ? ahead : slot - 1);
      cp_async_commit();
      wgmma_wait();
      wgmma_settle(acc);
      slot = slot + 1 == args.stages ? 0 : slot + 1;
    }

    if constexpr (kCluster || kFlat) {
      cp_async_wait<0>();
      __syncthreads();  // the ring is idle: the partial tile takes its place
      if constexpr (kCluster)
        add_in_cluster<kTokens>(args, acc, reinterpret_cast<float*>(smem), item, rank);
      else
        add_in_block<kTokens>(args, acc, reinterpret_cast<float*>(smem), item);
    } else {
      store_tile<kTokens>(args, acc, item);
    }
  }
}

// The copies of one block as boxes, by one thread.
template <int kTokens>
struct BoxLoader {
  const WgmmaArgs& args;
  const CUtensorMap &w_map, &x_map;
  const uint32_t ring, barriers;
  const int first_part, steps, item_step;
  int item, kb = 0;  // of the next stage to copy

  __device__ __forceinline__ bool done() const { return item >= args.items; }
  __device__ __forceinline__ int part_steps(int i) const {
    return args.begin[first_part + i + 1] - args.begin[first_part + i];
  }

  // `w`, `x`: which operands; the barrier expects both with w.
  __device__ void copy(int slot, bool w, bool x) const {
    const uint32_t stage = ring + slot * args.stage_bytes, barrier = barriers + 8 * slot;
    const int n0 = item / args.token_blocks * args.rows, token0 = item % args.token_blocks * kTokens;
    if (w) {
      int active = 0;
      for (int i = 0; i < args.parts; ++i) active += kb < part_steps(i);
      mbarrier_expect(barrier, active * (args.rows + kTokens) * kRowBytes);
    }
    for (int i = 0; i < args.parts; ++i) {
      if (kb >= part_steps(i)) continue;
      const int k = (args.begin[first_part + i] + kb) * kStageK;
      if (w && args.once) copy_box_once(stage + i * args.rows * kRowBytes, w_map, k, n0, barrier);
      if (w && !args.once) copy_box(stage + i * args.rows * kRowBytes, w_map, k, n0, barrier);
      if (x) copy_box(stage + args.w_bytes + i * kTokens * kRowBytes, x_map, k, token0, barrier);
    }
  }

  __device__ void to_l2(int count) {
    for (; count > 0 && !done(); --count, advance())
      for (int i = 0; i < args.parts; ++i)
        if (kb < part_steps(i))
          box_to_l2(w_map, (args.begin[first_part + i] + kb) * kStageK, item / args.token_blocks * args.rows);
  }

  __device__ __forceinline__ void advance() {
    if (++kb == steps) {
      kb = 0;
      item += item_step;
    }
  }
};

template <int kTokens, Cut kCut>
__global__ void __launch_bounds__(kMaxThreads, kTokens <= 64 ? 2 : 1)
    linear_boxes(const __grid_constant__ WgmmaArgs args, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  constexpr bool kFlat = kCut == Cut::kFlat, kCluster = kCut == Cut::kTall;
  const int rank = kCluster ? int(blockIdx.x) % args.splits : 0;
  const int first_item = kCluster ? int(blockIdx.x) / args.splits : int(blockIdx.x);
  const int item_step = kCluster ? args.items : int(gridDim.x);
  const int part = kFlat ? warpgroup : rank, part_steps = args.begin[part + 1] - args.begin[part];
  int steps = part_steps;
  if (kFlat)
    for (int i = 0; i < args.parts; ++i) steps = max(steps, args.begin[i + 1] - args.begin[i]);

  const uint32_t ring = smem_address(smem), barriers = ring + args.barriers;
  if (ring % 1024 != 0) __trap();
  BoxLoader<kTokens> loader{args, w_map, x_map, ring, barriers, rank, steps, item_step, first_item};
  if (args.early) let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) mbarrier_init(barriers + 8 * s, 1);
    mbarrier_init_fence();
    prefetch_map(x_map);
    BoxLoader<kTokens> first = loader;
    if (args.p.w_settled)
      for (int s = 0; s < args.stages && !first.done(); ++s, first.advance()) first.copy(s, true, false);
    if (args.l2_stages) first.to_l2(args.l2_stages + (args.p.w_settled ? 0 : args.stages));
    wait_for_previous_kernel();
    for (int s = 0; s < args.stages && !loader.done(); ++s, loader.advance()) loader.copy(s, !args.p.w_settled, true);
  } else {
    wait_for_previous_kernel();
  }
  if (!args.early) let_next_kernel_start();
  __syncthreads();  // the barriers are initialized

  const uint32_t own_w = kFlat ? part * args.rows * kRowBytes : warpgroup * 64 * kRowBytes;
  const uint32_t own_x = args.w_bytes + (kFlat ? part * kTokens * kRowBytes : 0);
  float acc[kTokens / 2];
  int slot = 0;
  uint32_t parity = 0;
  for (int item = first_item; item < args.items; item += item_step) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;

    for (int kb = 0; kb < steps; ++kb) {
      if (kb < part_steps) {
        mbarrier_wait(barriers + 8 * slot, parity);
        const uint32_t stage = ring + slot * args.stage_bytes;
        const uint64_t a = wgmma_operand(stage + own_w), b = wgmma_operand(stage + own_x);
        wgmma_settle(acc);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < kStageK / 16; ++step) wgmma_k16(acc, a + 2 * step, b + 2 * step);
        wgmma_commit();
        wgmma_wait();
        wgmma_settle(acc);
      }
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

    if constexpr (kCluster)
      add_in_cluster<kTokens>(args, acc, reinterpret_cast<float*>(smem), item, rank);
    else if constexpr (kFlat)
      add_in_block<kTokens>(args, acc, reinterpret_cast<float*>(smem), item);
    else
      store_tile<kTokens>(args, acc, item);
  }
}

template <int kTokens, Cut kCut>
void launch_wgmma(WgmmaArgs args, const DeviceInfo& info, cudaStream_t stream) {
  constexpr bool kCluster = kCut == Cut::kTall;
  const int groups = args.parts > 1 ? args.parts : (args.rows + 63) / 64;  // warpgroups
  args.w_bytes = args.parts * args.rows * kRowBytes;
  args.stage_bytes = args.w_bytes + args.parts * kTokens * kRowBytes;
  // The last wgmma of a stage reads 64 rows though the tile may end sooner; what it reads there is not used.
  const int beyond = (args.parts > 1 ? 64 : 64 * groups) - args.rows;
  const int extra = std::max(0, beyond - args.parts * kTokens) * kRowBytes;
  const int budget = kTokens > 64 ? info.smem_optin : std::min(linear_tuning.smem_kb * 1024, info.smem_optin);
  args.stages = std::min(kMaxStages, (budget - extra - kMaxStages * 8) / args.stage_bytes);
  VC_CHECK(args.stages >= 2, "linear: a block may use ", info.smem_optin, " bytes of shared memory on this GPU, ",
           2 * args.stage_bytes + extra, " are needed.");
  const int partial = kCluster || args.parts > 1 ? args.parts * kTokens * (args.rows + kPad) * 4 : 0;
  LaunchShape shape;
  shape.block = dim3(unsigned(128 * groups));
  args.barriers = std::max(args.stages * args.stage_bytes + extra, partial);
  shape.smem = size_t(args.barriers + kMaxStages * 8);
  shape.cluster = kCluster ? args.splits : 1;
  const int blocks = kCluster         ? args.items * args.splits
                     : args.parts > 1 ? args.items
                                      : std::min(args.items, info.multiprocessors);
  shape.grid = dim3(unsigned(blocks));
  if (linear_tuning.kernel == 2) {
    const CUtensorMap w_map = bf16_matrix_map(args.p.w, args.p.n, args.p.k, args.p.k, args.rows);
    const CUtensorMap x_map =
        bf16_matrix_map(args.p.x, args.p.rows, args.p.k, args.p.rows > 1 ? args.p.x_stride_row : args.p.k, kTokens);
    allow_all_smem<linear_boxes<kTokens, kCut>>(info);
    return launch(linear_boxes<kTokens, kCut>, shape, info, stream, args, w_map, x_map);
  }
  allow_all_smem<linear_wgmma<kTokens, kCut>>(info);
  launch(linear_wgmma<kTokens, kCut>, shape, info, stream, args);
}

void linear_hopper(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream) {
  const LinearHopperPlan plan = linear_hopper_plan(p.n, p.k);
  WgmmaArgs args{};
  args.p = p;
  args.splits = plan.splits;
  for (int i = 0; i <= plan.splits; ++i) args.begin[i] = plan.part_begin(i);
  args.early = linear_tuning.early, args.l2_stages = linear_tuning.l2_stages;
  args.fence = linear_tuning.fence, args.once = linear_tuning.once;
  args.wide = can_access_wide(p);
  const bool flat = plan.splits > 1 && p.rows <= std::min(32, linear_tuning.flat_rows);
  args.parts = flat ? plan.splits : 1;
  args.rows = flat ? plan.rows / plan.splits : plan.rows;
  const int tokens = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : p.rows <= 64 ? 64 : 128;
  args.token_blocks = (p.rows + tokens - 1) / tokens;
  args.items = (p.n + args.rows - 1) / args.rows * args.token_blocks;
  const auto go = [&]<int kTokens>() {
    if constexpr (kTokens <= 32)
      if (flat) return launch_wgmma<kTokens, Cut::kFlat>(args, info, stream);
    if (plan.splits > 1) return launch_wgmma<kTokens, Cut::kTall>(args, info, stream);
    launch_wgmma<kTokens, Cut::kWalk>(args, info, stream);
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

}  // namespace

size_t linear_workspace_bytes(const LinearParams&) { return 0; }

void linear(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 0 || p.n <= 0) return;
  const DeviceInfo info = device_info();
  if (p.dtype == DType::kFloat32 || p.k % 8 != 0 || p.k == 0) return linear_simple(p, info, stream);
  // Another kernel for an unaligned x would be another order of addition for the same product.
  VC_CHECK(rows_aligned16(p.x, p.x_stride_row, 2) && aligned16(p.w), "linear: the rows of x (stride ", p.x_stride_row,
           " elements) and w must start at multiples of 16 bytes; make them contiguous.");
  if (info.hopper && linear_tuning.kernel >= 1) return linear_hopper(p, info, stream);
  linear_mma(p, info, stream);
}

}  // namespace vericache::cuda
