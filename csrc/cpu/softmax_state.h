// SPDX-License-Identifier: Apache-2.0
// The state of a softmax over part of the keys, and the one place where two states become one.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace vericache::cpu {

// 2^x for x <= 0 (up to 126), within 2 units in the last place; exactly 1 at 0, 0 below -126, NaN for a NaN. 2^x = 2^n
// 2^f with n the nearest integer and a minimax polynomial for 2^f on [-1/2, 1/2], relative error 2e-9 before rounding.
inline f32x16 exp2(f32x16 x) {
  const f32x16 lowest(-126.0f);
  const f32x16 clamped = where_less(x, lowest, lowest, x);
  const f32x16 n = round_even(clamped);
  const f32x16 f = clamped - n;
  f32x16 y(0x1.41fbbcp-13f);
  y = fma(y, f, f32x16(0x1.5f3e54p-10f));
  y = fma(y, f, f32x16(0x1.3b2d4cp-7f));
  y = fma(y, f, f32x16(0x1.c6aee8p-5f));
  y = fma(y, f, f32x16(0x1.ebfbdcp-3f));
  y = fma(y, f, f32x16(0x1.62e430p-1f));
  y = fma(y, f, f32x16(1.0f));
  return where_less(x, lowest, f32x16(0.0f), y * exp2_int(n));
}

// Scores are in units of log2: s = scale * log2(e) * q . k.
//   m = max s,  l = sum of 2^(s - m),  o[head_dim] = sum of 2^(s - m) v.
// Without a finite score m is -inf, l and o are 0. A NaN or +inf score makes l and o NaN.
struct SoftmaxState {
  float m = -std::numeric_limits<float>::infinity();
  float l = 0;
};

// What scores are measured from, so that -inf - -inf does not arise.
inline float softmax_base(float m) { return m == -std::numeric_limits<float>::infinity() ? 0.0f : m; }

inline float first_lane(f32x16 x) {
  float lanes[kLanes];
  store(lanes, x);
  return lanes[0];
}

// left := left and then right. Reduction order (R1): callers merge from left to right over the splits a row attends to.
inline void merge(SoftmaxState& left, float* left_o, const SoftmaxState& right, const float* right_o, int head_dim) {
  const float m = right.m > left.m ? right.m : left.m;
  const float base = softmax_base(m);
  const f32x16 a = exp2(f32x16(left.m - base)), b = exp2(f32x16(right.m - base));
  left = {m, first_lane(fma(f32x16(left.l), a, f32x16(right.l) * b))};
  for (int d = 0; d < head_dim; d += kLanes) store(left_o + d, fma(load(left_o + d), a, load(right_o + d) * b));
}

}  // namespace vericache::cpu
