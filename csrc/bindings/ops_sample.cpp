// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "cpu/sampler.h"

namespace vericache::bindings {
namespace {

// Values, not shapes: where the parameters lie in host memory.
void check_values(const SampleParams& p) {
  for (int32_t row = 0; row < p.rows; ++row) {
    VC_CHECK(p.temperature[row] >= 0.0f && std::isfinite(p.temperature[row]), "temperature[", row, "] is ",
             p.temperature[row], "; it must be finite and not negative.");
    VC_CHECK(p.top_k[row] >= 0, "top_k[", row, "] is ", p.top_k[row], "; it must be positive, or 0 for off.");
    VC_CHECK(p.top_p[row] > 0.0f && p.top_p[row] <= 1.0f, "top_p[", row, "] is ", p.top_p[row],
             "; it must be above 0 and at most 1.");
    VC_CHECK(p.min_p[row] >= 0.0f && p.min_p[row] <= 1.0f, "min_p[", row, "] is ", p.min_p[row],
             "; it must be from 0 to 1.");
    VC_CHECK(p.row_position[row] >= 0, "row_position[", row, "] is ", p.row_position[row],
             "; it must not be negative.");
  }
}

std::tuple<at::Tensor, at::Tensor> sample(const at::Tensor& logits, const at::Tensor& temperature,
                                          const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p,
                                          const at::Tensor& seed, const at::Tensor& row_position) {
  check_dtype(logits, at::kFloat, "logits");
  check_shape(logits, {-1, -1}, "logits");
  check_last_axis_contiguous(logits, "logits");
  const int64_t rows = logits.size(0);
  VC_CHECK(logits.size(1) > 0, "logits has shape ", shape_text(logits.sizes()), "; the vocabulary must not be empty.");
  check_tensor(temperature, at::kFloat, {rows}, logits, "temperature", "logits");
  check_tensor(top_k, at::kInt, {rows}, logits, "top_k", "logits");
  check_tensor(top_p, at::kFloat, {rows}, logits, "top_p", "logits");
  check_tensor(min_p, at::kFloat, {rows}, logits, "min_p", "logits");
  check_tensor(seed, at::kLong, {rows}, logits, "seed", "logits");
  check_tensor(row_position, at::kInt, {rows}, logits, "row_position", "logits");

  const at::Tensor token = at::empty({rows}, logits.options().dtype(at::kLong));
  const at::Tensor logprob = at::empty({rows}, logits.options());
  if (rows == 0) return {token, logprob};
  SampleParams p{};
  p.logits = logits.const_data_ptr<float>();
  p.temperature = temperature.const_data_ptr<float>();
  p.top_k = top_k.const_data_ptr<int32_t>();
  p.top_p = top_p.const_data_ptr<float>();
  p.min_p = min_p.const_data_ptr<float>();
  p.seed = seed.const_data_ptr<int64_t>();
  p.row_position = row_position.const_data_ptr<int32_t>();
  p.token = token.data_ptr<int64_t>();
  p.logprob = logprob.data_ptr<float>();
  p.logits_stride_row = logits.stride(0);
  p.rows = extent(rows, "the number of rows of logits");
  p.vocab = extent(logits.size(1), "the vocabulary");
#ifdef VERICACHE_WITH_CUDA
  if (logits.is_cuda()) {
    launch_cuda(logits, p, cuda::sample, cuda::sample_workspace_bytes);
    return {token, logprob};
  }
#endif
  check_values(p);
  cpu::sample(p);
  return {token, logprob};
}

}  // namespace
}  // namespace vericache::bindings

TORCH_LIBRARY_FRAGMENT(vericache, m) {
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
      "Tensor row_position) -> (Tensor token, Tensor logprob)");
}

TORCH_LIBRARY_IMPL(vericache, CPU, m) { m.impl("sample", &vericache::bindings::sample); }
#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) { m.impl("sample", &vericache::bindings::sample); }
#endif
