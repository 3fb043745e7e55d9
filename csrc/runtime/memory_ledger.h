// SPDX-License-Identifier: Apache-2.0
// Who holds how much of a memory budget, and for what. It counts; it allocates nothing. Thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace vericache {

class MemoryLedger {
 public:
  // The owner of what never leaves: weights, staging. Any negative owner counts as permanent.
  static constexpr int64_t kPermanent = -1;

  explicit MemoryLedger(int64_t budget);

  // Adds `bytes` to what `owner` holds as `kind`; false, changing nothing, if the budget does not allow it.
  bool try_reserve(int64_t owner, const std::string& kind, int64_t bytes);
  // Makes what `owner` holds as `kind` exactly `bytes` (0: nothing). False, changing nothing, if it would have to grow
  // beyond the budget; shrinking always succeeds.
  bool try_resize(int64_t owner, const std::string& kind, int64_t bytes);
  // Gives back all that `owner` holds. Returns the bytes, 0 for an unknown owner.
  int64_t release(int64_t owner);

  int64_t budget() const { return budget_; }
  int64_t used() const;
  int64_t free() const;
  int64_t peak() const;
  int64_t held(int64_t owner) const;
  std::map<std::string, int64_t> used_by_kind() const;
  // Whether `bytes` would fit beside what is permanent, once everything else has left.
  bool would_ever_fit(int64_t bytes) const;

  // The arithmetic, kinds in the order in which they first came: "weights 23.1 MiB + staging 8.0 MiB = 31.1 MiB of
  // 64.0 MiB". With kind and bytes, that further need is the last term, and ", 3.0 MiB too many" follows if it does not
  // fit. permanent_only leaves out what will leave (the sentence for a refusal).
  std::string describe(const std::string& kind = "", int64_t bytes = 0, bool permanent_only = false) const;

 private:
  int64_t total(bool permanent_only) const;

  const int64_t budget_;
  mutable std::mutex mutex_;
  std::map<std::pair<int64_t, std::string>, int64_t> held_;  // by owner and kind; no zero entries
  std::vector<std::string> kinds_;                           // in the order in which they first came
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

// "23.1 MiB"; bytes below 1 KiB as "512 B".
std::string format_bytes(int64_t bytes);

}  // namespace vericache
