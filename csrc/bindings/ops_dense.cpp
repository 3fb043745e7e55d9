// SPDX-License-Identifier: Apache-2.0
// The dense ops of a layer: linear, linear_swiglu, linear_rope_write, rms_norm, add_rms_norm, rope_write, silu_mul.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "cpu/activation.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/rope.h"

namespace vericache::bindings {
namespace {

struct LinearOptions {
  bool out_float32 = false, swiglu = false, weight_settled = false;
};

// Of linear, linear_swiglu and linear_rope_write; all but the output.
LinearParams product_params(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, LinearOptions options) {
  const DType dtype = storage_dtype(x, "x");
  check_shape(x, {-1, -1}, "x");
  check_last_axis_contiguous(x, "x");
  const int64_t rows = x.size(0), k = x.size(1);
  check_tensor(w, x.scalar_type(), {-1, k}, x, "w", "x");
  const int64_t n = w.size(0);
  VC_CHECK(k > 0, "x has shape ", shape_text(x.sizes()), "; its last axis must not be empty.");
  VC_CHECK(!options.swiglu || n % 2 == 0, "w has shape ", shape_text(w.sizes()),
           "; its first axis holds gate, then up, of equal length.");
  if (bias) check_tensor(*bias, x.scalar_type(), {n}, x, "bias", "x");
  if (residual) {
    check_dtype(*residual, x.scalar_type(), "residual");
    check_shape(*residual, {rows, n}, "residual");
    check_same_device(*residual, x, "residual", "x");
    check_last_axis_contiguous(*residual, "residual");
  }

  LinearParams p{};
  p.x = x.const_data_ptr();
  p.w = w.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.x_stride_row = x.stride(0);
  p.residual_stride_row = residual ? residual->stride(0) : 0;
  p.out_stride_row = options.swiglu ? n / 2 : n;
  p.rows = extent(rows, "the number of rows of x");
  p.n = extent(n, "the number of rows of w");
  p.k = extent(k, "the last axis of x");
  p.out_float32 = options.out_float32;
  p.dtype = dtype;
  p.swiglu = options.swiglu;
  p.w_settled = options.weight_settled;
  return p;
}

// linear and linear_swiglu.
at::Tensor product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& residual, LinearOptions options) {
  LinearParams p = product_params(x, w, bias, residual, options);
  const at::Tensor out =
      at::empty({p.rows, p.out_stride_row}, x.options().dtype(options.out_float32 ? at::kFloat : x.scalar_type()));
  if (out.numel() == 0) return out;
  p.out = out.data_ptr();
#ifdef VERICACHE_WITH_CUDA
  if (x.is_cuda()) {
    launch_cuda(x, p, cuda::linear, cuda::linear_workspace_bytes);
    return out;
  }
#endif
  cpu::linear(p);
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& residual, bool out_float32, bool weight_settled) {
  return product(x, w, bias, residual, {.out_float32 = out_float32, .weight_settled = weight_settled});
}

at::Tensor linear_swiglu(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                         bool weight_settled) {
  return product(x, w, bias, std::nullopt, {.swiglu = true, .weight_settled = weight_settled});
}

// rms_norm and add_rms_norm; residual_out is undefined without a residual.
std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
                                        double eps) {
  const DType dtype = storage_dtype(x, "x");
  check_shape(x, {-1, -1}, "x");
  check_last_axis_contiguous(x, "x");
  const int64_t rows = x.size(0), dim = x.size(1);
  check_tensor(weight, x.scalar_type(), {dim}, x, "weight", "x");
  VC_CHECK(dim > 0, "x has shape ", shape_text(x.sizes()), "; its last axis must not be empty.");
  VC_CHECK(eps >= 0.0, "eps is ", eps, "; it must not be negative.");
  if (residual != nullptr) {
    check_dtype(*residual, x.scalar_type(), "residual");
    check_shape(*residual, {rows, dim}, "residual");
    check_same_device(*residual, x, "residual", "x");
    check_last_axis_contiguous(*residual, "residual");
  }

  const at::Tensor out = at::empty({rows, dim}, x.options());
  const at::Tensor residual_out = residual != nullptr ? at::empty({rows, dim}, x.options()) : at::Tensor();
  if (rows == 0) return {out, residual_out};
  RmsNormParams p{};
  p.x = x.const_data_ptr();
  p.residual = residual != nullptr ? residual->const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.out = out.data_ptr();
  p.residual_out = residual != nullptr ? residual_out.data_ptr() : nullptr;
  p.x_stride_row = x.stride(0);
  p.residual_stride_row = residual != nullptr ? residual->stride(0) : 0;
  p.rows = extent(rows, "the number of rows of x");
  p.dim = extent(dim, "the last axis of x");
  p.eps = float(eps);
  p.dtype = dtype;
#ifdef VERICACHE_WITH_CUDA
  if (x.is_cuda()) {
    launch_cuda(x, p, cuda::rms_norm);
    return {out, residual_out};
  }
#endif
  cpu::rms_norm(p);
  return {out, residual_out};
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return std::get<0>(norm(x, nullptr, weight, eps));
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps) {
  return norm(x, &residual, weight, eps);
}

// Of rope_write and linear_rope_write: norms, sizes, tables and where each row goes, for `rows` rows of `lead`.
RopeWriteParams rope_params(const at::Tensor& lead, const char* lead_name, int64_t rows,
                            const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& row_position,
                            const at::Tensor& row_page, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                            int64_t page_size, double eps) {
  RopeWriteParams p{};
  p.q_heads = positive_int(q_heads, "q_heads");
  p.kv_heads = positive_int(kv_heads, "kv_heads");
  p.head_dim = positive_int(head_dim, "head_dim");
  p.page_size = positive_int(page_size, "page_size");
  VC_CHECK(head_dim % 2 == 0, "head_dim is ", head_dim, "; rotary embedding needs an even one.");
  check_tensor(cos, at::kFloat, {-1, head_dim / 2}, lead, "cos", lead_name);
  check_tensor(sin, at::kFloat, {cos.size(0), head_dim / 2}, lead, "sin", lead_name);
  check_tensor(row_position, at::kInt, {rows}, lead, "row_position", lead_name);
  check_tensor(row_page, at::kLong, {rows}, lead, "row_page", lead_name);
  VC_CHECK(eps >= 0.0, "eps is ", eps, "; it must not be negative.");
  if (q_norm) check_tensor(*q_norm, lead.scalar_type(), {head_dim}, lead, "q_norm", lead_name);
  if (k_norm) check_tensor(*k_norm, lead.scalar_type(), {head_dim}, lead, "k_norm", lead_name);
  p.q_norm = q_norm ? q_norm->const_data_ptr() : nullptr;
  p.k_norm = k_norm ? k_norm->const_data_ptr() : nullptr;
  p.eps = float(eps);
  p.cos = cos.const_data_ptr<float>();
  p.sin = sin.const_data_ptr<float>();
  p.row_position = row_position.const_data_ptr<int32_t>();
  p.row_page = row_page.const_data_ptr<int64_t>();
  p.rows = extent(rows, "the number of rows");
  p.dtype = storage_dtype(lead, lead_name);
  return p;
}

// On the CPU; a GPU trusts them.
void check_positions(const RopeWriteParams& p, int64_t positions) {
  for (int32_t row = 0; row < p.rows; ++row)
    VC_CHECK(p.row_position[row] >= 0 && p.row_position[row] < positions, "row_position[", row, "] is ",
             p.row_position[row], "; cos and sin hold positions 0 to ", positions - 1, ".");
}

at::Tensor rope_write(const at::Tensor& qkv, const std::optional<at::Tensor>& q_norm,
                      const std::optional<at::Tensor>& k_norm, const at::Tensor& cos, const at::Tensor& sin,
                      const at::Tensor& row_position, const at::Tensor& row_page, int64_t q_heads, int64_t kv_heads,
                      int64_t head_dim, int64_t page_size, double eps) {
  storage_dtype(qkv, "qkv");  // a supported one
  check_shape(qkv, {-1, -1}, "qkv");
  RopeWriteParams p = rope_params(qkv, "qkv", qkv.size(0), q_norm, k_norm, cos, sin, row_position, row_page, q_heads,
                                  kv_heads, head_dim, page_size, eps);
  check_shape(qkv, {-1, (q_heads + 2 * kv_heads) * head_dim}, "qkv");
  check_last_axis_contiguous(qkv, "qkv");

  const at::Tensor q_out = at::empty({p.rows, q_heads, head_dim}, qkv.options());
  if (p.rows == 0) return q_out;
  p.qkv = qkv.const_data_ptr();
  p.q_out = q_out.data_ptr();
  p.qkv_stride_row = qkv.stride(0);
#ifdef VERICACHE_WITH_CUDA
  if (qkv.is_cuda()) {
    launch_cuda(qkv, p, cuda::rope_write);
    return q_out;
  }
#endif
  check_positions(p, cos.size(0));
  cpu::rope_write(p);
  return q_out;
}

at::Tensor linear_rope_write(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm,
                             const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& row_position,
                             const at::Tensor& row_page, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                             int64_t page_size, double eps, bool weight_settled) {
  LinearRopeWriteParams p{};
  p.product = product_params(x, w, bias, std::nullopt, {.weight_settled = weight_settled});
  p.rope = rope_params(x, "x", p.product.rows, q_norm, k_norm, cos, sin, row_position, row_page, q_heads, kv_heads,
                       head_dim, page_size, eps);
  check_shape(w, {(q_heads + 2 * kv_heads) * head_dim, p.product.k}, "w");

  const at::Tensor q_out = at::empty({p.product.rows, q_heads, head_dim}, x.options());
  if (p.product.rows == 0) return q_out;
  p.rope.q_out = q_out.data_ptr();
#ifdef VERICACHE_WITH_CUDA
  if (x.is_cuda()) {
    launch_cuda(x, p, cuda::linear_rope_write, cuda::linear_rope_write_workspace_bytes);
    return q_out;
  }
#endif
  check_positions(p.rope, cos.size(0));
  cpu::linear_rope_write(p);
  return q_out;
}

at::Tensor silu_mul(const at::Tensor& gate_up) {
  const DType dtype = storage_dtype(gate_up, "gate_up");
  check_shape(gate_up, {-1, -1}, "gate_up");
  check_last_axis_contiguous(gate_up, "gate_up");
  const int64_t rows = gate_up.size(0), dim = gate_up.size(1) / 2;
  VC_CHECK(dim > 0 && gate_up.size(1) % 2 == 0, "gate_up has shape ", shape_text(gate_up.sizes()),
           "; its last axis holds gate, then up, of equal length.");

  const at::Tensor out = at::empty({rows, dim}, gate_up.options());
  if (rows == 0) return out;
  SiluMulParams p{};
  p.gate_up = gate_up.const_data_ptr();
  p.out = out.data_ptr();
  p.gate_up_stride_row = gate_up.stride(0);
  p.rows = extent(rows, "the number of rows of gate_up");
  p.dim = extent(dim, "half of gate_up's last axis");
  p.dtype = dtype;
#ifdef VERICACHE_WITH_CUDA
  if (gate_up.is_cuda()) {
    launch_cuda(gate_up, p, cuda::silu_mul);
    return out;
  }
#endif
  cpu::silu_mul(p);
  return out;
}

void bind(torch::Library& m) {
  m.impl("linear", &linear);
  m.impl("linear_swiglu", &linear_swiglu);
  m.impl("linear_rope_write", &linear_rope_write);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rope_write", &rope_write);
  m.impl("silu_mul", &silu_mul);
}

}  // namespace
}  // namespace vericache::bindings

TORCH_LIBRARY_FRAGMENT(vericache, m) {
  m.def(
      "linear(Tensor x, Tensor w, Tensor? bias, Tensor? residual, bool out_float32, bool weight_settled=False) -> "
      "Tensor");
  m.def("linear_swiglu(Tensor x, Tensor w, Tensor? bias, bool weight_settled=False) -> Tensor");
  m.def(
      "linear_rope_write(Tensor x, Tensor w, Tensor? bias, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
      "Tensor row_position, Tensor row_page, int q_heads, int kv_heads, int head_dim, int page_size, float eps, "
      "bool weight_settled=False) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor out, Tensor residual_out)");
  m.def(
      "rope_write(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor row_position, "
      "Tensor row_page, int q_heads, int kv_heads, int head_dim, int page_size, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
}

TORCH_LIBRARY_IMPL(vericache, CPU, m) { vericache::bindings::bind(m); }
#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) { vericache::bindings::bind(m); }
#endif
