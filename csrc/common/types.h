// SPDX-License-Identifier: Apache-2.0
// Storage types on the host: bfloat16 as its bit pattern, and the size of a DType.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "common/params.h"

namespace vericache {

// bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN (quieted), as torch does it.
inline bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

// x rounded to T, as a float.
template <class T>
float round_to(float x) {
  return to_float(from_float<T>(x));
}

inline size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
      return 2;
  }
  throw Error(detail::concat("unknown dtype code ", int32_t(dtype), "; 0 is float32, 1 is bfloat16."));
}

inline const char* dtype_name(DType dtype) { return dtype == DType::kFloat32 ? "float32" : "bfloat16"; }

// Call f with a value of the storage type: dispatch(p.dtype, [&](auto t) { run<decltype(t)>(p); }).
template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
  }
  throw Error(detail::concat("unknown dtype code ", int32_t(dtype), "; 0 is float32, 1 is bfloat16."));
}

}  // namespace vericache
