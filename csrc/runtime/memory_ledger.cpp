// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory_ledger.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "common/error.h"

namespace vericache {

std::string format_bytes(int64_t bytes) {
  if (bytes < 1024) return detail::concat(bytes, " B");
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  // 1023.95 and not 1024: what would be printed as "1024.0 KiB" is "1.0 MiB".
  while (value >= 1023.95 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %s", value, kUnits[unit]);
  return text;
}

MemoryLedger::MemoryLedger(int64_t budget) : budget_(budget) {
  VC_CHECK(budget > 0, "a memory budget must be positive, not ", budget, " bytes");
}

bool MemoryLedger::try_reserve(int64_t owner, const std::string& kind, int64_t bytes) {
  VC_CHECK(bytes >= 0, "cannot reserve ", bytes, " bytes of ", kind, "; a size cannot be negative");
  std::lock_guard lock(mutex_);
  if (bytes > budget_ - used_) return false;
  if (std::find(kinds_.begin(), kinds_.end(), kind) == kinds_.end()) kinds_.push_back(kind);
  if (bytes == 0) return true;
  held_[{owner, kind}] += bytes;
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  return true;
}

bool MemoryLedger::try_resize(int64_t owner, const std::string& kind, int64_t bytes) {
  VC_CHECK(bytes >= 0, "cannot hold ", bytes, " bytes of ", kind, "; a size cannot be negative");
  std::lock_guard lock(mutex_);
  const auto it = held_.find({owner, kind});
  const int64_t now = it == held_.end() ? 0 : it->second;
  if (bytes > now && bytes - now > budget_ - used_) return false;
  if (std::find(kinds_.begin(), kinds_.end(), kind) == kinds_.end()) kinds_.push_back(kind);
  used_ += bytes - now;
  peak_ = std::max(peak_, used_);
  if (bytes == 0) {
    held_.erase({owner, kind});
  } else {
    held_[{owner, kind}] = bytes;
  }
  return true;
}

int64_t MemoryLedger::release(int64_t owner) {
  std::lock_guard lock(mutex_);
  int64_t given_back = 0;
  auto it = held_.lower_bound({owner, ""});
  while (it != held_.end() && it->first.first == owner) {
    given_back += it->second;
    it = held_.erase(it);
  }
  used_ -= given_back;
  return given_back;
}

int64_t MemoryLedger::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

int64_t MemoryLedger::free() const {
  std::lock_guard lock(mutex_);
  return budget_ - used_;
}

int64_t MemoryLedger::peak() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

int64_t MemoryLedger::held(int64_t owner) const {
  std::lock_guard lock(mutex_);
  int64_t bytes = 0;
  for (auto it = held_.lower_bound({owner, ""}); it != held_.end() && it->first.first == owner; ++it) {
    bytes += it->second;
  }
  return bytes;
}

std::map<std::string, int64_t> MemoryLedger::used_by_kind() const {
  std::lock_guard lock(mutex_);
  std::map<std::string, int64_t> by_kind;
  for (const auto& [key, bytes] : held_) by_kind[key.second] += bytes;
  return by_kind;
}

int64_t MemoryLedger::total(bool permanent_only) const {
  int64_t bytes = 0;
  for (const auto& [key, held] : held_) {
    if (!permanent_only || key.first < 0) bytes += held;
  }
  return bytes;
}

bool MemoryLedger::would_ever_fit(int64_t bytes) const {
  std::lock_guard lock(mutex_);
  return bytes <= budget_ - total(true);
}

std::string MemoryLedger::describe(const std::string& kind, int64_t bytes, bool permanent_only) const {
  std::lock_guard lock(mutex_);
  std::string text;
  const auto add = [&text](const std::string& name, int64_t amount) {
    text += detail::concat(text.empty() ? "" : " + ", name, " ", format_bytes(amount));
  };
  for (const std::string& name : kinds_) {
    int64_t sum = 0;
    for (const auto& [key, held] : held_) {
      if (key.second == name && (!permanent_only || key.first < 0)) sum += held;
    }
    if (sum > 0) add(name, sum);
  }
  if (bytes > 0) add(kind, bytes);
  if (text.empty()) text = "nothing";
  const int64_t sum = total(permanent_only) + bytes;
  text += detail::concat(" = ", format_bytes(sum), " of ", format_bytes(budget_));
  // Rounded, the two sides of a near miss look alike.
  if (sum > budget_) text += detail::concat(", ", format_bytes(sum - budget_), " too many");
  return text;
}

}  // namespace vericache
