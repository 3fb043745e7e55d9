// SPDX-License-Identifier: Apache-2.0
// Where attention gets the keys and values of one (request, KV head), in float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/code_planes.h"
#include "common/error.h"
#include "common/types.h"
#include "cpu/attention_tiles.h"
#include "cpu/words.h"

namespace vericache::cpu {

// Pages hold a multiple of 16 tokens, so the 16 keys of a run lie in one page. A run may hold keys past the last one
// that is attended to: their bytes are converted, and never used.
class KeySource {
 public:
  virtual ~KeySource() = default;
  // The run of 16 keys from `key`, a multiple of 16, transposed: channel d goes to tile[d * kTileKeys ..].
  virtual void pack_keys(int64_t key, float* tile) const = 0;
  // `count` values from `key` on, all of one run: [count, head_dim].
  virtual void load_values(int64_t key, int count, float* rows) const = 0;
};

inline void pack_rows(const float* rows, int head_dim, float* tile) {
  for (int d = 0; d < head_dim; d += kLanes)
    transpose_words(rows + d, int64_t(head_dim) * 4,
                    [&](int w, u32x16 x) { store(tile + (d + w) * kTileKeys, as_float(x)); });
}

// Two channels a word.
inline void pack_rows(const bf16* rows, int head_dim, float* tile) {
  for (int d = 0; d < head_dim; d += 2 * kLanes) {
    const int first = std::min(d, head_dim - 2 * kLanes);  // the last block may cover channels again
    transpose_words(rows + first, int64_t(head_dim) * 2, [&](int w, u32x16 x) {
      float* channel = tile + (first + 2 * w) * kTileKeys;
      store(channel, as_float(x << 16));
      store(channel + kTileKeys, as_float(x & 0xffff0000u));
    });
  }
}

// Full pages, or with kv_heads = 1 and kv_head = 0 head pages.
template <class T>
class Pages final : public KeySource {
 public:
  Pages(const int64_t* table, int kv_heads, int kv_head, int page_size, int head_dim)
      : table_(table),
        head_dim_(head_dim),
        shift_(std::countr_zero(unsigned(page_size))),
        mask_(page_size - 1),
        head_offset_(int64_t(kv_head) * page_size * head_dim),
        value_offset_(int64_t(kv_heads) * page_size * head_dim) {}

  void pack_keys(int64_t key, float* tile) const override { pack_rows(key_row(key), head_dim_, tile); }

  void load_values(int64_t key, int count, float* rows) const override {
    const T* from = key_row(key) + value_offset_;
    for (int64_t i = 0; i < int64_t(count) * head_dim_; i += kLanes) store(rows + i, load(from + i));
  }

 private:
  const T* key_row(int64_t key) const {
    return reinterpret_cast<const T*>(table_[key >> shift_]) + head_offset_ + (key & mask_) * head_dim_;
  }

  const int64_t* table_;
  int head_dim_, shift_;
  int64_t mask_, head_offset_, value_offset_;
};

// Sixteen codes of kBits bits, the least significant first.
template <int kBits>
inline u32x16 unpack_codes(const uint8_t* p) {
  if constexpr (kBits == 8) {
    return load_bytes(p);
  } else {
    constexpr int kPerWord = 32 / kBits;
    uint32_t words[2] = {};
    std::memcpy(words, p, size_t(kLanes * kBits / 8));
    const u32x16 second = constant_words([](int i) { return i < kPerWord ? 0u : ~0u; });
    const u32x16 spread = each_part([&](int i) {
      const WordPart low = words[0] - WordPart{}, high = words[1] - WordPart{};
      return kPerWord == kLanes ? low : (low & ~second.part[i]) | (high & second.part[i]);
    });
    return spread >> constant_words([](int i) { return uint32_t(i % kPerWord * kBits); }) & ((1u << kBits) - 1);
  }
}

// The codes of one row of a block of codes as numbers.
template <int kBits>
class CodeRow {
 public:
  using Planes = CodePlanes<kBits>;

  CodeRow(const uint8_t* block, int64_t row, int page_size, int head_dim) {
    if constexpr (Planes::kSplit) {
      std::fill_n(bytes_, head_dim / 4, 0u);
      Planes::each_plane([&]<int w>() {
        const auto* units = reinterpret_cast<const uint16_t*>(block + Planes::begin(page_size, head_dim, w) +
                                                              row * Planes::row_bytes(head_dim, w));
        const int n = head_dim * w / 16;
        for (int q = 0; q < 4 / w; ++q)
          for (int u = 0; u < n; ++u) bytes_[q * n + u] |= Planes::template spread<w>(units[u], q) << Planes::place(w);
      });
    } else {
      codes_ = block + row * (head_dim * kBits / 8);
    }
  }
  // From channel d on, a multiple of 16.
  f32x16 load(int d) const {
    if constexpr (Planes::kSplit)
      return to_f32x16(load_bytes(reinterpret_cast<const uint8_t*>(bytes_) + d));
    else
      return to_f32x16(unpack_codes<kBits>(codes_ + d * kBits / 8));
  }

 private:
  alignas(64) uint32_t bytes_[Planes::kSplit ? kMaxHeadDim / 4 : 1];
  const uint8_t* codes_ = nullptr;
};

// Calls work<bits>().
template <class Work>
auto dispatch_bits(int bits, Work work) {
  switch (bits) {
    case 8:
      return work.template operator()<8>();
    case 7:
      return work.template operator()<7>();
    case 6:
      return work.template operator()<6>();
    case 5:
      return work.template operator()<5>();
    case 4:
      return work.template operator()<4>();
    case 2:
      return work.template operator()<2>();
    default:
      throw Error(vericache::detail::concat("bits is ", bits, "; it must be 2, 4, 5, 6, 7 or 8."));
  }
}

// Pages of QuantPageLayout.
template <class T, int kBits>
class QuantPages final : public KeySource {
 public:
  QuantPages(const int64_t* table, int kv_heads, int kv_head, int page_size, int head_dim, int group)
      : layout_(QuantPageLayout::make(kv_heads, page_size, head_dim, kBits, group, int(sizeof(T)))),
        table_(table),
        kv_head_(kv_head),
        shift_(std::countr_zero(unsigned(page_size))),
        mask_(page_size - 1),
        head_dim_(head_dim),
        group_(group) {}

  void pack_keys(int64_t key, float* tile) const override {
    if constexpr (CodePlanes<kBits>::kSplit)
      pack_planes(key, tile);
    else
      pack_words(key, tile);
  }

  void load_values(int64_t key, int count, float* rows) const override {
    const uint8_t* codes = head_blob(key) + layout_.code_bytes + 2 * layout_.k_param_bytes;
    const int64_t slot = key & mask_;
    const int groups = head_dim_ / group_;
    const T* scale = reinterpret_cast<const T*>(codes + layout_.code_bytes) + slot * groups;
    const T* zero = scale + layout_.v_param_bytes / int64_t(sizeof(T));
    for (int i = 0; i < count; ++i, rows += head_dim_, scale += groups, zero += groups) {
      const CodeRow<kBits> row(codes, slot + i, int(mask_) + 1, head_dim_);
      for (int g = 0; g < groups; ++g) {
        const f32x16 s(to_float(scale[g])), z(to_float(zero[g]));
        for (int d = g * group_; d < (g + 1) * group_; d += kLanes) store(rows + d, fma(row.load(d), s, z));
      }
    }
  }

 private:
  const T* key_scale(const uint8_t* blob, int64_t slot) const {
    return reinterpret_cast<const T*>(blob + layout_.code_bytes) + slot / group_ * head_dim_;
  }

  void pack_planes(int64_t key, float* tile) const {
    const uint8_t* blob = head_blob(key);
    const int64_t slot = key & mask_;
    const T* scale = key_scale(blob, slot);
    const T* zero = scale + layout_.k_param_bytes / int64_t(sizeof(T));
    alignas(64) float rows[kLanes * kMaxHeadDim];
    for (int i = 0; i < kLanes; ++i) {
      const CodeRow<kBits> row(blob, slot + i, int(mask_) + 1, head_dim_);
      for (int d = 0; d < head_dim_; d += kLanes)
        store(rows + i * head_dim_ + d, fma(row.load(d), load(scale + d), load(zero + d)));
    }
    pack_rows(rows, head_dim_, tile);
  }

  void pack_words(int64_t key, float* tile) const {
    constexpr int kPerWord = 32 / kBits;
    const uint8_t* blob = head_blob(key);
    const int64_t slot = key & mask_;
    const int row_bytes = head_dim_ * kBits / 8;
    const uint8_t* codes = blob + slot * row_bytes;
    const T* scale = key_scale(blob, slot);
    const T* zero = scale + layout_.k_param_bytes / int64_t(sizeof(T));
    // A block reads 16 words of each row; past the end of the last row lie the scales, at least as long.
    const int words = row_bytes / 4;
    for (int block = 0; block < words; block += kLanes) {
      const int used = std::min(kLanes, words - block);
      alignas(64) uint32_t columns[kLanes][kLanes];
      transpose_words(codes + block * 4, row_bytes, [&](int w, u32x16 x) { std::memcpy(columns[w], &x, sizeof x); });
      for (int w = 0; w < used; ++w) {
        u32x16 word;
        std::memcpy(&word, columns[w], sizeof word);
#pragma GCC unroll 16
        for (int c = 0; c < kPerWord; ++c) {
          const int d = (block + w) * kPerWord + c;
          const f32x16 code = to_f32x16(word >> (c * kBits) & ((1u << kBits) - 1));
          store(tile + d * kTileKeys, fma(code, f32x16(to_float(scale[d])), f32x16(to_float(zero[d]))));
        }
      }
    }
  }

  const uint8_t* head_blob(int64_t key) const {
    return reinterpret_cast<const uint8_t*>(table_[key >> shift_]) + kv_head_ * layout_.head_bytes;
  }

  QuantPageLayout layout_;
  const int64_t* table_;
  int64_t kv_head_;
  int shift_;
  int64_t mask_;
  int head_dim_, group_;
};

// A compressed part at keys 0 .. and the tail from `boundary`, a multiple of 16: no run holds keys of both.
template <class Front, class Tail>
class WithTail final : public KeySource {
 public:
  WithTail(Front front, Tail tail, int64_t boundary) : front_(front), tail_(tail), boundary_(boundary) {}

  void pack_keys(int64_t key, float* tile) const override {
    key < boundary_ ? front_.pack_keys(key, tile) : tail_.pack_keys(key - boundary_, tile);
  }
  void load_values(int64_t key, int count, float* rows) const override {
    key < boundary_ ? front_.load_values(key, count, rows) : tail_.load_values(key - boundary_, count, rows);
  }

 private:
  Front front_;
  Tail tail_;
  int64_t boundary_;
};

// Where the tail begins when `length` compressed keys lie before it: no split holds keys of both.
inline int64_t tail_boundary(int64_t length) { return (length + kSplit - 1) / kSplit * kSplit; }

}  // namespace vericache::cpu
