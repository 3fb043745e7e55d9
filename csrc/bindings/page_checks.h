// SPDX-License-Identifier: Apache-2.0
// Checks of what the attention and cache ops have in common: pages, tables of page addresses, quantization groups.
#pragma once

#include "bindings/checks.h"
#include "common/code_planes.h"

namespace vericache::bindings {

inline int32_t page_size_of(int64_t value) {
  VC_CHECK(value >= 16 && value <= 256 && (value & (value - 1)) == 0, "page_size is ", value,
           "; it must be a power of two from 16 to 256.");
  return int32_t(value);
}

inline int32_t check_head_dim(int64_t value) {
  VC_CHECK(value >= 32 && value <= 256 && value % 16 == 0, "head_dim is ", value,
           "; it must be a multiple of 16 from 32 to 256.");
  return int32_t(value);
}

inline int32_t bits_of(int64_t value) {
  VC_CHECK(are_code_bits(value), "bits is ", value, "; it must be 2, 4, 5, 6, 7 or 8.");
  return int32_t(value);
}

inline int32_t group_of(int64_t value, int64_t page_size, int64_t head_dim) {
  VC_CHECK(value >= 16 && value % 16 == 0 && page_size % value == 0 && head_dim % value == 0, "group is ", value,
           "; it must be a multiple of 16 that divides page_size ", page_size, " and head_dim ", head_dim, ".");
  return int32_t(value);
}

inline int64_t pages_of(int64_t tokens, int64_t page_size) { return (tokens + page_size - 1) / page_size; }

// A table of page addresses: int64, last axis contiguous.
inline void check_table(const at::Tensor& t, std::initializer_list<int64_t> shape, const at::Tensor& lead,
                        const char* name, const char* lead_name) {
  check_dtype(t, at::kLong, name);
  check_shape(t, shape, name);
  check_same_device(t, lead, name, lead_name);
  check_last_axis_contiguous(t, name);
}

// Entries first .. last - 1 of a row of a host table must be addresses.
inline void check_pages(const int64_t* table, int64_t first, int64_t last, const char* name, int64_t row) {
  for (int64_t i = first; i < last; ++i)
    VC_CHECK(table[i] != 0, name, " has no page at entry ", i, " of row ", row, ", which the call would touch; ",
             "give it the page's address.");
}

}  // namespace vericache::bindings
