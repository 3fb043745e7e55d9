// SPDX-License-Identifier: Apache-2.0
#include "runtime/ring_allocator.h"

#include "common/error.h"

namespace vericache {
namespace {

int64_t align(int64_t bytes) {
  constexpr int64_t a = RingAllocator::kRingAlignment;
  return (bytes + a - 1) / a * a;
}

}  // namespace

RingAllocator::RingAllocator(int64_t capacity) : capacity_(capacity / kRingAlignment * kRingAlignment) {
  VC_CHECK(capacity_ > 0, "a staging ring needs at least ", kRingAlignment, " bytes, not ", capacity);
}

int64_t RingAllocator::place(int64_t bytes) const {
  if (entries_.empty()) return bytes <= capacity_ ? 0 : -1;
  const int64_t tail = entries_.front().slot.offset;
  const int64_t head = entries_.back().slot.offset + entries_.back().slot.bytes;
  // With slots live, head == tail means full, so the wrapped case below must leave no other way to get there.
  if (head > tail) {
    if (bytes <= capacity_ - head) return head;
    return bytes <= tail ? 0 : -1;
  }
  return bytes <= tail - head ? head : -1;
}

int64_t RingAllocator::acquire(int64_t bytes) {
  VC_CHECK(bytes > 0, "a staging slot must be of at least one byte, not ", bytes);
  if (bytes > capacity_) {
    throw CapacityError(detail::concat("a staging slot of ", bytes, " bytes can never fit the ring of ", capacity_,
                                       " bytes; make the staging ring larger"));
  }
  const int64_t aligned = align(bytes);
  const int64_t offset = place(aligned);
  if (offset < 0) return -1;
  entries_.push_back(Entry{RingSlot{next_id_, offset, aligned}, false});
  ++live_;
  return next_id_++;
}

size_t RingAllocator::index(int64_t id) const {
  const int64_t first = entries_.empty() ? next_id_ : entries_.front().slot.id;
  VC_CHECK(id >= first && id < next_id_ && !entries_[static_cast<size_t>(id - first)].released, "staging slot ", id,
           " is not live: it was never acquired or is released already");
  return static_cast<size_t>(id - first);
}

std::vector<RingSlot> RingAllocator::release(int64_t id) {
  entries_[index(id)].released = true;
  --live_;
  std::vector<RingSlot> reclaimed;
  while (!entries_.empty() && entries_.front().released) {
    reclaimed.push_back(entries_.front().slot);
    entries_.pop_front();
  }
  return reclaimed;
}

const RingSlot& RingAllocator::slot(int64_t id) const { return entries_[index(id)].slot; }

bool RingAllocator::fits(int64_t bytes) const { return bytes > 0 && bytes <= capacity_ && place(align(bytes)) >= 0; }

int64_t RingAllocator::occupied() const {
  if (entries_.empty()) return 0;
  const int64_t tail = entries_.front().slot.offset;
  const int64_t head = entries_.back().slot.offset + entries_.back().slot.bytes;
  return head > tail ? head - tail : capacity_ - tail + head;
}

}  // namespace vericache
