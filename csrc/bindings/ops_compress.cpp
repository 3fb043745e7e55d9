// SPDX-License-Identifier: Apache-2.0
// torch.ops.vericache.window_scores: what a compressor asks of a prompt.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "cpu/attention_tiles.h"
#include "cpu/window_scores.h"

namespace vericache::bindings {
namespace {

at::Tensor window_scores(const at::Tensor& queries, const at::Tensor& k) {
  const DType dtype = storage_dtype(k, "k");
  check_shape(k, {-1, -1, -1}, "k");
  check_last_axis_contiguous(k, "k");
  const int64_t kv_heads = k.size(0), tokens = k.size(1), head_dim = k.size(2);
  check_dtype(queries, k.scalar_type(), "queries");
  check_shape(queries, {-1, -1, head_dim}, "queries");
  check_same_device(queries, k, "queries", "k");
  check_last_axis_contiguous(queries, "queries");
  const int64_t window = queries.size(0), q_heads = queries.size(1);
  VC_CHECK(kv_heads > 0 && q_heads > 0 && q_heads % kv_heads == 0, "queries has ", q_heads, " heads and k ", kv_heads,
           "; the heads of queries must be a multiple of k's.");
  VC_CHECK(head_dim > 0 && head_dim <= cpu::kMaxHeadDim, "head_dim is ", head_dim, "; it must be from 1 to ",
           cpu::kMaxHeadDim, ".");
  VC_CHECK(window > 0 && window <= tokens, "queries has ", window, " rows and k ", tokens,
           " tokens; a window holds at least one query and at most one a token: pass the last rows alone.");

  const at::Tensor out = at::empty({q_heads, tokens}, k.options().dtype(at::kFloat));
  WindowScoresParams p{};
  p.queries = queries.const_data_ptr();
  p.k = k.const_data_ptr();
  p.out = out.data_ptr<float>();
  p.q_stride_row = queries.stride(0);
  p.q_stride_head = queries.stride(1);
  p.k_stride_head = k.stride(0);
  p.k_stride_token = k.stride(1);
  p.window = extent(window, "the number of rows of queries");
  p.tokens = extent(tokens, "the number of tokens of k");
  p.q_heads = extent(q_heads, "the number of heads of queries");
  p.kv_heads = extent(kv_heads, "the number of heads of k");
  p.head_dim = int32_t(head_dim);
  p.scale = float(1.0 / std::sqrt(double(head_dim)));
  p.dtype = dtype;
#ifdef VERICACHE_WITH_CUDA
  if (k.is_cuda()) {
    launch_cuda(k, p, cuda::window_scores, cuda::window_scores_workspace_bytes);
    return out;
  }
#endif
  cpu::window_scores(p);
  return out;
}

TORCH_LIBRARY_FRAGMENT(vericache, m) { m.def("window_scores(Tensor queries, Tensor k) -> Tensor"); }

TORCH_LIBRARY_IMPL(vericache, CPU, m) { m.impl("window_scores", &window_scores); }
#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) { m.impl("window_scores", &window_scores); }
#endif

}  // namespace
}  // namespace vericache::bindings
