// SPDX-License-Identifier: Apache-2.0
// The CPU backend of the copy engine.
#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "common/error.h"
#include "runtime/copy_backend.h"

namespace vericache {
namespace {

using Clock = std::chrono::steady_clock;

// A link of so many bytes a second: a transfer ends no earlier than the link could have carried it. Deadlines add up,
// so the rate is right over many jobs however coarse a single sleep is.
class Throttle {
 public:
  explicit Throttle(double bytes_per_s) : bytes_per_s_(bytes_per_s) {}

  void carry(int64_t bytes, Clock::time_point begin) {
    if (bytes_per_s_ <= 0.0) return;
    const std::chrono::duration<double> needed(static_cast<double>(bytes) / bytes_per_s_);
    free_at_ = std::max(free_at_, begin) + std::chrono::duration_cast<Clock::duration>(needed);
    std::this_thread::sleep_until(free_at_);
  }

 private:
  double bytes_per_s_;
  Clock::time_point free_at_{};
};

class Worker {
 public:
  Worker(const CopyEngineOptions& options, int direction, std::function<void()> on_complete)
      : options_(options),
        random_(options.seed * kCopyDirections + static_cast<uint64_t>(direction)),
        throttle_(options.bandwidth_bytes_per_s),
        on_complete_(std::move(on_complete)),
        thread_([this] { loop(); }) {}

  ~Worker() {
    begin_stop(true);
    join();
  }

  void submit(const CopyJobPtr& job) {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(job);
    }
    work_.notify_one();
  }

  // The job that has begun runs to its end; those behind it too if `drain`, else they fail.
  void begin_stop(bool drain) {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      if (!drain) {
        for (const CopyJobPtr& job : jobs_) job->failure = "the copy engine was shut down before it ran";
      }
    }
    work_.notify_one();
  }

  void join() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  void loop() {
    while (true) {
      CopyJobPtr job;
      {
        std::unique_lock lock(mutex_);
        work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
        if (jobs_.empty()) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      run(*job);
      on_complete_();
    }
  }

  void run(CopyJob& job) {
    // Even a job that fails waits: whoever takes over its slot relies on `end` coming after `before`.
    for (const EventPtr& event : job.before) event->wait();
    std::string failure = job.failure;
    if (job.after_copy && job.after_copy->wait() == Event::State::kFailed && failure.empty()) {
      failure = "the copy it follows failed: " + job.after_copy->reason();
    }
    if (!failure.empty()) {
      job.end->set_failed(failure);
      return;
    }
    if (options_.delay_us_max > 0) {
      std::uniform_int_distribution<int64_t> delay(options_.delay_us_min, options_.delay_us_max);
      std::this_thread::sleep_for(std::chrono::microseconds(delay(random_)));
    }
    const Clock::time_point begin = Clock::now();
    int64_t bytes = 0;
    for (const CopyRow& row : job.rows) {
      std::memmove(reinterpret_cast<void*>(row.dst), reinterpret_cast<const void*>(row.src),
                   static_cast<size_t>(row.bytes));
      bytes += row.bytes;
    }
    throttle_.carry(bytes, begin);
    job.busy_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    job.end->set_done();
  }

  const CopyEngineOptions options_;
  std::mt19937_64 random_;
  Throttle throttle_;
  const std::function<void()> on_complete_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<CopyJobPtr> jobs_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

class ThreadBackend final : public CopyBackend {
 public:
  ThreadBackend(const CopyEngineOptions& options, std::function<void()> on_complete)
      : options_(options), on_complete_(std::move(on_complete)) {}

  void submit(const CopyJobPtr& job) noexcept override {
    auto& worker = workers_[static_cast<size_t>(job->direction)];
    try {
      if (!worker) worker = std::make_unique<Worker>(options_, static_cast<int>(job->direction), on_complete_);
      worker->submit(job);
    } catch (const std::exception& error) {
      job->end->set_failed(std::string("no thread to copy with: ") + error.what());
    }
  }

  void stop(bool drain) noexcept override {
    // Tell all before joining any: a job may wait for one of another direction.
    for (auto& worker : workers_) {
      if (worker) worker->begin_stop(drain);
    }
    for (auto& worker : workers_) {
      if (worker) worker->join();
    }
  }

  bool notifies() const noexcept override { return true; }

 private:
  const CopyEngineOptions options_;
  const std::function<void()> on_complete_;
  std::array<std::unique_ptr<Worker>, kCopyDirections> workers_;
};

}  // namespace

std::unique_ptr<CopyBackend> make_thread_backend(const CopyEngineOptions& options, std::function<void()> on_complete) {
  return std::make_unique<ThreadBackend>(options, std::move(on_complete));
}

}  // namespace vericache
