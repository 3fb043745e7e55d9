// SPDX-License-Identifier: Apache-2.0
// A warp's ring (half_ring.cuh) of a quantized cache, of quantized tiles and then of the tail's.
#pragma once

#include "half_ring.cuh"
#include "quant_state.cuh"

namespace vericache::cuda {

template <class Shape>
struct QuantRing : HalfRing<Shape::kHalves, Shape::kSlotBytes> {
  using Ring = HalfRing<Shape::kHalves, Shape::kSlotBytes>;
  using Ring::arrived, Ring::from, Ring::next_is_value, Ring::of_next, Ring::release;

  const QuantAttentionParams& p;
  const QuantBlob& blob;
  int lane;
  int first = 0;  // of this lane's tile: its first token in its page; -1 if it is of the tail

  __device__ __forceinline__ void set(const char* page, int kv_head, int tile, int quant_tiles) {
    from = keys_in<Shape>(page, p, blob, kv_head, tile, quant_tiles);
    first = tile < quant_tiles ? (tile & ((1 << blob.tiles_log2) - 1)) * kQuantTokens : -1;
  }
  __device__ __forceinline__ bool next_is_tail() const { return of_next(first) < 0; }

  template <class Locate>
  __device__ __forceinline__ void copy_next(bool there, const Locate& locate) {
    Ring::copy_next(there, locate, [&](const char* at, uint32_t to) {
      const int token = of_next(first);
      if (token >= 0)
        copy_half<Shape>(blob, at + (next_is_value() ? blob.half() : 0), token, p.page_size, to, lane);
      else  // whole rows, written or not: who reads the tile masks those past the last token
        copy_piece<Shape, Shape::kTailHalf, false>(to, at + (next_is_value() ? tail_half<Shape>(p) : 0) + lane * 16,
                                                   lane);
    });
  }

  // A quantized tile enters the state. `refill` copies the next half.
  template <class Refill>
  __device__ __forceinline__ void take(QuantState<Shape>& state, float c, const Refill& refill) {
    uint32_t weights[4][2];
    const unsigned char* keys = arrived();
    state.keys(keys, smem_address(keys), c, lane, weights);
    release(refill);
    const unsigned char* values = arrived();
    state.values(values, smem_address(values), lane, weights);
    release(refill);
  }
  // A tile of the tail; see QuantState::tail.
  template <class Refill>
  __device__ __forceinline__ void take_tail(QuantState<Shape>& state, float c, int valid, const int (&seen)[2],
                                            const Refill& refill) {
    const unsigned char* keys = Ring::template arrived<1>();
    Ring::step();
    state.tail(keys, Ring::here(), c, lane, valid, seen);
    release(refill);
    refill();
  }
};

}  // namespace vericache::cuda
