// SPDX-License-Identifier: Apache-2.0
// A warp's ring (half_ring.cuh) of a quantized cache, of quantized tiles and then of the tail's.
#pragma once

#include "half_ring.cuh"
#include "quant_state.cuh"

namespace vericache::cuda {

template <class Shape>
struct QuantRing : HalfRing<Shape::kHalves, Shape::kSlotBytes> {
  using Ring = HalfRing<Shape::kHalves, Shape::kSlotBytes>;
  using Ring::arrived, Ring::from, Ring::next, Ring::of_next, Ring::release;

  const QuantAttentionParams& p;
  const QuantBlob& blob;
  int lane;
  int halves;     // of all turns
  int first = 0;  // of this lane's tile, if it is quantized: its first token in its page

  // `from` is a multiple of 16; the last bit says that the tile is of the tail.
  __device__ __forceinline__ void set(const char* page, int kv_head, int tile, int quant_tiles) {
    const bool is_tail = tile >= quant_tiles;
    from = keys_in<Shape>(page, p, blob, kv_head, tile, quant_tiles) + is_tail;
    first = (tile & ((1 << blob.tiles_log2) - 1)) * kQuantTokens;
  }
  static __device__ __forceinline__ bool is_tail(const char* from) {
    return (uint32_t(reinterpret_cast<uint64_t>(from)) & 1) != 0;
  }
  __device__ __forceinline__ bool next_is_tail() const {
    return of_next(uint32_t(reinterpret_cast<uint64_t>(from)) & 1) != 0;
  }

  template <HalfPart kPart = HalfPart::kEither, class Locate>
  __device__ __forceinline__ void copy_next(const Locate& locate) {
    Ring::template copy_next<kPart>(next < halves, locate, [&](const char* at, uint32_t to) {
      const bool is_value = Ring::template next_is_value<kPart>();
      if (!is_tail(at))
        copy_half<Shape>(blob, at, is_value, [&] { return of_next(first); }, p.page_size, to, lane);
      else  // whole rows, written or not: who reads the tile masks those past the last token
        copy_piece<Shape, Shape::kTailHalf, false>(to, at - 1 + (is_value ? tail_half<Shape>(p) : 0) + lane * 16, lane);
    });
  }

  // A quantized tile enters the state.
  template <class Locate>
  __device__ __forceinline__ void take(QuantState<Shape>& state, float c, const Locate& locate) {
    uint32_t weights[4][2];
    const unsigned char* keys = arrived();
    state.keys(keys, smem_address(keys), c, lane, weights);
    release([&] { copy_next<Ring::kAfterKeys>(locate); });
    const unsigned char* values = arrived();
    state.values(values, smem_address(values), lane, weights);
    release([&] { copy_next<Ring::kAfterValues>(locate); });
  }
  // A tile of the tail; see QuantState::tail.
  template <class Locate>
  __device__ __forceinline__ void take_tail(QuantState<Shape>& state, float c, int valid, const int (&seen)[2],
                                            const Locate& locate) {
    const unsigned char* keys = Ring::template arrived<1>();
    state.tail(keys, Ring::memory + Ring::after(Ring::slot) * Shape::kSlotBytes, c, lane, valid, seen);
    release([&] { copy_next<Ring::kAfterKeys>(locate); });
    release([&] { copy_next<Ring::kAfterValues>(locate); });
  }
};

}  // namespace vericache::cuda
