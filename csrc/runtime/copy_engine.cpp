// SPDX-License-Identifier: Apache-2.0
#include "runtime/copy_engine.h"

#include <chrono>
#include <thread>
#include <utility>

#include "common/error.h"
#include "common/nvtx.h"

namespace vericache {
namespace {

// How long an engine without notifications sleeps between two looks: well under the time of one 4 MiB copy.
constexpr auto kPollInterval = std::chrono::microseconds(20);

// Drops empty rows and joins each row to the one before where both sides continue it: fewer, larger copies.
std::vector<CopyRow> coalesce(std::span<const CopyRow> rows) {
  std::vector<CopyRow> joined;
  for (const CopyRow& row : rows) {
    if (row.bytes == 0) continue;
    if (!joined.empty()) {
      CopyRow& last = joined.back();
      if (last.src + last.bytes == row.src && last.dst + last.bytes == row.dst) {
        last.bytes += row.bytes;
        continue;
      }
    }
    joined.push_back(row);
  }
  return joined;
}

void check_rows(std::span<const CopyRow> rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const CopyRow& row = rows[i];
    VC_CHECK(row.bytes >= 0, "copy row ", i, " has ", row.bytes, " bytes; a size cannot be negative");
    VC_CHECK(row.bytes == 0 || (row.src != 0 && row.dst != 0), "copy row ", i, " of ", row.bytes,
             " bytes has a null address (src ", row.src, ", dst ", row.dst, ")");
  }
}

}  // namespace

const char* name_of(CopyDirection direction) {
  switch (direction) {
    case CopyDirection::kHostToDevice:
      return "h2d";
    case CopyDirection::kDeviceToHost:
      return "d2h";
    case CopyDirection::kDeviceToDevice:
      return "d2d";
  }
  throw Error(detail::concat("unknown copy direction ", static_cast<int>(direction)));
}

CopyEngine::CopyEngine(int device, const CopyEngineOptions& options) : device_(device), options_(options) {
  VC_CHECK(0 <= options.delay_us_min && options.delay_us_min <= options.delay_us_max, "the copy delay [",
           options.delay_us_min, ", ", options.delay_us_max, "] microseconds is not a range of times");
  VC_CHECK(options.bandwidth_bytes_per_s >= 0, "the copy bandwidth ", options.bandwidth_bytes_per_s,
           " bytes/s is negative; use 0 for no limit");
  if (device < 0) {
    backend_ = make_thread_backend(options, [this] {
      // Through the mutex, so that a waiter which has looked and not yet slept does not miss it.
      {
        std::lock_guard lock(mutex_);
      }
      progress_.notify_all();
    });
    return;
  }
  VC_CHECK(options.delay_us_max == 0 && options.bandwidth_bytes_per_s == 0,
           "delays and bandwidth emulation are hooks of the CPU copy engine; device ", device, " is a GPU");
  backend_ = make_cuda_backend(device);
}

CopyEngine::~CopyEngine() {
  backend_->stop(false);  // not shutdown(): a destructor must not throw
}

int64_t CopyEngine::submit(std::span<const CopyRow> rows, const CopySubmit& how) {
  NvtxRange range("vericache.copy.submit");
  check_rows(rows);
  auto job = std::make_shared<CopyJob>();
  job->direction = how.direction;
  job->rows = coalesce(rows);
  job->has_after_stream = how.has_after_stream;
  job->after_stream = how.after_stream;
  InFlight entry{.sequence = 0, .bytes = 0, .rows = 0, .job = job};
  for (const CopyRow& row : rows) {
    entry.bytes += row.bytes;
    entry.rows += row.bytes > 0;
  }
  const bool timing = options_.timing && device_ >= 0;
  if (timing) job->begin = std::make_shared<Event>(device_, true);

  // Held to the end: the order in the queue and in the backend must be the same.
  std::lock_guard lock(mutex_);
  VC_CHECK(!shut_down_, "the copy engine is shut down and takes no further copies");
  if (how.after >= 0) {
    int64_t sequence = 0;
    Queue& other = queue_of(how.after, &sequence);
    job->after_copy = pending_event(how.after);
    const auto failure = other.failures.find(sequence);
    if (failure != other.failures.end()) job->failure = "the copy it follows failed: " + failure->second;
  }
  if (how.ring != nullptr) {
    VC_CHECK(how.ring->device() == device_, "the staging ring is on device ", how.ring->device(),
             " and the copy engine on device ", device_);
    const int64_t begin = how.ring->address(how.slot);
    const int64_t end = begin + how.ring->bytes(how.slot);
    for (const CopyRow& row : job->rows) {
      VC_CHECK(row.dst >= begin && row.dst <= end - row.bytes, "a copy of ", row.bytes, " bytes to ", row.dst,
               " leaves staging slot ", how.slot, " at [", begin, ", ", end, ")");
    }
    StagingRing::CopyOrder order = how.ring->begin_copy(how.slot, timing);
    job->before = std::move(order.before);
    job->end = std::move(order.ready);
  } else {
    job->end = std::make_shared<Event>(device_, timing);
  }
  if (job->failure.empty()) job->failure = injected_failure();
  ++submitted_;

  Queue& queue = queues_[static_cast<size_t>(how.direction)];
  entry.sequence = queue.next_sequence++;
  const int64_t ticket = entry.sequence * kCopyDirections + static_cast<int64_t>(how.direction);
  queue.counters.in_flight_jobs += 1;
  queue.counters.in_flight_bytes += entry.bytes;
  queue.jobs.push_back(std::move(entry));
  backend_->submit(job);
  return ticket;
}

std::string CopyEngine::injected_failure() {
  if (options_.fail_after < 0 || submitted_ != options_.fail_after) return "";
  return detail::concat("failure injected after ", options_.fail_after, " copies");
}

void CopyEngine::settle() {
  for (Queue& queue : queues_) {
    while (!queue.jobs.empty()) {
      InFlight& front = queue.jobs.front();
      const Event::State state = front.job->end->poll();
      if (state == Event::State::kPending) break;
      CopyCounters& c = queue.counters;
      c.in_flight_jobs -= 1;
      c.in_flight_bytes -= front.bytes;
      if (state == Event::State::kFailed) {
        c.failed += 1;
        queue.failures.emplace(front.sequence, front.job->end->reason());
      } else {
        c.jobs += 1;
        c.bytes += front.bytes;
        c.rows += front.rows;
        c.copies += static_cast<int64_t>(front.job->rows.size());
        c.busy_seconds += front.job->busy_seconds;
        if (front.job->begin) c.busy_seconds += front.job->end->elapsed_ms(*front.job->begin) / 1e3;
      }
      queue.completed = front.sequence + 1;
      queue.jobs.pop_front();
    }
  }
}

CopyEngine::Queue& CopyEngine::queue_of(int64_t ticket, int64_t* sequence) {
  VC_CHECK(ticket >= 0, "copy ticket ", ticket, " was never given out");
  Queue& queue = queues_[static_cast<size_t>(ticket % kCopyDirections)];
  *sequence = ticket / kCopyDirections;
  VC_CHECK(*sequence < queue.next_sequence, "copy ticket ", ticket, " was never given out");
  return queue;
}

bool CopyEngine::through(int64_t ticket) {
  int64_t sequence = 0;
  const Queue& queue = queue_of(ticket, &sequence);
  if (sequence >= queue.completed) return false;
  const auto failure = queue.failures.find(sequence);
  VC_CHECK(failure == queue.failures.end(), name_of(static_cast<CopyDirection>(ticket % kCopyDirections)),
           " copy failed (ticket ", ticket, "): ", failure->second);
  return true;
}

EventPtr CopyEngine::pending_event(int64_t ticket) {
  int64_t sequence = 0;
  const Queue& queue = queue_of(ticket, &sequence);
  if (sequence < queue.completed) return nullptr;
  return queue.jobs[static_cast<size_t>(sequence - queue.jobs.front().sequence)].job->end;
}

bool CopyEngine::ready(int64_t ticket) {
  std::lock_guard lock(mutex_);
  settle();
  return through(ticket);
}

void CopyEngine::wait(int64_t ticket) {
  EventPtr event;
  {
    std::lock_guard lock(mutex_);
    settle();
    event = pending_event(ticket);
  }
  if (event) event->wait();  // outside the lock: others go on submitting
  std::lock_guard lock(mutex_);
  // Jobs of a direction complete in order, so the earlier ones are through as well.
  settle();
  through(ticket);
}

void CopyEngine::wait_on_stream(int64_t ticket, int64_t stream) {
  EventPtr event;
  {
    std::lock_guard lock(mutex_);
    settle();
    event = pending_event(ticket);
    if (!event) {
      through(ticket);
      return;
    }
  }
  event->block_stream(stream);  // the copy's writes before the stream's next reads
}

int64_t CopyEngine::total_completed() const {
  int64_t total = 0;
  for (const Queue& queue : queues_) total += queue.completed;
  return total;
}

bool CopyEngine::idle() const {
  for (const Queue& queue : queues_) {
    if (!queue.jobs.empty()) return false;
  }
  return true;
}

int64_t CopyEngine::completed() {
  std::lock_guard lock(mutex_);
  settle();
  return total_completed();
}

int64_t CopyEngine::wait_until(int64_t count, double seconds) {
  using Clock = std::chrono::steady_clock;
  const bool limited = seconds >= 0;
  const auto deadline =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(limited ? seconds : 0));
  std::unique_lock lock(mutex_);
  while (true) {
    settle();
    if (total_completed() >= count || idle() || (limited && Clock::now() >= deadline)) return total_completed();
    if (!backend_->notifies()) {
      lock.unlock();
      std::this_thread::sleep_for(kPollInterval);
      lock.lock();
    } else if (limited) {
      progress_.wait_until(lock, deadline);
    } else {
      progress_.wait(lock);
    }
  }
}

CopyCounters CopyEngine::counters(CopyDirection direction) {
  std::lock_guard lock(mutex_);
  settle();
  return queues_[static_cast<size_t>(direction)].counters;
}

void CopyEngine::shutdown(bool drain) {
  {
    std::lock_guard lock(mutex_);
    if (shut_down_) return;
    shut_down_ = true;  // no submit can reach the backend from here on
  }
  backend_->stop(drain);
  std::lock_guard lock(mutex_);
  settle();
  progress_.notify_all();
}

}  // namespace vericache
