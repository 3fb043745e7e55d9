// SPDX-License-Identifier: Apache-2.0
// Named ranges for NVIDIA's profilers. Without CUDA, or without the NVTX headers, they cost nothing.
#pragma once

#if defined(VERICACHE_WITH_CUDA) && __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define VERICACHE_HAS_NVTX 1
#else
#define VERICACHE_HAS_NVTX 0
#endif

namespace vericache {

inline void nvtx_push([[maybe_unused]] const char* name) {
#if VERICACHE_HAS_NVTX
  nvtxRangePushA(name);
#endif
}

inline void nvtx_pop() {
#if VERICACHE_HAS_NVTX
  nvtxRangePop();
#endif
}

// A range that ends with its scope, so that an exception cannot leave it open.
class NvtxRange {
 public:
  explicit NvtxRange(const char* name) { nvtx_push(name); }
  ~NvtxRange() { nvtx_pop(); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

}  // namespace vericache
