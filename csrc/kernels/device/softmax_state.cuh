// SPDX-License-Identifier: Apache-2.0
// Partial softmax states: how a tile of scores enters one, and how the states of a row's splits are merged. The only
// place where either is done of what R1 binds; draft attention has quant_state.cuh, kept_state.cuh and state_sum.cuh
// besides.
//
// A state of some keys is (m, l, o[head_dim]): with x_j = s_j * scale * log2(e) and the state's reference m,
// l = sum 2^(x_j - m) and o = sum 2^(x_j - m) v_j. Arithmetic that enters a row's bits is written with the rounding
// intrinsics: left to the compiler, two instantiations of a kernel could fuse a product differently.
//
// Reduction order (R1) of the merge: states are weighted by 2^(m_i - M), M the largest m of the row; groups of 8
// splits at absolute indexes 8g .. 8g+7 are summed left to right, then the groups left to right.
// Held by bench/gpu/attention_check.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fast_math.cuh"
#include "launch.cuh"
#include "splits.cuh"

namespace vericache::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// A row's running maximum of raw scores over the tiles so far. A tile all of whose keys are masked changes nothing:
// rescale is then exactly 1 (or the state is still empty), every weight exactly 0.
struct RunningMax {
  float raw;  // -inf before the first visible key

  // Takes the tile's maximum in; returns the factor for everything summed so far. c = scale * log2(e) > 0.
  __device__ __forceinline__ float update(float tile_max, float c) {
    const float next = fmaxf(raw, tile_max);
    const float reference = next == negative_infinity() ? 0.f : next;
    const float rescale = fast_exp2(__fmul_rn(__fsub_rn(raw, reference), c));
    raw = next;
    return rescale;
  }
  __device__ __forceinline__ float reference(float c) const {
    return raw == negative_infinity() ? 0.f : __fmul_rn(raw, c);
  }
  // As it is kept in memory.
  __device__ __forceinline__ float stored(float c) const {
    return raw == negative_infinity() ? raw : __fmul_rn(raw, c);
  }
};

__device__ __forceinline__ float softmax_weight(float score, float c, float reference) {
  return fast_exp2(__fmaf_rn(score, c, -reference));
}

// Partial states in memory; the kernel that writes them says which index is whose.
struct PartialStates {
  float* o;    // [count, head_dim] float32
  float2* ml;  // [count]: m, l; m is -inf if the state holds no key

  static size_t bytes(int64_t count, int head_dim) {
    return size_t(count) * (head_dim * sizeof(float) + sizeof(float2));
  }
  static PartialStates at(void* memory, int64_t count, int head_dim) {
    float* o = static_cast<float*>(memory);
    return {o, reinterpret_cast<float2*>(o + count * head_dim)};
  }
};

// The states of one row and head: indexes first + s, begin <= s < end, in key order.
struct StateRun {
  int64_t first = 0;
  int begin = 0, end = 0;
};

inline constexpr int kMergeGroup = 8;  // splits

// A group of a row's splits as one warp holds it, kHeadDim / 32 channels a lane.
template <int kHeadDim>
struct MergeGroup {
  static constexpr int kPer = kHeadDim / 32;
  struct alignas(4 * kPer) Channels {
    float at[kPer];
  };
  float2 ml;  // of split begin + lane % 8
  Channels values[kMergeGroup];

  // Splits begin .. begin + 7, as far as the run has them. All loads are independent.
  __device__ __forceinline__ void load(const PartialStates& partial, const StateRun& run, int begin, int lane) {
    const auto has = [&](int s) { return s >= run.begin && s < run.end; };
    const int own = begin + lane % kMergeGroup;
    ml = has(own) ? partial.ml[run.first + own] : make_float2(negative_infinity(), 0.f);
#pragma unroll
    for (int i = 0; i < kMergeGroup; ++i) {
      const int64_t at = run.first + begin + i;
      values[i] = has(begin + i) ? reinterpret_cast<const Channels*>(partial.o + at * kHeadDim)[lane] : Channels{};
    }
  }
  __device__ __forceinline__ void sum(float largest, float& l, float (&o)[kPer]) const {
    const float own_weight = fast_exp2(__fsub_rn(ml.x, largest));
    l = 0.f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) o[j] = 0.f;
#pragma unroll
    for (int i = 0; i < kMergeGroup; ++i) {
      const float weight = __shfl_sync(0xffffffffu, own_weight, i);
      l = __fmaf_rn(__shfl_sync(0xffffffffu, ml.y, i), weight, l);
#pragma unroll
      for (int j = 0; j < kPer; ++j) o[j] = __fmaf_rn(values[i].at[j], weight, o[j]);
    }
  }
};

// The largest m of a row, 0 if it has no key, for a whole warp. `meanwhile` sends for what does not depend on it.
template <class Meanwhile>
__device__ __forceinline__ float merge_reference(const PartialStates& partial, const StateRun& run, int lane,
                                                 const Meanwhile& meanwhile) {
  const auto m = [&](int s) { return s < run.end ? partial.ml[run.first + s].x : negative_infinity(); };
  float largest = m(run.begin + lane);
  const float other = m(run.begin + lane + 32);
  meanwhile();
  for (int s = run.begin + lane + 64; s < run.end; s += 32) largest = fmaxf(largest, m(s));
  largest = fmaxf(largest, other);
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  return largest == negative_infinity() ? 0.f : largest;
}

// A row without a visible key is zeros; NaN stays.
__device__ __forceinline__ float merged(float o, float l) { return l > 0.f || l != l ? __fdiv_rn(o, l) : 0.f; }

// Warps a block of the merge for rows of at most `splits` splits; enters no bits.
inline int merge_warps(int splits) { return splits <= 4 * kMergeGroup ? 4 : 8; }

// out[row, head] = merged state of its splits. Grid: (q_heads, rows); block: kWarps warps, warp w takes the groups
// w, w + kWarps, ... of splits. `out` is bf16. Idle rows, and rows without a visible key, come out as zeros.
// Runs::states(row, head) says which states those are (a StateRun, empty for an idle row). It reads only what was there
// before the kernel that wrote the states began, so it need not wait for that kernel's end: a kernel that launches the
// merge has itself waited for all before it (let_next_kernel_start comes after its wait).
template <int kHeadDim, int kWarps, class Runs>
__global__ void __launch_bounds__(32 * kWarps)
    merge_states_kernel(const __grid_constant__ Runs runs, PartialStates partial, uint16_t* out) {
  constexpr int kPer = kHeadDim / 32;  // channels a lane
  static_assert(32 * kWarps >= kHeadDim);
  __shared__ float group_o[kWarps][kHeadDim];
  __shared__ float group_l[kWarps];
  const int head = int(blockIdx.x), row = int(blockIdx.y), q_heads = int(gridDim.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const StateRun run = runs.states(row, head);
  // Before the wait: the kernel after may fill its memory while the states are still being made. It waits for this one,
  // hence for the one that makes them, whose wait was over before this one began.
  let_next_kernel_start();
  wait_for_previous_kernel();
  MergeGroup<kHeadDim> group;
  const float largest =
      merge_reference(partial, run, lane, [&]() { group.load(partial, run, warp * kMergeGroup, lane); });

  float sum_l = 0.f, sum_o = 0.f;  // of channel threadIdx.x, for threadIdx.x < kHeadDim
  const int groups = (run.end + kMergeGroup - 1) / kMergeGroup;
  for (int first = 0; first < groups; first += kWarps) {
    float o[kPer], l;
    if (first > 0) group.load(partial, run, (first + warp) * kMergeGroup, lane);
    group.sum(largest, l, o);
#pragma unroll
    for (int j = 0; j < kPer; ++j) group_o[warp][lane * kPer + j] = o[j];
    if (lane == 0) group_l[warp] = l;
    __syncthreads();
    if (int(threadIdx.x) < kHeadDim) {
      for (int g = 0; g < kWarps; ++g) {
        sum_o = __fadd_rn(sum_o, group_o[g][threadIdx.x]);
        sum_l = __fadd_rn(sum_l, group_l[g]);
      }
    }
    __syncthreads();
  }
  if (int(threadIdx.x) < kHeadDim) {
    out[(int64_t(row) * q_heads + head) * kHeadDim + threadIdx.x] = uint16_t(pack_bf16(merged(sum_o, sum_l), 0.f));
  }
}

// The same sums by one warp a row and head, without a barrier: for so many of them that the chip is full anyway. Grid:
// all rows and heads over kRowWarps.
inline constexpr int kRowWarps = 4;
template <int kHeadDim, class Runs>
__global__ void __launch_bounds__(32 * kRowWarps)
    merge_rows_kernel(const __grid_constant__ Runs runs, PartialStates partial, uint16_t* out, int rows, int q_heads) {
  constexpr int kPer = kHeadDim / 32;
  const int index = int(blockIdx.x) * kRowWarps + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int row = index / q_heads, head = index % q_heads;
  StateRun run;
  let_next_kernel_start();  // as above
  if (row < rows) run = runs.states(row, head);
  wait_for_previous_kernel();
  if (row >= rows) return;

  int begin = run.begin / kMergeGroup * kMergeGroup;
  MergeGroup<kHeadDim> group;
  const float largest = merge_reference(partial, run, lane, [&]() { group.load(partial, run, begin, lane); });
  float sum_l = 0.f, sum_o[kPer] = {};
  while (begin < run.end) {
    float l, o[kPer];
    group.sum(largest, l, o);
    begin += kMergeGroup;
    if (begin < run.end) group.load(partial, run, begin, lane);
    sum_l = __fadd_rn(sum_l, l);
#pragma unroll
    for (int j = 0; j < kPer; ++j) sum_o[j] = __fadd_rn(sum_o[j], o[j]);
  }
  auto* to = reinterpret_cast<uint32_t*>(out + (int64_t(row) * q_heads + head) * kHeadDim) + lane * (kPer / 2);
#pragma unroll
  for (int j = 0; j < kPer / 2; ++j) to[j] = pack_bf16(merged(sum_o[2 * j], sum_l), merged(sum_o[2 * j + 1], sum_l));
}

template <int kHeadDim, class Runs>
void launch_merge(const Runs& runs, int splits, int rows, int q_heads, const PartialStates& partial, void* out,
                  const DeviceInfo& info, cudaStream_t stream) {
  const auto with = [&](auto kernel, int warps) {
    launch(kernel, {dim3(unsigned(q_heads), unsigned(rows)), dim3(unsigned(32 * warps))}, info, stream, runs, partial,
           static_cast<uint16_t*>(out));
  };
  const int64_t all = int64_t(rows) * q_heads;
  if (all >= int64_t(kRowWarps) * 8 * info.multiprocessors)
    launch(merge_rows_kernel<kHeadDim, Runs>, {dim3(unsigned((all + kRowWarps - 1) / kRowWarps)), dim3(32 * kRowWarps)},
           info, stream, runs, partial, static_cast<uint16_t*>(out), rows, q_heads);
  else if (merge_warps(splits) == 4)
    with(merge_states_kernel<kHeadDim, 4, Runs>, 4);
  else
    with(merge_states_kernel<kHeadDim, 8, Runs>, 8);
}

}  // namespace vericache::cuda
