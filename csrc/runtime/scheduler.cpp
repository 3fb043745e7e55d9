// SPDX-License-Identifier: Apache-2.0
#include "runtime/scheduler.h"

#include <algorithm>
#include <utility>

#include "common/error.h"

namespace vericache {

void Scheduler::Verify::skip_resident() {
  while (next_submit < layers() && layer_bytes[static_cast<size_t>(next_submit)] == 0) {
    arrived[static_cast<size_t>(next_submit++)] = true;
  }
  extend_prefix();
}

void Scheduler::Verify::extend_prefix() {
  while (arrived_prefix < layers() && arrived[static_cast<size_t>(arrived_prefix)]) ++arrived_prefix;
}

Scheduler::Scheduler(int64_t max_verifying, int64_t link_bytes_per_iteration, int64_t horizon)
    : max_verifying_(max_verifying), link_rate_(link_bytes_per_iteration), credit_(link_bytes_per_iteration) {
  VC_CHECK(max_verifying > 0, "at least one request must be allowed to verify, not ", max_verifying);
  VC_CHECK(link_bytes_per_iteration >= 0, "the link's bytes per iteration cannot be negative, as ",
           link_bytes_per_iteration, " is; use 0 for no limit");
  if (link_rate_ > 0) link_.emplace(link_rate_, horizon);
}

int64_t Scheduler::reserve_verify(int64_t id, int64_t bytes, int64_t not_before, int64_t max_per_iter) {
  VC_CHECK(bytes >= 0, "a verify cannot fetch ", bytes, " bytes");
  if (!link_) return std::max(iteration_, not_before);
  link_->release(id);
  return link_->reserve(id, bytes, max_per_iter, not_before);
}

void Scheduler::begin_iteration() {
  ++iteration_;
  if (!link_) return;
  link_->advance();
  credit_ = std::min(credit_, int64_t{0}) + link_rate_;  // a debt carries over, unused bytes do not
}

void Scheduler::enqueue(int64_t id, const std::vector<int64_t>& layer_bytes, int64_t priority) {
  VC_CHECK(done(id), "verify ", id, " is queued already; it can join again once it is done or cancelled");
  VC_CHECK(!layer_bytes.empty(), "verify ", id, " has no layers");
  for (const int64_t bytes : layer_bytes) {
    VC_CHECK(bytes >= 0, "verify ", id, " has a layer of ", bytes, " bytes; a size cannot be negative");
  }
  Verify verify{.id = id, .priority = priority, .layer_bytes = layer_bytes, .arrived = {}};
  verify.arrived.assign(layer_bytes.size(), false);
  const auto place = std::upper_bound(waiting_.begin(), waiting_.end(), priority,
                                      [](int64_t p, const Verify& other) { return p > other.priority; });
  waiting_.insert(place, std::move(verify));
  start_waiting();
}

void Scheduler::start_waiting() {
  while (!waiting_.empty() && verifying() < max_verifying_ &&
         (verifying_.empty() || verifying_.back().all_submitted())) {
    verifying_.push_back(std::move(waiting_.front()));
    waiting_.erase(waiting_.begin());
    verifying_.back().skip_resident();
  }
}

std::optional<LayerFetch> Scheduler::next() const {
  // Only the newest verify can have layers left: it did not start before those ahead had submitted all of theirs.
  if (verifying_.empty() || verifying_.back().all_submitted()) return std::nullopt;
  if (link_ && credit_ <= 0) return std::nullopt;
  return LayerFetch{verifying_.back().id, verifying_.back().next_submit};
}

Scheduler::Verify& Scheduler::verifying_by_id(int64_t id, const char* what) {
  const auto it = std::find_if(verifying_.begin(), verifying_.end(), [id](const Verify& v) { return v.id == id; });
  VC_CHECK(it != verifying_.end(), "request ", id, " is not verifying, so no layer of it can have ", what);
  return *it;
}

void Scheduler::submitted(int64_t id, int64_t layer) {
  Verify& verify = verifying_by_id(id, "been submitted");
  VC_CHECK(&verify == &verifying_.back() && layer == verify.next_submit, "layer ", layer, " of verify ", id,
           " was submitted out of order; next() says which one is next");
  credit_ -= verify.layer_bytes[static_cast<size_t>(layer)];
  ++verify.next_submit;
  verify.skip_resident();
  start_waiting();
}

void Scheduler::arrived(int64_t id, int64_t layer) {
  Verify& verify = verifying_by_id(id, "arrived");
  VC_CHECK(0 <= layer && layer < verify.next_submit, "layer ", layer, " of verify ", id,
           " has arrived without having been submitted");
  VC_CHECK(!verify.arrived[static_cast<size_t>(layer)], "layer ", layer, " of verify ", id, " has arrived twice");
  verify.arrived[static_cast<size_t>(layer)] = true;
  verify.extend_prefix();
}

std::vector<LayerRange> Scheduler::runnable(int64_t max_layers) const {
  VC_CHECK(max_layers >= 0, "the most layers to run cannot be negative, as ", max_layers, " is; use 0 for no limit");
  std::vector<LayerRange> ranges;
  for (const Verify& v : verifying_) {
    if (v.arrived_prefix == v.ran) continue;
    const int64_t hi = max_layers == 0 ? v.arrived_prefix : std::min(v.arrived_prefix, v.ran + max_layers);
    ranges.push_back(LayerRange{v.id, v.ran, hi});
  }
  return ranges;
}

bool Scheduler::ran(int64_t id, int64_t layer_hi) {
  Verify& verify = verifying_by_id(id, "run");
  VC_CHECK(verify.ran < layer_hi && layer_hi <= verify.arrived_prefix, "verify ", id, " cannot have run up to layer ",
           layer_hi, ": layers below ", verify.ran, " had run and those below ", verify.arrived_prefix,
           " have arrived");
  verify.ran = layer_hi;
  if (layer_hi < verify.layers()) return false;
  cancel(id);  // all slots are accounted for, so that what it returns is empty
  return true;
}

std::vector<int64_t> Scheduler::cancel(int64_t id) {
  const auto is_id = [id](const Verify& v) { return v.id == id; };
  if (link_) link_->release(id);
  std::erase_if(waiting_, is_id);
  std::vector<int64_t> in_flight;
  const auto it = std::find_if(verifying_.begin(), verifying_.end(), is_id);
  if (it != verifying_.end()) {
    for (int64_t layer = it->ran; layer < it->next_submit; ++layer) {
      if (it->layer_bytes[static_cast<size_t>(layer)] > 0) in_flight.push_back(layer);
    }
    verifying_.erase(it);
  }
  start_waiting();
  return in_flight;
}

bool Scheduler::done(int64_t id) const {
  const auto is_id = [id](const Verify& v) { return v.id == id; };
  return std::none_of(waiting_.begin(), waiting_.end(), is_id) &&
         std::none_of(verifying_.begin(), verifying_.end(), is_id);
}

}  // namespace vericache
