// SPDX-License-Identifier: Apache-2.0
// A tile of a quantized cache in shared memory: 64 tokens of quantized K and V of one KV head, or a few of the
// full-precision tail.
//
// Quantized: k_codes | k_scale | k_zero | v_codes | v_scale | v_zero as in the page. Codes are read by ldmatrix, whose
// eight rows are the even (or odd) tokens of a block of 16: 16-byte pieces are swizzled (place_of) so that they lie in
// different banks. Tail: K then V, [tokens][head_dim] bf16.
#pragma once

#include "cp_async.cuh"
#include "quant_codes.cuh"
#include "quant_line.cuh"

namespace vericache::cuda {

// kPaired: see quant_state.cuh. kWarps: of a block, at most. kStages: tiles of a warp's ring. kBlocks: of a
// multiprocessor.
template <int kHeadDim_, int kBits_, int kGroup_, bool kPaired_, int kWarps_, int kStages_, int kBlocks_>
struct QuantShape {
  static constexpr int kHeadDim = kHeadDim_, kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kPaired = kPaired_;
  static constexpr int kWarps = kWarps_, kStages = kStages_, kBlocks = kBlocks_;
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

  // Byte offsets.
  static constexpr int kCodes = kQuantTokens * kHeadDim * kBits / 8;
  static constexpr int kParam = kQuantTokens / kGroup * kHeadDim * 2;  // of keys and of values alike
  static constexpr int kKeyScale = kCodes, kKeyZero = kKeyScale + kParam, kValues = kKeyZero + kParam;
  static constexpr int kValueScale = kValues + kCodes, kValueZero = kValueScale + kParam;
  static constexpr int kTailRow = kHeadDim * 2, kTailHalf = kTailTokens * kTailRow;
  static constexpr int kQuantBytes = kValueZero + kParam;
  static constexpr int kTileBytes = kQuantBytes > 2 * kTailHalf ? kQuantBytes : 2 * kTailHalf;
  static_assert(kTileBytes % 128 == 0);
  static_assert(!kPaired || kChunkChannels == 2 * kGroup);

  // Shared memory: the line, then of as many warps as there is room for the states they deposit, then their rings.
  static constexpr int kStateBytes = (kItemRows * (kHeadDim * 4 + 8) + 127) / 128 * 128;
  static constexpr int kRingBytes = kStages * kTileBytes, kWarpBytes = kStateBytes + kRingBytes;
  static __host__ __device__ int line_bytes(int requests) { return (QuantLine::ints(requests) * 4 + 127) / 128 * 128; }

  // Where byte `at` of a tile's codes lies.
  static constexpr int kSwizzleShift = kCodeRow >= 128 ? 8 : 7;
  static __host__ __device__ constexpr int place_of(int at) { return at ^ (at >> kSwizzleShift & 7) << 4; }
  // Planes begin at multiples of 1024 bytes, which place_of does not mix.
  static constexpr int plane_begin(int w) { return int(CodePlanes<kBits>::begin(kQuantTokens, kHeadDim, w)); }
  static_assert(!kPlanar || (plane_begin(2) % 1024 == 0 && plane_begin(1) % 1024 == 0));
};

// Byte offsets and sizes within a head's blob of a page.
struct QuantBlob {
  int head_bytes, codes, k_param, v_param;
  int tiles_log2;  // tiles a page holds

  static QuantBlob make(const QuantAttentionParams& p) {
    const auto l = QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, p.bits, p.group, 2);
    int log2 = 0;
    while (kQuantTokens << log2 < p.page_size) ++log2;
    return {int(l.head_bytes), int(l.code_bytes), int(l.k_param_bytes), int(l.v_param_bytes), log2};
  }
};

__device__ __forceinline__ const char* page_of(const QuantAttentionParams& p, const QuantBlob& blob,
                                               const LineCursor& c, int tail_tokens) {
  const int64_t at = c.is_tail()
                         ? p.tail_table[c.request * p.tail_stride_request +
                                        ((c.tile - c.quant_tiles) * tail_tokens / kQuantTokens >> blob.tiles_log2)]
                         : p.quant_table[c.request * p.quant_stride_request + (c.tile >> blob.tiles_log2)];
  return reinterpret_cast<const char*>(at);
}

// One warp copies kBytes; kSwizzled: to their places (see above). `from`: this lane's 16 bytes of the first 512.
template <class Shape, int kBytes, bool kSwizzled>
__device__ __forceinline__ void copy_piece(uint32_t to, const char* from, int lane) {
#pragma unroll
  for (int i = 0; i < (kBytes + 511) / 512; ++i) {
    const int at = (i * 32 + lane) * 16;
    if (kBytes % 512 == 0 || at < kBytes) cp_async16(to + (kSwizzled ? Shape::place_of(at) : at), from + i * 512, true);
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

// Starts copying the tile at `c`, whose page is `page`, to `to`.
template <class Shape>
__device__ __forceinline__ void copy_tile(const QuantAttentionParams& p, const QuantBlob& blob, const LineCursor& c,
                                          const char* page, uint32_t to, int lane) {
  page += lane * 16;
  if (!c.is_tail()) {
    const char* keys = page + int64_t(c.kv_head) * blob.head_bytes;
    const auto copy = [&](auto codes, const char* k, const char* k_scale, const char* k_zero, const char* v,
                          const char* v_scale, const char* v_zero) {
      codes(to, k);
      copy_piece<Shape, Shape::kParam, false>(to + Shape::kKeyScale, k_scale, lane);
      copy_piece<Shape, Shape::kParam, false>(to + Shape::kKeyZero, k_zero, lane);
      codes(to + Shape::kValues, v);
      copy_piece<Shape, Shape::kParam, false>(to + Shape::kValueScale, v_scale, lane);
      copy_piece<Shape, Shape::kParam, false>(to + Shape::kValueZero, v_zero, lane);
    };
    if (blob.tiles_log2 == 0) {  // pages of one tile: a blob is laid out like the tile, addresses differ by constants
      copy([&](uint32_t at, const char* from) { copy_piece<Shape, Shape::kCodes, true>(at, from, lane); }, keys,
           keys + Shape::kKeyScale, keys + Shape::kKeyZero, keys + Shape::kValues, keys + Shape::kValueScale,
           keys + Shape::kValueZero);
      return;
    }
    const int first = (c.tile & ((1 << blob.tiles_log2) - 1)) * kQuantTokens;
    const char* k_scale = keys + blob.codes + first / Shape::kGroup * (Shape::kHeadDim * 2);
    const char* values = keys + blob.codes + 2 * blob.k_param;
    const char* v_scale = values + blob.codes + first * (Shape::kRowGroups * 2);
    copy([&](uint32_t at, const char* from) { copy_codes<Shape>(at, from, first, p.page_size, lane); }, keys, k_scale,
         k_scale + blob.k_param, values, v_scale, v_scale + blob.v_param);
    return;
  }
  // Whole rows, written or not: who reads the tile masks those past the last token.
  const int first = (c.tile - c.quant_tiles) * Shape::kTailTokens & (p.page_size - 1);
  const char* keys = page + (int64_t(c.kv_head) * p.page_size + first) * Shape::kTailRow;
  copy_piece<Shape, Shape::kTailHalf, false>(to, keys, lane);
  copy_piece<Shape, Shape::kTailHalf, false>(to + Shape::kTailHalf,
                                             keys + int64_t(p.kv_heads) * p.page_size * Shape::kTailRow, lane);
}

}  // namespace vericache::cuda
