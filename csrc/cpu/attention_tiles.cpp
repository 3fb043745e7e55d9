// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention_tiles.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace vericache::cpu {
namespace {

template <int kRows, int kVectors>
void score_block(const float* __restrict q, const float* __restrict keys, float* __restrict scores, int head_dim) {
  f32x16 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = f32x16(0.0f);
  for (int d = 0; d < head_dim; ++d) {
    f32x16 k[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) k[c] = load(keys + d * kTileKeys + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const f32x16 x = f32x16(q[r * head_dim + d]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) store(scores + r * kSplit + c * kLanes, sum[r][c]);
}

template <int kRows, int kVectors>
void value_block(const float* __restrict weights, const float* __restrict values, float* __restrict out, int keys,
                 int head_dim) {
  f32x16 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = load(out + r * head_dim + c * kLanes);
  for (int j = 0; j < keys; ++j) {
    f32x16 v[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) v[c] = load(values + int64_t(j) * head_dim + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const f32x16 w = f32x16(weights[r * kSplit + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = fma(w, v[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) store(out + r * head_dim + c * kLanes, sum[r][c]);
}

using ScoreBlock = void (*)(const float*, const float*, float*, int);
using ValueBlock = void (*)(const float*, const float*, float*, int, int);

// Entry (rows - 1) * kTileVectors + (vectors - 1).
template <size_t... I>
constexpr std::array<ScoreBlock, sizeof...(I)> score_blocks(std::index_sequence<I...>) {
  return {score_block<int(I) / kTileVectors + 1, int(I) % kTileVectors + 1>...};
}
template <size_t... I>
constexpr std::array<ValueBlock, sizeof...(I)> value_blocks(std::index_sequence<I...>) {
  return {value_block<int(I) / kTileVectors + 1, int(I) % kTileVectors + 1>...};
}
constexpr auto kScoreBlocks = score_blocks(std::make_index_sequence<kTileRows * kTileVectors>());
constexpr auto kValueBlocks = value_blocks(std::make_index_sequence<kTileRows * kTileVectors>());

constexpr float kLaneIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

}  // namespace

void score_tile(const float* q, const float* keys, float* scores, int rows, int vectors, int head_dim) {
  for (int v = 0; v < vectors; v += kTileVectors) {
    const int width = std::min(kTileVectors, vectors - v);
    kScoreBlocks[size_t((rows - 1) * kTileVectors + width - 1)](q, keys + v * kLanes, scores + v * kLanes, head_dim);
  }
}

void value_tile(const float* weights, const float* values, float* out, int rows, int keys, int head_dim) {
  const int vectors = head_dim / kLanes;
  for (int v = 0; v < vectors; v += kTileVectors) {
    const int width = std::min(kTileVectors, vectors - v);
    kValueBlocks[size_t((rows - 1) * kTileVectors + width - 1)](weights, values + v * kLanes, out + v * kLanes, keys,
                                                                head_dim);
  }
}

SoftmaxState softmax_row(float* scores, int begin, int end) {
  const int first = begin / kLanes * kLanes, last = (end - 1) / kLanes * kLanes;  // the outer vectors
  const f32x16 hidden(-std::numeric_limits<float>::infinity());
  const f32x16 lane = load(kLaneIndex);
  store(scores + first, where_less(lane, f32x16(float(begin - first)), hidden, load(scores + first)));
  store(scores + last, where_less(lane, f32x16(float(end - last)), load(scores + last), hidden));

  f32x16 top = hidden;
  for (int j = first; j <= last; j += kLanes) top = max(load(scores + j), top);
  SoftmaxState state;
  state.m = hmax(top);
  const f32x16 base(softmax_base(state.m));
  f32x16 sum(0.0f);
  for (int j = first; j <= last; j += kLanes) {
    const f32x16 w = exp2(load(scores + j) - base);
    store(scores + j, w);
    sum = sum + w;
  }
  state.l = hsum(sum);
  return state;
}

}  // namespace vericache::cpu
