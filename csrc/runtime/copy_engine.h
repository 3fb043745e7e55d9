// SPDX-License-Identifier: Apache-2.0
// Moves bytes between host and device beside compute. It decides nothing: what to move comes as flat tables.
//
//   ticket = submit(rows, direction, ...)   one call a step and direction; returns at once
//   ready(ticket) / wait(ticket)            host side
//   wait_on_stream(ticket, stream)          CUDA: compute waits, the host does not
//
// Order: jobs of one direction run in the order submitted; different directions run concurrently unless a job names
// another's ticket in `after`. Rows of one job run in order; rows whose source and destination both continue the row
// before are joined into one copy. The rows' memory must stay put until the ticket is ready; bytes of a source may not
// change, bytes of a destination may not be read until then.
//
// A job that fails leaves its reason with its ticket; ready() and wait() throw it every time they are asked, and the
// engine goes on with the next job. Thread-safe.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/copy_backend.h"
#include "runtime/staging_ring.h"

namespace vericache {

// Of one direction. Bytes are those that moved: failed jobs count in `failed` alone.
struct CopyCounters {
  int64_t bytes = 0;
  int64_t rows = 0;    // as submitted, empty ones left out
  int64_t copies = 0;  // after joining
  int64_t jobs = 0;
  int64_t failed = 0;
  int64_t in_flight_jobs = 0;
  int64_t in_flight_bytes = 0;
  double busy_seconds = 0.0;  // time the link was at work; on CUDA measured only with options.timing
};

struct CopySubmit {
  CopyDirection direction = CopyDirection::kHostToDevice;
  StagingRing* ring = nullptr;  // the copy fills slot `slot` of this ring and completes its ready event
  int64_t slot = -1;
  int64_t after_stream = 0;  // CUDA: the copy follows what is now in this stream, if has_after_stream
  bool has_after_stream = false;
  int64_t after = -1;  // a ticket that the copy follows, and fails with; -1: none
};

class CopyEngine {
 public:
  // device: CUDA ordinal, or -1 for the CPU backend.
  explicit CopyEngine(int device = -1, const CopyEngineOptions& options = {});
  ~CopyEngine();  // shutdown(false)
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // rows: [n] of (src, dst, bytes); n may be 0. With a slot, every destination must lie inside it.
  // Returns the ticket. Throws Error, having submitted nothing, for a bad row, slot or ticket, or after shutdown().
  int64_t submit(std::span<const CopyRow> rows, const CopySubmit& how);

  bool ready(int64_t ticket);
  void wait(int64_t ticket);
  void wait_on_stream(int64_t ticket, int64_t stream);

  // Tickets completed since the engine began, failed ones too.
  int64_t completed();
  // Blocks until completed() >= count, nothing is in flight, or the time is up (seconds < 0: no limit).
  // Returns completed(). To wait for "the next one" without missing any: read completed(), look at the tickets, then
  // wait_until(completed + 1).
  int64_t wait_until(int64_t count, double seconds);

  CopyCounters counters(CopyDirection direction);
  int device() const { return device_; }
  // drain: finish what was submitted; otherwise what has not begun fails. Either way no byte moves afterwards.
  void shutdown(bool drain);

 private:
  struct InFlight {
    int64_t sequence;
    int64_t bytes;
    int64_t rows;
    CopyJobPtr job;
  };
  struct Queue {
    std::deque<InFlight> jobs;
    int64_t next_sequence = 0;
    int64_t completed = 0;                              // every sequence below is through
    std::unordered_map<int64_t, std::string> failures;  // by sequence
    CopyCounters counters;
  };

  // With mutex_ held.
  void settle();
  Queue& queue_of(int64_t ticket, int64_t* sequence);
  bool through(int64_t ticket);            // throws the ticket's failure
  EventPtr pending_event(int64_t ticket);  // null if the ticket is through
  std::string injected_failure();
  int64_t total_completed() const;
  bool idle() const;

  const int device_;
  const CopyEngineOptions options_;
  std::mutex mutex_;
  std::condition_variable progress_;
  std::array<Queue, kCopyDirections> queues_;
  int64_t submitted_ = 0;
  bool shut_down_ = false;
  std::unique_ptr<CopyBackend> backend_;  // last: its threads call back
};

const char* name_of(CopyDirection direction);

}  // namespace vericache
