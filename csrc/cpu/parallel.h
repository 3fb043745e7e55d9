// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' thread pool. Work is cut statically into at most num_threads() runs of whole items, and no kernel
// reduces across items that the cut could separate, so results never depend on the thread count.
//
// Threads of our own and not OpenMP: torch brings its own OpenMP runtime, and a second one in the process would
// oversubscribe the cores. Held by tests/ops/test_parallel.py.
#pragma once

#include <cstdint>
#include <functional>

namespace vericache::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, items), one range a thread, each of at least `grain` items.
// Returns when all are done; the first exception thrown by a body is rethrown here. Safe from any thread: a call from
// inside a body, or while another thread's call is running, does its work alone on the calling thread.
void parallel_for(int64_t items, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

// Threads in use, the caller's included. Starts as the hardware's.
int num_threads();

// Throws if threads < 1. Waits for a running parallel_for.
void set_num_threads(int threads);

}  // namespace vericache::cpu
