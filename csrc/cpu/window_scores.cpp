// SPDX-License-Identifier: Apache-2.0
#include "cpu/window_scores.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/types.h"
#include "cpu/attention_tiles.h"
#include "cpu/parallel.h"
#include "cpu/words.h"

namespace vericache::cpu {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kTiles = kSplit / kTileKeys;  // of a split

// What a query's weights are made of: 2^(score - base) * factor.
struct Normalizer {
  float base, factor;
};

// A thread's buffers, kept from call to call.
struct Scratch {
  std::vector<float> keys;    // [kTiles, head_dim, kTileKeys]
  std::vector<float> scores;  // [kTileRows, kSplit]
  std::vector<float> sums;    // [group, kSplit]
};

template <class T>
class Scores {
 public:
  explicit Scores(const WindowScoresParams& p)
      : p_(p),
        group_(p.q_heads / p.kv_heads),
        rows_(int64_t(group_) * p.window),
        splits_((p.tokens + kSplit - 1) / kSplit),
        q_(size_t(p.q_heads) * p.window * p.head_dim),
        states_(size_t(p.q_heads) * p.window * splits_),
        normalizers_(size_t(p.q_heads) * p.window) {}

  void run() {
    // Queries in float32, [q_heads, window, head_dim], so that scores come out in units of log2.
    const float c = p_.scale * kLog2e;
    for (int64_t h = 0; h < p_.q_heads; ++h)
      for (int64_t w = 0; w < p_.window; ++w) {
        const T* from = static_cast<const T*>(p_.queries) + w * p_.q_stride_row + h * p_.q_stride_head;
        float* to = q_.data() + (h * p_.window + w) * p_.head_dim;
        for (int d = 0; d < p_.head_dim; ++d) to[d] = to_float(from[d]) * c;
      }
    each_split([&](int64_t kv_head, int64_t split, Scratch& scratch) {
      each_row(kv_head, split, scratch, [&](int64_t row, float* scores, int visible) {
        states_[size_t((kv_head * rows_ + row) * splits_ + split)] = softmax_row(scores, 0, visible);
      });
    });
    merge_states();
    each_split([&](int64_t kv_head, int64_t split, Scratch& scratch) { add_weights(kv_head, split, scratch); });
  }

 private:
  template <class Body>
  void each_split(Body body) {
    parallel_for(p_.kv_heads * splits_, 1, [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      scratch.keys.resize(size_t(kTiles * p_.head_dim * kTileKeys));
      scratch.scores.resize(size_t(kTileRows * kSplit));
      scratch.sums.resize(size_t(group_ * kSplit));
      for (int64_t i = begin; i < end; ++i) body(i / splits_, i % splits_, scratch);
    });
  }

  // Calls body(row, scores [kSplit], visible keys) for the rows of a KV head, head after head and then query after
  // query, that see any key of the split.
  template <class Body>
  void each_row(int64_t kv_head, int64_t split, Scratch& scratch, Body body) {
    const int64_t start = split * kSplit;
    const int keys = int(std::min<int64_t>(kSplit, p_.tokens - start)), tiles = (keys + kTileKeys - 1) / kTileKeys;
    for (int tile = 0; tile < tiles; ++tile)
      pack_tile(kv_head, start + tile * kTileKeys, scratch.keys.data() + tile * p_.head_dim * kTileKeys);
    const float* q = q_.data() + kv_head * rows_ * p_.head_dim;
    for (int64_t first = 0; first < rows_; first += kTileRows) {
      const int rows = int(std::min<int64_t>(kTileRows, rows_ - first));
      for (int tile = 0; tile < tiles; ++tile)
        score_tile(q + first * p_.head_dim, scratch.keys.data() + tile * p_.head_dim * kTileKeys,
                   scratch.scores.data() + tile * kTileKeys, rows, kTileKeys / kLanes, p_.head_dim);
      for (int r = 0; r < rows; ++r) {
        const int64_t position = p_.tokens - p_.window + (first + r) % p_.window;
        const int visible = int(std::clamp<int64_t>(position + 1 - start, 0, keys));
        if (visible > 0) body(first + r, scratch.scores.data() + r * kSplit, visible);
      }
    }
  }

  // Keys token .. token + kTileKeys - 1, transposed; those past the end as zeros.
  void pack_tile(int64_t kv_head, int64_t token, float* tile) const {
    const T* head = static_cast<const T*>(p_.k) + kv_head * p_.k_stride_head;
    constexpr int kWords = 4 / int(sizeof(T));  // elements a word
    for (int run = 0; run < kTileKeys; run += kLanes) {
      const bool whole = token + run + kLanes <= p_.tokens;
      const T* rows = head + (token + run) * p_.k_stride_token;
      int d = 0;
      for (; whole && d + kWords * kLanes <= p_.head_dim; d += kWords * kLanes)
        transpose_words(rows + d, p_.k_stride_token * int64_t(sizeof(T)), [&](int w, u32x16 x) {
          float* channel = tile + (d + kWords * w) * kTileKeys + run;
          if constexpr (kWords == 1) {
            store(channel, as_float(x));
          } else {
            store(channel, as_float(x << 16));
            store(channel + kTileKeys, as_float(x & 0xffff0000u));
          }
        });
      for (; d < p_.head_dim; ++d)
        for (int i = 0; i < kLanes; ++i)
          tile[d * kTileKeys + run + i] =
              token + run + i < p_.tokens ? to_float(rows[i * p_.k_stride_token + d]) : 0.0f;
    }
  }

  void merge_states() {
    parallel_for(int64_t(normalizers_.size()), 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        SoftmaxState total;
        for (int64_t s = 0; s < splits_; ++s) merge(total, nullptr, states_[size_t(row * splits_ + s)], nullptr, 0);
        normalizers_[size_t(row)] = {softmax_base(total.m), 1.0f / (total.l * float(p_.window))};
      }
    });
  }

  void add_weights(int64_t kv_head, int64_t split, Scratch& scratch) {
    std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0f);
    each_row(kv_head, split, scratch, [&](int64_t row, float* scores, int visible) {
      const Normalizer n = normalizers_[size_t(kv_head * rows_ + row)];
      const f32x16 base(n.base), factor(n.factor);
      float* sums = scratch.sums.data() + row / p_.window * kSplit;
      for_lanes(visible, [&](int64_t j, int count) {
        store_n(sums + j, fma(exp2(load(scores + j) - base), factor, load(sums + j)), count);
      });
    });
    const int64_t start = split * kSplit, keys = std::min<int64_t>(kSplit, p_.tokens - start);
    for (int64_t g = 0; g < group_; ++g)
      std::memcpy(p_.out + (kv_head * group_ + g) * p_.tokens + start, scratch.sums.data() + g * kSplit,
                  size_t(keys) * sizeof(float));
  }

  const WindowScoresParams& p_;
  const int64_t group_, rows_, splits_;  // rows: of one KV head
  std::vector<float> q_;                 // [q_heads, window, head_dim]
  std::vector<SoftmaxState> states_;     // [q_heads, window, splits]
  std::vector<Normalizer> normalizers_;  // [q_heads, window]
};

}  // namespace

void window_scores(const WindowScoresParams& p) {
  dispatch(p.dtype, [&](auto t) { Scores<decltype(t)>(p).run(); });
}

}  // namespace vericache::cpu
