// SPDX-License-Identifier: Apache-2.0
// Quantized codes to bf16 mma fragments, in registers. One lane handles, of each token, a run of channels that lie side
// by side, so that codes, scales and zeros are read in wide words; which channel stands in which place of a fragment is
// free as long as both operands agree.
//
// A 32-bit word of codes has two halves of kHalf = 16 / kBits codes. Fragment register j of a word holds code j (low)
// and code j + kHalf (high). bf16 values that meet such a register (q, scales, zeros) are paired alike: pair_halves.
#pragma once

#include <cstdint>

#include "fast_math.cuh"

namespace vericache::cuda {

__device__ __forceinline__ float low_of(uint32_t bf16_pair) { return __uint_as_float(bf16_pair << 16); }
__device__ __forceinline__ float high_of(uint32_t bf16_pair) { return __uint_as_float(bf16_pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t half_from_bf16(uint32_t pair) { return pack_half(low_of(pair), high_of(pair)); }

// Values. x = code * scale + zero as one bf16 fma (2 and 4 bits): the code goes to the top of the
// mantissa of 1.0, which makes it 1 + code / 2^bits exactly, so x = fma(that, scale * 2^bits, zero - scale * 2^bits).
// The product by 2^bits is exact; the offset rounds once, to within 2^-9 of the group's range.
template <int kBits>
struct PairParams {
  uint32_t slope, offset;

  // Pairs of bf16, as stored.
  __device__ __forceinline__ static PairParams make(uint32_t scale, uint32_t zero) {
    constexpr uint32_t kPower = kBits == 2 ? 0x40804080u : 0x41804180u;  // 2^bits
    constexpr uint32_t kMinusOne = 0xbf80bf80u;
    const uint32_t slope = multiply_bf16x2(scale, kPower);
    return {slope, fma_bf16x2(slope, kMinusOne, zero)};
  }
};

// 8 bits go through fp16, whose 11 bits hold 1024 + code; products with them are fp16 too.
template <>
struct PairParams<8> {
  uint32_t slope, offset;

  __device__ __forceinline__ static PairParams make(uint32_t scale, uint32_t zero) {
    return {half_from_bf16(scale), half_from_bf16(zero)};
  }
};

// 1024 + code for codes j and j + 2 of a word of bytes, fp16.
__device__ __forceinline__ uint32_t raw_bytes(uint32_t word, int j) {
  return __byte_perm(word, 0x64646464u, 0x4240u + uint32_t(j) * 0x101u);
}

// Register j of a word: values of code j and code j + kHalf.
template <int kBits>
__device__ __forceinline__ uint32_t dequantize_pair(uint32_t word, int j, const PairParams<kBits>& p) {
  if constexpr (kBits == 8) {
    return fma_half2(add_half2(raw_bytes(word, j), 0xe400e400u), p.slope, p.offset);
  } else {
    constexpr int kTop = 7 - kBits;  // where the code must sit
    constexpr uint32_t kMask = ((1u << kBits) - 1) << kTop, kMasks = kMask | kMask << 16;
    const int from = j * kBits;
    const uint32_t moved = from <= kTop ? word << (kTop - from) : word >> (from - kTop);
    return fma_bf16x2(and_or(moved, kMasks, 0x3f803f80u), p.slope, p.offset);
  }
}

// Codes without arithmetic (2 and 4 bits), for keys, whose scales belong to q: register j of a word as
// 1 + code / 2^power(j), exactly. Registers whose codes share a shift need it once.
template <int kBits>
struct RawCodes {
  static constexpr int kAShift = kBits == 2 ? 3 : 1;  // registers
  static __device__ constexpr int bit(int j) { return j % kAShift * kBits; }
  static __device__ constexpr int power(int j) { return 7 - bit(j); }

  static __device__ __forceinline__ uint32_t get(uint32_t word, int j) {
    const uint32_t mask = ((1u << kBits) - 1) << bit(j);
    return and_or(word >> (j / kAShift * kAShift * kBits), mask | mask << 16, 0x3f803f80u);
  }
  // 2^power(j), twice in bf16.
  static __device__ constexpr uint32_t factor(int j) {
    return uint32_t(127 + power(j)) << 7 | uint32_t(127 + power(j)) << 23;
  }
};

// Of 2 * kHalf bf16 side by side (kHalf words): pair j = element j (low) and element j + kHalf (high).
template <int kHalf>
__device__ __forceinline__ uint32_t pair_halves(const uint32_t (&words)[kHalf], int j) {
  return __byte_perm(words[j / 2], words[(j + kHalf) / 2], j % 2 ? 0x7632u : 0x5410u);
}

// kWords words from 4-, 8- or 16-byte aligned memory.
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
