// SPDX-License-Identifier: Apache-2.0
#include "runtime/event.h"

#include "common/error.h"
#ifdef VERICACHE_WITH_CUDA
#include "runtime/cuda_device.h"
#endif

namespace vericache {

#ifdef VERICACHE_WITH_CUDA
namespace {
cudaEvent_t as_event(void* handle) { return static_cast<cudaEvent_t>(handle); }
}  // namespace
#endif

Event::Event(int device, [[maybe_unused]] bool timing) : device_(device) {
  if (device_ < 0) return;
#ifdef VERICACHE_WITH_CUDA
  DeviceGuard guard(device_);
  cudaEvent_t event = nullptr;
  // Blocking sync: a thread that waits for a copy of milliseconds must not burn a core meanwhile.
  const unsigned flags = cudaEventBlockingSync | (timing ? cudaEventDefault : cudaEventDisableTiming);
  VC_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags));
  handle_ = event;
#else
  VC_CHECK(false, "device ", device_, " needs a build with CUDA; this one has the CPU only (use device=-1)");
#endif
}

Event::~Event() {
#ifdef VERICACHE_WITH_CUDA
  // A status here is of no use: at interpreter exit the driver may be gone already.
  if (handle_ != nullptr && cudaEventDestroy(as_event(handle_)) != cudaSuccess) (void)cudaGetLastError();
#endif
}

void Event::set_done() {
  State expected = State::kPending;
  state_.compare_exchange_strong(expected, State::kDone, std::memory_order_acq_rel);
  state_.notify_all();
}

void Event::set_failed(const std::string& reason) {
  bool expected = false;
  if (state_.load(std::memory_order_acquire) == State::kPending && failing_.compare_exchange_strong(expected, true)) {
    reason_ = reason;
    state_.store(State::kFailed, std::memory_order_release);
  }
  state_.notify_all();
}

void Event::fail_on_completion(const std::string& reason) {
  failing_.store(true);
  reason_ = reason;
  fails_on_completion_ = true;
}

void Event::complete() {
  if (!fails_on_completion_) {
    set_done();
    return;
  }
  state_.store(State::kFailed, std::memory_order_release);
  state_.notify_all();
}

void Event::record([[maybe_unused]] int64_t stream) {
  if (device_ < 0) {
    complete();
    return;
  }
#ifdef VERICACHE_WITH_CUDA
  DeviceGuard guard(device_);
  VC_CUDA_CHECK(cudaEventRecord(as_event(handle_), as_stream(stream)));
  recorded_.store(true, std::memory_order_release);
#endif
}

Event::State Event::settle([[maybe_unused]] int status) {
#ifdef VERICACHE_WITH_CUDA
  const auto code = static_cast<cudaError_t>(status);
  if (code == cudaSuccess) {
    complete();
  } else {
    (void)cudaGetLastError();  // "not ready" too would be found there by the next, innocent check
    if (code != cudaErrorNotReady) {
      set_failed(std::string("CUDA reports ") + cudaGetErrorName(code) + ", " + cudaGetErrorString(code));
    }
  }
#endif
  return state_.load(std::memory_order_acquire);
}

Event::State Event::poll() {
  const State state = state_.load(std::memory_order_acquire);
  if (state != State::kPending || !recorded_.load(std::memory_order_acquire)) return state;
#ifdef VERICACHE_WITH_CUDA
  // cudaEventQuery calls an event that was never recorded complete; recorded_ above is what makes this right.
  return settle(cudaEventQuery(as_event(handle_)));
#else
  return state;
#endif
}

Event::State Event::wait() {
#ifdef VERICACHE_WITH_CUDA
  if (state_.load(std::memory_order_acquire) == State::kPending && recorded_.load(std::memory_order_acquire)) {
    return settle(cudaEventSynchronize(as_event(handle_)));
  }
#endif
  // CPU, or a CUDA event that the host will complete: recording happens before an event is handed out to wait for.
  state_.wait(State::kPending, std::memory_order_acquire);
  return state_.load(std::memory_order_acquire);
}

void Event::block_stream([[maybe_unused]] int64_t stream) {
  if (device_ < 0) {
    wait();
    return;
  }
#ifdef VERICACHE_WITH_CUDA
  if (state_.load(std::memory_order_acquire) != State::kPending) return;
  VC_CHECK(recorded_.load(std::memory_order_acquire), "a stream cannot wait for an event that was not recorded");
  DeviceGuard guard(device_);
  VC_CUDA_CHECK(cudaStreamWaitEvent(as_stream(stream), as_event(handle_), 0));
#endif
}

double Event::elapsed_ms([[maybe_unused]] const Event& begin) const {
#ifdef VERICACHE_WITH_CUDA
  if (device_ >= 0) {
    float ms = 0.0F;
    VC_CUDA_CHECK(cudaEventElapsedTime(&ms, as_event(begin.handle_), as_event(handle_)));
    return ms;
  }
#endif
  return 0.0;
}

}  // namespace vericache
