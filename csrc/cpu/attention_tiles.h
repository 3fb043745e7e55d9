// SPDX-License-Identifier: Apache-2.0
// The inner loops of attention: small matrix products on float32 tiles, and the softmax of one row of scores.
//
// Reduction order (R1): a score is one chain of fma over head_dim, from channel 0 up; an output channel is one chain of
// fma over the keys, in order; a sum of weights runs over 16 lanes (key % 16), then over the tree of hsum. How
// many rows or columns are computed side by side changes none of these. Held by tests/ops/test_paged_attention.py.
#pragma once

#include "cpu/softmax_state.h"

namespace vericache::cpu {

inline constexpr int kSplit = 256;    // keys of one softmax state: the absolute cuts of R1
inline constexpr int kTileKeys = 64;  // keys converted to float32 at a time
inline constexpr int kMaxHeadDim = 256;

// Registers bound the tile: rows x vectors accumulators, one vector of rows and one of columns.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 6, kTileVectors = 4;
#else
inline constexpr int kTileRows = 3, kTileVectors = 2;
#endif

// scores[r, j] = sum over d of q[r, d] * keys[d, j] for r < rows <= kTileRows, j < 16 * vectors <= kTileKeys.
//   q [rows, head_dim], keys [head_dim, kTileKeys], scores [rows, kSplit]
void score_tile(const float* q, const float* keys, float* scores, int rows, int vectors, int head_dim);

// out[r, d] += sum over j < keys of weights[r, j] * values[j, d] for r < rows <= kTileRows.
//   weights [rows, kSplit], values [keys, head_dim], out [rows, head_dim]
void value_tile(const float* weights, const float* values, float* out, int rows, int keys, int head_dim);

// The softmax of scores[begin .. end) in place; 0 <= begin < end <= kSplit. Elements outside are never part of any
// arithmetic: they may be NaN. Within the outer vectors of 16 they come back as 0.
SoftmaxState softmax_row(float* scores, int begin, int end);

}  // namespace vericache::cpu
