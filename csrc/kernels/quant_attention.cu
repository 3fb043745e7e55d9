// SPDX-License-Identifier: Apache-2.0
// Draft attention over quantized pages (KIVI layout), then the full-precision tail.
//
// Free of R1, so the work is cut to fit the chip: the tiles of all requests, 64 quantized or a few tail tokens each,
// form one line (device/quant_line.cuh); every block takes an equal run of it, its warps take turns at the tiles and
// work alone until the run meets the end of a unit (request, up to 8 item rows, KV head), where their states merge. A
// second kernel merges the states of units that lie in several runs (device/quant_merge.cuh). Item row i is query row
// i / group, head i % group, as in split_attention.cuh. What a warp does with a tile: device/quant_state.cuh.
//
// Grid: one block a multiprocessor. Shared memory: the line, the states that warps deposit for the merge, a ring of
// half tiles a warp (device/quant_ring.cuh), refilled beside the merge. Quantized tiles that fit the rings are on their
// way before the kernel waits for the one before it, if the caller says that they are settled: the merge of the call
// before, among others, so runs beside them.
//
// One request of few units takes kernels of its own (device/quant_single.cuh).
// Other dtypes, head_dims, page and group sizes take device/simple_attention.cuh.
#include <algorithm>

#include "device/element.cuh"
#include "device/quant_merge.cuh"
#include "device/quant_ring.cuh"
#include "device/quant_simple.cuh"
#include "device/quant_single.cuh"
#include "device/shared_memory.cuh"
#include "launchers.h"

namespace vericache::cuda {
namespace {

struct QuantArgs {
  QuantAttentionParams p;
  QuantBlob blob;
  PartialStates states;
};

// The warps whose turns are `count` tiles of a run from its tile `first` on, one bit each.
__device__ __forceinline__ uint32_t turns(int first, int count, int warps) {
  const uint32_t all = (1u << warps) - 1, some = (1u << min(count, warps)) - 1;
  return (some << first % warps | some >> (warps - first % warps)) & all;
}

template <class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 1)
    quant_attention_kernel(const __grid_constant__ QuantArgs args) {
  const QuantAttentionParams& p = args.p;
  unsigned char* smem = dynamic_smem();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, group = p.q_heads / p.kv_heads;
  QuantLine line;
  line.place(reinterpret_cast<int*>(smem), p.requests, int(gridDim.x));
  if (!p.tables_settled) wait_for_previous_kernel();
  line.build(p, Shape::kItemRows, Shape::kTailTokens);

  const int begin = line.begin(int(blockIdx.x)), end = line.begin(int(blockIdx.x) + 1);
  unsigned char* deposits = smem + Shape::line_bytes(p.requests);
  QuantRing<Shape> ring{{deposits + warps * Shape::kStateBytes + warp * Shape::kRingBytes},
                        p,
                        args.blob,
                        lane,
                        2 * ((end - begin - warp + warps - 1) / warps)};
  const auto locate = [&](int turn) {
    const int tile = begin + warp + (turn + lane) * warps;
    if (tile >= end) return;
    LineCursor at;
    at.seek(line, p, tile);
    ring.set(page_of<Shape>(p, args.blob, at.request, at.tile, at.quant_tiles), at.kv_head, at.tile, at.quant_tiles);
  };
  locate(0);
  ring.fill(Shape::kHalves, [&] { return p.cache_settled && !ring.next_is_tail(); }, [&] { ring.copy_next(locate); });
  LineCursor at;
  if (begin < end) at.seek(line, p, begin);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const float c = p.scale * kLog2e;
  int flat = begin + warp;
  for (int from = begin; from < end;) {  // the part of a unit that lies in this run
    const int unit_begin = from - at.tile, to = min(end, unit_begin + at.tiles);
    QuantUnit unit;
    unit.number = at.unit, unit.kv_head = at.kv_head, unit.query0 = line.row_offset[at.request];
    unit.first_item = at.row_block * Shape::kItemRows;
    const int items = (line.row_offset[at.request + 1] - int(unit.query0)) * group;
    unit.rows = min(Shape::kItemRows, items - unit.first_item);
    unit.whole = from == unit_begin && to == unit_begin + at.tiles;

    if (flat < to) {
      QuantState<Shape> state;
      state.start({state.q_row(p, unit.query0, unit.first_item, items, at.kv_head, lane), lane});
      do {
        const int number = flat - unit_begin;
        if (number < at.quant_tiles) {
          ring.take(state, c, locate);
        } else {
          const int skipped = (number - at.quant_tiles) * Shape::kTailTokens + at.quant_tiles * kQuantTokens;
          int seen[2];
          state.count_seen(seen, p, unit.query0, unit.first_item, items, skipped, lane);
          ring.take_tail(state, c, line.last_pos[at.request] + 1 - skipped, seen, locate);
        }
        flat += warps;
      } while (flat < to);
      auto* o = reinterpret_cast<float*>(deposits + warp * Shape::kStateBytes);
      state.deposit(o, reinterpret_cast<float2*>(o + Shape::kItemRows * Shape::kHeadDim), lane);
    }
    __syncthreads();  // deposits are there
    const uint32_t present = turns(from - begin, to - from, warps);
    merge_deposits<Shape>(p, args.states, unit, deposits, Shape::kStateBytes,
                          [&](int w) { return (present >> w & 1) != 0; });
    from = to;
    if (from < end) {
      at.seek(line, p, from);
      __syncthreads();  // deposits have been read
    }
  }
}

// The head_dims of the tensor cores: a row of the 1-bit plane of 5 and 7 bits fills an ldmatrix row at 128 alone.
constexpr bool has_shape(int head_dim, int bits) {
  return head_dim == 128 || (head_dim == 64 && bits != 5 && bits != 7);
}

bool takes_tensor_cores(const QuantAttentionParams& p) {
  return p.dtype == DType::kBFloat16 && has_shape(p.head_dim, p.bits) && p.page_size >= kQuantTokens &&
         (p.group == 32 || p.group == 64) && q_aligned16(p);
}

// One row a request (or fewer) of at most four heads a group: see quant_state.cuh.
constexpr bool has_pairs(int bits, int group) { return (bits == 2 || bits == 4) && group == 32; }
bool pairs_groups(const QuantAttentionParams& p) {
  return has_pairs(p.bits, p.group) && p.q_heads / p.kv_heads <= 4 && p.rows <= p.requests;
}

// What was fastest: warps, and halves of a warp's ring.
struct LineRing {
  int warps, halves;
};
constexpr LineRing line_ring(int bits, int group, bool paired) {
  if (bits == 8) return {7, 3};
  if (bits == 7) return {8, 2};
  if (bits == 6 || bits == 5) return {8, 3};
  if (bits == 4) return {12, 2};
  return {group == 32 && !paired ? 8 : 12, 3};  // two sets of accumulators leave registers for 8
}
template <int kHeadDim, int kBits, int kGroup, bool kPaired>
using ShapeFor = QuantShape<kHeadDim, kBits, kGroup, kPaired, line_ring(kBits, kGroup, kPaired).warps,
                            line_ring(kBits, kGroup, kPaired).halves>;

int64_t max_states(const QuantAttentionParams& p, int item_rows, int blocks) {
  const int64_t row_blocks = int64_t(p.rows) * (p.q_heads / p.kv_heads) / item_rows + p.requests;
  return (int64_t(blocks) + row_blocks * p.kv_heads) * item_rows;
}

template <class Shape>
void launch_quant(const QuantAttentionParams& p, cudaStream_t stream) {
  constexpr auto kernel = quant_attention_kernel<Shape>;
  const DeviceInfo info = device_info();
  const int blocks = info.multiprocessors;
  const int warps = std::min(Shape::kWarps, (info.smem_optin - Shape::line_bytes(p.requests)) / Shape::kWarpBytes);
  VC_CHECK(warps > 0, p.requests, " requests leave no shared memory for the attention kernel; use fewer a batch.");
  const auto states = PartialStates::at(p.workspace, max_states(p, Shape::kItemRows, blocks), Shape::kHeadDim);
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(blocks), dim3(32 * warps), size_t(Shape::line_bytes(p.requests) + warps * Shape::kWarpBytes)},
         info, stream, QuantArgs{p, QuantBlob::make(p), states});
  launch_quant_merge<Shape::kHeadDim>({p, states, blocks, Shape::kItemRows, Shape::kTailTokens}, info, stream);
}

// One request with few units: see quant_single.cuh.
struct SingleRing {
  int warps, halves, early_warps, early_halves;
};
constexpr SingleRing single_ring(int bits) {
  if (bits == 8) return {8, 3, 7, 3};
  if (bits == 4) return {11, 3, 8, 3};
  return {12, 3, 8, 2};
}
template <int kHeadDim, int kBits, int kGroup, bool kPaired>
using SingleShape =
    QuantSingleShape<QuantShape<kHeadDim, kBits, kGroup, kPaired, single_ring(kBits).warps, single_ring(kBits).halves>,
                     single_ring(kBits).early_warps, single_ring(kBits).early_halves>;

constexpr bool has_single(int head_dim, int bits) { return head_dim == 128 && (bits == 2 || bits == 4 || bits == 8); }

int64_t single_units(const QuantAttentionParams& p, int item_rows) {
  const int64_t items = int64_t(p.rows) * (p.q_heads / p.kv_heads);
  return (items + item_rows - 1) / item_rows * p.kv_heads;
}

template <class Shape>
bool takes_single(const QuantAttentionParams& p) {
  const DeviceInfo info = device_info();
  return info.hopper && p.requests == 1 && p.rows <= kSingleRows &&
         4 * single_units(p, Shape::kItemRows) <= info.multiprocessors;
}

template <class Shape>
void launch_single(const QuantAttentionParams& p, cudaStream_t stream) {
  constexpr auto kernel = quant_single_kernel<Shape>;
  constexpr auto merge = quant_single_merge_kernel<Shape>;
  const DeviceInfo info = device_info();
  const auto pieces = QuantPieces::make(info.multiprocessors, int(single_units(p, Shape::kItemRows)));
  const auto states =
      PartialStates::at(p.workspace, max_states(p, Shape::kItemRows, info.multiprocessors), Shape::kHeadDim);
  const QuantSingleArgs args{p, QuantBlob::make(p), states, pieces};
  allow_all_smem<kernel>(info);
  launch(kernel, {dim3(info.multiprocessors), dim3(32 * Shape::kWarps), size_t(Shape::kWarps * Shape::kRingBytes)},
         info, stream, args);
  launch(merge, {dim3(p.rows * p.q_heads), dim3(32 * kMergeWarps), 0}, info, stream, args);
}

template <int kHeadDim, int kBits, int kGroup, bool kPaired>
void launch_shape(const QuantAttentionParams& p, cudaStream_t stream) {
  constexpr bool kTwoSets = kBits == 2 && kGroup == 32 && !kPaired;  // too many registers for a kernel beside the merge
  if constexpr (has_single(kHeadDim, kBits) && !kTwoSets) {
    using Shape = SingleShape<kHeadDim, kBits, kGroup, kPaired>;
    if (takes_single<Shape>(p)) return launch_single<Shape>(p, stream);
  }
  launch_quant<ShapeFor<kHeadDim, kBits, kGroup, kPaired>>(p, stream);
}

template <int kHeadDim, int kBits, int kGroup>
void launch_group(const QuantAttentionParams& p, cudaStream_t stream) {
  if constexpr (has_pairs(kBits, kGroup)) {
    if (pairs_groups(p)) return launch_shape<kHeadDim, kBits, kGroup, true>(p, stream);
  }
  launch_shape<kHeadDim, kBits, kGroup, false>(p, stream);
}

template <int kHeadDim, int kBits>
void launch_for(const QuantAttentionParams& p, cudaStream_t stream) {
  if (p.group == 32)
    launch_group<kHeadDim, kBits, 32>(p, stream);
  else
    launch_group<kHeadDim, kBits, 64>(p, stream);
}

template <int kBits>
void launch_bits(const QuantAttentionParams& p, cudaStream_t stream) {
  if (!takes_tensor_cores(p))
    dispatch_element(
        p.dtype, [&](auto t) { launch_simple_attention<decltype(t), SimpleQuantKeys<kBits, decltype(t)>>(p, stream); });
  else if (p.head_dim == 128)
    launch_for<128, kBits>(p, stream);
  else if constexpr (has_shape(64, kBits))
    launch_for<64, kBits>(p, stream);
}

}  // namespace

size_t quant_attention_workspace_bytes(const QuantAttentionParams& p) {
  if (!takes_tensor_cores(p)) return 0;
  const int item_rows = pairs_groups(p) ? 4 : 8;
  return PartialStates::bytes(max_states(p, item_rows, device_info().multiprocessors), p.head_dim);
}

void quant_attention(const QuantAttentionParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  VC_CHECK(p.scale > 0.f, "scale is ", p.scale, "; attention needs a positive one.");
  switch (p.bits) {
    case 2:
      return launch_bits<2>(p, stream);
    case 4:
      return launch_bits<4>(p, stream);
    case 5:
      return launch_bits<5>(p, stream);
    case 6:
      return launch_bits<6>(p, stream);
    case 7:
      return launch_bits<7>(p, stream);
    case 8:
      return launch_bits<8>(p, stream);
    default:
      throw Error(detail::concat("bits is ", p.bits, "; it must be 2, 4, 5, 6, 7 or 8."));
  }
}

}  // namespace vericache::cuda
