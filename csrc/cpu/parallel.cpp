// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "common/error.h"

namespace vericache::cpu {
namespace {

// Workers and the caller spin this many pauses before they sleep: decode issues ops microseconds apart.
constexpr int kSpins = 2000;

thread_local bool inside_body = false;

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    workers_.reserve(size_t(threads - 1));
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  void run(int64_t items, int parts, const std::function<void(int64_t, int64_t)>& body) {
    {
      std::lock_guard lock(mutex_);
      items_ = items;
      parts_ = parts;
      body_ = &body;
      error_ = nullptr;
      pending_.store(threads_ - 1, std::memory_order_relaxed);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run_part(0);
    for (int spin = 0; spin < kSpins && pending_.load(std::memory_order_acquire) != 0; ++spin) cpu_pause();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_.load(std::memory_order_acquire) == 0; });
    body_ = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void run_part(int part) {
    if (part >= parts_) return;
    const int64_t begin = items_ * part / parts_, end = items_ * (part + 1) / parts_;
    inside_body = true;
    try {
      (*body_)(begin, end);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_body = false;
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) cpu_pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      run_part(index);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard lock(mutex_);  // the caller is either before its wait's check or in the wait: no lost wake-up
        done_.notify_one();
      }
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> pending_{0};
  bool stop_ = false;
  int64_t items_ = 0;
  int parts_ = 0;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  std::exception_ptr error_;
};

// One caller at a time owns the pool.
struct Shared {
  std::mutex owner;
  int threads = std::max(1, int(std::thread::hardware_concurrency()));
  std::unique_ptr<Pool> pool;
};

// Never destroyed: joining threads from a static destructor of a module that is being unloaded can hang.
Shared* shared = new Shared;

// After fork() the child has the pool's memory and none of its threads.
void abandon_pool() {
  const int threads = shared->threads;
  shared = new Shared;
  shared->threads = threads;
}

const int fork_guard = pthread_atfork(nullptr, nullptr, abandon_pool);

}  // namespace

void parallel_for(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (items <= 0) return;
  const int64_t most = std::max<int64_t>(1, items / std::max<int64_t>(1, grain));
  if (most == 1 || inside_body) return body(0, items);
  std::unique_lock owner(shared->owner, std::try_to_lock);
  if (!owner.owns_lock() || shared->threads == 1) {
    if (owner.owns_lock()) owner.unlock();
    return body(0, items);
  }
  if (!shared->pool) shared->pool = std::make_unique<Pool>(shared->threads);
  shared->pool->run(items, int(std::min<int64_t>(most, shared->threads)), body);
}

int num_threads() {
  std::lock_guard owner(shared->owner);
  return shared->threads;
}

void set_num_threads(int threads) {
  VC_CHECK(threads >= 1, "threads is ", threads, "; it must be at least 1.");
  std::lock_guard owner(shared->owner);
  if (threads == shared->threads) return;
  shared->pool.reset();
  shared->threads = threads;
}

}  // namespace vericache::cpu
