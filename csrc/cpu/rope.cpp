// SPDX-License-Identifier: Apache-2.0
#include "cpu/rope.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vericache::cpu {
namespace {

// out = rotate(norm(head)); `normed` is scratch of head_dim elements.
template <class T>
void rotate_head(const RopeWriteParams& p, const T* head, const T* weight, int64_t position, T* normed, T* out) {
  if (weight != nullptr) {
    f32x16 squares(0.0f);
    for_lanes(p.head_dim, [&](int64_t i, int n) {
      const f32x16 v = load_n(head + i, n);
      squares = fma(v, v, squares);
    });
    const f32x16 scale(1.0f / std::sqrt(hsum(squares) / float(p.head_dim) + p.eps));
    for_lanes(p.head_dim,
              [&](int64_t i, int n) { store_n(normed + i, load_n(head + i, n) * scale * load_n(weight + i, n), n); });
    head = normed;
  }
  const int64_t half = p.head_dim / 2;
  const float* cos = p.cos + position * half;
  const float* sin = p.sin + position * half;
  for_lanes(half, [&](int64_t i, int n) {
    const f32x16 a = load_n(head + i, n), b = load_n(head + half + i, n);
    const f32x16 c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(out + i, a * c - b * s, n);
    store_n(out + half + i, b * c + a * s, n);
  });
}

template <class T>
void rope_row(const RopeWriteParams& p, int64_t row, T* normed) {
  const int64_t dim = p.head_dim, position = p.row_position[row];
  const T* head = static_cast<const T*>(p.qkv) + row * p.qkv_stride_row;
  T* q_out = static_cast<T*>(p.q_out) + row * p.q_heads * dim;
  for (int h = 0; h < p.q_heads; ++h, head += dim)
    rotate_head(p, head, static_cast<const T*>(p.q_norm), position, normed, q_out + h * dim);

  T* page = reinterpret_cast<T*>(p.row_page[row]);
  if (page == nullptr) return;
  const int64_t slot = position % p.page_size, head_elems = int64_t(p.page_size) * dim;
  for (int h = 0; h < p.kv_heads; ++h, head += dim)
    rotate_head(p, head, static_cast<const T*>(p.k_norm), position, normed, page + h * head_elems + slot * dim);
  T* values = page + p.kv_heads * head_elems;
  for (int h = 0; h < p.kv_heads; ++h, head += dim)
    std::memcpy(values + h * head_elems + slot * dim, head, size_t(dim) * sizeof(T));
}

}  // namespace

void rope_write(const RopeWriteParams& p) {
  const int64_t row_elems = int64_t(p.q_heads + 2 * p.kv_heads) * p.head_dim;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(p.rows, 1 + (1 << 13) / row_elems, [&](int64_t begin, int64_t end) {
      std::vector<T> normed(static_cast<size_t>(p.head_dim));
      for (int64_t row = begin; row < end; ++row) rope_row<T>(p, row, normed.data());
    });
  });
}

}  // namespace vericache::cpu
