// SPDX-License-Identifier: Apache-2.0
// A ring of staging slots in a device buffer that the caller owns.
//
// Each slot owns two events: ready (its copy has arrived) and released (its last reader has run). Both directions wait:
//   compute reads a slot only after ready      - ready() on the host, or wait_on_stream() on the compute stream;
//   a copy writes a slot only after released    - of every slot whose bytes it takes over, and after their own copies:
//                                                 the copy engine asks begin_copy() what to wait for, so a release
//                                                 that the GPU has not reached yet frees the space for the host's
//                                                 planning at once.
// Thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime/event.h"
#include "runtime/ring_allocator.h"

namespace vericache {

struct StagingRingStats {
  int64_t capacity;
  int64_t occupied;  // bytes that acquire cannot use now
  int64_t peak_occupied;
  int64_t live_slots;
  int64_t acquired;  // slots handed out so far
  int64_t refused;   // times acquire returned -1
};

class StagingRing {
 public:
  // base: address of the buffer in the device's memory, 256-byte aligned. device: CUDA ordinal, or -1 for the CPU.
  StagingRing(int64_t base, int64_t bytes, int device);

  // The slot's id, or -1 if there is no room now. Throws CapacityError if it could never fit.
  int64_t acquire(int64_t bytes);
  bool fits(int64_t bytes) const;
  int64_t address(int64_t slot) const;
  int64_t bytes(int64_t slot) const;
  // Whether the slot's latest copy has arrived. False if none was submitted. Throws Error if that copy failed.
  bool ready(int64_t slot) const;
  // Work submitted to `stream` from now on waits for the slot's copy (write of the slot before its reads).
  void wait_on_stream(int64_t slot, int64_t stream);
  // The work now in `stream` holds the last reads of the slot. May come in any order, and before the copy has arrived
  // (a cancelled request): whoever takes the space over waits for both.
  void release(int64_t slot, int64_t stream);

  struct CopyOrder {
    EventPtr ready;                // to be completed by the copy
    std::vector<EventPtr> before;  // to be waited for before the copy writes
    int64_t address;
    int64_t bytes;
  };
  // For the copy engine: a new copy into the slot begins.
  CopyOrder begin_copy(int64_t slot, bool timing);

  int device() const { return device_; }
  int64_t capacity() const;
  StagingRingStats stats() const;

 private:
  struct State {
    EventPtr ready;     // null until a copy is submitted
    EventPtr released;  // null until released
    std::vector<EventPtr> before;
  };
  // Bytes whose host-side owner is gone, and what must have happened before they are written again.
  struct Remnant {
    int64_t begin, end;
    std::vector<EventPtr> events;
  };

  void inherit(const RingSlot& slot, State& state);
  const State& state(int64_t slot) const;

  const int64_t base_;
  const int device_;
  mutable std::mutex mutex_;
  RingAllocator ring_;
  std::unordered_map<int64_t, State> slots_;  // live, or released and not yet reclaimed
  std::deque<Remnant> remnants_;              // in ring order
  int64_t peak_occupied_ = 0;
  int64_t acquired_ = 0;
  int64_t refused_ = 0;
};

}  // namespace vericache
