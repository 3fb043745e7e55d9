// SPDX-License-Identifier: Apache-2.0
// Full pages <-> quantized pages (QuantPageLayout; KIVI, arXiv 2402.02750: keys per channel, values per token).
//
// scale and zero are rounded to T first; the code is round-half-even((x - zero) / scale) with those, clamped to the
// code's range. Where the scale is 0 or NaN all codes are 0. A NaN or infinity makes its group's scale and zero NaN.
#include "cpu/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/types.h"
#include "cpu/key_source.h"
#include "cpu/parallel.h"

namespace vericache::cpu {
namespace {

// The blocks of one head of one quantized page.
template <class T>
struct HeadBlob {
  uint8_t* k_codes;
  T *k_scale, *k_zero;
  uint8_t* v_codes;
  T *v_scale, *v_zero;

  HeadBlob(int64_t page, const QuantPageLayout& l, int kv_head) {
    auto* at = reinterpret_cast<uint8_t*>(page) + kv_head * l.head_bytes;
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    k_codes = take(l.code_bytes);
    k_scale = reinterpret_cast<T*>(take(l.k_param_bytes));
    k_zero = reinterpret_cast<T*>(take(l.k_param_bytes));
    v_codes = take(l.code_bytes);
    v_scale = reinterpret_cast<T*>(take(l.v_param_bytes));
    v_zero = reinterpret_cast<T*>(take(l.v_param_bytes));
  }
};

// Smallest and largest of a group, lane by lane.
struct Extent {
  f32x16 low = f32x16(std::numeric_limits<float>::infinity()), high = f32x16(-std::numeric_limits<float>::infinity());
  f32x16 poison = f32x16(0.0f);  // NaN once a NaN or an infinity was seen

  void add(f32x16 x) {
    low = min(x, low), high = max(x, high);
    poison = poison + x * f32x16(0.0f);
  }
};

template <int kBits>
constexpr float kLevels = float((1 << kBits) - 1);

// Code numbers of 16 values, as floats.
template <int kBits>
f32x16 code_of(f32x16 x, f32x16 scale, f32x16 zero) {
  const f32x16 none(0.0f);
  const f32x16 code = min(max((x - zero) / scale, none), f32x16(kLevels<kBits>));  // NaN -> 0
  return where_less(none, scale, round_even(code), none);
}

// Codes of one row, given as floats, to their place in a block of codes.
template <int kBits>
void pack_codes(const float* codes, uint8_t* block, int row, int page_size, int dim) {
  if constexpr (CodePlanes<kBits>::kSplit) {
    std::array<uint32_t, kMaxHeadDim / 4> bytes{};
    for (int d = 0; d < dim; ++d) bytes[size_t(d / 4)] |= uint32_t(codes[d]) << (d % 4 * 8);
    CodePlanes<kBits>::each_plane([&]<int w>() {
      using Planes = CodePlanes<kBits>;
      auto* out = reinterpret_cast<uint16_t*>(block + Planes::begin(page_size, dim, w) +
                                              int64_t(row) * Planes::row_bytes(dim, w));
      for (int u = 0; u < dim * w / 16; ++u) out[u] = Planes::template unit<w>(bytes.data(), dim, u);
    });
  } else {
    constexpr int kPerByte = 8 / kBits;
    const int row_bytes = dim * kBits / 8;
    uint8_t* out = block + int64_t(row) * row_bytes;
    for (int i = 0; i < row_bytes; ++i) {
      int byte = 0;
      for (int c = 0; c < kPerByte; ++c) byte |= int(codes[i * kPerByte + c]) << (c * kBits);
      out[i] = uint8_t(byte);
    }
  }
}

template <class T, int kBits>
void quantize_keys(const T* keys, const QuantizeParams& p, const HeadBlob<T>& blob) {
  const int dim = p.head_dim;
  alignas(64) std::array<float, kMaxHeadDim> codes, scale, zero;
  for (int g = 0; g < p.page_size / p.group; ++g) {
    const T* rows = keys + int64_t(g) * p.group * dim;
    for (int d = 0; d < dim; d += kLanes) {
      Extent extent;
      for (int i = 0; i < p.group; ++i) extent.add(load(rows + int64_t(i) * dim + d));
      T* const s = blob.k_scale + int64_t(g) * dim + d;
      T* const z = blob.k_zero + int64_t(g) * dim + d;
      store(s, (extent.high - extent.low) / f32x16(kLevels<kBits>) + extent.poison);
      store(z, extent.low + extent.poison);
      store(scale.data() + d, load(s));
      store(zero.data() + d, load(z));
    }
    for (int i = 0; i < p.group; ++i) {
      for (int d = 0; d < dim; d += kLanes)
        store(codes.data() + d,
              code_of<kBits>(load(rows + int64_t(i) * dim + d), load(scale.data() + d), load(zero.data() + d)));
      pack_codes<kBits>(codes.data(), blob.k_codes, g * p.group + i, p.page_size, dim);
    }
  }
}

template <class T, int kBits>
void quantize_values(const T* values, const QuantizeParams& p, const HeadBlob<T>& blob) {
  const int dim = p.head_dim, groups = dim / p.group;
  alignas(64) std::array<float, kMaxHeadDim> codes;
  for (int i = 0; i < p.page_size; ++i) {
    const T* row = values + int64_t(i) * dim;
    for (int g = 0; g < groups; ++g) {
      Extent extent;
      for (int d = g * p.group; d < (g + 1) * p.group; d += kLanes) extent.add(load(row + d));
      const float low = -hmax(f32x16(0.0f) - extent.low), poison = hsum(extent.poison);
      T& s = blob.v_scale[int64_t(i) * groups + g];
      T& z = blob.v_zero[int64_t(i) * groups + g];
      s = from_float<T>((hmax(extent.high) - low) / kLevels<kBits> + poison);
      z = from_float<T>(low + poison);
      const f32x16 scale(to_float(s)), zero(to_float(z));
      for (int d = g * p.group; d < (g + 1) * p.group; d += kLanes)
        store(codes.data() + d, code_of<kBits>(load(row + d), scale, zero));
    }
    pack_codes<kBits>(codes.data(), blob.v_codes, i, p.page_size, dim);
  }
}

template <class T, int kBits>
void quantize_head(int64_t full, int64_t quant, int kv_head, const QuantizeParams& p, const QuantPageLayout& layout) {
  const HeadBlob<T> blob(quant, layout, kv_head);
  const int64_t head_size = int64_t(p.page_size) * p.head_dim;
  const T* keys = reinterpret_cast<const T*>(full) + kv_head * head_size;
  quantize_keys<T, kBits>(keys, p, blob);
  quantize_values<T, kBits>(keys + p.kv_heads * head_size, p, blob);
}

template <class T, int kBits>
void dequantize_head(int64_t full, int64_t quant, int kv_head, const QuantizeParams& p, const QuantPageLayout& layout) {
  const HeadBlob<T> blob(quant, layout, kv_head);
  const int dim = p.head_dim, groups = dim / p.group;
  const int64_t head_size = int64_t(p.page_size) * dim;
  T* key = reinterpret_cast<T*>(full) + kv_head * head_size;
  T* value = key + p.kv_heads * head_size;
  for (int i = 0; i < p.page_size; ++i, key += dim, value += dim) {
    const T *k_scale = blob.k_scale + int64_t(i / p.group) * dim, *k_zero = blob.k_zero + int64_t(i / p.group) * dim;
    const T *v_scale = blob.v_scale + int64_t(i) * groups, *v_zero = blob.v_zero + int64_t(i) * groups;
    const CodeRow<kBits> k_codes(blob.k_codes, i, p.page_size, dim), v_codes(blob.v_codes, i, p.page_size, dim);
    for (int d = 0; d < dim; d += kLanes) {
      store(key + d, fma(k_codes.load(d), load(k_scale + d), load(k_zero + d)));
      store(value + d,
            fma(v_codes.load(d), f32x16(to_float(v_scale[d / p.group])), f32x16(to_float(v_zero[d / p.group]))));
    }
  }
}

// Calls work<T, bits>(full page, quantized page, head) for each head of each page.
template <class Work>
void each_head(const QuantizeParams& p, Work work) {
  const auto layout =
      QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, p.bits, p.group, int(dtype_size(p.dtype)));
  parallel_for(int64_t(p.pages) * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dispatch(p.dtype, [&](auto t) {
        const int64_t full = p.full_pages[i / p.kv_heads], quant = p.quant_pages[i / p.kv_heads];
        const int kv_head = int(i % p.kv_heads);
        dispatch_bits(p.bits,
                      [&]<int kBits>() { work.template operator()<decltype(t), kBits>(full, quant, kv_head, layout); });
      });
  });
}

}  // namespace

void kv_quantize(const QuantizeParams& p) {
  each_head(p, [&]<class T, int kBits>(int64_t full, int64_t quant, int kv_head, const QuantPageLayout& layout) {
    quantize_head<T, kBits>(full, quant, kv_head, p, layout);
  });
}

void kv_dequantize(const QuantizeParams& p) {
  each_head(p, [&]<class T, int kBits>(int64_t full, int64_t quant, int kv_head, const QuantPageLayout& layout) {
    dequantize_head<T, kBits>(full, quant, kv_head, p, layout);
  });
}

}  // namespace vericache::cpu
