// SPDX-License-Identifier: Apache-2.0
// Sums of partial states, where R1 asks for nothing (draft attention): each lane of a warp holds some channels.
#pragma once

#include "element.cuh"
#include "softmax_state.cuh"

namespace vericache::cuda {

// Some channels of a state, and sums of such.
template <int kChannels>
struct StateSum {
  float reference = negative_infinity(), l = 0.f;
  float o[kChannels] = {};

  // To the reference `to`, at least the own one.
  __device__ __forceinline__ void raise(float to) {
    const float factor = weight_of(reference, to);
    reference = to;
    l *= factor;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) o[j] *= factor;
  }
  __device__ __forceinline__ void add(const float (&x)[kChannels], float weight) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) o[j] = fmaf(x[j], weight, o[j]);
  }
  // What a state counts beside the largest reference; nothing if it holds no key.
  static __device__ __forceinline__ float weight_of(float own, float largest) {
    return own == negative_infinity() ? 0.f : fast_exp2(own - largest);
  }
  // Through shared memory: the channels of all lanes, then reference and l.
  __device__ __forceinline__ void store_shared(float* to, int lane) const {
    static_assert(kChannels == 4);
    reinterpret_cast<float4*>(to)[lane] = {o[0], o[1], o[2], o[3]};
    if (lane == 0) *reinterpret_cast<float2*>(to + 32 * kChannels) = make_float2(reference, l);
  }
  __device__ __forceinline__ void add_shared(const float* from, int lane) {
    static_assert(kChannels == 4);
    const float2 ml = *reinterpret_cast<const float2*>(from + 32 * kChannels);
    const float4 other = reinterpret_cast<const float4*>(from)[lane];
    raise(fmaxf(reference, ml.x));
    const float weight = weight_of(ml.x, reference);
    l = fmaf(ml.y, weight, l);
    add({other.x, other.y, other.z, other.w}, weight);
  }
  __device__ __forceinline__ void store_normalized(uint16_t* to) const {
    static_assert(kChannels == 4 || kChannels == 2);
    const float by = l > 0.f || l != l ? 1.f / l : 0.f;
    uint32_t words[kChannels / 2];
#pragma unroll
    for (int j = 0; j < kChannels; j += 2) words[j / 2] = pack_bf16(o[j] * by, o[j + 1] * by);
    if constexpr (kChannels == 4)
      *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    else
      *reinterpret_cast<uint32_t*>(to) = words[0];
  }
  // To state `at`, whose channels piece * kChannels .. it has.
  template <int kHeadDim>
  __device__ __forceinline__ void store(const PartialStates& states, int64_t at, int piece) const {
    static_assert(kChannels == 4);
    reinterpret_cast<float4*>(states.o + at * kHeadDim)[piece] = {o[0], o[1], o[2], o[3]};
    if (piece == 0) states.ml[at] = make_float2(reference, l);
  }
};

template <int kChannels>
__device__ __forceinline__ void load_channels(float (&to)[kChannels], const float* from) {
  uint32_t words[kChannels];
  load_words(words, from);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) to[j] = __uint_as_float(words[j]);
}

// A state that a warp leaves in shared memory: kItemRows rows of o, kStateRow floats apart, then m and l of each row.
// By one warp: one of no keys.
template <class Shape>
__device__ __forceinline__ void deposit_nothing(unsigned char* to, int lane) {
  auto* o = reinterpret_cast<float*>(to);
  for (int i = lane; i < Shape::kItemRows * Shape::kStateRow; i += 32) o[i] = 0.f;
  auto* ml = reinterpret_cast<float2*>(o + Shape::kItemRows * Shape::kStateRow);
  if (lane < Shape::kItemRows) ml[lane] = make_float2(negative_infinity(), 0.f);
}

struct EveryWarp {
  __device__ bool operator()(int) const { return true; }
};

// Of a row's states that warps have left, `apart` bytes from warp to warp: channels 4 piece .. of their sum. has(w):
// whether warp w has left one.
template <class Shape, class Has>
__device__ __forceinline__ StateSum<4> sum_deposits(const unsigned char* deposits, int apart, const Has& has, int row,
                                                    int piece) {
  const auto of_warp = [&](int w) { return reinterpret_cast<const float*>(deposits + w * apart); };
  // All loads first, and no branch: what a warp has not left is the state of no keys, whose -0 change no sum.
  StateSum<4> sum;
  float2 ml[Shape::kWarps];
  float o[Shape::kWarps][4];
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) {
    const float* from = of_warp(w) + Shape::kItemRows * Shape::kStateRow;
    ml[w] = has(w) ? reinterpret_cast<const float2*>(from)[row] : make_float2(negative_infinity(), -0.f);
  }
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) {
#pragma unroll
    for (int k = 0; k < 4; ++k) o[w][k] = -0.f;
    if (has(w)) load_channels(o[w], of_warp(w) + row * Shape::kStateRow + piece * 4);
  }
  float largest[Shape::kWarps];
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) largest[w] = ml[w].x;
#pragma unroll
  for (int step = 1; step < Shape::kWarps; step *= 2)
#pragma unroll
    for (int w = 0; w + step < Shape::kWarps; w += 2 * step) largest[w] = fmaxf(largest[w], largest[w + step]);
  sum.reference = largest[0];
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) {
    const float weight = StateSum<4>::weight_of(ml[w].x, sum.reference);
    sum.add(o[w], weight);
    sum.l = fmaf(ml[w].y, weight, sum.l);
  }
  return sum;
}

// Past the L1: for what other blocks, or another kernel, have written meanwhile. kAgain: others may write it while it
// is loaded again and again.
template <bool kAgain>
__device__ __forceinline__ void load_fresh(float2& to, const float2* from) {
  if constexpr (kAgain)
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(to.x), "=f"(to.y) : "l"(from) : "memory");
  else
    to = __ldcg(from);
}
template <bool kAgain, int kChannels>
__device__ __forceinline__ void load_fresh(float (&to)[kChannels], const float* from) {
  if constexpr (kChannels == 4) {
    float4 x;
    if constexpr (kAgain)
      asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                   : "l"(from)
                   : "memory");
    else
      x = __ldcg(reinterpret_cast<const float4*>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    static_assert(kChannels == 2);
    float2 x;
    load_fresh<kAgain>(x, reinterpret_cast<const float2*>(from));
    to[0] = x.x, to[1] = x.y;
  }
}

// What stands in a state until it is stored.
__device__ __forceinline__ bool is_mark(float x) { return __float_as_uint(x) == kNoResult; }
// By one warp: marks state `at`.
template <int kHeadDim>
__device__ __forceinline__ void mark_state(const PartialStates& states, int64_t at, int lane) {
  const float mark = __uint_as_float(kNoResult);
  for (int i = lane; i < kHeadDim / 4; i += 32)
    reinterpret_cast<float4*>(states.o + at * kHeadDim)[i] = {mark, mark, mark, mark};
  if (lane == 0) states.ml[at] = make_float2(mark, mark);
}

// Sums up states from .. to - 1 of those from index `first` on, `apart` apart: a warp, kHeadDim / 32 channels a lane.
// kBatch: so many are loaded before the first is used; every lane reads m and l of each, which saves an exchange.
// kMarked: each is loaded until no mark is left in it.
template <int kHeadDim, int kBatch, bool kMarked = false>
__device__ __forceinline__ StateSum<kHeadDim / 32> sum_states(const PartialStates& states, int64_t first, int apart,
                                                              int from, int to, int lane) {
  constexpr int kPer = kHeadDim / 32;
  StateSum<kPer> sum;
  for (int begin = from; begin < to; begin += kBatch) {
    const int64_t at = first + int64_t(begin) * apart;
    const float2* from_ml = states.ml + at;
    const float* from_o = states.o + at * kHeadDim + lane * kPer;
    const int here = min(kBatch, to - begin);
    float2 ml[kBatch];
    float o[kBatch][kPer];
    bool missing;
    do {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        ml[i] = make_float2(negative_infinity(), 0.f);
        if (i < here) load_fresh<kMarked>(ml[i], from_ml + i * apart);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // all loads first: they are independent
#pragma unroll
        for (int j = 0; j < kPer; ++j) o[i][j] = 0.f;
        if (i < here) load_fresh<kMarked>(o[i], from_o + i * apart * kHeadDim);
      }
      missing = false;
      if constexpr (kMarked) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= is_mark(ml[i].x) || is_mark(ml[i].y);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int j = 0; j < kPer; ++j) missing |= is_mark(o[i][j]);
      }
    } while (kMarked && __any_sync(0xffffffffu, missing));
    float largest = fmaxf(sum.reference, ml[0].x);
#pragma unroll
    for (int i = 1; i < kBatch; ++i) largest = fmaxf(largest, ml[i].x);
    sum.raise(largest);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = sum.weight_of(ml[i].x, largest);
      sum.l = fmaf(ml[i].y, weight, sum.l);
      sum.add(o[i], weight);
    }
  }
  return sum;
}

}  // namespace vericache::cuda
