// SPDX-License-Identifier: Apache-2.0
// What the copy engine asks of the hardware: run copy jobs, each direction in the order given.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/event.h"

namespace vericache {

enum class CopyDirection : int32_t { kHostToDevice = 0, kDeviceToHost = 1, kDeviceToDevice = 2 };
inline constexpr int kCopyDirections = 3;

struct CopyRow {
  int64_t src, dst, bytes;
};

// Test hooks of the CPU backend; the defaults are a plain engine. fail_after works on CUDA too, the others do not.
struct CopyEngineOptions {
  int64_t delay_us_min = 0;  // each job sleeps a random time in [min, max] before it moves its first byte
  int64_t delay_us_max = 0;
  uint64_t seed = 0;                   // of the delays
  double bandwidth_bytes_per_s = 0.0;  // emulates a link, a direction each, by sleeping; 0: as fast as memory
  int64_t fail_after = -1;             // this many jobs run, the next one fails and moves nothing; -1: none fails
  bool timing = false;                 // CUDA: measure busy_seconds with timing events, a few microseconds a job
};

struct CopyJob {
  CopyDirection direction;
  std::vector<CopyRow> rows;      // coalesced
  std::vector<EventPtr> before;   // waited for before the first byte moves
  EventPtr after_copy;            // a copy that this one follows and fails with; null if there is none
  int64_t after_stream = 0;       // CUDA: the copy follows what is now in this stream ...
  bool has_after_stream = false;  // ... if this is set (0 is a stream too, the default one)
  std::string failure;            // injected; empty: none
  EventPtr begin;                 // CUDA with timing only
  EventPtr end;                   // completed, or failed, when the copy is through
  double busy_seconds = 0.0;      // written before `end` completes; CPU only
};

using CopyJobPtr = std::shared_ptr<CopyJob>;

class CopyBackend {
 public:
  virtual ~CopyBackend() = default;
  // Never throws: what goes wrong is said by the job's `end`. Called by one thread at a time.
  virtual void submit(const CopyJobPtr& job) noexcept = 0;
  // Finishes (drain) or fails the jobs that have not begun, and returns when no byte moves any more.
  virtual void stop(bool drain) noexcept = 0;
  // Whether `on_complete` is called after each job; otherwise the engine has to poll.
  virtual bool notifies() const noexcept = 0;
};

// Threads of this process, one a direction, started at its first job. Real bytes move, concurrently with the caller.
std::unique_ptr<CopyBackend> make_thread_backend(const CopyEngineOptions& options, std::function<void()> on_complete);
// Non-blocking streams of one CUDA device, one a direction. Throws Error in a build without CUDA.
std::unique_ptr<CopyBackend> make_cuda_backend(int device);

}  // namespace vericache
