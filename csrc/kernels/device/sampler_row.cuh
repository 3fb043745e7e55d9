// SPDX-License-Identifier: Apache-2.0
// One row of logits spread over the blocks of a cluster: which part a block reads, and how the blocks exchange results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cluster.cuh"
#include "common/params.h"
#include "cp_async.cuh"
#include "sampler_order.cuh"

namespace vericache::cuda {

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32, kMostBlocks = 8;

// Blocks a row, in device code: a cluster of them where there are clusters.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kRowBlocks = kMostBlocks;
#else
constexpr int kRowBlocks = 1;
#endif
__device__ __forceinline__ int64_t block_row() { return int(blockIdx.x) / kRowBlocks; }
__device__ __forceinline__ int block_rank() { return int(blockIdx.x) % kRowBlocks; }

// What the caller asks for, of one row.
struct SampleSettings {
  float temperature, top_p, min_p;
  int32_t top_k;
  uint32_t position, seed[2];
};

// Larger value first, then smaller index; an index of -1 loses to all.
struct Best {
  float score = -INFINITY;
  int32_t index = -1;

  __device__ __forceinline__ void offer(float s, int32_t i) {
    if (i >= 0 && (index < 0 || s > score || (s == score && i < index))) {
      score = s;
      index = i;
    }
  }
};

struct SampleExchange {
  SampleSettings settings;
  // Two of each, used in turn: one is written again only after a barrier at which all have read it.
  float4 message[2][kMostBlocks];
  uint64_t best[2][kSampleWarps];
};

// Quads of 4 entries, in eighths (or one part, in a cluster of one block) of the row; a thread reads those at tid,
// tid + 512, ... of its block's part. If `resident` is given, the first walk keeps what it reads there.
template <bool kResident>
class RowPart {
 public:
  __device__ RowPart(const float* logits, int vocab, float4* resident)
      : logits_(logits),
        resident_(resident),
        vocab_(vocab),
        begin_(part_begin(vocab, block_rank())),
        end_(part_begin(vocab, block_rank() + 1)) {}

  __device__ int entries() const { return min(4 * end_, vocab_) - min(4 * begin_, vocab_); }

  // An entry of this thread's own.
  __device__ float operator[](int index) const {
    if constexpr (kResident) return reinterpret_cast<const float*>(resident_)[index - 4 * begin_];
    return logits_[index];
  }

  // f(4 logits, index of the first) of each quad of this thread in order; -infinity stands beyond the vocabulary. To be
  // called first.
  template <class F>
  __device__ __forceinline__ void read(F f) const {
    stream<8>([&](float4 v, int first) {
      if constexpr (kResident) resident_[first / 4 - begin_] = v;
      f(v, first);
    });
  }

  // The same again.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (kResident) {
#pragma unroll 1
      for (int q = begin_ + fresh_thread(); q < end_; q += kSampleThreads) f(resident_[q - begin_], 4 * q);
    } else {
      stream<4>(f);
    }
  }

 private:
  static __device__ int part_begin(int vocab, int rank) { return int(int64_t((vocab + 3) / 4) * rank / kRowBlocks); }

  __device__ __forceinline__ float4 load(int quad) const {
    const float* from = logits_ + 4 * quad;
    float4 v{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    if (quad >= end_) return v;
    const int count = vocab_ - 4 * quad;
    if (count >= 4 && reinterpret_cast<uintptr_t>(logits_) % 16 == 0) return *reinterpret_cast<const float4*>(from);
    v.x = from[0];
    if (count > 1) v.y = from[1];
    if (count > 2) v.z = from[2];
    if (count > 3) v.w = from[3];
    return v;
  }

  // kAhead quads are in flight.
  template <int kAhead, class F>
  __device__ __forceinline__ void stream(F f) const {
    float4 ahead[kAhead];
    int quad = begin_ + int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(quad + i * kSampleThreads);
    while (quad < end_) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (quad < end_) {
          f(ahead[i], 4 * quad);
          ahead[i] = load(quad + kAhead * kSampleThreads);
        }
        quad += kSampleThreads;
      }
    }
  }

  const float* logits_;
  float4* resident_;
  int vocab_, begin_, end_;
};

class RowCluster {
 public:
  explicit __device__ RowCluster(SampleExchange& shared) : s_(shared) {}

  // The best of the block's threads, to every thread; scores are not NaN. Of those of the same score as the best, the
  // one with the lowest index.
  __device__ Best block_best(Best mine) {
    const auto reduce = [](uint32_t& key, uint32_t& index) {
      const uint32_t largest = __reduce_max_sync(kAllLanes, key);
      index = __reduce_min_sync(kAllLanes, key == largest ? index : ~0u);
      key = largest;
    };
    const int thread = fresh_thread();
    uint32_t key = mine.index < 0 ? 0 : ordered_bits(mine.score), index = uint32_t(mine.index);
    reduce(key, index);
    best_turn_ ^= 1;
    if (thread % 32 == 0) s_.best[best_turn_][thread / 32] = uint64_t(key) << 32 | index;
    __syncthreads();
    const uint64_t other = s_.best[best_turn_][thread % kSampleWarps];
    key = uint32_t(other >> 32), index = uint32_t(other);
    reduce(key, index);
    return {key == 0 ? -INFINITY : key_to_float(key), int32_t(index)};
  }

  // Stores this block's message with every block of the cluster; then all messages can be read. What a block wrote to
  // its shared memory before can be read by the others, too.
  __device__ void exchange(float4 message) {
    turn_ ^= 1;
    const int thread = fresh_thread();
    if (thread < kRowBlocks)
      store_cluster_float4(map_to_rank(smem_address(&s_.message[turn_][block_rank()]), thread), message);
    cluster_barrier();
  }
  __device__ float4 message(int block) const { return s_.message[turn_][block]; }

 private:
  SampleExchange& s_;
  int turn_ = 0, best_turn_ = 0;
};

}  // namespace vericache::cuda
