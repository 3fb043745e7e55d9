// SPDX-License-Identifier: Apache-2.0
// A warp's ring of half tiles of a quantized cache in shared memory, K and V in turn. A half is refilled as soon as it
// has been read, which keeps more on its way in the same memory than whole tiles would.
//
// A warp takes turns: lane i knows where the tile of the i-th turn from some multiple of kTurns on lies. Who owns the
// ring says so (`locate`, for all lanes), and which turns there are.
#pragma once

#include "quant_state.cuh"

namespace vericache::cuda {

template <class Shape>
struct QuantRing {
  static constexpr int kHalves = Shape::kHalves, kTurns = 32;

  const QuantAttentionParams& p;
  const QuantBlob& blob;
  unsigned char* memory;
  int lane;
  const char* from = nullptr;   // keys of this lane's tile: where they lie in their page, see keys_in
  int first = 0;                // its first token in its page; -1 if it is of the tail
  int next = 0, next_slot = 0;  // half to be copied next: of turn next / 2; its slot
  int slot = 0;                 // to be read next

  __device__ __forceinline__ void set(const char* page, int kv_head, int tile, int quant_tiles) {
    from = keys_in<Shape>(page, p, blob, kv_head, tile, quant_tiles);
    first = tile < quant_tiles ? (tile & ((1 << blob.tiles_log2) - 1)) * kQuantTokens : -1;
  }
  __device__ __forceinline__ int next_turn() const { return next / 2; }
  __device__ __forceinline__ bool next_is_tail() const { return __shfl_sync(kAll, first, next / 2 % kTurns) < 0; }

  // Copies the next half, if its turn is `there`; a group in any case.
  template <class Locate>
  __device__ __forceinline__ void copy_next(bool there, const Locate& locate) {
    if (there) {
      if (next % (2 * kTurns) == 0 && next > 0) locate(next / 2);
      const char* at =
          reinterpret_cast<const char*>(__shfl_sync(kAll, reinterpret_cast<uint64_t>(from), next / 2 % kTurns));
      const int token = __shfl_sync(kAll, first, next / 2 % kTurns);
      const uint32_t to = smem_address(memory) + next_slot * Shape::kSlotBytes;
      if (token >= 0)
        copy_half<Shape>(blob, at + (next % 2 ? blob.half() : 0), token, p.page_size, to, lane);
      else  // whole rows, written or not: who reads the tile masks those past the last token
        copy_piece<Shape, Shape::kTailHalf, false>(to, at + (next % 2 ? tail_half<Shape>(p) : 0) + lane * 16, lane);
    }
    cp_async_commit();
    ++next;
    next_slot = next_slot + 1 == kHalves ? 0 : next_slot + 1;
  }

  // A quantized tile enters the state. `refill` copies the next half.
  template <class Refill>
  __device__ __forceinline__ void take(QuantState<Shape>& state, float c, const Refill& refill) {
    uint32_t weights[4][2];
    wait<kHalves - 1>();
    state.keys(here(), smem_address(here()), c, lane, weights);
    release(refill);
    wait<kHalves - 1>();
    state.values(here(), smem_address(here()), lane, weights);
    release(refill);
  }
  // A tile of the tail; see QuantState::tail.
  template <class Refill>
  __device__ __forceinline__ void take_tail(QuantState<Shape>& state, float c, int valid, const int (&seen)[2],
                                            const Refill& refill) {
    wait<kHalves - 2>();  // both halves
    const unsigned char* keys = here();
    step();
    state.tail(keys, here(), c, lane, valid, seen);
    __syncwarp();
    refill();
    refill();
    step();
  }

 private:
  static constexpr uint32_t kAll = 0xffffffffu;

  __device__ __forceinline__ const unsigned char* here() const { return memory + slot * Shape::kSlotBytes; }
  __device__ __forceinline__ void step() { slot = slot + 1 == kHalves ? 0 : slot + 1; }
  template <int kPending>
  __device__ __forceinline__ void wait() const {
    cp_async_wait<kPending>();
    __syncwarp();  // every lane's copies have landed
  }
  template <class Refill>
  __device__ __forceinline__ void release(const Refill& refill) {
    __syncwarp();  // the half has been read
    refill();
    step();
  }
};

}  // namespace vericache::cuda
