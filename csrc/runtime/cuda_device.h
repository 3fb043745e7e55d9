// SPDX-License-Identifier: Apache-2.0
// What the CUDA branches of the runtime share: the current device as a scope, stream handles.
// Included by .cpp files only, inside VERICACHE_WITH_CUDA.
#pragma once

#include <cstdint>

#include "common/cuda_check.h"

namespace vericache {

// Events and streams belong to a device; a caller's thread may have another one current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    VC_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) {
      VC_CUDA_CHECK(cudaSetDevice(device));
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t as_stream(int64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

}  // namespace vericache
