// SPDX-License-Identifier: Apache-2.0
#include "runtime/staging_ring.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/error.h"

namespace vericache {

StagingRing::StagingRing(int64_t base, int64_t bytes, int device) : base_(base), device_(device), ring_(bytes) {
  VC_CHECK(base != 0 && base % RingAllocator::kRingAlignment == 0, "the staging buffer's address ", base,
           " is not a multiple of ", RingAllocator::kRingAlignment, "; allocate it aligned");
#ifndef VERICACHE_WITH_CUDA
  VC_CHECK(device < 0, "device ", device, " needs a build with CUDA; this one has the CPU only (use device=-1)");
#endif
}

int64_t StagingRing::acquire(int64_t bytes) {
  std::lock_guard lock(mutex_);
  const int64_t id = ring_.acquire(bytes);
  if (id < 0) {
    ++refused_;
    return -1;
  }
  ++acquired_;
  peak_occupied_ = std::max(peak_occupied_, ring_.occupied());
  inherit(ring_.slot(id), slots_[id]);
  return id;
}

// What the slot's copy must wait for: every remnant that shares bytes with it.
void StagingRing::inherit(const RingSlot& slot, State& state) {
  const int64_t end = slot.offset + slot.bytes;
  for (auto it = remnants_.begin(); it != remnants_.end();) {
    if (it->end <= slot.offset || it->begin >= end) {
      ++it;
      continue;
    }
    state.before.insert(state.before.end(), it->events.begin(), it->events.end());
    // The slot now answers for the bytes it covers; what sticks out behind it is the next slot's to wait for.
    if (it->end <= end) {
      it = remnants_.erase(it);
    } else {
      it->begin = end;
      ++it;
    }
  }
}

const StagingRing::State& StagingRing::state(int64_t slot) const {
  ring_.slot(slot);  // throws if it is not live
  return slots_.at(slot);
}

bool StagingRing::fits(int64_t bytes) const {
  std::lock_guard lock(mutex_);
  return ring_.fits(bytes);
}

int64_t StagingRing::address(int64_t slot) const {
  std::lock_guard lock(mutex_);
  return base_ + ring_.slot(slot).offset;
}

int64_t StagingRing::bytes(int64_t slot) const {
  std::lock_guard lock(mutex_);
  return ring_.slot(slot).bytes;
}

bool StagingRing::ready(int64_t slot) const {
  std::lock_guard lock(mutex_);
  const EventPtr& ready = state(slot).ready;
  if (!ready) return false;
  const Event::State now = ready->poll();
  VC_CHECK(now != Event::State::kFailed, "the copy into staging slot ", slot, " failed: ", ready->reason());
  return now == Event::State::kDone;
}

void StagingRing::wait_on_stream(int64_t slot, int64_t stream) {
  EventPtr ready;
  {
    std::lock_guard lock(mutex_);
    ready = state(slot).ready;
  }
  VC_CHECK(ready, "no copy into staging slot ", slot, " was submitted, so nothing will ever make it ready");
  ready->block_stream(stream);  // outside the lock: on the CPU it blocks
  VC_CHECK(ready->poll() != Event::State::kFailed, "the copy into staging slot ", slot, " failed: ", ready->reason());
}

void StagingRing::release(int64_t slot, int64_t stream) {
  // Orders the stream's reads of the slot before the next write of its bytes.
  auto released = std::make_shared<Event>(device_);
  released->record(stream);
  std::lock_guard lock(mutex_);
  const auto reclaimed = ring_.release(slot);  // throws before anything changed
  slots_.at(slot).released = std::move(released);
  for (const RingSlot& gone : reclaimed) {
    State state = std::move(slots_.at(gone.id));
    slots_.erase(gone.id);
    Remnant remnant{gone.offset, gone.offset + gone.bytes, {std::move(state.released)}};
    if (state.ready) {
      remnant.events.push_back(std::move(state.ready));
    } else {
      // Never copied into, so it passes on what it inherited itself.
      std::move(state.before.begin(), state.before.end(), std::back_inserter(remnant.events));
    }
    // On the CPU, and for slots long past, there is nothing left to wait for.
    std::erase_if(remnant.events, [](const EventPtr& e) { return e->poll() != Event::State::kPending; });
    if (!remnant.events.empty()) remnants_.push_back(std::move(remnant));
  }
}

StagingRing::CopyOrder StagingRing::begin_copy(int64_t slot, bool timing) {
  auto ready = std::make_shared<Event>(device_, timing);
  std::lock_guard lock(mutex_);
  const RingSlot& place = ring_.slot(slot);
  State& state = slots_.at(slot);
  CopyOrder order{ready, std::move(state.before), base_ + place.offset, place.bytes};
  state.before.clear();
  // A second copy into the slot may run in another direction's queue: it follows the first.
  if (state.ready) order.before.push_back(state.ready);
  state.ready = std::move(ready);
  return order;
}

int64_t StagingRing::capacity() const { return ring_.capacity(); }

StagingRingStats StagingRing::stats() const {
  std::lock_guard lock(mutex_);
  return StagingRingStats{
      .capacity = ring_.capacity(),
      .occupied = ring_.occupied(),
      .peak_occupied = peak_occupied_,
      .live_slots = ring_.live_slots(),
      .acquired = acquired_,
      .refused = refused_,
  };
}

}  // namespace vericache
