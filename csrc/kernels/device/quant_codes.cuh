// SPDX-License-Identifier: Apache-2.0
// Quantized codes as operands of an mma, with no arithmetic at all.
//
// A 32-bit word of codes has two halves of kUnit codes: 16 / kBits, and 4 of the 4-bit plane of 5 to 7 bits, whose
// other planes give a word more for each. Register j of a word holds code j of the low half and code j of the high
// half, each a small integer in the lowest bits of a 16-bit float whose other bits are zero. Read as bf16 (2 to 7 bits)
// or fp16 (8 bits) that is exactly code * 2^(place(j) - kExponent): a subnormal number, or one between the smallest
// normal one and its double, which are as close to each other as subnormal ones. So a bf16 has room for a byte of
// codes, one bit more than its mantissa. The tensor core multiplies it like any other. What it is multiplied by carries
// the scale and a power of two that brings the products back into range.
#pragma once

#include <cstdint>

#include "common/code_planes.h"
#include "fast_math.cuh"

namespace vericache::cuda {

template <int kBits>
struct QuantCodes {
  static constexpr bool kPlanar = CodePlanes<kBits>::kSplit;
  static constexpr int kUnit = kPlanar ? 4 : 16 / kBits;
  static constexpr bool kFp16 = kBits == 8;
  static constexpr int kExponent = kFp16 ? 24 : 133;

  // The lowest bit of a code in register j: the codes of a byte share a shift.
  static constexpr bool kPlaced = kBits == 2 || kBits == 4;
  static __host__ __device__ constexpr int place(int j) { return kPlaced ? kBits * (j % (8 / kBits)) : 0; }

  static __device__ __forceinline__ uint32_t get(uint32_t word, int j) {
    if constexpr (kBits == 8) return __byte_perm(word, 0, 0x4240u + uint32_t(j) * 0x101u);
    constexpr uint32_t kMask = (1u << kBits) - 1;
    return word >> (j * kBits - place(j)) & (kMask << place(j)) * 0x10001u;
  }

  // The same, but the last register has all codes of its byte, which takes no mask: what that adds to a sum is taken
  // off it at the end (open_first).
  static __device__ __forceinline__ uint32_t get_open(uint32_t word, int j) {
    if constexpr (!kPlaced) return get(word, j);
    if (j < kUnit / 2) return get(word, j);
    const uint32_t byte = __byte_perm(word, 0, 0x4341u);
    return j == kUnit - 1 ? byte : byte & (((1u << kBits) - 1) << place(j)) * 0x10001u;
  }
  // The first of the registers before j whose codes register j has as well; j: none.
  static __host__ __device__ constexpr int open_first(int j) { return kPlaced && j == kUnit - 1 ? kUnit / 2 : j; }

  // 5 to 7 bits. `word`: of the 4-bit plane; `middle`, `low`: of the 2-bit and the 1-bit plane, if there is one, whose
  // parts middle_part and low_part belong to it (code_planes.h).
  static __device__ __forceinline__ uint32_t get(uint32_t word, uint32_t middle, int middle_part, uint32_t low,
                                                 int low_part, int j) {
    uint32_t bytes = bits_at<4>(word, 4 * (j % 2));  // codes j % 2 and j % 2 + 2 of both halves, a byte each
    if constexpr ((kBits & 2) != 0) bytes |= bits_at<2>(middle, 2 * (2 * middle_part + j % 2));
    if constexpr ((kBits & 1) != 0) bytes |= bits_at<1>(low, 2 * low_part + j % 2);
    return __byte_perm(bytes, 0, j < 2 ? 0x4240u : 0x4341u);
  }

 private:
  // w bits from `at` on of every byte, at their place in a code.
  template <int w>
  static __device__ __forceinline__ uint32_t bits_at(uint32_t word, int at) {
    constexpr int kPlace = CodePlanes<kBits>::place(w);
    const uint32_t moved = at >= kPlace ? word >> (at - kPlace) : word << (kPlace - at);
    return moved & (((1u << w) - 1) << kPlace) * 0x01010101u;
  }
};

// 2^e twice, as bf16.
__host__ __device__ constexpr uint32_t bf16_power(int e) { return uint32_t(127 + e) << 7; }
__host__ __device__ constexpr uint32_t bf16_powers(int low, int high) {
  return bf16_power(low) | bf16_power(high) << 16;
}

__device__ __forceinline__ float low_of(uint32_t bf16_pair) { return __uint_as_float(bf16_pair << 16); }
__device__ __forceinline__ float high_of(uint32_t bf16_pair) { return __uint_as_float(bf16_pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t half_from_bf16(uint32_t pair) { return pack_half(low_of(pair), high_of(pair)); }

// The low or the high elements of two words.
__device__ __forceinline__ uint32_t pair_elements(uint32_t a, uint32_t b, bool high) {
  return __byte_perm(a, b, high ? 0x7632u : 0x5410u);
}

// Of 2 * kUnit elements side by side (kUnit words): pair j = element j (low) and element j + kUnit (high), which is how
// register j of a word of codes pairs them.
template <int kUnit>
__device__ __forceinline__ uint32_t pair_halves(const uint32_t (&words)[kUnit], int j) {
  return pair_elements(words[j / 2], words[(j + kUnit) / 2], j % 2);
}

}  // namespace vericache::cuda
