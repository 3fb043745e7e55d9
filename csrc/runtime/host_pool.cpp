// SPDX-License-Identifier: Apache-2.0
#include "runtime/host_pool.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "common/error.h"

namespace vericache {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + kHostPageBytes - 1) / kHostPageBytes * kHostPageBytes; }
int64_t round_down(int64_t bytes) { return bytes / kHostPageBytes * kHostPageBytes; }

}  // namespace

HostPool::HostPool(int64_t capacity, int64_t block_bytes, int device)
    : capacity_(round_down(capacity == 0 ? default_host_capacity() : capacity)),
      block_bytes_(round_up(block_bytes)),
      device_(device) {
  VC_CHECK(capacity_ > 0, "a host pool's capacity must be at least ", kHostPageBytes, " bytes (or 0 for the default), ",
           "not ", capacity);
#ifndef VERICACHE_WITH_CUDA
  VC_CHECK(device < 0, "device ", device, " needs a build with CUDA; this one has the CPU only (use device=-1)");
#endif
  VC_CHECK(block_bytes > 0, "a host pool's block size must be positive, not ", block_bytes);
}

int64_t HostPool::allocate(int64_t bytes) {
  VC_CHECK(bytes > 0, "a host allocation must be of at least one byte, not ", bytes);
  // Before rounding up, which could overflow.
  if (bytes > capacity_) {
    throw CapacityError(detail::concat("a host allocation of ", bytes, " bytes can never fit the host capacity of ",
                                       capacity_, " bytes; raise the capacity or shorten the context"));
  }
  const int64_t rounded = round_up(bytes);
  {
    std::lock_guard lock(mutex_);
    if (const int64_t address = take(rounded)) return address;
  }
  std::lock_guard growing(grow_mutex_);
  while (true) {
    {
      // Another thread may have grown the pool, or freed, while this one waited; and after growing, others may
      // have taken the new block.
      std::lock_guard lock(mutex_);
      if (const int64_t address = take(rounded)) return address;
    }
    grow(rounded);
  }
}

void HostPool::reserve(int64_t bytes) {
  VC_CHECK(bytes > 0, "a host reservation must be of at least one byte, not ", bytes);
  if (bytes > capacity_) {
    throw CapacityError(detail::concat("a host reservation of ", bytes, " bytes can never fit the host capacity of ",
                                       capacity_, " bytes; raise the capacity"));
  }
  std::lock_guard growing(grow_mutex_);
  {
    std::lock_guard lock(mutex_);
    if (largest_free() >= round_up(bytes)) return;
  }
  grow(round_up(bytes));
}

void HostPool::grow(int64_t bytes) {
  int64_t block_bytes = 0;
  {
    std::lock_guard lock(mutex_);
    block_bytes = plan_growth(bytes);
  }
  try {
    HostBlock block(block_bytes, device_);  // slow when pinned
    std::lock_guard lock(mutex_);
    const int64_t address = block.address();
    blocks_.emplace(address, std::move(block));
    add_free(address, Extent{block_bytes, address});
  } catch (...) {
    std::lock_guard lock(mutex_);
    bytes_reserved_ -= block_bytes;
    throw;
  }
}

int64_t HostPool::plan_growth(int64_t bytes) {
  if (capacity_ - bytes_reserved_ < bytes) trim_locked();
  const int64_t room = capacity_ - bytes_reserved_;
  if (room < bytes) {
    throw CapacityError(detail::concat("a host allocation of ", bytes, " bytes does not fit: ", bytes_in_use_,
                                       " bytes are in use, ", bytes_reserved_, " of the capacity of ", capacity_,
                                       " are taken, the largest free extent is ", largest_free(),
                                       "; wait for a request to finish or raise the host capacity"));
  }
  const int64_t block_bytes = std::max(bytes, std::min(block_bytes_, room));
  bytes_reserved_ += block_bytes;
  return block_bytes;
}

int64_t HostPool::take(int64_t bytes) {
  const auto fit = free_sizes_.lower_bound({bytes, 0});
  if (fit == free_sizes_.end()) return 0;
  const auto it = free_.find(fit->second);
  const int64_t address = it->first;
  const Extent extent = it->second;
  remove_free(it);
  if (extent.bytes > bytes) add_free(address + bytes, Extent{extent.bytes - bytes, extent.block});
  live_.emplace(address, Extent{bytes, extent.block});
  bytes_in_use_ += bytes;
  peak_in_use_ = std::max(peak_in_use_, bytes_in_use_);
  return address;
}

void HostPool::free(int64_t address) {
  std::lock_guard lock(mutex_);
  const auto it = live_.find(address);
  VC_CHECK(it != live_.end(), "cannot free host address ", address, ": no live allocation starts there");
  const Extent extent = it->second;
  live_.erase(it);
  bytes_in_use_ -= extent.bytes;
  add_free(address, extent);
}

int64_t HostPool::allocated_bytes(int64_t address) const {
  std::lock_guard lock(mutex_);
  const auto it = live_.find(address);
  VC_CHECK(it != live_.end(), "no live host allocation starts at address ", address);
  return it->second.bytes;
}

void HostPool::add_free(int64_t address, Extent extent) {
  auto next = free_.lower_bound(address);
  if (next != free_.end() && next->second.block == extent.block && address + extent.bytes == next->first) {
    extent.bytes += next->second.bytes;
    next = remove_free(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->second.block == extent.block && previous->first + previous->second.bytes == address) {
      address = previous->first;
      extent.bytes += previous->second.bytes;
      remove_free(previous);
    }
  }
  free_.emplace(address, extent);
  free_sizes_.emplace(extent.bytes, address);
}

std::map<int64_t, HostPool::Extent>::iterator HostPool::remove_free(std::map<int64_t, Extent>::iterator it) {
  free_sizes_.erase({it->second.bytes, it->first});
  return free_.erase(it);
}

int64_t HostPool::largest_free() const { return free_sizes_.empty() ? 0 : free_sizes_.rbegin()->first; }

int64_t HostPool::trim() {
  std::lock_guard growing(grow_mutex_);
  std::lock_guard lock(mutex_);
  return trim_locked();
}

int64_t HostPool::trim_locked() {
  std::vector<int64_t> empty;
  for (const auto& [address, block] : blocks_) {
    const auto it = free_.find(address);
    if (it != free_.end() && it->second.bytes == block.bytes()) empty.push_back(address);
  }
  int64_t given_back = 0;
  for (const int64_t address : empty) {
    remove_free(free_.find(address));
    given_back += blocks_.at(address).bytes();
    blocks_.erase(address);
  }
  bytes_reserved_ -= given_back;
  return given_back;
}

HostPoolStats HostPool::stats() const {
  std::lock_guard lock(mutex_);
  return HostPoolStats{
      .capacity = capacity_,
      .bytes_reserved = bytes_reserved_,
      .bytes_in_use = bytes_in_use_,
      .peak_in_use = peak_in_use_,
      .largest_free = largest_free(),
      .blocks = static_cast<int64_t>(blocks_.size()),
      .allocations = static_cast<int64_t>(live_.size()),
      .pinned = device_ >= 0,
  };
}

}  // namespace vericache
