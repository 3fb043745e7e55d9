// SPDX-License-Identifier: Apache-2.0
// A warp's ring of half tiles in shared memory, K and V in turn. A half is refilled as soon as it has been read, which
// keeps more on its way in the same memory than whole tiles would.
//
// A warp takes turns: lane i knows where the tile of the i-th turn from some multiple of kTurns on lies. Who owns the
// ring says so (`locate`, for all lanes), which turns there are, and how a half is copied and read.
#pragma once

#include "cp_async.cuh"
#include "launch.cuh"

namespace vericache::cuda {

// What the next half to be copied is, if the program says so. Then the ring has been filled.
enum class HalfPart { kEither, kKeys, kValues };

template <int kHalves, int kSlotBytes>
struct HalfRing {
  static constexpr int kTurns = 32;

  unsigned char* memory;
  const char* from = nullptr;  // keys of this lane's tile
  int next = 0;                // half to be copied next: of turn next / 2
  int slot = 0;                // to be read next
  // After a half of keys, or of values, has been read. A half that has been read makes room for the one kHalves later.
  static constexpr HalfPart kAfterKeys = kHalves % 2 == 0 ? HalfPart::kKeys : HalfPart::kValues;
  static constexpr HalfPart kAfterValues = kHalves % 2 == 0 ? HalfPart::kValues : HalfPart::kKeys;

  __device__ __forceinline__ int next_turn() const { return next / 2; }
  template <HalfPart kPart = HalfPart::kEither>
  __device__ __forceinline__ bool next_is_value() const {
    return kPart == HalfPart::kEither ? next % 2 != 0 : kPart == HalfPart::kValues;
  }
  // What the lane that knows the next half's turn has as `x`.
  template <class T>
  __device__ __forceinline__ T of_next(T x) const {
    return __shfl_sync(0xffffffffu, x, next_turn() % kTurns);
  }

  // Copies the next half, if its turn is `there`: copy(keys of its tile, where to). A group in any case.
  template <HalfPart kPart = HalfPart::kEither, class Locate, class Copy>
  __device__ __forceinline__ void copy_next(bool there, const Locate& locate, const Copy& copy) {
    if (there) {
      if (kPart != HalfPart::kValues && next % (2 * kTurns) == 0 && next > 0) locate(next_turn());
      const int to = kPart == HalfPart::kEither && next < kHalves ? next : slot;
      copy(reinterpret_cast<const char*>(of_next(reinterpret_cast<uint64_t>(from))),
           smem_address(memory) + uint32_t(to * kSlotBytes));
    }
    cp_async_commit();
    ++next;
  }
  // The next of the first halves. Until the wait for the kernel before, which the first half that is not `settled`
  // brings, one is on its way at a time: what that kernel asks of the memory queues behind what has been asked already.
  template <class CopyNext>
  __device__ __forceinline__ void fill_next(bool settled, const CopyNext& copy_next) {
    settled ? cp_async_wait<0>() : wait_for_previous_kernel();
    copy_next();
  }
  // The first `count` halves.
  template <class Settled, class CopyNext>
  __device__ __forceinline__ void fill(int count, const Settled& settled, const CopyNext& copy_next) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) fill_next(settled(), copy_next);
  }

  // The half to be read next; once it, and so many more, are there.
  __device__ __forceinline__ const unsigned char* here() const { return memory + slot * kSlotBytes; }
  template <int kMore = 0>
  __device__ __forceinline__ const unsigned char* arrived() const {
    cp_async_wait<kHalves - 1 - kMore>();
    __syncwarp();  // every lane's copies have landed
    return here();
  }
  // It has been read; its place takes the next half.
  template <class CopyNext>
  __device__ __forceinline__ void release(const CopyNext& copy_next) {
    __syncwarp();
    copy_next();
    step();
  }
  __device__ __forceinline__ int after(int i) const { return i + 1 == kHalves ? 0 : i + 1; }
  __device__ __forceinline__ void step() { slot = after(slot); }
};

}  // namespace vericache::cuda
