// SPDX-License-Identifier: Apache-2.0
// Named ranges for NVIDIA's profilers. Without CUDA, or without the NVTX headers, they cost nothing.
#pragma once

#ifdef VERICACHE_WITH_NVTX  // the build found the headers
#include <nvtx3/nvToolsExt.h>
#endif

namespace vericache {

inline void nvtx_push([[maybe_unused]] const char* name) {
#ifdef VERICACHE_WITH_NVTX
  nvtxRangePushA(name);
#endif
}

inline void nvtx_pop() {
#ifdef VERICACHE_WITH_NVTX
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
