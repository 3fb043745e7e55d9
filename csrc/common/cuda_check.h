// SPDX-License-Identifier: Apache-2.0
// VC_CUDA_CHECK(call): throws vericache::Error with CUDA's text, the call, file and line. CUDA's last-error slot is
// cleared first: whoever catches the exception must not find this error again at the next, innocent check.
#pragma once

#include <cuda_runtime_api.h>

#include "common/error.h"

#define VC_CUDA_CHECK(call)                                                                                      \
  do {                                                                                                           \
    if (const cudaError_t vc_status = (call); vc_status != cudaSuccess) [[unlikely]] {                           \
      (void)cudaGetLastError();                                                                                  \
      throw ::vericache::Error(::vericache::detail::concat("CUDA failed: ", cudaGetErrorString(vc_status), " (", \
                                                           cudaGetErrorName(vc_status), ") in ", #call, " at ",  \
                                                           __FILE__, ":", __LINE__, "."));                       \
    }                                                                                                            \
  } while (0)
