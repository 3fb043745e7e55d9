// SPDX-License-Identifier: Apache-2.0
// From the states of warps to outputs. A block's warps leave their states of a unit in shared memory; the block merges
// them. If the unit lies in the block's run as a whole, that is the output; else the merged state goes to memory, and
// the block that brings a unit's last state merges them, in key order. Every order is fixed by the lengths and the
// number of multiprocessors: the same call gives the same bits.
#pragma once

#include "launch.cuh"
#include "quant_state.cuh"

namespace vericache::cuda {

// Counters of one launch, in the workspace, whose contents are unknown before it: a tag in the high word and a count in
// the low one. Block 0 sets them to (tag, 0); adding to one that does not carry the tag yet is repeated; the last to
// add clears it, so that no launch meets another's tags. The tag is a NaN no arithmetic makes.
using UnitCounter = unsigned long long;
inline constexpr UnitCounter kFreshUnit = 0xffa5c3e2ull << 32;

__device__ __forceinline__ int count_one(UnitCounter* counter) {
  while (true) {
    const UnitCounter old = atomicAdd(counter, 1ull);
    if (old >> 32 == kFreshUnit >> 32) return int(old & 0xffffffffu);
  }
}

// States of units cut by a block's end: that of row i of unit u from block b at index (b + u) * kItemRows + i.
struct QuantStates {
  float* o;              // [count, head_dim]
  float2* ml;            // [count]: reference (log2 units, -inf if there is no key), sum of weights
  UnitCounter* arrived;  // [units]

  static size_t bytes(int64_t count, int64_t units, int head_dim) {
    return size_t(count) * (head_dim * sizeof(float) + sizeof(float2)) + size_t(units) * sizeof(UnitCounter);
  }
  static QuantStates at(void* memory, int64_t count, int head_dim) {
    float* o = static_cast<float*>(memory);
    auto* ml = reinterpret_cast<float2*>(o + count * head_dim);
    return {o, ml, reinterpret_cast<UnitCounter*>(ml + count)};
  }
};

// Four channels of a state, and sums of such.
struct QuantSum {
  float reference = negative_infinity(), l = 0.f;
  float4 o = {0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ void raise(float to) {  // to >= reference
    const float factor = reference == negative_infinity() ? 0.f : fast_exp2(reference - to);
    reference = to;
    l *= factor;
    o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
  }
  __device__ __forceinline__ void add(float2 ml, float4 x) {  // ml.x <= reference
    const float weight = ml.x == negative_infinity() ? 0.f : fast_exp2(ml.x - reference);
    l = fmaf(ml.y, weight, l);
    o.x = fmaf(x.x, weight, o.x);
    o.y = fmaf(x.y, weight, o.y);
    o.z = fmaf(x.z, weight, o.z);
    o.w = fmaf(x.w, weight, o.w);
  }
  __device__ __forceinline__ uint2 normalized() const {
    const float by = l > 0.f || l != l ? 1.f / l : 0.f;
    return {pack_bf16(o.x * by, o.y * by), pack_bf16(o.z * by, o.w * by)};
  }
};

// What the merges need to know of a unit.
struct QuantUnit {
  int number, rows;  // rows: of this unit
  int64_t query0;    // the first query row of its request
  int first_item;    // the request's item row that is its row 0
  int kv_head;
  int first_block, last_block;

  template <class Shape>
  __device__ __forceinline__ uint2* out(const QuantAttentionParams& p, int row, int piece) const {
    const int group = p.q_heads / p.kv_heads, i = first_item + row;
    const int64_t at = (query0 + i / group) * p.q_heads + kv_head * group + i % group;
    return reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at * Shape::kHeadDim) + piece;
  }
};

// By all threads of the block. `deposits` [kWarps]: of each warp the offset of its state in `smem`, or -1.
template <class Shape>
__device__ __forceinline__ void merge_warps(const QuantAttentionParams& p, const QuantStates& states,
                                            const QuantUnit& unit, const unsigned char* smem, const int* deposits) {
  constexpr int kPieces = Shape::kHeadDim / 4;
  const bool whole = unit.first_block == unit.last_block;
  for (int task = threadIdx.x; task < unit.rows * kPieces; task += int(blockDim.x)) {
    const int row = task / kPieces, piece = task % kPieces;
    const auto ml_of = [&](int w) {
      return reinterpret_cast<const float2*>(smem + deposits[w] + Shape::kItemRows * Shape::kHeadDim * 4)[row];
    };
    QuantSum sum;
    float2 ml[Shape::kWarps];
    float largest = negative_infinity();
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      ml[w] = deposits[w] >= 0 ? ml_of(w) : make_float2(negative_infinity(), 0.f);
      largest = fmaxf(largest, ml[w].x);
    }
    sum.reference = largest;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w)
      if (deposits[w] >= 0) sum.add(ml[w], reinterpret_cast<const float4*>(smem + deposits[w])[task]);
    if (whole) {
      *unit.out<Shape>(p, row, piece) = sum.normalized();
    } else {
      const int64_t at = (int64_t(blockIdx.x) + unit.number) * Shape::kItemRows + row;
      reinterpret_cast<float4*>(states.o)[at * kPieces + piece] = sum.o;
      if (piece == 0) states.ml[at] = make_float2(sum.reference, sum.l);
    }
  }
}

// By all threads of the block that brought the unit's last state. Two neighbouring lanes share four channels of a row:
// one takes the even states, one the odd.
template <class Shape>
__device__ __forceinline__ void merge_blocks(const QuantAttentionParams& p, const QuantStates& states,
                                             const QuantUnit& unit) {
  constexpr int kPieces = Shape::kHeadDim / 4, kBatch = 10;  // states loaded before the first is used
  const int count = unit.last_block - unit.first_block + 1;
  const int64_t first = (int64_t(unit.first_block) + unit.number) * Shape::kItemRows;
  for (int item = threadIdx.x; item < unit.rows * kPieces * 2; item += int(blockDim.x)) {  // whole warps
    const int row = item / 2 / kPieces, piece = item / 2 % kPieces;
    QuantSum sum;
    for (int base = item % 2; base < count; base += 2 * kBatch) {
      float2 ml[kBatch];
      float4 o[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool exists = base + 2 * i < count;
        const int64_t at = first + int64_t(base + 2 * i) * Shape::kItemRows + row;
        ml[i] = exists ? __ldcg(states.ml + at) : make_float2(negative_infinity(), 0.f);
        o[i] = exists ? __ldcg(reinterpret_cast<const float4*>(states.o) + at * kPieces + piece)
                      : make_float4(0.f, 0.f, 0.f, 0.f);
      }
      float largest = sum.reference;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) largest = fmaxf(largest, ml[i].x);
      sum.raise(largest);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum.add(ml[i], o[i]);
    }
    const auto other = [](float x) { return __shfl_xor_sync(0xffffffffu, x, 1); };
    const float2 ml = {other(sum.reference), other(sum.l)};
    const float4 o = {other(sum.o.x), other(sum.o.y), other(sum.o.z), other(sum.o.w)};
    sum.raise(fmaxf(sum.reference, ml.x));
    sum.add(ml, o);
    if (item % 2 == 0) *unit.out<Shape>(p, row, piece) = sum.normalized();
  }
}

}  // namespace vericache::cuda
