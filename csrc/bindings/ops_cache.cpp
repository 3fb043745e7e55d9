// SPDX-License-Identifier: Apache-2.0
// torch.ops.vericache.{kv_quantize,kv_dequantize,gather_tokens,scatter_tokens}. They write through tables of addresses,
// so no tensor argument is mutated; `like` only names the pages' dtype and device.
#include <torch/library.h>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "bindings/page_checks.h"
#include "common/params.h"
#include "cpu/quantize.h"
#include "cpu/token_move.h"

namespace vericache::bindings {
namespace {

QuantizeParams quantize_params(const at::Tensor& full_pages, const at::Tensor& quant_pages, const at::Tensor& like,
                               int64_t kv_heads, int64_t head_dim, int64_t page_size, int64_t bits, int64_t group) {
  QuantizeParams p{};
  p.dtype = storage_dtype(like, "like");
  check_table(full_pages, {-1}, like, "full_pages", "like");
  check_table(quant_pages, {full_pages.size(0)}, like, "quant_pages", "like");
  p.kv_heads = positive_int(kv_heads, "kv_heads");
  p.head_dim = check_head_dim(head_dim);
  p.page_size = page_size_of(page_size);
  p.bits = bits_of(bits);
  p.group = group_of(group, page_size, head_dim);
  p.full_pages = full_pages.const_data_ptr<int64_t>();
  p.quant_pages = quant_pages.const_data_ptr<int64_t>();
  p.pages = extent(full_pages.size(0), "the number of pages");
  return p;
}

template <void (*kRun)(const QuantizeParams&)>
void quantize_cpu(const at::Tensor& full_pages, const at::Tensor& quant_pages, const at::Tensor& like, int64_t kv_heads,
                  int64_t head_dim, int64_t page_size, int64_t bits, int64_t group) {
  const QuantizeParams p = quantize_params(full_pages, quant_pages, like, kv_heads, head_dim, page_size, bits, group);
  check_pages(p.full_pages, 0, p.pages, "full_pages", 0);
  check_pages(p.quant_pages, 0, p.pages, "quant_pages", 0);
  kRun(p);
}

TokenMoveParams token_move_params(const at::Tensor& page_table, const at::Tensor& head_table,
                                  const at::Tensor& positions, const at::Tensor& counts, const at::Tensor& like,
                                  int64_t head_dim, int64_t page_size) {
  TokenMoveParams p{};
  p.dtype = storage_dtype(like, "like");
  check_table(page_table, {-1}, like, "page_table", "like");
  check_table(head_table, {-1, -1}, like, "head_table", "like");
  const int64_t kv_heads = head_table.size(0);
  p.kv_heads = positive_int(kv_heads, "the number of rows of head_table (KV heads)");
  check_dtype(positions, at::kInt, "positions");
  check_shape(positions, {kv_heads, -1}, "positions");
  check_same_device(positions, like, "positions", "like");
  check_last_axis_contiguous(positions, "positions");
  check_tensor(counts, at::kInt, {kv_heads}, like, "counts", "like");
  p.head_dim = check_head_dim(head_dim);
  p.page_size = page_size_of(page_size);
  p.page_table = page_table.const_data_ptr<int64_t>();
  p.head_table = head_table.const_data_ptr<int64_t>();
  p.positions = positions.const_data_ptr<int32_t>();
  p.counts = counts.const_data_ptr<int32_t>();
  p.head_stride = head_table.stride(0);
  p.positions_stride = positions.stride(0);
  p.capacity = extent(positions.size(1), "the width of positions");
  p.max_pages = extent(page_table.size(0), "the length of page_table");
  p.max_head_pages = extent(head_table.size(1), "the width of head_table");
  return p;
}

template <void (*kRun)(const TokenMoveParams&)>
void token_move_cpu(const at::Tensor& page_table, const at::Tensor& head_table, const at::Tensor& positions,
                    const at::Tensor& counts, const at::Tensor& like, int64_t head_dim, int64_t page_size) {
  const TokenMoveParams p = token_move_params(page_table, head_table, positions, counts, like, head_dim, page_size);
  for (int32_t h = 0; h < p.kv_heads; ++h) {
    const int64_t count = p.counts[h], room = int64_t(p.max_head_pages) * p.page_size;
    VC_CHECK(count >= 0 && count <= p.capacity && count <= room, "counts of head ", h, " is ", count,
             "; positions has room for ", p.capacity, " and head_table for ", room, ".");
    check_pages(p.head_table + h * p.head_stride, 0, pages_of(count, p.page_size), "head_table", h);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = p.positions[h * p.positions_stride + i], page = position / p.page_size;
      VC_CHECK(position >= 0 && page < p.max_pages, "positions[", h, ", ", i, "] is ", position,
               "; page_table holds positions 0 to ", int64_t(p.max_pages) * p.page_size - 1, ".");
      check_pages(p.page_table, page, page + 1, "page_table", 0);
    }
  }
  kRun(p);
}

#ifdef VERICACHE_WITH_CUDA

template <void (*kLauncher)(const QuantizeParams&, cudaStream_t)>
void quantize_cuda(const at::Tensor& full_pages, const at::Tensor& quant_pages, const at::Tensor& like,
                   int64_t kv_heads, int64_t head_dim, int64_t page_size, int64_t bits, int64_t group) {
  launch_cuda(like, quantize_params(full_pages, quant_pages, like, kv_heads, head_dim, page_size, bits, group),
              kLauncher);
}

template <void (*kLauncher)(const TokenMoveParams&, cudaStream_t)>
void token_move_cuda(const at::Tensor& page_table, const at::Tensor& head_table, const at::Tensor& positions,
                     const at::Tensor& counts, const at::Tensor& like, int64_t head_dim, int64_t page_size) {
  launch_cuda(like, token_move_params(page_table, head_table, positions, counts, like, head_dim, page_size), kLauncher);
}

#endif  // VERICACHE_WITH_CUDA

TORCH_LIBRARY_FRAGMENT(vericache, m) {
  m.def(
      "kv_quantize(Tensor full_pages, Tensor quant_pages, Tensor like, int kv_heads, int head_dim, int page_size, "
      "int bits, int group) -> ()");
  m.def(
      "kv_dequantize(Tensor full_pages, Tensor quant_pages, Tensor like, int kv_heads, int head_dim, int page_size, "
      "int bits, int group) -> ()");
  m.def(
      "gather_tokens(Tensor page_table, Tensor head_table, Tensor positions, Tensor counts, Tensor like, int head_dim, "
      "int page_size) -> ()");
  m.def(
      "scatter_tokens(Tensor page_table, Tensor head_table, Tensor positions, Tensor counts, Tensor like, "
      "int head_dim, int page_size) -> ()");
}

TORCH_LIBRARY_IMPL(vericache, CPU, m) {
  m.impl("kv_quantize", quantize_cpu<cpu::kv_quantize>);
  m.impl("kv_dequantize", quantize_cpu<cpu::kv_dequantize>);
  m.impl("gather_tokens", token_move_cpu<cpu::gather_tokens>);
  m.impl("scatter_tokens", token_move_cpu<cpu::scatter_tokens>);
}

#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) {
  m.impl("kv_quantize", quantize_cuda<cuda::kv_quantize>);
  m.impl("kv_dequantize", quantize_cuda<cuda::kv_dequantize>);
  m.impl("gather_tokens", token_move_cuda<cuda::gather_tokens>);
  m.impl("scatter_tokens", token_move_cuda<cuda::scatter_tokens>);
}
#endif

}  // namespace
}  // namespace vericache::bindings
