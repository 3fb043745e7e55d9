// SPDX-License-Identifier: Apache-2.0
// The filters and the draw of a row whose kept entries are few: no histogram of the row, one exchange, and the rest in
// the cluster's first block.
//
// The largest logits of groups of threads, known from the softmax, are a sample of the row's upper end: as many
// entries as there are such peaks above a bound, or more, are above it. So above a bound that k peaks exceed are the
// top-k entries, and few others. For top-p the bound that kPeaksByMass peaks exceed is a guess: whether the entries
// above it weigh enough is known when the mass of the row is, from the same walk that lists them.
//
// The listed entries then are compared with each other. If they are too many or, in top-p, do not suffice, the caller
// takes the filters of device/sampler_filter.cuh, which find the same cut.
#pragma once

#include "philox.cuh"
#include "reduce.cuh"
#include "sampler_filter.cuh"
#include "sampler_noise.cuh"
#include "sampler_row.cuh"

namespace vericache::cuda {

constexpr int kPeaks = kSampleThreads / 4;  // a block's; each of 4 threads
constexpr int kPeaksByMass = 64;
constexpr int kMostByCount = 256;                            // a larger top_k is not tried
constexpr int kFewOfBlock = 128, kMostFew = kSampleThreads;  // listed entries
constexpr int kNearestWithoutMass = 208;                     // the bin of distance_bin from which on nothing has a mass

struct FewShared {
  float peaks[kMostBlocks][kPeaks];
  alignas(16) uint32_t counts[kBins][kCopies];
  uint64_t gathered[kMostBlocks][kFewOfBlock];  // in the first block
  uint64_t place[kMostFew], mass[kMostFew];
  uint64_t warp_total[kSampleWarps], warp_near[kSampleWarps];
  uint32_t size;
  int32_t bin;
};

template <bool kResident>
class FewEntries {
 public:
  __device__ FewEntries(const RowPart<kResident>& part, FewShared& shared, const SampleSettings& settings, int vocab)
      : part_(part), s_(shared), settings_(settings), vocab_(vocab) {}

  __device__ __forceinline__ bool by_count() const { return settings_.top_k > 0 && settings_.top_k < vocab_; }
  __device__ __forceinline__ bool by_mass() const { return settings_.top_p < 1.0f; }
  __device__ __forceinline__ bool worth_trying() const {
    return settings_.temperature != 0.0f && (by_count() ? settings_.top_k <= kMostByCount : by_mass());
  }

  // Before a barrier of the cluster, when all its blocks have started: every block gets every peak.
  __device__ __forceinline__ void send_peak(float largest_of_thread) {
    const int thread = fresh_thread();
    float peak = fmaxf(largest_of_thread, __shfl_xor_sync(kAllLanes, largest_of_thread, 1));
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
    for (int r = thread % 4; r < kRowBlocks; r += 4)
      store_cluster_float(map_to_rank(smem_address(&s_.peaks[block_rank()][thread / 4]), r), peak);
    uint4* words = reinterpret_cast<uint4*>(s_.counts);
    if (thread < kBins * kCopies / 4) words[thread] = make_uint4(0, 0, 0, 0);
    if (thread == 0) s_.size = 0, s_.bin = kBins - 1;
  }

  // After it. Whether the row's token has been found: in `token`, in the first block.
  __device__ __forceinline__ bool run(RowCluster& cluster, float temperature, float largest, int32_t& token) {
    temperature_ = temperature, largest_ = largest;
    if (!by_count() && !is_ordinary()) return false;
    find_bin();
    const int bin = s_.bin;
    if (bin == kBins - 1) return false;
    cluster.exchange(list(bin));
    uint64_t total = 0, near = 0;
    int count = 0;
    bool fits = true;
#pragma unroll 1
    for (int r = 0; r < kRowBlocks; ++r) {
      const Message m = message(cluster, r);
      total += m.total, near += m.near, count += m.count;
      fits &= m.count <= kFewOfBlock;
    }
    if (!fits || count > kMostFew) return false;
    const bool whole = !by_count();  // top-p of the whole row
    const uint64_t target = whole ? mass_target(total) : 0;
    if (whole && near < target) return false;
    if (block_rank() == 0) token = draw(cluster, count, target);
    return true;
  }

 private:
  struct Message {
    uint64_t total, near;
    int count;
  };
  // Sums of masses have fewer than 56 bits, the count 8.
  __device__ static Message message(const RowCluster& cluster, int block) {
    const float4 m = cluster.message(block);
    const uint32_t high = __float_as_uint(m.y);
    return {uint64_t(high & 0xffffffu) << 32 | __float_as_uint(m.x),
            uint64_t(__float_as_uint(m.w)) << 32 | __float_as_uint(m.z), int(high >> 24)};
  }

  __device__ __forceinline__ int bin_of(float value) const { return distance_bin(largest_, value, kBins - 1); }

  __device__ __forceinline__ uint64_t mass_target(uint64_t total) const {
    return share_of_mass(fmaxf(settings_.top_p, 0.0f), total);
  }

  // x / temperature: correctly rounded from its correctly rounded reciprocal by two steps of Markstein's, for a row
  // that is_ordinary() and x not below what has a mass; an x below 2^-100 aside, whose mass it does not change.
  __device__ __forceinline__ float quotient(float x, float reciprocal) const {
    const float first = x * reciprocal;
    const float second = fmaf(fmaf(-first, temperature_, x), reciprocal, first);
    return fmaf(fmaf(-second, temperature_, x), reciprocal, second);
  }
  // Nothing overflows or gets lost then; and there is a logit with no mass.
  __device__ __forceinline__ bool is_ordinary() const {
    return temperature_ >= 0x1p-20f && temperature_ <= 0x1p20f && fabsf(largest_) <= 0x1p14f;
  }

  // The bin that has the last of as many peaks as are wanted; the last bin if that is none.
  __device__ __forceinline__ void find_bin() {
    const int thread = fresh_thread();
    const float* const peaks = s_.peaks[0];
#pragma unroll
    for (int i = thread; i < kRowBlocks * kPeaks; i += kSampleThreads) {
      const int bin = bin_of(peaks[i] / temperature_);
      if (bin < kBins - 1) atomicAdd(&s_.counts[bin][thread % kCopies], 1u);
    }
    __syncthreads();
    if (thread < 32) {
      constexpr int kLaneBins = kBins / 32;
      uint32_t weight[kLaneBins], own = 0;
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) {
        const uint4 c = *reinterpret_cast<const uint4*>(s_.counts[kLaneBins * thread + i]);
        weight[i] = c.x + c.y + c.z + c.w;
        own += weight[i];
      }
      uint32_t all, before = warp_sum_before(own, thread, all);
      const uint32_t wanted = by_count() ? uint32_t(settings_.top_k) : kPeaksByMass;
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) {
        const int bin = kLaneBins * thread + i;
        if (before < wanted && wanted <= before + weight[i]) s_.bin = by_count() ? bin : min(bin, kNearestWithoutMass);
        before += weight[i];
      }
      if (thread == 0 && !by_count() && all < wanted) s_.bin = kNearestWithoutMass;
    }
    __syncthreads();
  }

  // Sends the part's entries up to this bin to the first block; returns the message that goes with them.
  __device__ __forceinline__ float4 list(int bin) {
    // Logits up to these are in a later bin, and have no mass.
    float outside = (largest_ - (float(bin) + 1.01f) / kBinsPerNat) * temperature_;
    outside -= fabsf(outside) * 1e-6f;
    if (!(bin_of(outside / temperature_) > bin)) outside = -INFINITY;
    const bool weigh = !by_count();
    const float weightless = weigh ? fminf(outside, last_without_mass(largest_, temperature_)) : outside;

    uint64_t total = 0, near = 0;
    const auto send = [&](float x, int index) {
      const uint32_t slot = atomicAdd(&s_.size, 1u);
      const uint32_t to = map_to_rank(smem_address(&s_.gathered[block_rank()][0]), 0);
      if (slot < kFewOfBlock) store_cluster_u64(to + 8 * slot, place(x / temperature_, index));
    };
    if (weigh) {
      const float reciprocal = 1.0f / temperature_;
      part_.each([&](float4 v, int first) {
        if (!(largest_of(v) > weightless)) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = element(v, i), value = quotient(x, reciprocal);
          const uint64_t mass = x > weightless ? mass_of(value - largest_) : 0;
          total += mass;
          if (x > outside && bin_of(value) <= bin) near += mass, send(x, first + i);
        }
      });
    } else {
      part_.each([&](float4 v, int first) {
        if (!(largest_of(v) > outside)) return;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const float x = element(v, i);
          if (x > outside && bin_of(x / temperature_) <= bin) send(x, first + i);
        }
      });
    }
    const int thread = fresh_thread();
    if (weigh) {
      total = warp_sum(total), near = warp_sum(near);
      if (thread % 32 == 0) s_.warp_total[thread / 32] = total, s_.warp_near[thread / 32] = near;
    }
    __syncthreads();
    total = near = 0;
    if (weigh && thread < 32) {
      total = warp_sum(thread < kSampleWarps ? s_.warp_total[thread] : 0);
      near = warp_sum(thread < kSampleWarps ? s_.warp_near[thread] : 0);
    }
    const uint32_t count = min(s_.size, kFewOfBlock + 1u);
    return make_float4(__uint_as_float(uint32_t(total)), __uint_as_float(uint32_t(total >> 32) | count << 24),
                       __uint_as_float(uint32_t(near)), __uint_as_float(uint32_t(near >> 32)));
  }

  // In the first block: each entry's place among all, what the filters keep, and the best score of it.
  __device__ __forceinline__ int32_t draw(RowCluster& cluster, int count, uint64_t target) {
    const int thread = fresh_thread();
    int begin = 0;
#pragma unroll 1
    for (int r = 0; r < kRowBlocks; ++r) {
      const int there = message(cluster, r).count;
      if (thread < there) {
        const uint64_t at = s_.gathered[r][thread];
        s_.place[begin + thread] = at;
        s_.mass[begin + thread] = by_mass() ? mass_of(value_at(at) - largest_) : 0;
      }
      begin += there;
    }
    __syncthreads();

    // An entry is compared with the others by as many lanes as there are.
    int lanes = 1;
    while (lanes < 32 && 2 * lanes * count <= kSampleThreads) lanes *= 2;
    const int entry = thread / lanes, lane = thread % lanes;
    const uint64_t mine = entry < count ? s_.place[entry] : 0;
    bool kept = entry < count;
    const auto sum_over_lanes = [&](auto sum) {
#pragma unroll 1
      for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      return sum;
    };
    uint64_t last = 0;  // of the top-k entries, the one with the lowest place
    if (by_count()) {
      uint32_t before = 0;
      for (int i = lane; i < count; i += lanes) before += s_.place[i] > mine ? 1 : 0;
      before = sum_over_lanes(before);
      kept = kept && before < uint32_t(settings_.top_k);
      if (before + 1 == uint32_t(settings_.top_k) && entry < count && lane == 0) s_.gathered[0][0] = mine;
      __syncthreads();
      last = s_.gathered[0][0];
    }
    if (by_mass()) {
      uint64_t before = 0, total = 0;
      for (int i = lane; i < count; i += lanes) {
        const uint64_t at = s_.place[i], mass = at >= last ? s_.mass[i] : 0;
        total += mass, before += at > mine ? mass : 0;
      }
      before = sum_over_lanes(before), total = sum_over_lanes(total);
      if (by_count()) target = mass_target(total);
      kept = kept && before < target;
    }
    Best best;
    if (kept && lane == 0) {
      const float value = value_at(mine);
      const int32_t index = index_at(mine);
      const PhiloxWords words =
          philox4x32(uint32_t(index) / 4, settings_.position, settings_.seed[0], settings_.seed[1]);
      if (!(settings_.min_p > 0.0f && below_min_p(value, largest_, settings_.min_p)))
        best = {value + gumbel(words[index % 4]), index};
    }
    return cluster.block_best(best).index;
  }

  const RowPart<kResident>& part_;
  FewShared& s_;
  const SampleSettings& settings_;
  const int vocab_;
  float temperature_ = 1.0f, largest_ = 0.0f;
};

}  // namespace vericache::cuda
