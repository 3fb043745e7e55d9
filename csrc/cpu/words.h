// SPDX-License-Identifier: Apache-2.0
// u32x16: sixteen 32-bit words beside f32x16, for what moves and unpacks bits: transposing key rows, packed codes.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/simd.h"

namespace vericache::cpu {

// One register with AVX-512, two with AVX2, else four.
#if defined(__AVX512F__)
constexpr int kWordParts = 1;
#elif defined(__AVX2__)
constexpr int kWordParts = 2;
#else
constexpr int kWordParts = 4;
#endif
constexpr int kPartLanes = kLanes / kWordParts;
typedef uint32_t WordPart __attribute__((vector_size(4 * kPartLanes)));
typedef uint8_t BytePart __attribute__((vector_size(kPartLanes)));

struct u32x16 {
  WordPart part[kWordParts];
};

// The word vector whose part i is f(i).
template <class F>
[[gnu::always_inline]] inline u32x16 each_part(F f) {
  u32x16 r;
#pragma GCC unroll 4
  for (int i = 0; i < kWordParts; ++i) r.part[i] = f(i);
  return r;
}

// clang-format off
inline u32x16 operator>>(u32x16 a, int n) { return each_part([&](int i) { return a.part[i] >> n; }); }
inline u32x16 operator<<(u32x16 a, int n) { return each_part([&](int i) { return a.part[i] << n; }); }
inline u32x16 operator>>(u32x16 a, u32x16 n) { return each_part([&](int i) { return a.part[i] >> n.part[i]; }); }
inline u32x16 operator&(u32x16 a, uint32_t bits) { return each_part([&](int i) { return a.part[i] & bits; }); }
// clang-format on

inline f32x16 as_float(u32x16 bits) { return std::bit_cast<f32x16>(bits); }

// Words below 2^31 as numbers.
inline f32x16 to_f32x16(u32x16 a) {
  typedef int32_t Signed __attribute__((vector_size(sizeof(WordPart))));
  typedef float Float __attribute__((vector_size(sizeof(WordPart))));
  return as_float(each_part([&](int i) { return WordPart(__builtin_convertvector(Signed(a.part[i]), Float)); }));
}

// Sixteen bytes, one a lane.
inline u32x16 load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return std::bit_cast<u32x16>(_mm512_cvtepu8_epi32(bytes));
#else
  return each_part([&](int i) {
    BytePart b;
    std::memcpy(&b, p + i * kPartLanes, sizeof b);
    return __builtin_convertvector(b, WordPart);
  });
#endif
}

// Lane i = f(i), known when compiled.
template <class F>
[[gnu::always_inline]] inline u32x16 constant_words(F f) {
  return each_part([&](int part) {
    WordPart r;
    for (int i = 0; i < kPartLanes; ++i) r[i] = f(part * kPartLanes + i);
    return r;
  });
}

namespace detail {

// Lanes with bit kHalf clear from a, the others from b, kHalf lanes over: one step of a transposition.
template <int kHalf, size_t... I>
[[gnu::always_inline]] inline void butterfly(WordPart& a, WordPart& b, std::index_sequence<I...>) {
  const WordPart low = __builtin_shufflevector(a, b, (I & kHalf ? I - kHalf + kPartLanes : I)...);
  const WordPart high = __builtin_shufflevector(a, b, (I & kHalf ? I + kPartLanes : I + kHalf)...);
  a = low, b = high;
}

template <int kHalf>
[[gnu::always_inline]] inline void transpose_part(WordPart* r) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kPartLanes; ++i)
      if (!(i & kHalf)) butterfly<kHalf>(r[i], r[i + kHalf], std::make_index_sequence<size_t(kPartLanes)>());
    transpose_part<kHalf / 2>(r);
  }
}

}  // namespace detail

// Calls out(w, words) for w = 0 .. 15: lane i of words is word w of row i. Rows of 16 words lie `stride` bytes apart.
template <class Out>
[[gnu::always_inline]] inline void transpose_words(const void* rows, int64_t stride, Out out) {
  constexpr int n = kPartLanes;
#pragma GCC unroll 4
  for (int column = 0; column < kWordParts; ++column) {
    u32x16 words[n];
#pragma GCC unroll 4
    for (int part = 0; part < kWordParts; ++part) {
      WordPart r[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        std::memcpy(&r[i], static_cast<const char*>(rows) + (part * n + i) * stride + column * int(sizeof r[i]),
                    sizeof r[i]);
      detail::transpose_part<n / 2>(r);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) words[i].part[part] = r[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) out(column * n + i, words[i]);
  }
}

}  // namespace vericache::cpu
