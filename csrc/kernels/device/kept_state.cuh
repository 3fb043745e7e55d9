// SPDX-License-Identifier: Apache-2.0
// What one warp of kept_single.cuh sums up over its tiles, with mma m16n8k16. Keys and channels take the 16-wide side
// of the mma, item rows its 8-wide side: scores are s[key][row], outputs o[channel][row]; movmatrix turns the weights
// from one into the other. Weights: stale_maximum.cuh.
//
// Lane (g, t) = (lane / 4, lane % 4).
#pragma once

#include "cp_async.cuh"
#include "element.cuh"
#include "mma.cuh"
#include "softmax_state.cuh"
#include "stale_maximum.cuh"

namespace vericache::cuda {

// kWarps: that work on tiles. kHalves: of a warp's ring.
template <int kHeadDim_, int kWarps_, int kHalves_>
struct KeptSingleShape {
  static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kHalves = kHalves_;
  static constexpr int kItemRows = 8, kTokens = kGranuleTokens, kSteps = kHeadDim / 16;
  static constexpr int kRowBytes = kHeadDim * 2, kHalfBytes = kTokens * kRowBytes;
  static constexpr int kBytes = kHalves * kHalfBytes;                                     // of a warp's ring
  static constexpr int kQuery = kWarps * kBytes, kSmem = kQuery + kItemRows * kRowBytes;  // q lies behind the rings
  // A state that a warp leaves: rows of o, padded so that banks differ, then m and l of each row.
  static constexpr int kStateRow = kHeadDim + 4, kStateBytes = kItemRows * (kStateRow * 4 + 8);
  static_assert(kHeadDim == 128);      // a warp holds a row's channels, four a lane
  static_assert(kSmem <= 227 * 1024);  // what a block may have
  static_assert(kStateBytes <= kBytes && kHalves >= 2);

  // Where 16-byte chunk `chunk` of a row lies.
  static __device__ __forceinline__ uint32_t place(uint32_t base, int row, int chunk) {
    return swizzled(base, row, kRowBytes, chunk);
  }

  // By one warp: a half whose first `valid` rows may be read, from `from` on.
  static __device__ __forceinline__ void copy_half(const char* from, uint32_t to, int valid, int lane) {
    constexpr int kRowChunks = kRowBytes / 16, kRowsAtOnce = 32 / kRowChunks;
    from += lane * 16;
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
      const int row = lane / kRowChunks + i * kRowsAtOnce;
      const uint32_t at = place(to, row, lane % kRowChunks);
      if (valid >= kTokens)
        cp_async16_once(at, from + i * 512);
      else  // zeros where nothing may be read
        cp_async16(at, from + i * 512, row < valid);
    }
  }
};

// What one warp sums up. Columns of an mma are item rows, its rows keys or channels.
template <class Shape>
struct KeptState {
  static constexpr int kSlack = 8;  // a weight is at most 2^kSlack

  uint32_t q[Shape::kSteps][2];
  float o[Shape::kSteps][4];  // channels 16 n + g and, from 2 on, 16 n + 8 + g of columns 2t, 2t + 1
  float l[2];                 // of columns 2t, 2t + 1: this lane's share
  float reference[2];         // of these columns; log2 units

  // `query`: q in shared memory.
  __device__ void start(uint32_t query, int lane) {
#pragma unroll
    for (int n = 0; n < Shape::kSteps; n += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, Shape::place(query, lane % 8, n * 2 + lane / 8));
      q[n][0] = r[0], q[n][1] = r[1], q[n + 1][0] = r[2], q[n + 1][1] = r[3];
    }
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] = 0.f, reference[r] = negative_infinity();
  }

  // A tile's keys to weights. Of the tile's tokens columns 2t, 2t + 1 see the first seen[0], seen[1].
  __device__ __forceinline__ void keys(uint32_t tile, float c, int lane, const int (&seen)[2], uint32_t (&weights)[2]) {
    const int g = lane / 4, row = lane / 8 % 2 * 8 + lane % 8;
    float even[4] = {}, odd[4] = {};  // two sums, for an mma waits for the one whose sum it goes on with
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
      uint32_t a[4];
      ldmatrix_x4(a, Shape::place(tile, row, n * 2 + lane / 16));
      mma_m16n8k16(n % 2 == 0 ? even : odd, a, q[n][0], q[n][1]);
    }
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = g + e / 2 * 8 < seen[e % 2] ? (even[e] + odd[e]) * c : negative_infinity();
    float w[4];
    uint32_t packed[1][2];
    const auto weigh = [&](const float (&from)[2]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = fast_exp2(x[e] - from[e % 2]);
      packed[0][0] = pack_bf16(w[0], w[1]), packed[0][1] = pack_bf16(w[2], w[3]);
    };
    const auto rescale = [&](const float (&by)[2]) {
#pragma unroll
      for (int n = 0; n < Shape::kSteps; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] *= by[e % 2];
#pragma unroll
      for (int r = 0; r < 2; ++r) l[r] *= by[r];
    };
    weigh_against_stale<false, kSlack, 4>(
        reference, packed, weigh, [&](int r) { return fmaxf(x[r], x[r + 2]); }, rescale);
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] += w[r] + w[r + 2];
#pragma unroll
    for (int half = 0; half < 2; ++half) weights[half] = movmatrix_trans(packed[0][half]);
  }

  __device__ __forceinline__ void values(uint32_t tile, int lane, const uint32_t (&weights)[2]) {
    const int token = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, Shape::place(tile, token, n * 2 + lane / 8 % 2));
      mma_m16n8k16(o[n], a, weights[0], weights[1]);
    }
  }

  // Leaves the state in shared memory.
  __device__ void deposit(unsigned char* to, int lane) const {
    const int g = lane / 4, t = lane % 4;
    auto* to_o = reinterpret_cast<float*>(to);
    auto* to_ml = reinterpret_cast<float2*>(to_o + Shape::kItemRows * Shape::kStateRow);
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) to_o[(t * 2 + e % 2) * Shape::kStateRow + n * 16 + e / 2 * 8 + g] = o[n][e];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = l[r];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (g == 0) to_ml[t * 2 + r] = make_float2(reference[r], sum);
    }
  }
};

}  // namespace vericache::cuda
