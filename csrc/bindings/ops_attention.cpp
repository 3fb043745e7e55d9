// SPDX-License-Identifier: Apache-2.0
// torch.ops.vericache.{paged,kept,quant}_attention: checks, params, launch. On the CPU the contents of the tables are
// checked too; on CUDA that would mean a synchronization, and a bad table is undefined behaviour. `settled` is the
// caller's promise of params.h (tables_settled, cache_settled); the CPU has no use for it.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "bindings/page_checks.h"
#include "common/params.h"
#include "cpu/kept_attention.h"
#include "cpu/paged_attention.h"
#include "cpu/quant_attention.h"

namespace vericache::bindings {
namespace {

constexpr int64_t kMaxGroup = 64;

// What the three ops share: q, the rows, the shape. Returns the output.
template <class Params>
at::Tensor fill_common(Params& p, const at::Tensor& q, const at::Tensor& row_offsets, const at::Tensor& row_position,
                       int64_t requests, int64_t kv_heads, int64_t page_size, double scale) {
  p.dtype = storage_dtype(q, "q");
  check_shape(q, {-1, -1, -1}, "q");
  check_last_axis_contiguous(q, "q");
  check_head_dim(q.size(2));
  p.kv_heads = positive_int(kv_heads, "kv_heads");
  VC_CHECK(q.size(1) > 0 && q.size(1) % kv_heads == 0 && q.size(1) / kv_heads <= kMaxGroup, "q has ", q.size(1),
           " heads for kv_heads ", kv_heads, "; it must be a multiple, at most ", kMaxGroup, " to one.");
  p.page_size = page_size_of(page_size);
  VC_CHECK(std::isfinite(scale), "scale is ", scale, "; it must be finite.");
  check_tensor(row_offsets, at::kInt, {requests + 1}, q, "row_offsets", "q");
  check_tensor(row_position, at::kInt, {q.size(0)}, q, "row_position", "q");

  at::Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  p.q = q.const_data_ptr();
  p.out = out.data_ptr();
  p.row_offsets = row_offsets.const_data_ptr<int32_t>();
  p.row_position = row_position.const_data_ptr<int32_t>();
  p.q_stride_row = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.rows = extent(q.size(0), "the number of rows of q");
  p.requests = extent(requests, "the number of requests");
  p.q_heads = extent(q.size(1), "the number of heads of q");
  p.head_dim = int32_t(q.size(2));
  p.scale = float(scale);
  return out;
}

template <class Params>
void check_rows(const Params& p) {
  VC_CHECK(p.row_offsets[0] == 0, "row_offsets begins with ", p.row_offsets[0], "; it must begin with 0.");
  for (int32_t r = 0; r < p.requests; ++r)
    VC_CHECK(p.row_offsets[r] <= p.row_offsets[r + 1], "row_offsets falls from ", p.row_offsets[r], " to ",
             p.row_offsets[r + 1], " at request ", r, "; it must not decrease.");
  VC_CHECK(p.row_offsets[p.requests] <= p.rows, "row_offsets ends with ", p.row_offsets[p.requests], " and q has ",
           p.rows, " rows; it must not end past them.");
}

// The positions of request r's rows: at least `lowest`, within the `pages` that begin at position `start`. Returns the
// tokens of those pages that the furthest row attends to.
template <class Params>
int64_t check_positions(const Params& p, int32_t r, int64_t lowest, int64_t start, int64_t pages, const char* table) {
  int64_t tokens = 0;
  for (int32_t row = p.row_offsets[r]; row < p.row_offsets[r + 1]; ++row) {
    const int64_t position = p.row_position[row];
    VC_CHECK(position >= lowest && position - start < pages * p.page_size, "row_position of row ", row, " is ",
             position, "; request ", r, " has ", table, " pages for positions ", lowest, " to ",
             start + pages * p.page_size - 1, ".");
    tokens = std::max(tokens, position - start + 1);
  }
  return tokens;
}

PagedAttentionParams paged_params(const at::Tensor& q, const at::Tensor& page_table, const at::Tensor& row_offsets,
                                  const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, double scale,
                                  int64_t window, at::Tensor& out) {
  PagedAttentionParams p{};
  check_table(page_table, {-1, -1}, q, "page_table", "q");
  out = fill_common(p, q, row_offsets, row_position, page_table.size(0), kv_heads, page_size, scale);
  VC_CHECK(window >= 0, "window is ", window, "; it must be 0 (none) or the number of keys a row attends to.");
  p.page_table = page_table.const_data_ptr<int64_t>();
  p.table_stride_request = page_table.stride(0);
  p.max_pages = extent(page_table.size(1), "the width of page_table");
  p.window = int32_t(std::min<int64_t>(window, std::numeric_limits<int32_t>::max()));
  return p;
}

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& page_table, const at::Tensor& row_offsets,
                               const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, double scale,
                               int64_t window, bool) {
  at::Tensor out;
  const PagedAttentionParams p =
      paged_params(q, page_table, row_offsets, row_position, kv_heads, page_size, scale, window, out);
  check_rows(p);
  for (int32_t r = 0; r < p.requests; ++r) {
    const int64_t tokens = check_positions(p, r, 0, 0, p.max_pages, "page_table");
    int64_t first = tokens;
    for (int32_t row = p.row_offsets[r]; row < p.row_offsets[r + 1]; ++row)
      first = std::min(first, p.window > 0 ? std::max<int64_t>(0, int64_t(p.row_position[row]) + 1 - p.window) : 0);
    check_pages(p.page_table + r * p.table_stride_request, first / p.page_size, pages_of(tokens, p.page_size),
                "page_table", r);
  }
  cpu::paged_attention(p);
  return out;
}

KeptAttentionParams kept_params(const at::Tensor& q, const at::Tensor& kept_table, const at::Tensor& kept_len,
                                const at::Tensor& tail_table, const at::Tensor& tail_start,
                                const at::Tensor& row_offsets, const at::Tensor& row_position, int64_t page_size,
                                double scale, at::Tensor& out) {
  KeptAttentionParams p{};
  check_table(kept_table, {-1, -1, -1}, q, "kept_table", "q");
  const int64_t requests = kept_table.size(0), kv_heads = kept_table.size(1);
  out = fill_common(p, q, row_offsets, row_position, requests, kv_heads, page_size, scale);
  check_tensor(kept_len, at::kInt, {requests, kv_heads}, q, "kept_len", "q");
  check_table(tail_table, {requests, -1}, q, "tail_table", "q");
  check_tensor(tail_start, at::kInt, {requests}, q, "tail_start", "q");
  p.kept_table = kept_table.const_data_ptr<int64_t>();
  p.kept_len = kept_len.const_data_ptr<int32_t>();
  p.tail_table = tail_table.const_data_ptr<int64_t>();
  p.tail_start = tail_start.const_data_ptr<int32_t>();
  p.kept_stride_request = kept_table.stride(0);
  p.kept_stride_head = kept_table.stride(1);
  p.tail_stride_request = tail_table.stride(0);
  p.max_kept_pages = extent(kept_table.size(2), "the width of kept_table");
  p.max_tail_pages = extent(tail_table.size(1), "the width of tail_table");
  return p;
}

at::Tensor kept_attention_cpu(const at::Tensor& q, const at::Tensor& kept_table, const at::Tensor& kept_len,
                              const at::Tensor& tail_table, const at::Tensor& tail_start, const at::Tensor& row_offsets,
                              const at::Tensor& row_position, int64_t page_size, double scale, bool, bool as_full) {
  at::Tensor out;
  KeptAttentionParams p =
      kept_params(q, kept_table, kept_len, tail_table, tail_start, row_offsets, row_position, page_size, scale, out);
  p.as_full = as_full;
  check_rows(p);
  for (int32_t r = 0; r < p.requests; ++r) {
    if (p.row_offsets[r] == p.row_offsets[r + 1]) continue;  // without rows nothing of it is read
    for (int32_t h = 0; h < p.kv_heads; ++h) {
      const int32_t kept = p.kept_len[int64_t(r) * p.kv_heads + h];
      VC_CHECK(kept >= 0 && kept <= int64_t(p.max_kept_pages) * p.page_size, "kept_len of request ", r, ", head ", h,
               " is ", kept, "; kept_table holds 0 to ", int64_t(p.max_kept_pages) * p.page_size, " rows.");
      check_pages(p.kept_table + r * p.kept_stride_request + h * p.kept_stride_head, 0, pages_of(kept, p.page_size),
                  "kept_table", r);
    }
    const int64_t start = p.tail_start[r];
    VC_CHECK(start >= 0 && start % p.page_size == 0, "tail_start of request ", r, " is ", start,
             "; it must be a multiple of page_size ", p.page_size, ".");
    const int64_t tokens = check_positions(p, r, start - 1, start, p.max_tail_pages, "tail_table");
    check_pages(p.tail_table + r * p.tail_stride_request, 0, pages_of(tokens, p.page_size), "tail_table", r);
  }
  cpu::kept_attention(p);
  return out;
}

QuantAttentionParams quant_params(const at::Tensor& q, const at::Tensor& quant_table, const at::Tensor& quant_len,
                                  const at::Tensor& tail_table, const at::Tensor& row_offsets,
                                  const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, int64_t bits,
                                  int64_t group, double scale, at::Tensor& out) {
  QuantAttentionParams p{};
  check_table(quant_table, {-1, -1}, q, "quant_table", "q");
  const int64_t requests = quant_table.size(0);
  out = fill_common(p, q, row_offsets, row_position, requests, kv_heads, page_size, scale);
  check_tensor(quant_len, at::kInt, {requests}, q, "quant_len", "q");
  check_table(tail_table, {requests, -1}, q, "tail_table", "q");
  p.bits = bits_of(bits);
  p.group = group_of(group, page_size, q.size(2));
  p.quant_table = quant_table.const_data_ptr<int64_t>();
  p.quant_len = quant_len.const_data_ptr<int32_t>();
  p.tail_table = tail_table.const_data_ptr<int64_t>();
  p.quant_stride_request = quant_table.stride(0);
  p.tail_stride_request = tail_table.stride(0);
  p.max_quant_pages = extent(quant_table.size(1), "the width of quant_table");
  p.max_tail_pages = extent(tail_table.size(1), "the width of tail_table");
  return p;
}

at::Tensor quant_attention_cpu(const at::Tensor& q, const at::Tensor& quant_table, const at::Tensor& quant_len,
                               const at::Tensor& tail_table, const at::Tensor& row_offsets,
                               const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, int64_t bits,
                               int64_t group, double scale, bool) {
  at::Tensor out;
  const QuantAttentionParams p = quant_params(q, quant_table, quant_len, tail_table, row_offsets, row_position,
                                              kv_heads, page_size, bits, group, scale, out);
  check_rows(p);
  for (int32_t r = 0; r < p.requests; ++r) {
    if (p.row_offsets[r] == p.row_offsets[r + 1]) continue;
    const int64_t length = p.quant_len[r];
    VC_CHECK(length >= 0 && length % p.page_size == 0 && length <= int64_t(p.max_quant_pages) * p.page_size,
             "quant_len of request ", r, " is ", length, "; it must be a multiple of page_size ", p.page_size,
             ", at most the ", int64_t(p.max_quant_pages) * p.page_size, " tokens of quant_table.");
    check_pages(p.quant_table + r * p.quant_stride_request, 0, length / p.page_size, "quant_table", r);
    const int64_t tokens = check_positions(p, r, length - 1, length, p.max_tail_pages, "tail_table");
    check_pages(p.tail_table + r * p.tail_stride_request, 0, pages_of(tokens, p.page_size), "tail_table", r);
  }
  cpu::quant_attention(p);
  return out;
}

#ifdef VERICACHE_WITH_CUDA

at::Tensor paged_attention_cuda(const at::Tensor& q, const at::Tensor& page_table, const at::Tensor& row_offsets,
                                const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, double scale,
                                int64_t window, bool settled) {
  at::Tensor out;
  PagedAttentionParams p =
      paged_params(q, page_table, row_offsets, row_position, kv_heads, page_size, scale, window, out);
  p.tables_settled = p.cache_settled = settled;
  launch_cuda(q, p, cuda::paged_attention, cuda::paged_attention_workspace_bytes);
  return out;
}

at::Tensor kept_attention_cuda(const at::Tensor& q, const at::Tensor& kept_table, const at::Tensor& kept_len,
                               const at::Tensor& tail_table, const at::Tensor& tail_start,
                               const at::Tensor& row_offsets, const at::Tensor& row_position, int64_t page_size,
                               double scale, bool settled, bool as_full) {
  at::Tensor out;
  KeptAttentionParams p =
      kept_params(q, kept_table, kept_len, tail_table, tail_start, row_offsets, row_position, page_size, scale, out);
  p.tables_settled = p.cache_settled = settled;
  p.as_full = as_full;
  launch_cuda(q, p, cuda::kept_attention, cuda::kept_attention_workspace_bytes);
  return out;
}

at::Tensor quant_attention_cuda(const at::Tensor& q, const at::Tensor& quant_table, const at::Tensor& quant_len,
                                const at::Tensor& tail_table, const at::Tensor& row_offsets,
                                const at::Tensor& row_position, int64_t kv_heads, int64_t page_size, int64_t bits,
                                int64_t group, double scale, bool settled) {
  at::Tensor out;
  QuantAttentionParams p = quant_params(q, quant_table, quant_len, tail_table, row_offsets, row_position, kv_heads,
                                        page_size, bits, group, scale, out);
  p.tables_settled = p.cache_settled = settled;
  launch_cuda(q, p, cuda::quant_attention, cuda::quant_attention_workspace_bytes);
  return out;
}

#endif  // VERICACHE_WITH_CUDA

TORCH_LIBRARY_FRAGMENT(vericache, m) {
  m.def(
      "paged_attention(Tensor q, Tensor page_table, Tensor row_offsets, Tensor row_position, int kv_heads, "
      "int page_size, float scale, int window, bool settled=False) -> Tensor");
  m.def(
      "kept_attention(Tensor q, Tensor kept_table, Tensor kept_len, Tensor tail_table, Tensor tail_start, "
      "Tensor row_offsets, Tensor row_position, int page_size, float scale, bool settled=False, bool as_full=False) "
      "-> Tensor");
  m.def(
      "quant_attention(Tensor q, Tensor quant_table, Tensor quant_len, Tensor tail_table, Tensor row_offsets, "
      "Tensor row_position, int kv_heads, int page_size, int bits, int group, float scale, bool settled=False) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(vericache, CPU, m) {
  m.impl("paged_attention", paged_attention_cpu);
  m.impl("kept_attention", kept_attention_cpu);
  m.impl("quant_attention", quant_attention_cpu);
}

#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) {
  m.impl("paged_attention", paged_attention_cuda);
  m.impl("kept_attention", kept_attention_cuda);
  m.impl("quant_attention", quant_attention_cuda);
}
#endif

}  // namespace
}  // namespace vericache::bindings
