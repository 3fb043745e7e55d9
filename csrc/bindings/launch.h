// SPDX-License-Identifier: Apache-2.0
// Running a CUDA launcher on torch's current stream, with its workspace from torch's allocator.
#pragma once

#ifdef VERICACHE_WITH_CUDA

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launchers.h"

namespace vericache::bindings {

template <class Params>
void launch_cuda(const at::Tensor& lead, const Params& p, void (*launcher)(const Params&, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(lead.device());
  launcher(p, c10::cuda::getCurrentCUDAStream().stream());
}

template <class Params>
void launch_cuda(const at::Tensor& lead, Params& p, void (*launcher)(const Params&, cudaStream_t),
                 size_t (*workspace_bytes)(const Params&)) {
  const c10::cuda::CUDAGuard guard(lead.device());
  // Freed on return: the allocator reuses it only for work queued after this launch on the same stream.
  const at::Tensor workspace = at::empty({int64_t(workspace_bytes(p))}, lead.options().dtype(at::kByte));
  p.workspace = workspace.data_ptr();
  launcher(p, c10::cuda::getCurrentCUDAStream().stream());
}

}  // namespace vericache::bindings

#endif  // VERICACHE_WITH_CUDA
