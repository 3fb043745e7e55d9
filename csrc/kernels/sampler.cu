// SPDX-License-Identifier: Apache-2.0
// Draws one token a row: argmax(filter(logits / temperature) + gumbel(seed, position)), and its log-softmax (R4). One
// launch, nothing returns to the host in between.
//
// Grid: one cluster of 8 blocks a row (of 1 block before sm_90); block i reads the i-th eighth of the vocabulary, in
// quads of 4 entries. Block: 512 threads. Shared memory: a histogram of 256 bins x 32 lanes x 3 words, so that the
// atomics of one warp never meet, and the slots through which the blocks exchange results.
//
// The filters keep a prefix of one total order: value descending, index ascending, packed into a 56-bit integer as
// (ordered bits of the value) << 24 | (2^24 - 1 - index). So their joint effect is one cut, found by radix selection, 8
// bits a pass, by count (top-k) or by mass (top-p). Masses exp(value - largest) are integers in units of 2^-36: their
// sums do not depend on the order of the atomics.
//
// Reduction order (R1): the log-softmax's sum is a running one a thread (quads tid, tid + 512, ... of the block's
// part), then the butterflies of device/reduce.cuh, then the blocks left to right; it depends on the vocabulary alone.
// All else is integers, maxima and comparisons. Held by bench/gpu/dense_check.cu (sample).
#include <cfloat>
#include <cmath>

#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kThreads = 512, kClusterBlocks = 8, kBins = 256, kIndexBits = 24;
constexpr uint32_t kIndexMask = (1u << kIndexBits) - 1;
constexpr float kMassUnit = 0x1p36f;
constexpr float kSmallestMass = -25.7f;  // e^x is below half a unit
constexpr int kMaxVocab = 500000;        // lane sums of 18-bit halves of masses stay below 2^32 in a one-block cluster

// What a block tells its cluster in one exchange.
struct alignas(16) Message {
  float largest, sum, score;
  int32_t index;
  uint64_t mass;
  uint32_t nan, unused;
};

static_assert(sizeof(Message) == 32);

struct Shared {
  uint32_t counts[kBins][32], mass_low[kBins][32], mass_high[kBins][32];
  // Two of each, used in turn: a block writes one again only after a barrier at which all have read it.
  uint32_t bin_count[2][kBins];
  uint64_t bin_mass[2][kBins];
  Message message[2];
  Message all[kClusterBlocks];  // what the last exchange brought, block after block
  uint64_t total_count[kBins], total_mass[kBins];
  uint64_t mass_scratch[32];
  float score_scratch[32];
  int32_t index_scratch[32];
  uint64_t found_bin, found_rest, found_count, found_mass;
};

// Larger value first, then smaller index; an index of -1 loses to all.
struct Best {
  float score;
  int32_t index;

  __device__ __forceinline__ void offer(float s, int32_t i) {
    if (i >= 0 && (index < 0 || s > score || (s == score && i < index))) {
      score = s;
      index = i;
    }
  }
};

// A float's bits, ordered as unsigned integers like the values; -0 counts as +0.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t place(float value, int32_t index) {
  return uint64_t(ordered_bits(value)) << kIndexBits | (kIndexMask - uint32_t(index));
}

__device__ __forceinline__ uint64_t mass_of(float value, float largest) {
  const float x = value - largest;
  return x < kSmallestMass ? 0 : __float2ull_rn(expf(x) * kMassUnit);
}

__device__ __forceinline__ float gumbel(uint32_t bits) {
  const double u = (double(bits >> 8) + 0.5) * 0x1p-24;
  return float(-log(-log(u)));
}

// The same to within 1e-5, without double precision: -log u from the smaller of u and 1 - u.
__device__ __forceinline__ float gumbel_estimate(uint32_t bits) {
  const uint32_t n = bits >> 8;
  const float below = (float(n) + 0.5f) * 0x1p-24f, above = (float(0xffffffu - n) + 0.5f) * 0x1p-24f;
  return -logf(n < 0x800000u ? -logf(below) : -log1pf(-above));
}
constexpr float kGumbelBound = 17.3287f;  // that of u = 1 - 2^-25 is 17.32868

class RowSampler {
 public:
  __device__ RowSampler(const SampleParams& p, Shared& shared, int blocks)
      : p_(p), s_(shared), blocks_(blocks), rank_(int(blockIdx.x) % blocks), row_(int(blockIdx.x) / blocks) {
    const int quads = (p.vocab + 3) / 4;
    quad_begin_ = int(int64_t(quads) * rank_ / blocks);
    quad_end_ = int(int64_t(quads) * (rank_ + 1) / blocks);
    logits_ = p.logits + row_ * p.logits_stride_row;
    wide_ = reinterpret_cast<uintptr_t>(logits_) % 16 == 0;
  }

  __device__ void run() {
    softmax_pass();
    if (nan_ || !isfinite(largest_logit_)) return finish(-1, NAN);
    const float temperature = p_.temperature[row_];
    int32_t token = argmax_;
    if (temperature != 0.0f &&
        isfinite(largest_logit_ / temperature)) {  // else the limit of a temperature that goes to 0
      temperature_ = temperature;
      largest_ = largest_logit_ / temperature;
      filter();
      token = draw();
    }
    finish(token, (logits_[token] - largest_logit_) - logf(sum_));
  }

 private:
  // f(value of 4 logits, first index, how many of them exist)
  template <class F>
  __device__ __forceinline__ void each_quad(F f) const {
    for (int q = quad_begin_ + int(threadIdx.x); q < quad_end_; q += kThreads) {
      const int first = 4 * q, count = min(4, p_.vocab - first);
      float x[4];
      if (wide_ && count == 4) {
        const float4 v = *reinterpret_cast<const float4*>(logits_ + first);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = i < count ? logits_[first + i] : -INFINITY;
      }
      f(x, first, count);
    }
  }

  // f(value, index) for logit / temperature of each entry not yet cut off
  template <class F>
  __device__ __forceinline__ void each_kept(F f) const {
    each_quad([&](const float (&x)[4], int first, int count) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = x[i] / temperature_;
        if (i < count && place(value, first + i) >= cut_) f(value, first + i);
      }
    });
  }

  __device__ Best block_best(Best best) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto butterfly = [](Best b) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        const float score = __shfl_xor_sync(0xffffffffu, b.score, mask);
        const int32_t index = __shfl_xor_sync(0xffffffffu, b.index, mask);
        b.offer(score, index);
      }
      return b;
    };
    best = butterfly(best);
    __syncthreads();
    if (lane == 0) {
      s_.score_scratch[warp] = best.score;
      s_.index_scratch[warp] = best.index;
    }
    __syncthreads();
    best = lane < kThreads / 32 ? Best{s_.score_scratch[lane], s_.index_scratch[lane]} : Best{-INFINITY, -1};
    return butterfly(best);
  }

  // Publishes this block's message and fetches those of all blocks into s_.all. One warp fetches, and each word it
  // loads is stored before the block goes on: a load still in flight from a block that has left is a fault.
  __device__ void exchange(const Message& mine) {
    Message* slot = &s_.message[turn_];
    turn_ ^= 1;
    if (threadIdx.x == 0) *slot = mine;
    cluster_barrier();
    if (threadIdx.x < 2 * blocks_) {
      const int block = threadIdx.x / 2, half = threadIdx.x % 2;
      const uint32_t at = map_to_rank(smem_address(slot) + 16 * half, block);
      reinterpret_cast<float4*>(&s_.all[block])[half] = load_cluster_float4(at);
    }
    __syncthreads();
  }

  // f(message) for each block, left to right, by every thread.
  template <class F>
  __device__ __forceinline__ void each_message(F f) const {
    for (int r = 0; r < blocks_; ++r) f(s_.all[r]);
  }

  // Largest logit, its lowest index, the sum of exp(logit - largest), and whether there is a NaN.
  __device__ void softmax_pass() {
    float largest = -INFINITY, sum = 0.0f;
    Best best{-INFINITY, -1};
    bool nan = false;
    each_quad([&](const float (&x)[4], int first, int count) {
      float top = largest;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        nan |= x[i] != x[i];
        if (i < count) best.offer(x[i], first + i);
        top = fmaxf(top, x[i]);
      }
      if (top == -INFINITY) return;
      float quad = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) quad += expf(x[i] - top);
      sum = (largest == -INFINITY ? 0.0f : sum * expf(largest - top)) + quad;
      largest = top;
    });
    const bool any_nan = __syncthreads_or(nan);
    best = block_best(best);
    const float block_largest = best.index < 0 ? -INFINITY : best.score;
    sum = largest == -INFINITY ? 0.0f : sum * expf(largest - block_largest);
    __syncthreads();
    sum = block_sum(sum, s_.score_scratch);

    exchange(Message{block_largest, sum, best.score, best.index, 0, any_nan, 0});
    Best all{-INFINITY, -1};
    nan_ = false;
    each_message([&](const Message& m) {
      all.offer(m.score, m.index);
      nan_ |= m.nan != 0;
    });
    largest_logit_ = all.score;
    argmax_ = all.index;
    sum_ = 0.0f;
    each_message([&](const Message& m) {
      if (m.largest != -INFINITY) sum_ += m.sum * expf(m.largest - largest_logit_);
    });
  }

  __device__ void filter() {
    const int32_t top_k = p_.top_k[row_];
    const float top_p = p_.top_p[row_], min_p = p_.min_p[row_];
    if (top_k > 0 && top_k < p_.vocab) select<false>(uint64_t(top_k));
    if (top_p < 1.0f) {
      uint64_t mass = 0;
      each_kept([&](float value, int32_t) { mass += mass_of(value, largest_); });
      mass = block_sum(mass, s_.mass_scratch);
      exchange(Message{0.0f, 0.0f, 0.0f, 0, mass, 0, 0});
      uint64_t total = 0;
      each_message([&](const Message& m) { total += m.mass; });
      const double target = ceil(double(top_p) * double(total));
      select<true>(target < 1.0 ? 1 : min(uint64_t(target), total));
    }
    min_p_ = min_p;
  }

  // Moves the cut up to the entry at which the count or mass of those kept so far, from the top, reaches `target`.
  template <bool kByMass>
  __device__ void select(uint64_t target) {
    uint64_t prefix = 0;  // the bits of the new cut that are known
    for (int shift = 32 + kIndexBits - 8;; shift -= 8) {
      clear_histogram<kByMass>();
      const int lane = threadIdx.x % 32;
      each_kept([&](float value, int32_t index) {
        const uint64_t at = place(value, index);
        if (at >> shift >> 8 != prefix) return;
        const uint32_t bin = uint32_t(at >> shift) & 255;
        atomicAdd(&s_.counts[bin][lane], 1u);
        if constexpr (kByMass) {
          const uint64_t mass = mass_of(value, largest_);
          if (mass == 0) return;
          atomicAdd(&s_.mass_low[bin][lane], uint32_t(mass) & 0x3ffffu);
          atomicAdd(&s_.mass_high[bin][lane], uint32_t(mass >> 18));
        }
      });
      const auto [bin, rest, count, weight] = find_bin<kByMass>(target);
      prefix = prefix << 8 | bin;
      target = rest;
      if (shift == 0 || count == 1 || (!kByMass && weight == rest)) {
        cut_ = max(cut_, prefix << shift);
        return;
      }
    }
  }

  template <bool kByMass>
  __device__ void clear_histogram() {
    __syncthreads();  // the last histogram has been read
    uint32_t* words = &s_.counts[0][0];
    constexpr int kWords = kBins * 32 * (kByMass ? 3 : 1);  // the three lie one after the other
    for (int i = threadIdx.x; i < kWords; i += kThreads) words[i] = 0;
    __syncthreads();
  }

  struct Bin {
    uint64_t bin, rest, count, weight;
  };

  // The bin, from the top, in which the sum over the cluster reaches `target`; and what of the target falls in it.
  template <bool kByMass>
  __device__ Bin find_bin(uint64_t target) {
    __syncthreads();  // the histogram is complete
    const int turn = turn_;
    turn_ ^= 1;
    if (threadIdx.x < kBins) {
      const int bin = threadIdx.x;
      uint64_t count = 0, mass = 0;
      for (int i = 0; i < 32; ++i) {
        const int lane = (i + bin) % 32;  // another bank for each thread of a warp
        count += s_.counts[bin][lane];
        if constexpr (kByMass) mass += s_.mass_low[bin][lane] + (uint64_t(s_.mass_high[bin][lane]) << 18);
      }
      s_.bin_count[turn][bin] = uint32_t(count);
      s_.bin_mass[turn][bin] = mass;
    }
    cluster_barrier();
    if (threadIdx.x < kBins) {
      const int bin = threadIdx.x;
      uint64_t count = 0, mass = 0;
      for (int r = 0; r < blocks_; ++r) {
        count += load_cluster_u32(map_to_rank(smem_address(&s_.bin_count[turn][bin]), r));
        if constexpr (kByMass) mass += load_cluster_u64(map_to_rank(smem_address(&s_.bin_mass[turn][bin]), r));
      }
      s_.total_count[bin] = count;
      s_.total_mass[bin] = kByMass ? mass : count;
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l owns bins 255 - 8 l .. 248 - 8 l: descending
      const int lane = threadIdx.x;
      uint64_t count[8], weight[8], own = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int bin = kBins - 1 - 8 * lane - i;
        count[i] = s_.total_count[bin];
        weight[i] = s_.total_mass[bin];
        own += weight[i];
      }
      uint64_t before = own;  // inclusive scan, then exclusive
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, before, step);
        if (lane >= step) before += other;
      }
      before -= own;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (before < target && target <= before + weight[i]) {
          s_.found_bin = uint64_t(kBins - 1 - 8 * lane - i);
          s_.found_rest = target - before;
          s_.found_count = count[i];
          s_.found_mass = weight[i];
        }
        before += weight[i];
      }
    }
    __syncthreads();
    return {s_.found_bin, s_.found_rest, s_.found_count, s_.found_mass};
  }

  __device__ bool below_min_p(float value) const {
    if (min_p_ <= 0.0f || value >= largest_) return false;
    const float estimate = value - largest_ - logf(min_p_);
    if (fabsf(estimate) > 1e-3f) return estimate < 0.0f;
    return double(value) < double(largest_) + log(double(min_p_));
  }

  __device__ int32_t draw() {
    const uint64_t seed = uint64_t(p_.seed[row_]);
    const uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32), position = uint32_t(p_.row_position[row_]);
    Best best{-INFINITY, -1};
    // A good first score lets the bound below skip most of the vocabulary.
    if (place(largest_, argmax_) >= cut_)
      best.offer(largest_ + gumbel(philox4x32(uint32_t(argmax_) / 4, position, key0, key1)[argmax_ % 4]), argmax_);
    each_quad([&](const float (&x)[4], int first, int count) {
      float value[4];
      bool possible = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = x[i] / temperature_;
        // Float addition is monotonic: no noise could make it win.
        const bool wins = best.index < 0 || !(value[i] + kGumbelBound < best.score);
        const bool kept = i < count && place(value[i], first + i) >= cut_ && wins && !below_min_p(value[i]);
        if (!kept) value[i] = NAN;
        possible |= kept;
      }
      if (!possible) return;
      const auto bits = philox4x32(uint32_t(first) / 4, position, key0, key1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (value[i] != value[i]) continue;
        const float margin = 1e-3f + fabsf(value[i]) * 1e-6f;
        if (best.index >= 0 && value[i] + gumbel_estimate(bits[i]) + margin < best.score) continue;
        best.offer(value[i] + gumbel(bits[i]), first + i);
      }
    });
    best = block_best(best);
    Best all{-INFINITY, -1};
    exchange(Message{0.0f, 0.0f, best.score, best.index, 0, 0, 0});
    each_message([&](const Message& m) { all.offer(m.score, m.index); });
    return all.index;
  }

  __device__ void finish(int32_t token, float logprob) {
    if (rank_ == 0 && threadIdx.x == 0) {
      p_.token[row_] = token;
      p_.logprob[row_] = logprob;
    }
    cluster_barrier();  // no block leaves while another reads its shared memory
  }

  const SampleParams& p_;
  Shared& s_;
  const int blocks_, rank_;
  const int64_t row_;
  int quad_begin_, quad_end_;
  const float* logits_;
  bool wide_, nan_ = false;
  int turn_ = 0;
  float largest_logit_ = 0.0f, sum_ = 0.0f, temperature_ = 1.0f, largest_ = 0.0f, min_p_ = 0.0f;
  int32_t argmax_ = -1;
  uint64_t cut_ = 0;  // entries placed below it are filtered out
};

__global__ void __launch_bounds__(kThreads) sample_rows(const __grid_constant__ SampleParams p, int blocks) {
  extern __shared__ __align__(16) uint8_t smem[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  RowSampler(p, *reinterpret_cast<Shared*>(smem), blocks).run();
}

}  // namespace

size_t sample_workspace_bytes(const SampleParams&) { return 0; }

void sample(const SampleParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return;
  VC_CHECK(p.vocab > 0 && p.vocab <= kMaxVocab, "sample: the vocabulary has ", p.vocab, " entries; 1 to ", kMaxVocab,
           " are supported.");
  const DeviceInfo info = device_info();
  const int blocks = info.hopper_or_later ? kClusterBlocks : 1;
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.rows) * unsigned(blocks));
  shape.block = dim3(kThreads);
  shape.smem = sizeof(Shared);
  shape.cluster = blocks;
  VC_CHECK(int(shape.smem) <= info.smem_optin, "sample: needs ", shape.smem,
           " bytes of shared memory a block, this GPU has ", info.smem_optin, ".");
  allow_all_smem<sample_rows>(info);
  launch(sample_rows, shape, info, stream, p, blocks);
}

}  // namespace vericache::cuda
