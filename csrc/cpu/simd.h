// SPDX-License-Identifier: Apache-2.0
// f32x16: sixteen float32 lanes, one AVX-512 register, two AVX2 registers, or a plain array the compiler may vectorise.
// Every operation is lane-wise and exactly rounded, so the three give the same bits; only fma() on a machine without
// fused multiply-add differs (two roundings), and a build targets one machine.
//
// Reduction order of hsum, hmax: halves are folded, lane i with i + 8, then i + 4, i + 2, i + 1.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/types.h"

namespace vericache::cpu {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct f32x16 {
  __m512 v;
  f32x16() = default;
  f32x16(__m512 x) : v(x) {}
  explicit f32x16(float x) : v(_mm512_set1_ps(x)) {}
};

inline f32x16 operator+(f32x16 a, f32x16 b) { return _mm512_add_ps(a.v, b.v); }
inline f32x16 operator-(f32x16 a, f32x16 b) { return _mm512_sub_ps(a.v, b.v); }
inline f32x16 operator*(f32x16 a, f32x16 b) { return _mm512_mul_ps(a.v, b.v); }
inline f32x16 operator/(f32x16 a, f32x16 b) { return _mm512_div_ps(a.v, b.v); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// Lane-wise; b where either is a NaN.
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a.v, b.v); }
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a.v, b.v); }

inline f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline f32x16 load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x.v); }

// Round to nearest integer (ties to even), and 2^n for an integral n in [-126, 127].
inline f32x16 round_even(f32x16 x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline f32x16 exp2_int(f32x16 n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
// x < bound ? a : b; b where x is a NaN.
inline f32x16 where_less(f32x16 x, f32x16 bound, f32x16 a, f32x16 b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), b.v, a.v);
}

#elif defined(__AVX2__) && defined(__FMA__)

struct f32x16 {
  __m256 lo, hi;
  f32x16() = default;
  f32x16(__m256 l, __m256 h) : lo(l), hi(h) {}
  explicit f32x16(float x) : lo(_mm256_set1_ps(x)), hi(_mm256_set1_ps(x)) {}
};

inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline f32x16 load(const bf16* p) {
  const auto half = [](const bf16* q) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  };
  return {half(p), half(p + 8)};
}
inline void store(float* p, f32x16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}

inline f32x16 round_even(f32x16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
}
inline f32x16 exp2_int(f32x16 n) {
  const auto half = [](__m256 x) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  };
  return {half(n.lo), half(n.hi)};
}
inline f32x16 where_less(f32x16 x, f32x16 bound, f32x16 a, f32x16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ))};
}

#else

struct f32x16 {
  float v[kLanes];
  f32x16() = default;
  explicit f32x16(float x) {
    for (float& lane : v) lane = x;
  }
};

template <class F>
inline f32x16 lanewise(F f) {
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}

inline f32x16 operator+(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
inline f32x16 operator-(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
inline f32x16 operator*(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
inline f32x16 operator/(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] / b.v[i]; });
}
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__FP_FAST_FMAF)
  return lanewise([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
  return lanewise([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
inline f32x16 max(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline f32x16 min(f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline f32x16 load(const float* p) {
  return lanewise([&](int i) { return p[i]; });
}
inline f32x16 load(const bf16* p) {
  return lanewise([&](int i) { return to_float(p[i]); });
}
inline void store(float* p, f32x16 x) { std::memcpy(p, x.v, sizeof x.v); }
inline f32x16 round_even(f32x16 x) {
  return lanewise([&](int i) { return std::nearbyint(x.v[i]); });
}
inline f32x16 exp2_int(f32x16 n) {
  return lanewise([&](int i) { return std::bit_cast<float>(uint32_t(int32_t(n.v[i]) + 127) << 23); });
}
inline f32x16 where_less(f32x16 x, f32x16 bound, f32x16 a, f32x16 b) {
  return lanewise([&](int i) { return x.v[i] < bound.v[i] ? a.v[i] : b.v[i]; });
}

#endif

// Keeps x in a register: without it GCC folds a value's load into each of its uses.
inline void hold(f32x16& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x.v));
#elif defined(__AVX2__) && defined(__FMA__)
  asm("" : "+x"(x.lo), "+x"(x.hi));
#endif
}

// Rounds to bfloat16 as types.h does, lane by lane.
inline void store(bf16* p, f32x16 x) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i picked = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(picked));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
#endif
}

// The first n < 16 lanes; the others read as zero and are not written.
template <class T>
inline f32x16 load_partial(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_partial(T* p, f32x16 x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

// Calls body(offset, n) for each run of up to 16 elements of [0, size): n is 16 but for the last.
template <class F>
inline void for_lanes(int64_t size, F&& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, int(size - i));
}
template <class T>
inline f32x16 load_n(const T* p, int n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}
template <class T>
inline void store_n(T* p, f32x16 x, int n) {
  n == kLanes ? store(p, x) : store_partial(p, x, n);
}

inline float hsum(f32x16 x) {
  float v[kLanes];
  store(v, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

inline float hmax(f32x16 x) {
  float v[kLanes];
  store(v, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

// e^x to about one unit in the last place; 0 below -87.33 (no denormal results), infinity above 88.72, NaN for a NaN.
// Cody-Waite reduction to [-ln2/2, ln2/2] and the Taylor polynomial of degree 7.
inline f32x16 exp(f32x16 x) {
  const f32x16 clamped = max(f32x16(-88.0f), min(f32x16(89.0f), x));  // in this operand order a NaN passes through
  const f32x16 n = round_even(clamped * f32x16(1.44269504088896341f));
  f32x16 r = fma(n, f32x16(-0.693359375f), clamped);
  r = fma(n, f32x16(2.12194440e-4f), r);
  f32x16 y = fma(f32x16(1.0f / 5040.0f), r, f32x16(1.0f / 720.0f));
  y = fma(y, r, f32x16(1.0f / 120.0f));
  y = fma(y, r, f32x16(1.0f / 24.0f));
  y = fma(y, r, f32x16(1.0f / 6.0f));
  y = fma(y, r, f32x16(0.5f));
  y = fma(y, r, f32x16(1.0f));
  y = fma(y, r, f32x16(1.0f));
  // 2^n in two factors: n reaches 128.
  const f32x16 half = round_even(n * f32x16(0.5f));
  y = y * exp2_int(half) * exp2_int(n - half);
  y = where_less(x, f32x16(-87.3365f), f32x16(0.0f), y);
  return where_less(f32x16(88.7228f), x, f32x16(INFINITY), y);
}

}  // namespace vericache::cpu
