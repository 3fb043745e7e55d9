// SPDX-License-Identifier: Apache-2.0
// What one warp of kept_single.cuh sums up over its tiles, with mma m16n8k16. Keys and channels take the 16-wide side
// of the mma, item rows its 8-wide side: scores are s[key][row], outputs o[channel][row]; movmatrix turns the weights
// from one into the other.
//
// Lane (g, t) = (lane / 4, lane % 4).
#pragma once

#include "cp_async.cuh"
#include "element.cuh"
#include "mma.cuh"
#include "softmax_state.cuh"

namespace vericache::cuda {

// kHalves: of a warp's ring.
template <int kHeadDim_, int kWarps_, int kHalves_>
struct KeptSingleShape {
  static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kHalves = kHalves_;
  static constexpr int kItemRows = 8, kTokens = kGranuleTokens, kSteps = kHeadDim / 16;
  static constexpr int kRowBytes = kHeadDim * 2, kHalfBytes = kTokens * kRowBytes;
  static constexpr int kBytes = kHalves * kHalfBytes;  // of a warp's ring
  // A state that a warp leaves: rows of o, padded so that banks differ, then m and l of each row.
  static constexpr int kStateRow = kHeadDim + 4, kStateBytes = kItemRows * (kStateRow * 4 + 8);
  static_assert(kHeadDim == 128);                // a warp holds a row's channels, four a lane
  static_assert(kWarps * kBytes <= 227 * 1024);  // what a block may have
  static_assert(kStateBytes <= kBytes && kHalves >= 2);

  // By one warp: a half whose first `valid` rows may be read, from `from` on.
  static __device__ __forceinline__ void copy_half(const char* from, uint32_t to, int valid, int lane) {
    constexpr int kRowChunks = kRowBytes / 16, kRowsAtOnce = 32 / kRowChunks;
    from += lane * 16;
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
      const int row = lane / kRowChunks + i * kRowsAtOnce;
      const uint32_t place = swizzled(to, row, kRowBytes, lane % kRowChunks);
      if (valid >= kTokens)
        cp_async16_once(place, from + i * 512);
      else  // zeros where nothing may be read
        cp_async16(place, from + i * 512, row < valid);
    }
  }
};

// What one warp sums up. Columns of an mma are item rows, its rows keys or channels.
template <class Shape>
struct KeptState {
  uint32_t q[Shape::kSteps][2];
  float o[Shape::kSteps][4];  // channels 16 n + g and, from 2 on, 16 n + 8 + g of columns 2t, 2t + 1
  float l[2];                 // of columns 2t, 2t + 1: this lane's share
  RunningMax m[2];

  // `q_row`: q of the item row that column g stands for, or null if there is none.
  __device__ void start(const uint16_t* q_row, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        q[n][half] = q_row != nullptr ? *reinterpret_cast<const uint32_t*>(q_row + n * 16 + half * 8 + t * 2) : 0u;
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] = 0.f, m[r].raw = negative_infinity();
  }

  // A tile's keys to weights. Of the tile's tokens columns 2t, 2t + 1 see the first seen[0], seen[1].
  __device__ __forceinline__ void keys(uint32_t tile, float c, int lane, const int (&seen)[2], uint32_t (&weights)[2]) {
    const int g = lane / 4, row = lane / 8 % 2 * 8 + lane % 8;
    float s[4] = {};
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
      uint32_t a[4];
      ldmatrix_x4(a, swizzled(tile, row, Shape::kRowBytes, n * 2 + lane / 16));
      mma_m16n8k16(s, a, q[n][0], q[n][1]);
    }
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = negative_infinity();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (g + half * 8 >= seen[r]) s[half * 2 + r] = negative_infinity();
        x = fmaxf(x, s[half * 2 + r]);
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
      rescale[r] = m[r].update(x, c);
      const float reference = m[r].reference(c);
      s[r] = softmax_weight(s[r], c, reference);
      s[r + 2] = softmax_weight(s[r + 2], c, reference);
      l[r] = __fmaf_rn(l[r], rescale[r], __fadd_rn(s[r], s[r + 2]));
    }
    if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < Shape::kSteps; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] = __fmul_rn(o[n][e], rescale[e % 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) weights[half] = movmatrix_trans(pack_bf16(s[half * 2], s[half * 2 + 1]));
  }

  __device__ __forceinline__ void values(uint32_t tile, int lane, const uint32_t (&weights)[2]) {
    const int token = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int n = 0; n < Shape::kSteps; ++n) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, swizzled(tile, token, Shape::kRowBytes, n * 2 + lane / 8 % 2));
      mma_m16n8k16(o[n], a, weights[0], weights[1]);
    }
  }

  // Leaves the state in shared memory.
  __device__ void deposit(unsigned char* to, float c, int lane) const {
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
      for (int step = 4; step < 32; step *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
      if (g == 0) to_ml[t * 2 + r] = make_float2(m[r].stored(c), sum);
    }
  }
};

}  // namespace vericache::cuda
