// SPDX-License-Identifier: Apache-2.0
// Which layer of which verifying request is fetched next, and which layers may run. Pure logic: it moves nothing and
// knows neither ring nor link but by what it is told.
//
// A verify is a list of layers with the bytes each has to fetch. A layer of 0 bytes is on the device already: next()
// leaves it out, and it counts as arrived when its turn comes. Life of a verify:
//   waiting -> verifying (at most max_verifying at a time) -> done, or cancelled from either.
// Fetch order: verifies start by priority, equal ones in order of arrival; a verify's layers go in order; no layer of
// another is fetched before the last layer of the one before has been submitted. That is what makes a FIFO staging
// ring deadlock-free: the oldest slot always belongs to the oldest verify, whose earlier layers are all there, so it
// can run and give the slot back. It holds for any ring that fits the largest single layer.
// Link: with link_bytes_per_iteration, next() stops once an iteration has submitted that much; a layer larger than the
// rest goes anyway and its excess is owed by the iterations after, so even a layer larger than the whole budget goes.
// Not thread-safe: the engine's step loop owns it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/reservation_ring.h"

namespace vericache {

struct LayerFetch {
  int64_t id;
  int64_t layer;
};

struct LayerRange {
  int64_t id;
  int64_t layer_lo;  // first
  int64_t layer_hi;  // one past the last
};

class Scheduler {
 public:
  // link_bytes_per_iteration: 0 means no limit and no reservations. horizon: iterations that can be reserved ahead.
  explicit Scheduler(int64_t max_verifying, int64_t link_bytes_per_iteration = 0, int64_t horizon = 256);

  // Admission. Reserves the link for a verify of `bytes` whose fetch begins at iteration `not_before` or later, at most
  // `max_per_iter` bytes of an iteration (0: the link's whole rate). Returns the iteration by whose end the fetch is
  // through, -1 if the horizon has no room: do not admit. Replaces an earlier reservation of the id that it can.
  // It ends by itself when the verify is done or cancelled.
  int64_t reserve_verify(int64_t id, int64_t bytes, int64_t not_before, int64_t max_per_iter = 0);
  // Once an iteration, before its fetches.
  void begin_iteration();
  int64_t iteration() const { return iteration_; }
  // Units still reserved on the link from now on; 0 without a link limit.
  int64_t link_reserved() const { return link_ ? link_->reserved() : 0; }

  // A verify joins. `id` may be used again once done() or cancelled. Throws Error for an id in use, no layers, or
  // negative bytes.
  void enqueue(int64_t id, const std::vector<int64_t>& layer_bytes, int64_t priority = 0);

  // The fetch to submit next, if any. Asking changes nothing; submitted() does. If the ring has no room for it, stop
  // and ask again once slots were released: never try a later one instead.
  std::optional<LayerFetch> next() const;
  void submitted(int64_t id, int64_t layer);
  void arrived(int64_t id, int64_t layer);

  // Contiguous layers that have arrived and not run, oldest verify first, at most `max_layers` a verify (0: no limit).
  std::vector<LayerRange> runnable(int64_t max_layers = 0) const;
  // Layers below `layer_hi` have run. Returns true if that was the last: the verify is done and leaves.
  bool ran(int64_t id, int64_t layer_hi);

  // Forgets the verify and its reservation. Returns the layers with bytes that were submitted and have not run: the
  // caller gives their slots back and drops their tickets. Empty for an unknown id.
  std::vector<int64_t> cancel(int64_t id);
  // Whether the id is neither waiting nor verifying.
  bool done(int64_t id) const;

  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t verifying() const { return static_cast<int64_t>(verifying_.size()); }

 private:
  struct Verify {
    int64_t id;
    int64_t priority;
    std::vector<int64_t> layer_bytes;
    std::vector<bool> arrived;
    int64_t next_submit = 0;
    int64_t arrived_prefix = 0;  // layers below have arrived
    int64_t ran = 0;             // layers below have run

    int64_t layers() const { return static_cast<int64_t>(layer_bytes.size()); }
    bool all_submitted() const { return next_submit == layers(); }
    void skip_resident();
    void extend_prefix();
  };

  Verify& verifying_by_id(int64_t id, const char* what);
  void start_waiting();

  const int64_t max_verifying_;
  const int64_t link_rate_;
  int64_t iteration_ = 0;
  int64_t credit_;  // bytes that this iteration may still submit; negative: owed
  std::optional<ReservationRing> link_;
  std::vector<Verify> waiting_;    // in the order in which they start
  std::vector<Verify> verifying_;  // in the order in which they started
};

}  // namespace vericache
