// SPDX-License-Identifier: Apache-2.0
// Storage elements on the device: float and __nv_bfloat16 to and from float32, one at a time and 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/error.h"
#include "common/params.h"

namespace vericache::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return __float2bfloat16_rn(x);
}

// x rounded to T, as a float.
template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// 16 bytes of T.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / int(sizeof(T));
  uint4 raw;

  __device__ __forceinline__ static Pack load(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }

  __device__ __forceinline__ void unpack(float (&x)[kSize]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        x[i] = __uint_as_float(words[i]);
      } else {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }

  __device__ __forceinline__ static Pack pack(const float (&x)[kSize]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(x[i]);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
    return {make_uint4(words[0], words[1], words[2], words[3])};
  }
};

// kCount neighbours, moved in one access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Run {
  T x[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ void load_run(const T* src, float (&x)[kCount]) {
  const auto run = *reinterpret_cast<const Run<T, kCount>*>(src);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = to_float(run.x[i]);
}

template <class T, int kCount>
__device__ __forceinline__ void store_run(T* dst, const float (&x)[kCount]) {
  Run<T, kCount> run;
#pragma unroll
  for (int i = 0; i < kCount; ++i) run.x[i] = from_float<T>(x[i]);
  *reinterpret_cast<Run<T, kCount>*>(dst) = run;
}

// Adds what lies at src.
template <class T, int kCount>
__device__ __forceinline__ void add_run(float (&x)[kCount], const T* src) {
  float y[kCount];
  load_run(src, y);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] += y[i];
}

// Call f with a value of the device's storage type.
template <class F>
void dispatch_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      throw Error(detail::concat("unknown dtype code ", int32_t(dtype), "; 0 is float32, 1 is bfloat16."));
  }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// Every query row and head of attention's parameters, of two bytes an element, starts at a multiple of 16 bytes.
template <class Params>
bool q_aligned16(const Params& p) {
  return aligned16(p.q) && p.q_stride_row % 8 == 0 && p.q_stride_head % 8 == 0;
}
// Every row of a strided matrix of T starts at a multiple of 16 bytes.
inline bool rows_aligned16(const void* p, int64_t stride, int elem_bytes) {
  return aligned16(p) && stride * elem_bytes % 16 == 0;
}

// kWords words from memory aligned to their size, at most to 16 bytes.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&to)[kWords], const void* from) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = static_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint2 x = static_cast<const uint2*>(from)[i];
      to[2 * i] = x.x, to[2 * i + 1] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = static_cast<const uint32_t*>(from)[i];
  }
}

}  // namespace vericache::cuda
