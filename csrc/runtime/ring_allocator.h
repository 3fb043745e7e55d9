// SPDX-License-Identifier: Apache-2.0
// Where in a ring of bytes the next slot goes. Pure logic: no memory, no device, no thread.
//
// Slots are contiguous and aligned, handed out in ring order, and may be released in any order; their space comes back
// in the order it was handed out. A slot that does not fit before the end of the ring starts at 0, and the bytes it
// skipped come back with the slot that precedes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace vericache {

struct RingSlot {
  int64_t id;
  int64_t offset;  // bytes from the start of the ring, a multiple of kRingAlignment
  int64_t bytes;   // rounded up to kRingAlignment
};

class RingAllocator {
 public:
  static constexpr int64_t kRingAlignment = 256;

  // capacity: bytes, rounded down to the alignment. Throws Error if nothing is left.
  explicit RingAllocator(int64_t capacity);

  // The id of a slot of `bytes`, counted up from 0; -1 if it does not fit now.
  // Throws CapacityError if it would not fit the empty ring: waiting for it would never end.
  int64_t acquire(int64_t bytes);
  // Gives the slot back; returns the slots, oldest first, whose space became free by this. Throws Error if the slot is
  // not live (never acquired, or released already).
  std::vector<RingSlot> release(int64_t id);
  // The live slot `id`. Throws Error if it is not live.
  const RingSlot& slot(int64_t id) const;
  bool fits(int64_t bytes) const;

  int64_t capacity() const { return capacity_; }
  int64_t live_slots() const { return live_; }
  // Bytes between the oldest slot not yet reclaimed and the newest, skipped ones included: what acquire cannot use.
  int64_t occupied() const;

 private:
  struct Entry {
    RingSlot slot;
    bool released;
  };

  // Offset for `bytes` (aligned), -1 if there is none now.
  int64_t place(int64_t bytes) const;
  size_t index(int64_t id) const;  // in entries_; throws Error if not live

  int64_t capacity_;
  int64_t next_id_ = 0;
  int64_t live_ = 0;
  std::deque<Entry> entries_;  // acquired, space not reclaimed; ids are consecutive
};

}  // namespace vericache
