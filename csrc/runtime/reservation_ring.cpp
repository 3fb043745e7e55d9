// SPDX-License-Identifier: Apache-2.0
#include "runtime/reservation_ring.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "common/error.h"

namespace vericache {

ReservationRing::ReservationRing(int64_t capacity, int64_t horizon) : capacity_(capacity) {
  VC_CHECK(capacity > 0, "a reservation ring's capacity must be positive, not ", capacity);
  VC_CHECK(horizon > 0, "a reservation ring's horizon must be at least one iteration, not ", horizon);
  used_.assign(static_cast<size_t>(horizon), 0);
}

int64_t ReservationRing::free_at(int64_t iteration) const {
  if (iteration < now_ || iteration >= now_ + horizon()) return 0;
  return capacity_ - used_[static_cast<size_t>(iteration % horizon())];
}

int64_t ReservationRing::earliest_fit(int64_t amount, int64_t max_per_iter, int64_t not_before) const {
  VC_CHECK(amount >= 0, "an amount to reserve cannot be negative, as ", amount, " is");
  VC_CHECK(max_per_iter >= 0, "the most to take an iteration cannot be negative, as ", max_per_iter,
           " is; use 0 for no limit");
  const int64_t most = max_per_iter == 0 ? capacity_ : std::min(max_per_iter, capacity_);
  for (int64_t i = std::max(now_, not_before); i < now_ + horizon(); ++i) {
    amount -= std::min(free_at(i), most);
    if (amount <= 0) return i;
  }
  return -1;
}

int64_t ReservationRing::reserve(int64_t owner, int64_t amount, int64_t max_per_iter, int64_t not_before) {
  const int64_t last = earliest_fit(amount, max_per_iter, not_before);
  const int64_t most = max_per_iter == 0 ? capacity_ : max_per_iter;
  for (int64_t i = std::max(now_, not_before); i <= last && amount > 0; ++i) {
    const int64_t part = std::min({free_at(i), most, amount});
    take(owner, i, part);
    amount -= part;
  }
  return last;
}

int64_t ReservationRing::earliest_span(int64_t amount, int64_t length, int64_t not_before) const {
  VC_CHECK(amount >= 0, "an amount to reserve cannot be negative, as ", amount, " is");
  VC_CHECK(length > 0, "a reservation must last at least one iteration, not ", length);
  int64_t run = 0;
  for (int64_t i = std::max(now_, not_before); i < now_ + horizon(); ++i) {
    run = free_at(i) >= amount ? run + 1 : 0;
    if (run == length) return i - length + 1;
  }
  return -1;
}

bool ReservationRing::reserve_span(int64_t owner, int64_t amount, int64_t first, int64_t length) {
  if (first < now_ || earliest_span(amount, length, first) != first) return false;
  for (int64_t i = first; i < first + length; ++i) take(owner, i, amount);
  return true;
}

void ReservationRing::take(int64_t owner, int64_t iteration, int64_t amount) {
  if (amount == 0) return;
  used(iteration) += amount;
  holds_[owner].push_back(Hold{iteration, amount});
}

int64_t ReservationRing::release(int64_t owner) {
  const auto it = holds_.find(owner);
  if (it == holds_.end()) return 0;
  int64_t given_back = 0;
  for (const Hold& hold : it->second) {
    used(hold.iteration) -= hold.amount;
    given_back += hold.amount;
  }
  holds_.erase(it);
  return given_back;
}

void ReservationRing::advance(int64_t iterations) {
  VC_CHECK(iterations >= 0, "iterations only go forward, not by ", iterations);
  const int64_t spent = std::min(iterations, horizon());
  for (int64_t i = now_; i < now_ + spent; ++i) used(i) = 0;
  now_ += iterations;
  // Holds of the past must not be given back later: their place in the ring means another iteration by then.
  for (auto it = holds_.begin(); it != holds_.end();) {
    std::erase_if(it->second, [this](const Hold& hold) { return hold.iteration < now_; });
    it = it->second.empty() ? holds_.erase(it) : std::next(it);
  }
}

int64_t ReservationRing::reserved() const { return std::accumulate(used_.begin(), used_.end(), int64_t{0}); }

}  // namespace vericache
