// SPDX-License-Identifier: Apache-2.0
// A resource with so much capacity an iteration, reserved for iterations to come. Pure logic.
//
// Two uses. The link: a verify needs `amount` bytes through by some iteration, spread over as many as it takes
// (earliest_fit, reserve). GPU memory: `amount` bytes are held over a run of iterations (earliest_span, reserve_span).
// Iterations are absolute numbers; the ring knows now() .. now() + horizon - 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace vericache {

class ReservationRing {
 public:
  // capacity: units (bytes) an iteration, positive. horizon: iterations, positive.
  ReservationRing(int64_t capacity, int64_t horizon);

  // The iteration by whose end `amount` would be through, taking from each iteration from `not_before` (or now) on what
  // is free there, at most `max_per_iter` (0: no limit). -1 if the horizon ends first.
  int64_t earliest_fit(int64_t amount, int64_t max_per_iter = 0, int64_t not_before = 0) const;
  // Takes exactly what earliest_fit counted, for `owner`, and returns its answer; takes nothing if that is -1.
  int64_t reserve(int64_t owner, int64_t amount, int64_t max_per_iter = 0, int64_t not_before = 0);

  // The first iteration from `not_before` (or now) on of `length` consecutive ones that each have `amount` free; -1 if
  // there is none in the horizon.
  int64_t earliest_span(int64_t amount, int64_t length, int64_t not_before = 0) const;
  // Takes `amount` from each of [first, first + length) if all have it; false, taking nothing, otherwise.
  bool reserve_span(int64_t owner, int64_t amount, int64_t first, int64_t length);

  // Gives back what `owner` holds from now() on. Returns the units given back, 0 for an unknown owner.
  int64_t release(int64_t owner);
  // The next iteration begins: what was reserved for the past is spent, and the horizon moves on.
  void advance(int64_t iterations = 1);

  int64_t now() const { return now_; }
  int64_t capacity() const { return capacity_; }
  int64_t horizon() const { return static_cast<int64_t>(used_.size()); }
  // Units free in an iteration; 0 outside the horizon.
  int64_t free_at(int64_t iteration) const;
  // Units reserved from now() on.
  int64_t reserved() const;

 private:
  struct Hold {
    int64_t iteration, amount;
  };

  int64_t& used(int64_t iteration) { return used_[static_cast<size_t>(iteration % horizon())]; }
  void take(int64_t owner, int64_t iteration, int64_t amount);

  const int64_t capacity_;
  int64_t now_ = 0;
  std::vector<int64_t> used_;  // by iteration modulo horizon
  std::unordered_map<int64_t, std::vector<Hold>> holds_;
};

}  // namespace vericache
