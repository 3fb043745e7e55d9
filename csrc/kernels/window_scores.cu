// SPDX-License-Identifier: Apache-2.0
// Mean attention of a window of queries to all keys of a sequence, without a matrix of scores: two passes over K.
// The first leaves a softmax state for every query and split of kSplitKeys keys, a small kernel merges them
// (device/window_state.cuh), the second computes the same scores again and adds their weights up. bfloat16 with
// head_dim 64 or 128 here, on mma.sync; the rest in device/window_simple.cuh.
//
// Grid: (chunks of 32 queries, or 1 in the second pass; strips; runs). A strip is kHeads heads of one KV head, a run
// some of its keys: whole splits in the first pass, whole tiles in the second, as many runs as fill the chip. The
// second pass walks its run backwards, so that it starts with what the first read last and the L2 still has.
// Block: 4 warps. Warp v has head v % kHeads and, where there are fewer heads than warps, part v / kHeads of each
// tile's keys. Its 32 queries are the A operand and stay in registers; K is the B operand.
// Shared memory: a ring of kStages tiles of K, filled by cp.async. Row r of a tile is row r of K, its 16-byte chunk i
// at place i ^ (r % 8).
//
// Reduction order: a score is the chain of head_dim / 16 mma. A thread keeps a state of its own columns over a split,
// kSub keys at a time; a butterfly merges the four threads of a row, the merge kernel splits and parts. In the second
// pass a thread adds the weights of its queries by fma, 32 queries after 32, within them g, g + 8, g + 16, g + 24
// (g = lane / 4); then a butterfly over g. Bits depend on the shape alone, not on the grid.
// Held by bench/gpu/dense_check.cu (window_scores_*).
#include <algorithm>
#include <cstdint>

#include "device/cp_async.cuh"
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"
#include "device/softmax_state.cuh"
#include "device/window_simple.cuh"
#include "device/window_state.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kTileKeys = 64;  // keys of a stage
constexpr int kSplitTiles = 4, kSplitKeys = kSplitTiles * kTileKeys;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunkRows = 32;           // queries of a warp
constexpr int kBlocks = 3, kStages = 3;  // a multiprocessor; tiles in the ring

template <int kDim, int kHeadsOfBlock>
struct Shape {
  static constexpr int kHeadDim = kDim, kHeads = kHeadsOfBlock;
  static constexpr int kParts = kWarps / kHeads;                       // of a tile's tokens
  static constexpr int kWarpKeys = kTileKeys / kParts;                 // of a tile, a warp's
  static constexpr int kSub = std::min(32, kWarpKeys);                 // of them, at a time
  static constexpr int kSubs = kWarpKeys / kSub, kColumns = kSub / 8;  // n-tiles
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kRowBytes = 2 * kHeadDim, kTileBytes = kTileKeys * kRowBytes;
};

// How the work is laid out; nothing here enters a bit.
struct Layout {
  int head_blocks;  // of a KV head
  int chunks;       // of kChunkRows queries
  int tiles;        // of a strip: whole splits, so the last ones may be empty
  int run_tiles;    // of a run; the last one may have fewer
};

// x, of which the compiler knows nothing: what is computed from it once a tile is not kept in registers over the tiles.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Copies a tile of K to the stage; keys past the end as zeros. One commit group.
template <class S>
__device__ __forceinline__ void copy_tile(const WindowScoresParams& p, int kv_head, int tile, uint32_t stage) {
  constexpr int kRowChunks = S::kRowBytes / 16, kRowsAtOnce = kThreads / kRowChunks;
  const int thread = unknown(int(threadIdx.x)), chunk = thread % kRowChunks, row = thread / kRowChunks;
  const auto* k = static_cast<const __nv_bfloat16*>(p.k) + kv_head * p.k_stride_head;
  const int first = tile * kTileKeys + row;
  const uint32_t to = stage + uint32_t(row * S::kRowBytes);
#pragma unroll
  for (int i = 0; i < kTileKeys; i += kRowsAtOnce)
    cp_async16(to + uint32_t(i * S::kRowBytes + ((chunk ^ (row + i) % 8) << 4)),
               k + min(first + i, p.tokens - 1) * p.k_stride_token + chunk * 8, first + i < p.tokens);
}

// A warp's 32 queries: A operands of the m-tiles 0 and 1.
template <class S>
struct Queries {
  uint32_t a[2][S::kSteps][4];

  __device__ __forceinline__ void load(const WindowScoresParams& p, int head, int chunk) {
    const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    const auto* q = static_cast<const __nv_bfloat16*>(p.queries) + head * p.q_stride_head + 2 * t;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int w = chunk * kChunkRows + m * 16 + i * 8 + g;
        const auto* row = reinterpret_cast<const uint32_t*>(q + w * p.q_stride_row);
#pragma unroll
        for (int s = 0; s < S::kSteps; ++s) {
          a[m][s][i] = w < p.window ? row[s * 8] : 0u;
          a[m][s][i + 2] = w < p.window ? row[s * 8 + 4] : 0u;
        }
      }
  }
  // As operands in memory, so that the second pass can fetch 32 queries after 32 at full width.
  static __device__ __forceinline__ int64_t place(int head, int chunk, int chunks, int m, int s) {
    return (((int64_t(head) * chunks + chunk) * 2 + m) * S::kSteps + s) * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ void save(uint4* to, int head, int chunk, int chunks) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s)
        to[place(head, chunk, chunks, m, s)] = make_uint4(a[m][s][0], a[m][s][1], a[m][s][2], a[m][s][3]);
  }
  __device__ __forceinline__ void fetch(const uint4* from, int head, int chunk, int chunks) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
        const uint4 x = from[place(head, chunk, chunks, m, s)];
        a[m][s][0] = x.x, a[m][s][1] = x.y, a[m][s][2] = x.z, a[m][s][3] = x.w;
      }
  }
};

template <class S>
using Scores = float[2][S::kColumns][4];

// Scores of the warp's queries and kSub keys from row `key` of the stage on.
template <class S>
__device__ __forceinline__ void multiply(Scores<S>& c, const Queries<S>& q, uint32_t stage, int key) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t rows = stage + uint32_t((key + lane % 8) * S::kRowBytes);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < S::kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.f;
#pragma unroll
  for (int s = 0; s < S::kSteps; s += 2) {
    const uint32_t at = rows + uint32_t(((s * 2 + lane / 8) ^ lane % 8) << 4);
#pragma unroll
    for (int n = 0; n < S::kColumns; n += 2) {  // two at a time: more would not fit the registers
      uint32_t b[2][4];
      ldmatrix_x4(b[0], at + uint32_t(n * 8 * S::kRowBytes));
      ldmatrix_x4(b[1], at + uint32_t((n + 1) * 8 * S::kRowBytes));
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_m16n8k16(c[m][n + j], q.a[m][s + half], b[j][2 * half], b[j][2 * half + 1]);
    }
  }
}

// Hides keys in a query's future, and queries past the window. first_key: of the scores; first_query likewise.
template <class S>
__device__ __forceinline__ void mask(Scores<S>& c, const WindowScoresParams& p, int first_key, int first_query) {
  const int lane = unknown(int(threadIdx.x) % 32), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < S::kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int w = first_query + m * 16 + i / 2 * 8 + g, key = first_key + n * 8 + 2 * t + i % 2;
        if (w >= p.window || key > p.tokens - p.window + w) c[m][n][i] = negative_infinity();
      }
}

// The states of a thread's four rows over its own columns of a split. Row r is query (r / 2) * 16 + r % 2 * 8 + g.
struct States {
  RunningMax m[4];
  float l[4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 4; ++r) m[r].raw = negative_infinity(), l[r] = 0.f;
  }
  template <class S>
  __device__ __forceinline__ void add(const Scores<S>& c, float factor) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float top = negative_infinity();
#pragma unroll
      for (int n = 0; n < S::kColumns; ++n) top = fmaxf(top, fmaxf(c[r / 2][n][r % 2 * 2], c[r / 2][n][r % 2 * 2 + 1]));
      l[r] = __fmul_rn(l[r], m[r].update(top, factor));
      const float reference = m[r].reference(factor);
#pragma unroll
      for (int n = 0; n < S::kColumns; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          l[r] = __fadd_rn(l[r], softmax_weight(c[r / 2][n][r % 2 * 2 + e], factor, reference));
    }
  }
  // Over the four threads of a row; then one of them writes it.
  __device__ __forceinline__ void write(const WindowScoresParams& p, const WindowScratch& scratch, float factor,
                                        int head, int first_query, int split) const {
    const int lane = unknown(int(threadIdx.x) % 32), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      RunningMax both = m[r];
      float sum = l[r];
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, both.raw, step);
        const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
        RunningMax theirs{other};
        const float mine = both.update(other, factor), its = theirs.update(both.raw, factor);
        // Both threads add the same two products in the same order.
        const float a = __fmul_rn(sum, mine), b = __fmul_rn(other_sum, its);
        sum = __fadd_rn(a, b);
      }
      const int w = first_query + r / 2 * 16 + r % 2 * 8 + g;
      if (t == 0 && w < p.window)
        scratch.partial[(int64_t(head) * p.window + w) * scratch.splits + split] =
            make_float2(both.stored(factor), sum);
    }
  }
};

// A thread's sums of weights: of its queries, for the columns that it has.
template <class S>
struct Sums {
  float x[S::kSubs][2 * S::kColumns];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int sub = 0; sub < S::kSubs; ++sub)
#pragma unroll
      for (int j = 0; j < 2 * S::kColumns; ++j) x[sub][j] = 0.f;
  }
  // Always to the first set, which then goes to the back: after all sets each is in its place, and the loop over them
  // need not be unrolled, which would take more registers than there are.
  __device__ __forceinline__ void add(const Scores<S>& c, const WindowScoresParams& p, const WindowScratch& scratch,
                                      float factor, int head, int first_query) {
    const int first = first_query + int(threadIdx.x) % 32 / 4;
    const float2* normalizers = scratch.normalizers + int64_t(head) * p.window;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int w = first + r / 2 * 16 + r % 2 * 8;
      // From the L1 each time: they would take 8 registers beside the products.
      const float2 n = w < p.window ? normalizers[w] : make_float2(0.f, 0.f);
#pragma unroll
      for (int j = 0; j < 2 * S::kColumns; ++j)
        x[0][j] = __fmaf_rn(softmax_weight(c[r / 2][j / 2][r % 2 * 2 + j % 2], factor, n.x), n.y, x[0][j]);
    }
#pragma unroll
    for (int j = 0; j < 2 * S::kColumns; ++j) {
      const float first = x[0][j];
#pragma unroll
      for (int sub = 0; sub + 1 < S::kSubs; ++sub) x[sub][j] = x[sub + 1][j];
      x[S::kSubs - 1][j] = first;
    }
  }
  // Adds over g and writes: of two threads, each keeps half of the columns, until one is left.
  __device__ __forceinline__ void write(const WindowScoresParams& p, int head, int first_key) const {
    const int lane = unknown(int(threadIdx.x) % 32);
#pragma unroll
    for (int sub = 0; sub < S::kSubs; ++sub) {
      float y[2 * S::kColumns];
#pragma unroll
      for (int j = 0; j < 2 * S::kColumns; ++j) y[j] = x[sub][j];
      int column = 0, left = 2 * S::kColumns;
      bool writes = true;
#pragma unroll
      for (int step = 16; step >= 4; step /= 2) {
        const bool upper = lane & step;
        if (left > 1) {
          left /= 2;
#pragma unroll
          for (int j = 0; j < S::kColumns; ++j) {
            if (j >= left) continue;
            const float send = upper ? y[j] : y[j + left];
            y[j] = __fadd_rn(upper ? y[j + left] : y[j], __shfl_xor_sync(0xffffffffu, send, step));
          }
          column += upper ? left : 0;
        } else {
          y[0] = __fadd_rn(y[0], __shfl_xor_sync(0xffffffffu, y[0], step));
          writes = writes && !upper;
        }
      }
      const int key = first_key + sub * S::kSub + column / 2 * 8 + 2 * (lane % 4) + column % 2;
      if (writes && key < p.tokens) p.out[int64_t(head) * p.tokens + key] = y[0];
    }
  }
};

template <class S, bool kSums>
__global__ void __launch_bounds__(kThreads, kBlocks)
    window_kernel(const __grid_constant__ WindowScoresParams p, const __grid_constant__ WindowScratch scratch,
                  const __grid_constant__ Layout layout) {
  const uint32_t ring = smem_address(dynamic_smem());
  const int warp = int(threadIdx.x) / 32, part = S::kParts == 1 ? 0 : warp / S::kHeads, group = p.q_heads / p.kv_heads;
  const float factor = __fmul_rn(p.scale, kLog2e);

  // This block's strip, and its run of tiles.
  const int one_chunk = int(blockIdx.x), kv_head = int(blockIdx.y) / layout.head_blocks;
  const int head_in_group = int(blockIdx.y) % layout.head_blocks * S::kHeads + warp % S::kHeads;
  const int head = kv_head * group + head_in_group;
  const bool idle = head_in_group >= group;
  const int begin = int(blockIdx.z) * layout.run_tiles, count = min(layout.run_tiles, layout.tiles - begin);
  const auto tile_of = [&](int i) { return kSums ? begin + count - 1 - i : begin + i; };
  const auto copy = [&](int i) {
    if (i < count) copy_tile<S>(p, kv_head, tile_of(i), ring + uint32_t(i % kStages * S::kTileBytes));
    cp_async_commit();
  };

  // K was there before the first pass began, so the second need not wait for the merge to fetch it.
  if constexpr (!kSums) wait_for_previous_kernel();
  for (int i = 0; i < kStages - 1; ++i) copy(i);
  if constexpr (kSums) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }

  Queries<S> q;
  States states;
  Sums<S> sums;
  if (!idle) {
    if constexpr (kSums) {
      q.fetch(scratch.fragments, head, 0, layout.chunks);
    } else {
      q.load(p, head, one_chunk);
      if (begin == 0 && part == 0) q.save(scratch.fragments, head, one_chunk, layout.chunks);
      states.reset();
    }
  }
  for (int i = 0; i < count; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    copy(i + kStages - 1);  // into the stage that all warps left before the barrier
    if (idle) continue;
    const uint32_t stage = ring + uint32_t(i % kStages * S::kTileBytes);
    const int tile = tile_of(i), first_key = tile * kTileKeys + part * S::kWarpKeys;
    // Calls take(scores) for the warp's keys, kSub after kSub: one set of scores in registers.
    const auto each_sub = [&](int chunk, auto take) {
      const int first_query = chunk * kChunkRows;
      const bool partial = first_query + kChunkRows > p.window || first_key + S::kWarpKeys > p.tokens - p.window;
#pragma unroll 1
      for (int sub = 0; sub < S::kSubs; ++sub) {
        Scores<S> c;
        multiply<S>(c, q, stage, part * S::kWarpKeys + sub * S::kSub);
        if (partial) mask<S>(c, p, first_key + sub * S::kSub, first_query);
        take(c);
      }
    };
    if constexpr (kSums) {
      sums.reset();
      for (int chunk = 0; chunk < layout.chunks; ++chunk) {
        if (layout.chunks > 1) q.fetch(scratch.fragments, unknown(head), chunk, layout.chunks);
        each_sub(chunk,
                 [&](const Scores<S>& c) { sums.add(c, p, scratch, factor, unknown(head), chunk * kChunkRows); });
      }
      sums.write(p, unknown(head), first_key);
    } else {
      each_sub(one_chunk, [&](const Scores<S>& c) { states.template add<S>(c, factor); });
      if (tile % kSplitTiles == kSplitTiles - 1) {
        states.write(p, scratch, factor, unknown(head), one_chunk * kChunkRows, tile / kSplitTiles * S::kParts + part);
        states.reset();
      }
    }
  }
}

int heads_of_block(const WindowScoresParams& p) {
  const int group = p.q_heads / p.kv_heads;
  return group >= 3 ? 4 : group;
}

bool takes_tensor_cores(const WindowScoresParams& p) {
  return p.dtype == DType::kBFloat16 && (p.head_dim == 64 || p.head_dim == 128) &&
         rows_aligned16(p.queries, p.q_stride_row, 2) && p.q_stride_head % 8 == 0 &&
         rows_aligned16(p.k, p.k_stride_token, 2) && p.k_stride_head % 8 == 0;
}

// The scratch at `memory`, and its end.
struct Placed {
  WindowScratch scratch;
  size_t bytes;
};

Placed place_scratch(const WindowScoresParams& p, void* memory) {
  const bool fast = takes_tensor_cores(p);
  const int64_t rows = int64_t(p.q_heads) * p.window;
  const int64_t tile = fast ? kSplitKeys : kSimpleWindowKeys;
  Placed placed{};
  placed.scratch.splits = int((p.tokens + tile - 1) / tile) * (fast ? kWarps / heads_of_block(p) : 1);
  const auto take = [&](size_t bytes) {
    char* at = static_cast<char*>(memory) + placed.bytes;
    placed.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  placed.scratch.partial = reinterpret_cast<float2*>(take(size_t(rows) * placed.scratch.splits * sizeof(float2)));
  placed.scratch.normalizers = reinterpret_cast<float2*>(take(size_t(rows) * sizeof(float2)));
  const int chunks = (p.window + kChunkRows - 1) / kChunkRows;
  if (fast)
    placed.scratch.fragments =
        reinterpret_cast<uint4*>(take(size_t(p.q_heads) * chunks * kChunkRows * p.head_dim * sizeof(__nv_bfloat16)));
  return placed;
}

template <class S>
void launch_tensor_cores(const WindowScoresParams& p, const WindowScratch& scratch, cudaStream_t stream) {
  const DeviceInfo info = device_info();
  const int group = p.q_heads / p.kv_heads;
  VC_CHECK(p.tokens <= INT32_MAX - kSplitKeys, "window_scores: ", p.tokens, " tokens; it takes up to ",
           INT32_MAX - kSplitKeys, ".");
  Layout layout{(group + S::kHeads - 1) / S::kHeads, (p.window + kChunkRows - 1) / kChunkRows,
                (p.tokens + kSplitKeys - 1) / kSplitKeys * kSplitTiles, 0};
  const int strips = p.kv_heads * layout.head_blocks;
  const auto pass = [&](auto kernel, int chunks, int unit) {
    const int units = layout.tiles / unit,
              runs = std::clamp(info.multiprocessors * kBlocks / (strips * chunks), 1, units);
    const int run_units = (units + runs - 1) / runs;
    layout.run_tiles = run_units * unit;
    const dim3 grid(unsigned(chunks), unsigned(strips), unsigned((units + run_units - 1) / run_units));
    launch(kernel, {grid, dim3(kThreads), size_t(kStages) * S::kTileBytes}, info, stream, p, scratch, layout);
  };
  allow_all_smem<window_kernel<S, false>>(info);
  allow_all_smem<window_kernel<S, true>>(info);
  pass(window_kernel<S, false>, layout.chunks, kSplitTiles);
  launch_window_merge(p, scratch, info, stream);
  pass(window_kernel<S, true>, 1, 1);
}

template <int kHeadDim>
void launch_heads(const WindowScoresParams& p, const WindowScratch& scratch, cudaStream_t stream) {
  switch (heads_of_block(p)) {
    case 1:
      return launch_tensor_cores<Shape<kHeadDim, 1>>(p, scratch, stream);
    case 2:
      return launch_tensor_cores<Shape<kHeadDim, 2>>(p, scratch, stream);
    default:
      return launch_tensor_cores<Shape<kHeadDim, 4>>(p, scratch, stream);
  }
}

}  // namespace

size_t window_scores_workspace_bytes(const WindowScoresParams& p) { return place_scratch(p, nullptr).bytes; }

void window_scores(const WindowScoresParams& p, cudaStream_t stream) {
  const WindowScratch scratch = place_scratch(p, p.workspace).scratch;
  if (!takes_tensor_cores(p))
    return dispatch_element(p.dtype, [&](auto t) { launch_simple_window<decltype(t)>(p, scratch, stream); });
  switch (p.head_dim) {
    case 64:
      return launch_heads<64>(p, scratch, stream);
    case 128:
      return launch_heads<128>(p, scratch, stream);
    default:
      throw Error(detail::concat("head_dim is ", p.head_dim, "; the tensor-core kernel takes 64 and 128."));
  }
}

}  // namespace vericache::cuda
