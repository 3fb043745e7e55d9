// SPDX-License-Identifier: Apache-2.0
// How quant_attention.cu shares out its work: the tiles of all requests form one line, every warp takes a run of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace vericache::cuda {

inline constexpr int kQuantTokens = 64, kTailTokens = 16;  // of a tile
inline constexpr int kItemRows = 8;                        // of a unit: query rows times the heads of a group
inline constexpr int kMinRun = 2;                          // tiles

// Request r has units (row block, KV head) numbered from first_unit[r] on, each of tiles[r] tiles, from first_tile[r]
// of the line on. Built by every block from the device-side lengths; block 0 leaves a copy for the merge.
struct QuantLine {
  int* first_tile;  // [requests + 1]
  int* first_unit;  // [requests + 1]
  int* tiles;       // [requests]
  int* last_pos;    // [requests]
  int* row_offset;  // [requests + 1]

  static __host__ __device__ int ints(int requests) { return 5 * (requests + 1); }
  __device__ void place(int* memory, int requests) {
    first_tile = memory;
    first_unit = first_tile + requests + 1;
    tiles = first_unit + requests + 1;
    last_pos = tiles + requests + 1;
    row_offset = last_pos + requests + 1;
  }
  // Tiles a warp takes.
  __device__ int run(int requests, int workers) const {
    return max(kMinRun, (first_tile[requests] + workers - 1) / workers);
  }
};

// Called by all threads of the block.
inline __device__ void build_line(const QuantLine& line, const QuantAttentionParams& p) {
  for (int r = threadIdx.x; r <= p.requests; r += blockDim.x) {
    line.row_offset[r] = p.row_offsets[r];
    line.last_pos[r] = -1;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < line.row_offset[p.requests]; row += blockDim.x) {
    int lo = 0, hi = p.requests;
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (line.row_offset[mid] <= row ? lo : hi) = mid;
    }
    atomicMax(&line.last_pos[lo], p.row_position[row]);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < p.requests; r += blockDim.x) {
    const int tail = max(0, line.last_pos[r] + 1 - p.quant_len[r]);
    line.tiles[r] = p.quant_len[r] / kQuantTokens + (tail + kTailTokens - 1) / kTailTokens;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int tiles = 0, units = 0;
    for (int first = 0; first <= p.requests; first += 32) {
      const int r = first + lane;
      int own_units = 0, own_tiles = 0;
      if (r < p.requests) {
        const int rows = (line.row_offset[r + 1] - line.row_offset[r]) * (p.q_heads / p.kv_heads);
        own_units = (rows + kItemRows - 1) / kItemRows * p.kv_heads;
        own_tiles = own_units * line.tiles[r];
      }
      int sum_units = own_units, sum_tiles = own_tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int u = __shfl_up_sync(0xffffffffu, sum_units, step), n = __shfl_up_sync(0xffffffffu, sum_tiles, step);
        if (lane >= step) sum_units += u, sum_tiles += n;
      }
      if (r <= p.requests) {
        line.first_unit[r] = units + sum_units - own_units;
        line.first_tile[r] = tiles + sum_tiles - own_tiles;
      }
      units += __shfl_sync(0xffffffffu, sum_units, 31);
      tiles += __shfl_sync(0xffffffffu, sum_tiles, 31);
    }
  }
  __syncthreads();
}

// A place on the line.
struct LineCursor {
  int request, unit, row_block, kv_head;  // unit: number among all
  int tile, tiles, quant_tiles;           // of the unit

  __device__ void seek(const QuantLine& line, const QuantAttentionParams& p, int flat) {
    int lo = 0, hi = p.requests;
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
    quant_tiles = p.quant_len[lo] / kQuantTokens;
  }
  __device__ bool is_tail() const { return tile >= quant_tiles; }
  __device__ const char* page(const QuantAttentionParams& p) const {
    const int64_t at =
        is_tail() ? p.tail_table[request * p.tail_stride_request + (tile - quant_tiles) * kTailTokens / p.page_size]
                  : p.quant_table[request * p.quant_stride_request + tile * kQuantTokens / p.page_size];
    return reinterpret_cast<const char*>(at);
  }
};

}  // namespace vericache::cuda
