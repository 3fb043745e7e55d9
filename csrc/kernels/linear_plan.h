// SPDX-License-Identifier: Apache-2.0
// How linear.cu cuts a product, from the shape of the weights alone (R1). No CUDA here: testable on any machine.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vericache::cuda {

struct LinearPlan {
  int warps;     // of a block; 32 rows of w each
  int splits;    // parts of k, added left to right: 1, 2 or 4
  int tiles;     // ceil(n / tile rows)
  int k_stages;  // ceil(k / 64)

  constexpr int tile_rows() const { return 32 * warps; }
  // First stage of part i; part_begin(splits) is the end.
  constexpr int part_begin(int i) const { return int(int64_t(k_stages) * i / splits); }
};

// Picks the cut with the least to move for the busiest multiprocessor. The number of multiprocessors is a constant,
// that of an H100 or H200, and not the device's: bits must not depend on it. Cost of a block, in bytes, at 64 rows of
// x: its w, its x (which comes from the L2), and for a split tile the float32 partials written and read.
constexpr LinearPlan linear_plan(int n, int k, bool clusters) {
  constexpr int kMultiprocessors = 132, kTokens = 64;
  LinearPlan best{};
  int64_t best_cost = INT64_MAX;
  for (const int splits : {1, 2, 4}) {
    if (splits > 1 && !clusters) break;
    for (int warps = 8; warps >= 2; --warps) {
      LinearPlan plan{warps, splits, (n + 32 * warps - 1) / (32 * warps), (k + 63) / 64};
      if (plan.k_stages < 4 * splits) continue;
      if (splits > 1 && warps > 6) continue;  // two blocks a multiprocessor and three stages each: kSplitSmem
      const int64_t waves = (int64_t(plan.tiles) * splits + kMultiprocessors - 1) / kMultiprocessors;
      const int64_t part = (plan.k_stages + splits - 1) / splits;
      const int64_t bytes =
          (plan.tile_rows() + kTokens) * part * 128 + (splits > 1 ? int64_t(plan.tile_rows()) * kTokens * 8 : 0);
      if (waves * bytes < best_cost) {
        best_cost = waves * bytes;
        best = plan;
      }
    }
  }
  if (best.warps == 0) best = LinearPlan{2, 1, (n + 63) / 64, (k + 63) / 64};
  return best;
}

struct LinearHopperPlan {
  int rows;      // of w a tile; a multiple of 8 * splits
  int splits;    // parts of k, added left to right: 1, 2 or 4
  int k_stages;  // ceil(k / 64)

  // Of a tile with SwiGLU: a multiple of 16 * splits. No bits depend on it.
  constexpr int swiglu_rows() const { return std::max(1, rows / (16 * splits)) * 16 * splits; }
  // Of a tile that rotates: a multiple of 64, at most 192 in several parts of k, 256 in one. No bits depend on it.
  constexpr int rope_rows() const { return (rows + 63) / 64 * 64; }
  constexpr int part_begin(int i) const { return int(int64_t(k_stages) * i / splits); }
};

// Of so many rows of x a copy takes. No more: what it fills up past the last row costs it more than rows do.
constexpr int copied_tokens(int rows) { return (rows + 7) / 8 * 8; }

// For linear.cu: the same weighing with tiles of any multiple of 8 rows.
constexpr LinearHopperPlan linear_hopper_plan(int n, int k) {
  constexpr int kMultiprocessors = 132, kTokens = 64;
  LinearHopperPlan best{};
  int64_t best_cost = INT64_MAX;
  for (const int splits : {1, 2, 4}) {
    for (int rows = splits > 1 ? 192 : 256; rows >= 8 * splits; rows -= 8 * splits) {
      const LinearHopperPlan plan{rows, splits, (k + 63) / 64};
      if (splits > 1 && plan.k_stages < 4 * splits) continue;
      const int64_t tiles = (n + rows - 1) / rows;
      const int64_t waves = (tiles * splits + kMultiprocessors - 1) / kMultiprocessors;
      const int64_t part = (plan.k_stages + splits - 1) / splits;
      const int64_t bytes = (rows + kTokens) * part * 128 + (splits > 1 ? int64_t(rows) * kTokens * 8 : 0);
      if (waves * bytes < best_cost) {
        best_cost = waves * bytes;
        best = plan;
      }
    }
  }
  return best;
}

}  // namespace vericache::cuda
