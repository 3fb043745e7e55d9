// SPDX-License-Identifier: Apache-2.0
// One piece of page-aligned, optionally pinned host memory, and how much of it this process may take.
#pragma once

#include <cstdint>
#include <string>

namespace vericache {

inline constexpr int64_t kHostPageBytes = 4096;

// Owns its memory. Pinned: registered with CUDA as portable and mapped, so that copies run at link
// speed and kernels may read it. Pinning that fails is an error, not a slower block: overlap must not silently stop
// being true.
class HostBlock {
 public:
  // bytes: a multiple of kHostPageBytes. device: CUDA ordinal to pin for, -1: none. Throws CapacityError if the system
  // gives no memory, Error if pinning fails.
  HostBlock(int64_t bytes, int device);
  ~HostBlock();
  HostBlock(HostBlock&& other) noexcept;
  HostBlock& operator=(HostBlock&& other) noexcept;
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;

  int64_t address() const { return address_; }
  int64_t bytes() const { return bytes_; }
  bool pinned() const { return pinned_; }

 private:
  void release() noexcept;

  int64_t address_ = 0;
  int64_t bytes_ = 0;
  bool pinned_ = false;
};

// 0.8 of the tightest of: the cgroup's memory limit (v2 and v1, every level up to the root), and the memory that the
// kernel calls available. `root` is prepended to /proc and /sys, for tests. Returns bytes, a multiple of the page.
int64_t default_host_capacity(const std::string& root = "");

}  // namespace vericache
