// SPDX-License-Identifier: Apache-2.0
// How quant_attention.cu shares out its work: the tiles of all requests form one line, every block takes an equal run
// of it. The units of a single request may be cut into pieces instead (quant_single.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"
#include "reduce.cuh"

namespace vericache::cuda {

inline constexpr int kQuantTokens = 64;  // of a tile of quantized pages; lies within one page
inline constexpr int kMinRun = 4;        // tiles a block takes at least

// Request r has units (row block, KV head) numbered from first_unit[r] on, each of tiles[r] tiles, from first_tile[r]
// of the line on. Built by every block from the device-side lengths, so that no launch depends on any of them.
struct QuantLine {
  int* first_tile;   // [requests + 1]
  int* first_unit;   // [requests + 1]
  int* tiles;        // [requests]
  int* quant_tiles;  // [requests]: the first of a unit's tiles; the rest hold the tail
  int* last_pos;     // [requests]
  int* row_offset;   // [requests + 1]
  int requests;
  int grid;  // of the kernel that works on the tiles

  static __host__ __device__ int ints(int requests) { return 6 * (requests + 1); }
  __device__ void place(int* memory, int count, int launched_blocks) {
    requests = count;
    grid = launched_blocks;
    first_tile = memory;
    first_unit = first_tile + count + 1;
    tiles = first_unit + count + 1;
    quant_tiles = tiles + count + 1;
    last_pos = quant_tiles + count + 1;
    row_offset = last_pos + count + 1;
  }
  // Called by all threads of the block.
  __device__ void build(const QuantAttentionParams& p, int item_rows, int tail_tokens) const;

  // Which tiles the blocks take: block b those from begin(b) up to begin(b + 1).
  __device__ int total() const { return first_tile[requests]; }
  __device__ int blocks() const { return max(1, min(grid, total() / kMinRun)); }
  __device__ int begin(int block) const { return int(int64_t(total()) * min(block, blocks()) / blocks()); }
  __device__ int block_of(int tile) const { return int(((int64_t(tile) + 1) * blocks() - 1) / total()); }

  __device__ int request_of_row(int row) const {
    int lo = 0, hi = requests;  // row_offset[lo] <= row < row_offset[hi]
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (row_offset[mid] <= row ? lo : hi) = mid;
    }
    return lo;
  }
};

inline __device__ void QuantLine::build(const QuantAttentionParams& p, int item_rows, int tail_tokens) const {
  // All loads at once: one round trip, unless there are more rows or requests than threads.
  const int own_position = int(threadIdx.x) < p.rows ? p.row_position[threadIdx.x] : 0;
  for (int r = threadIdx.x; r <= requests; r += blockDim.x) {
    row_offset[r] = p.row_offsets[r];
    quant_tiles[r] = r < requests ? p.quant_len[r] / kQuantTokens : 0;
    last_pos[r] = -1;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < row_offset[requests]; row += blockDim.x)
    atomicMax(&last_pos[request_of_row(row)], row == int(threadIdx.x) ? own_position : p.row_position[row]);
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, group = p.q_heads / p.kv_heads;
    int tiles_before = 0, units_before = 0;
    for (int first = 0; first <= requests; first += 32) {
      const int r = first + lane;
      int own_units = 0, own_tiles = 0;
      if (r < requests) {
        const int rows = (row_offset[r + 1] - row_offset[r]) * group;
        const int tail = max(0, last_pos[r] + 1 - quant_tiles[r] * kQuantTokens);
        tiles[r] = quant_tiles[r] + (tail + tail_tokens - 1) / tail_tokens;
        own_units = (rows + item_rows - 1) / item_rows * p.kv_heads;
        own_tiles = own_units * tiles[r];
      }
      int all_units, all_tiles;
      const int units = warp_sum_before(own_units, lane, all_units);
      const int before = warp_sum_before(own_tiles, lane, all_tiles);
      if (r <= requests) {
        first_unit[r] = units_before + units;
        first_tile[r] = tiles_before + before;
      }
      units_before += all_units;
      tiles_before += all_tiles;
    }
  }
  __syncthreads();
}

// A place on the line.
struct LineCursor {
  int request, unit, row_block, kv_head;  // unit: number among all
  int tile, tiles, quant_tiles;           // of the unit

  __device__ void seek(const QuantLine& line, const QuantAttentionParams& p, int flat) {
    int lo = 0, hi = line.requests;
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (line.first_tile[mid] <= flat ? lo : hi) = mid;
    }
    request = lo;
    tiles = line.tiles[lo];
    const int local = flat - line.first_tile[lo], number = local / tiles;
    tile = local % tiles;
    unit = line.first_unit[lo] + number;
    kv_head = number % p.kv_heads;
    row_block = number / p.kv_heads;
    quant_tiles = line.quant_tiles[lo];
  }
};

// Every unit has `each` blocks, two or more, the first `extra` units one more. Divisions stand before a block's first
// load, so they are multiplications with 2^32 / divisor, rounded up: exact while dividend * divisor is below 2^32.
struct QuantPieces {
  int each, extra;
  uint32_t by_each, by_more;  // of each and each + 1

  static QuantPieces make(int blocks, int units) {
    const auto by = [](int divisor) { return uint32_t(((1ull << 32) + divisor - 1) / divisor); };
    const int each = blocks / units;
    return {each, blocks % units, by(each), by(each + 1)};
  }
  __device__ int count(int unit) const { return each + (unit < extra ? 1 : 0); }
  __device__ int first(int unit) const { return unit * each + min(unit, extra); }
  __device__ int unit_of(int block) const {
    return int(block < extra * (each + 1) ? __umulhi(block, by_more) : __umulhi(block - extra, by_each));
  }
  // Where piece `number` of a unit of so many tiles begins. Pieces meet and cover the unit whether or not it is exact.
  __device__ int begin(int unit, int tiles, int number) const {
    return int(__umulhi(uint32_t(tiles) * uint32_t(number), unit < extra ? by_more : by_each));
  }
};

}  // namespace vericache::cuda
