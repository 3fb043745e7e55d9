// SPDX-License-Identifier: Apache-2.0
// A tile of a quantized cache in shared memory: 64 tokens of quantized K and V of one KV head, or a few of the
// full-precision tail.
//
// Quantized: k_codes | k_scale | k_zero | v_codes | v_scale | v_zero as in the page: K and V are halves of the same
// layout, which may lie apart. Codes are read by ldmatrix, whose eight rows are the even (or odd) tokens of a block of
// 16: 16-byte pieces are swizzled (place_of) so that they lie in different banks. Tail: K then V, [tokens][head_dim]
// bf16.
#pragma once

#include <algorithm>

#include "cp_async.cuh"
#include "quant_codes.cuh"
#include "quant_line.cuh"

namespace vericache::cuda {

// kPaired: see quant_state.cuh. kWarps: of a block, at most. kHalves: half tiles of a warp's ring.
template <int kHeadDim_, int kBits_, int kGroup_, bool kPaired_, int kWarps_, int kHalves_>
struct QuantShape {
  static constexpr int kHeadDim = kHeadDim_, kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kPaired = kPaired_;
  static constexpr int kWarps = kWarps_, kHalves = kHalves_;
  static_assert(kHalves >= 2);
  static constexpr int kUnit = QuantCodes<kBits>::kUnit;
  static constexpr bool kFp16 = QuantCodes<kBits>::kFp16;

  static constexpr int kItemRows = kPaired ? 4 : 8;        // of a unit: query rows times the heads of a group
  static constexpr int kTailTokens = kBits == 2 ? 8 : 16;  // of a tile

  // Of the codes, or of their 4-bit plane if they are split:
  static constexpr bool kPlanar = QuantCodes<kBits>::kPlanar;
  static constexpr int kCodeRow = kHeadDim * (kPlanar ? 4 : kBits) / 8;  // bytes of a token
  static constexpr int kChunks = kCodeRow / 16;                          // 16-byte pieces of a token
  static constexpr int kChunkChannels = kHeadDim / kChunks;              // = 8 * kUnit
  static constexpr int kRowGroups = kHeadDim / kGroup;                   // V groups of a token
  static constexpr int kKeyGroups = kQuantTokens / kGroup;               // K groups of a tile

  // Byte offsets in a half.
  static constexpr int kCodes = kQuantTokens * kHeadDim * kBits / 8;
  static constexpr int kParam = kQuantTokens / kGroup * kHeadDim * 2;  // of keys and of values alike
  static constexpr int kScale = kCodes, kZero = kScale + kParam, kQuantHalf = kZero + kParam;
  static constexpr int kTailRow = kHeadDim * 2, kTailHalf = kTailTokens * kTailRow;
  static_assert(!kPaired || (kKeyGroups == 2 && (kChunkChannels == 2 * kGroup || kChunkChannels == kGroup)));

  // Shared memory: the line, then of as many warps as there is room for the states they deposit, then their rings.
  static constexpr int kStateRow = kHeadDim, kStateBytes = (kItemRows * (kStateRow * 4 + 8) + 127) / 128 * 128;
  static constexpr int kSlotBytes = (std::max(kQuantHalf, kTailHalf) + 127) / 128 * 128;
  static constexpr int kRingBytes = kHalves * kSlotBytes, kWarpBytes = kStateBytes + kRingBytes;
  static __host__ __device__ int line_bytes(int requests) { return (QuantLine::ints(requests) * 4 + 127) / 128 * 128; }

  // Where byte `at` of a tile's codes lies.
  static constexpr int kSwizzleShift = kCodeRow >= 128 ? 8 : 7;
  static __host__ __device__ constexpr int place_of(int at) { return at ^ (at >> kSwizzleShift & 7) << 4; }
  // The address of byte x + step of a tile, `at` that of byte x: tiles lie at multiples of 128 bytes, and bits of x and
  // of step do not meet.
  static __device__ __forceinline__ uint32_t place_after(uint32_t at, int step) {
    const uint32_t place = uint32_t(place_of(step));
    return (at ^ (place & 127)) + (place & ~127u);
  }
  // Planes begin at multiples of 1024 bytes, which place_of does not mix.
  static constexpr int plane_begin(int w) { return int(CodePlanes<kBits>::begin(kQuantTokens, kHeadDim, w)); }
  static_assert(!kPlanar || (plane_begin(2) % 1024 == 0 && plane_begin(1) % 1024 == 0));
};

// Byte offsets and sizes within a head's blob of a page.
struct QuantBlob {
  int head_bytes, codes, param;  // param: a block of scales or zeros, of keys and of values alike
  int tiles_log2;                // tiles a page holds

  __host__ __device__ int half() const { return codes + 2 * param; }

  static QuantBlob make(const QuantAttentionParams& p) {
    const auto l = QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, p.bits, p.group, 2);
    int log2 = 0;
    while (kQuantTokens << log2 < p.page_size) ++log2;
    return {int(l.head_bytes), int(l.code_bytes), int(l.k_param_bytes), log2};
  }
};

// The page of a request's tile, of which the first `quant_tiles` are quantized.
template <class Shape>
__device__ __forceinline__ const char* page_of(const QuantAttentionParams& p, const QuantBlob& blob, int request,
                                               int tile, int quant_tiles) {
  const int64_t at = tile < quant_tiles
                         ? p.quant_table[request * p.quant_stride_request + (tile >> blob.tiles_log2)]
                         : p.tail_table[request * p.tail_stride_request +
                                        ((tile - quant_tiles) * Shape::kTailTokens / kQuantTokens >> blob.tiles_log2)];
  return reinterpret_cast<const char*>(at);
}

// One warp copies kBytes; kSwizzled: to their places (see above). `from`: this lane's 16 bytes of the first 512.
template <class Shape, int kBytes, bool kSwizzled>
__device__ __forceinline__ void copy_piece(uint32_t to, const char* from, int lane) {
  to += kSwizzled ? Shape::place_of(lane * 16) : lane * 16;
#pragma unroll
  for (int i = 0; i < (kBytes + 511) / 512; ++i) {
    if (kBytes % 512 == 0 || i * 512 + lane * 16 < kBytes)
      cp_async16_once(kSwizzled ? Shape::place_after(to, i * 512) : to + i * 512, from + i * 512);
  }
}

// The codes of a tile out of a page of more than one: tokens first .. of the block of codes `from`.
template <class Shape>
__device__ __forceinline__ void copy_codes(uint32_t to, const char* from, int first, int page_size, int lane) {
  if constexpr (Shape::kPlanar) {
    using Planes = CodePlanes<Shape::kBits>;
    Planes::each_plane([&]<int w>() {
      constexpr int kRow = Planes::row_bytes(Shape::kHeadDim, w);
      copy_piece<Shape, kQuantTokens * kRow, true>(
          to + Shape::plane_begin(w), from + Planes::begin(page_size, Shape::kHeadDim, w) + first * kRow, lane);
    });
  } else {
    copy_piece<Shape, Shape::kCodes, true>(to, from + first * Shape::kCodeRow, lane);
  }
}

// Starts copying half a tile to `to`, from tokens first_of() .. of the head's blob `from`.
template <class Shape, class First>
__device__ __forceinline__ void copy_half(const QuantBlob& blob, const char* from, bool is_value, const First& first_of,
                                          int page_size, uint32_t to, int lane) {
  from += lane * 16;
  if (blob.tiles_log2 == 0) {  // pages of one tile: a blob is laid out like the tile, addresses differ by constants
    from += is_value ? Shape::kQuantHalf : 0;
    copy_piece<Shape, Shape::kCodes, true>(to, from, lane);
    copy_piece<Shape, 2 * Shape::kParam, false>(to + Shape::kScale, from + Shape::kScale, lane);
    return;
  }
  const int first = first_of();
  from += is_value ? blob.half() : 0;
  copy_codes<Shape>(to, from, first, page_size, lane);
  const char* scale = from + blob.codes + first * (Shape::kRowGroups * 2);
  copy_piece<Shape, Shape::kParam, false>(to + Shape::kScale, scale, lane);
  copy_piece<Shape, Shape::kParam, false>(to + Shape::kZero, scale + blob.param, lane);
}

// Where a tile's keys lie in its page: a quantized tile's head, whose values lie blob.half() further, or rows of the
// tail, whose values lie tail_half() further.
template <class Shape>
__device__ __forceinline__ const char* keys_in(const char* page, const QuantAttentionParams& p, const QuantBlob& blob,
                                               int kv_head, int tile, int quant_tiles) {
  if (tile < quant_tiles) return page + int64_t(kv_head) * blob.head_bytes;
  const int first = (tile - quant_tiles) * Shape::kTailTokens & (p.page_size - 1);
  return page + (int64_t(kv_head) * p.page_size + first) * Shape::kTailRow;
}
template <class Shape>
__device__ __forceinline__ int64_t tail_half(const QuantAttentionParams& p) {
  return int64_t(p.kv_heads) * p.page_size * Shape::kTailRow;
}

}  // namespace vericache::cuda
