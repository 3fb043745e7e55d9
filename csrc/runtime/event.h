// SPDX-License-Identifier: Apache-2.0
// One point in time that copies and compute wait for: a CUDA event, or on the CPU a flag set by a thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace vericache {

// device < 0: the CPU backend. Streams are raw handles (int64); the CPU has none and ignores them.
// Shared by the slot and the copy that fills it, and by whoever inherits the slot's space: hence shared_ptr.
class Event {
 public:
  enum class State : int32_t { kPending, kDone, kFailed };

  explicit Event(int device, bool timing = false);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Completes the event from the host. Failing is final and carries the reason.
  void set_done();
  void set_failed(const std::string& reason);

  // Once recorded work completes, the event has failed for this reason. Before record(), by the thread that records.
  void fail_on_completion(const std::string& reason);
  // Whether it has failed or is bound to; reason() says why. For the thread that serializes the recording.
  bool failing() const { return failing_.load(); }
  // CUDA: the event completes when the work now in `stream` has. CPU: the host runs the work itself, so at once.
  void record(int64_t stream);

  // Never blocks. An event that was never recorded is pending.
  State poll();
  // Blocks the calling thread until the state is not pending, and returns it.
  State wait();
  // Work submitted to `stream` from now on waits for the event; the host does not. CPU: blocks the caller.
  void block_stream(int64_t stream);

  // Valid once poll() or wait() returned kFailed, or failing() true.
  const std::string& reason() const { return reason_; }
  int device() const { return device_; }
  // Milliseconds from `begin` to this one; both with timing, both complete. 0 on the CPU.
  double elapsed_ms(const Event& begin) const;

 private:
  // The recorded work is through.
  void complete();
  // Turns the CUDA event's status into a state; called once it is recorded.
  State settle(int status);

  const int device_;
  std::atomic<State> state_{State::kPending};
  std::atomic<bool> recorded_{false};
  std::atomic<bool> failing_{false};  // claims reason_: the first reason wins
  bool fails_on_completion_ = false;  // set before recorded_
  std::string reason_;                // written before state_ becomes kFailed
  void* handle_ = nullptr;            // cudaEvent_t; null on the CPU
};

using EventPtr = std::shared_ptr<Event>;

}  // namespace vericache
