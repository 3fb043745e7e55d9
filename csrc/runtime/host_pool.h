// SPDX-License-Identifier: Apache-2.0
// The host store's memory: contiguous extents out of blocks that are taken from the system one at a time.
//
// Pinning costs about half a second a GiB, so nothing is taken at start-up: a block is mapped (and pinned) when an
// allocation does not fit what is there, outside the lock that frees and other allocations need. reserve() does it
// ahead of time, from a background thread if the caller likes. Placement is best fit; a freed extent merges with its
// free neighbours in the same block. Thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "runtime/host_block.h"

namespace vericache {

struct HostPoolStats {
  int64_t capacity;        // bytes the pool may take from the system
  int64_t bytes_reserved;  // taken from the system
  int64_t bytes_in_use;    // allocated, rounded up to pages
  int64_t peak_in_use;
  int64_t largest_free;  // the largest allocation that needs no new block
  int64_t blocks;
  int64_t allocations;  // live ones
  bool pinned;
};

class HostPool {
 public:
  // capacity: bytes; 0 means default_host_capacity(). block_bytes: what one growth step takes, in bytes.
  // device: CUDA ordinal whose copies it serves, so that blocks are pinned; -1: none are.
  explicit HostPool(int64_t capacity = 0, int64_t block_bytes = int64_t{64} << 20, int device = -1);
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  // The address of `bytes` contiguous bytes, aligned to kHostPageBytes; their contents are arbitrary.
  // Throws CapacityError with the arithmetic if the capacity does not allow it.
  int64_t allocate(int64_t bytes);
  // Throws Error if `address` is not a live allocation's.
  void free(int64_t address);
  // The bytes (rounded up to pages) of the live allocation at `address`. Throws Error if there is none.
  int64_t allocated_bytes(int64_t address) const;
  // Grows until an allocation of `bytes` fits without growing.
  void reserve(int64_t bytes);
  // Gives blocks that hold no allocation back to the system. Returns the bytes given back.
  int64_t trim();
  HostPoolStats stats() const;

 private:
  struct Extent {
    int64_t bytes;
    int64_t block;  // address of the block: extents of different blocks never merge, even if adjacent
  };

  // All of these with mutex_ held.
  int64_t take(int64_t bytes);  // 0 if nothing fits
  void add_free(int64_t address, Extent extent);
  std::map<int64_t, Extent>::iterator remove_free(std::map<int64_t, Extent>::iterator it);
  int64_t largest_free() const;
  int64_t trim_locked();
  int64_t plan_growth(int64_t bytes);  // size of the next block; counts it as reserved

  void grow(int64_t bytes);  // mutex_ not held, grow_mutex_ held

  const int64_t capacity_;
  const int64_t block_bytes_;
  const int device_;

  std::mutex grow_mutex_;  // one growth at a time; taken before mutex_, and never the other way round
  mutable std::mutex mutex_;
  std::map<int64_t, HostBlock> blocks_;               // by address
  std::map<int64_t, Extent> free_;                    // by address, for merging
  std::set<std::pair<int64_t, int64_t>> free_sizes_;  // (bytes, address), for best fit
  std::map<int64_t, Extent> live_;
  int64_t bytes_reserved_ = 0;
  int64_t bytes_in_use_ = 0;
  int64_t peak_in_use_ = 0;
};

}  // namespace vericache
