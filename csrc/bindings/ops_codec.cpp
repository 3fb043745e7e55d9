// SPDX-License-Identifier: Apache-2.0
// torch.ops.vericache.{bf16_pack,bf16_unpack}. Like the ops of ops_cache.cpp they work through tables of addresses, and
// `like` only names the dtype and the device that runs. On CUDA the tables lie on the device; the packed pages they
// point to may also lie in pinned host memory.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/checks.h"
#include "bindings/launch.h"
#include "bindings/page_checks.h"
#include "common/params.h"
#include "cpu/bf16_codec.h"

namespace vericache::bindings {
namespace {

Bf16PackParams codec_params(const at::Tensor& raw_pages, const at::Tensor& packed_pages, const at::Tensor& like,
                            int64_t elems) {
  check_dtype(like, at::kBFloat16, "like");
  check_table(raw_pages, {-1}, like, "raw_pages", "like");
  check_table(packed_pages, {raw_pages.size(0)}, like, "packed_pages", "like");
  VC_CHECK(elems > 0 && elems % 8 == 0, "elems is ", elems, "; a page has a positive multiple of 8 elements.");
  Bf16PackParams p{};
  p.raw_pages = raw_pages.const_data_ptr<int64_t>();
  p.packed_pages = packed_pages.const_data_ptr<int64_t>();
  p.elems = elems;
  p.pages = extent(raw_pages.size(0), "the number of pages");
  return p;
}

// Entries of a host table must be addresses of 16-byte units.
void check_aligned_pages(const int64_t* table, int64_t count, const char* name) {
  check_pages(table, 0, count, name, 0);
  for (int64_t i = 0; i < count; ++i)
    VC_CHECK(table[i] % 16 == 0, name, " has an address at entry ", i, " that is ", table[i] % 16,
             " bytes off a multiple of 16; align the page.");
}

at::Tensor bf16_pack(const at::Tensor& raw_pages, const at::Tensor& packed_pages, const at::Tensor& like, int64_t elems,
                     int64_t room) {
  Bf16PackParams p = codec_params(raw_pages, packed_pages, like, elems);
  const int64_t needed = Bf16PackLayout::make(elems).max_bytes;
  VC_CHECK(room >= needed, "room is ", room, " bytes; ", elems, " elements may pack to ", needed,
           ": give each packed page that much (bf16_packed_bound).");
  at::Tensor bytes = at::empty({p.pages}, raw_pages.options());
  p.packed_bytes = bytes.data_ptr<int64_t>();
#ifdef VERICACHE_WITH_CUDA
  if (like.is_cuda()) {
    launch_cuda(like, p, cuda::bf16_pack);
    return bytes;
  }
#endif
  check_aligned_pages(p.raw_pages, p.pages, "raw_pages");
  check_aligned_pages(p.packed_pages, p.pages, "packed_pages");
  cpu::bf16_pack(p);
  return bytes;
}

void bf16_unpack(const at::Tensor& packed_pages, const at::Tensor& packed_bytes, const at::Tensor& raw_pages,
                 const at::Tensor& like, int64_t elems, int64_t max_blocks) {
  Bf16PackParams p = codec_params(raw_pages, packed_pages, like, elems);
  check_table(packed_bytes, {p.pages}, like, "packed_bytes", "like");
  p.max_blocks = extent(max_blocks, "max_blocks");
#ifdef VERICACHE_WITH_CUDA
  if (like.is_cuda()) return launch_cuda(like, p, cuda::bf16_unpack);
#endif
  check_aligned_pages(p.raw_pages, p.pages, "raw_pages");
  check_aligned_pages(p.packed_pages, p.pages, "packed_pages");
  const int64_t* bytes = packed_bytes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < p.pages; ++i)
    cpu::bf16_check_packed(reinterpret_cast<const uint8_t*>(p.packed_pages[i]), bytes[i], elems, i);
  cpu::bf16_unpack(p);
}

void bind(torch::Library& m) {
  m.impl("bf16_pack", &bf16_pack);
  m.impl("bf16_unpack", &bf16_unpack);
}

}  // namespace
}  // namespace vericache::bindings

TORCH_LIBRARY_FRAGMENT(vericache, m) {
  m.def("bf16_pack(Tensor raw_pages, Tensor packed_pages, Tensor like, int elems, int room) -> Tensor");
  m.def(
      "bf16_unpack(Tensor packed_pages, Tensor packed_bytes, Tensor raw_pages, Tensor like, int elems, "
      "int max_blocks) -> ()");
}

TORCH_LIBRARY_IMPL(vericache, CPU, m) { vericache::bindings::bind(m); }
#ifdef VERICACHE_WITH_CUDA
TORCH_LIBRARY_IMPL(vericache, CUDA, m) { vericache::bindings::bind(m); }
#endif
