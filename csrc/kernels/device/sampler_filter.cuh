// SPDX-License-Identifier: Apache-2.0
// The sampler's filters. They keep a prefix of one total order, value descending and index ascending, packed into a
// 56-bit place; so their joint effect is one cut. top-k finds it by count, top-p by mass. Masses exp(value - largest)
// are integers in units of 2^-36: their sums do not depend on the order of the atomics.
//
// Selection: a histogram over the distance from the largest value, in eighths of a nat, finds the bin in which the
// target is reached. What follows concerns this bin alone, which each block copies to a list of its own if it fits:
// histograms over 256ths of the interval of places left, until at most 32 entries of the row are left, which every
// block gets and ranks. The last bin takes all that is further away. No atomics are spent on it: in top-p it starts
// where all that is beyond cannot weigh 1 - p.
#pragma once

#include "reduce.cuh"
#include "sampler_row.cuh"

namespace vericache::cuda {

constexpr int kBins = 256, kCopies = 4, kListSize = 1024, kRanked = 32;
constexpr float kBinsPerNat = 8.0f;
constexpr float kMassUnit = 0x1p36f;
constexpr float kSmallestMass = -25.7f;  // e^x is below half a unit

struct FilterShared {
  // Lanes of a warp that share a bin meet less often in four copies.
  alignas(16) uint32_t counts[kBins][kCopies], mass_low[kBins][kCopies], mass_high[kBins][kCopies];
  // Two of each, used in turn like the messages.
  alignas(16) uint64_t bin_mass[2][kBins];
  alignas(16) uint32_t bin_count[2][kBins];
  alignas(16) uint64_t total_mass[kBins];
  alignas(16) uint32_t total_count[kBins], fullest[kBins];
  uint64_t list[kListSize], few[kRanked], gathered[kMostBlocks][kRanked], ranked_place[kRanked], ranked_mass[kRanked];
  uint32_t list_size, few_size;

  // Where the target was reached last: the bin, its entries in the row and in the block that has most of them, and what
  // of the target falls in it. In the end the entry's place.
  uint64_t found_rest, found_place;
  uint32_t found_bin, found_count, found_fullest;

  // What is searched: entries of this bin of distances, with a place in [low, low + 2^width). Logits below `least` and
  // above `most` are surely outside.
  int search_bin, search_width;
  float search_least, search_most;
  uint64_t search_low;
};

// What the filters leave, in terms of logits: those above `surely`, and of those above `floor` the ones with an index
// up to `last_index`.
struct Cut {
  float floor = -INFINITY, surely = -INFINITY;
  int32_t last_index = 0;

  __device__ __forceinline__ bool keeps(float logit, int32_t index) const {
    return logit > floor && (logit > surely || index <= last_index);
  }
};

// Grows with the distance from the largest value, which is in bin 0.
__device__ __forceinline__ int distance_bin(float largest, float value, int last_bin) {
  return int(fminf(float(last_bin), (largest - value) * kBinsPerNat));
}

// Of a value that is x above the largest.
__device__ __forceinline__ uint64_t mass_of(float x) {
  return x < kSmallestMass ? 0 : __float2ull_rn(expf(x) * kMassUnit);
}
// A logit of which it is sure that it has no mass, as all below; -infinity if none is found.
__device__ __forceinline__ float last_without_mass(float largest, float temperature) {
  const float bound = (largest - 25.8f) * temperature;
  return bound / temperature - largest < kSmallestMass ? bound : -INFINITY;
}
// The mass at which top_p of the total is reached.
__device__ __forceinline__ uint64_t share_of_mass(float top_p, uint64_t total) {
  const double share = ceil(double(top_p) * double(total));
  return share < 1.0 ? 1 : min(uint64_t(share), total);
}

__device__ __forceinline__ bool below_min_p(float value, float largest, float min_p) {
  if (value >= largest) return false;
  const float estimate = value - largest - logf(min_p);
  if (fabsf(estimate) > 1e-3f) return estimate < 0.0f;
  return double(value) < double(largest) + log(double(min_p));
}

__device__ __forceinline__ float largest_of(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }
__device__ __forceinline__ float element(float4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <bool kResident>
class RowFilter {
 public:
  __device__ RowFilter(const RowPart<kResident>& part, FilterShared& shared, int vocab, float temperature,
                       float largest)
      : part_(part), s_(shared), vocab_(vocab), temperature_(temperature), largest_(largest) {}

  __device__ Cut run(const SampleSettings& settings) {
#pragma unroll 1  // one copy of the code
    for (int pass = 0; pass < 2; ++pass) {
      by_mass_ = pass == 1;
      if (by_mass_ ? settings.top_p < 1.0f : settings.top_k > 0 && settings.top_k < vocab_)
        select(settings.top_k, fmaxf(settings.top_p, 0.0f));
    }
    const float min_p = settings.min_p;
    if (min_p > 0.0f) {
      const float guess = (largest_ + logf(min_p)) * temperature_;
      cut_.floor =
          fmaxf(cut_.floor, last_below(guess, [&](float x) { return below_min_p(x / temperature_, largest_, min_p); }));
    }
    return cut_;
  }

 private:
  __device__ __forceinline__ uint64_t mass_of(float value) const { return cuda::mass_of(value - largest_); }
  __device__ __forceinline__ int distance_bin(float value) const {
    return cuda::distance_bin(largest_, value, last_bin_);
  }

  // f(place, place - low) of the entries that are searched.
  template <class F>
  __device__ __forceinline__ void each_candidate(bool listed, F f) const {
    const uint64_t low = s_.search_low;
    const int width = s_.search_width;
    if (listed) {
#pragma unroll 1
      for (uint32_t i = uint32_t(fresh_thread()); i < s_.list_size; i += kSampleThreads) {
        const uint64_t at = s_.list[i];
        if ((at - low) >> width == 0) f(at, at - low);
      }
      return;
    }
    const int bin = s_.search_bin;
    const float least = s_.search_least, most = s_.search_most;
    part_.each([&](float4 v, int first) {
      if (!(largest_of(v) >= least)) return;
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const float x = element(v, i);
        // top-k comes first, when nothing is cut off and -infinity counts.
        const bool kept = by_mass_ ? cut_.keeps(x, first + i) : first + i < vocab_;
        if (!(kept && x >= least && x <= most)) continue;
        const float value = x / temperature_;
        const uint64_t at = place(value, first + i);
        if (distance_bin(value) == bin && (at - low) >> width == 0 && (!by_mass_ || mass_of(value) != 0))
          f(at, at - low);
      }
    });
  }

  // The bin found at first: its values, outward by more than the roundings of distance_bin, as an interval of places.
  __device__ void search_found_bin() {
    const int bin = int(s_.found_bin);
    uint64_t low = 0;
    int width = 32 + kIndexBits;
    float least = -INFINITY, most = INFINITY;
    if (bin < last_bin_) {
      const float highest = __double2float_ru(double(largest_) - double(bin) * (0.125 * (1 - 0x1p-23)));
      const float lowest = __double2float_rd(double(largest_) - double(bin + 1) * (0.125 * (1 + 0x1p-23)));
      low = uint64_t(ordered_bits(lowest)) << kIndexBits;
      width = kIndexBits + 32 - __clz(int(ordered_bits(highest) - ordered_bits(lowest)));
      const float x = lowest * temperature_, y = highest * temperature_;
      const float below = x - fabsf(x) * 1e-6f, above = y + fabsf(y) * 1e-6f;
      if (below / temperature_ < lowest) least = below;
      if (above / temperature_ > highest) most = above;
    }
    s_.search_bin = bin, s_.search_low = low, s_.search_width = width;
    s_.search_least = least, s_.search_most = most;
  }

  // Moves the cut up to the entry at which what is kept so far, from the top, reaches top_k entries or, by mass, top_p
  // of it.
  __device__ void select(int32_t top_k, float top_p) {
    clear();
    __syncthreads();
    first_histogram(top_p);
    find(top_k, by_mass_ ? top_p : -1.0f);
    if (threadIdx.x == 0) search_found_bin();
    bool listed = false;
    for (;;) {
      const bool few = s_.found_count <= kRanked;
      if (few || (!listed && s_.found_fullest <= kListSize)) {
        uint64_t* const to = few ? s_.few : s_.list;
        uint32_t* const size = few ? &s_.few_size : &s_.list_size;
        if (threadIdx.x == 0) *size = 0;
        __syncthreads();
        each_candidate(listed, [&](uint64_t at, uint64_t) { to[atomicAdd(size, 1u)] = at; });
        __syncthreads();
        if (few) break;
        listed = true;
      }
      clear();
      __syncthreads();
      const int shift = max(s_.search_width - 8, 0);
      each_candidate(listed, [&](uint64_t at, uint64_t offset) {
        add(kBins - 1 - int(offset >> shift), by_mass_ ? mass_of(value_at(at)) : 0);
      });
      find(s_.found_rest, -1.0f);
      if (threadIdx.x == 0) {
        s_.search_low += uint64_t(kBins - 1 - s_.found_bin) << shift;
        s_.search_width = shift;
      }
      __syncthreads();
    }
    rank();

    const uint64_t last = s_.found_place;
    const float guess = value_at(last) * temperature_;
    const uint32_t key = uint32_t(last >> kIndexBits);
    cut_.floor = last_below(guess, [&](float x) { return ordered_bits(x / temperature_) < key; });
    cut_.surely = last_below(guess, [&](float x) { return ordered_bits(x / temperature_) <= key; });
    cut_.last_index = index_at(last);
  }

  __device__ void clear() {
    __syncthreads();                                     // the last histogram has been read
    uint4* words = reinterpret_cast<uint4*>(s_.counts);  // the three lie one after the other
    for (int i = fresh_thread(); i < 3 * kBins * kCopies / 4; i += kSampleThreads) words[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void add(int bin, uint64_t mass, uint32_t count = 1) {
    const int copy = fresh_thread() % kCopies;
    atomicAdd(&s_.counts[bin][copy], count);
    if (mass == 0) return;  // so by count
    const uint32_t low = uint32_t(mass), before = atomicAdd(&s_.mass_low[bin][copy], low);
    const uint32_t high = uint32_t(mass >> 32) + (before + low < before ? 1 : 0);
    if (high != 0) atomicAdd(&s_.mass_high[bin][copy], high);
  }

  __device__ void first_histogram(float top_p) {
    // Logits up to `bound` are in the last bin by count, and weigh nothing.
    last_bin_ = kBins - 1;
    float bound;
    if (by_mass_) {
      // vocab e^-d of the largest one's mass is less than 1 - p of it; NaN and infinity become 255.
      const float reach = kBinsPerNat * logf(float(vocab_) / (1.0f - top_p)) + 2.0f;
      last_bin_ = max(1, int(fminf(float(kBins - 1), reach)));
      bound = last_without_mass(largest_, temperature_);
    } else {
      bound = (largest_ - (float(kBins) + 0.1f) / kBinsPerNat) * temperature_;
      if (distance_bin(bound / temperature_) != kBins - 1) bound = -INFINITY;
    }
    uint64_t far_mass = 0;
    uint32_t far_count = 0, near_count = 0;
    part_.each([&](float4 v, int first) {
      if (!(largest_of(v) > bound)) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = element(v, i), value = x / temperature_;
        if (!(x > bound && cut_.keeps(x, first + i))) continue;
        const uint64_t mass = by_mass_ ? mass_of(value) : 0;
        if (by_mass_ && mass == 0) continue;
        const int bin = distance_bin(value);
        if (bin == last_bin_) {
          far_mass += mass, ++far_count;
        } else {
          ++near_count;
          add(bin, mass);
        }
      }
    });
    if (by_mass_) {
      far_mass = warp_sum(far_mass), far_count = __reduce_add_sync(kAllLanes, far_count);
    } else {  // all entries take part: what was not near is far, modulo 2^32
      far_count = (threadIdx.x == 0 ? uint32_t(part_.entries()) : 0) - __reduce_add_sync(kAllLanes, near_count);
    }
    if (threadIdx.x % 32 == 0) add(last_bin_, far_mass, far_count);
  }

  // Finds the bin, from 0 on, in which the sum over the cluster reaches `target`, or top_p of all unless that is
  // negative.
  __device__ void find(uint64_t target, float top_p) {
    __syncthreads();  // the histogram is complete
    const int thread = fresh_thread();
    turn_ ^= 1;
    if (thread < kBins) {
      const int bin = thread;
      uint32_t count = 0;
      uint64_t mass = 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        count += s_.counts[bin][i];
        if (by_mass_) mass += s_.mass_low[bin][i] + (uint64_t(s_.mass_high[bin][i]) << 32);
      }
      s_.bin_count[turn_][bin] = count;
      if (by_mass_) s_.bin_mass[turn_][bin] = mass;
    }
    cluster_barrier();
    if (thread < kBins) {
      const int bin = thread;
      uint32_t count = 0, fullest = 0;
      for (int r = 0; r < kRowBlocks; ++r) {
        const uint32_t c = load_cluster_u32(map_to_rank(smem_address(&s_.bin_count[turn_][bin]), r));
        count += c, fullest = max(fullest, c);
      }
      s_.total_count[bin] = count, s_.fullest[bin] = fullest;
    } else if (by_mass_ && thread < 2 * kBins) {
      const int bin = thread - kBins;
      uint64_t mass = 0;
      for (int r = 0; r < kRowBlocks; ++r)
        mass += load_cluster_u64(map_to_rank(smem_address(&s_.bin_mass[turn_][bin]), r));
      s_.total_mass[bin] = mass;
    }
    __syncthreads();
    if (thread < 32) {
      const int lane = thread;
      uint64_t weight[8], own = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weight[i] = by_mass_ ? s_.total_mass[8 * lane + i] : s_.total_count[8 * lane + i];
        own += weight[i];
      }
      uint64_t total, before = warp_sum_before(own, lane, total);
      if (top_p >= 0.0f) target = share_of_mass(top_p, total);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int bin = 8 * lane + i;
        if (before < target && target <= before + weight[i]) {
          s_.found_bin = uint32_t(bin), s_.found_rest = target - before;
          s_.found_count = s_.total_count[bin], s_.found_fullest = s_.fullest[bin];
        }
        before += weight[i];
      }
    }
    __syncthreads();
  }

  // Finds the place of the entry, of the at most 32 left in the row, at which the sum from the top reaches the target.
  __device__ void rank() {
    const int thread = fresh_thread(), block = thread / kRanked, entry = thread % kRanked;
    if (block < kRowBlocks)  // no place is 0
      store_cluster_u64(map_to_rank(smem_address(&s_.gathered[block_rank()][entry]), block),
                        entry < int(s_.few_size) ? s_.few[entry] : 0);
    cluster_barrier();
    if (thread < 32) {
      const int lane = thread;
      int count = 0;
      for (int r = 0; r < kRowBlocks; ++r) {
        const uint64_t at = s_.gathered[r][lane];
        const uint32_t there = __ballot_sync(kAllLanes, at != 0);
        const int slot = count + lane;  // a block's entries come first
        if (at != 0) {
          s_.ranked_place[slot] = at;
          s_.ranked_mass[slot] = by_mass_ ? mass_of(value_at(at)) : 1;
        }
        count += __popc(there);
      }
      __syncwarp();
      if (lane < count) {
        const uint64_t mine = s_.ranked_place[lane], own = s_.ranked_mass[lane], target = s_.found_rest;
        uint64_t before = 0;
        for (int i = 0; i < count; ++i) before += s_.ranked_place[i] > mine ? s_.ranked_mass[i] : 0;
        if (before < target && target <= before + own) s_.found_place = mine;
      }
    }
    __syncthreads();
  }

  const RowPart<kResident>& part_;
  FilterShared& s_;
  const int vocab_;
  const float temperature_, largest_;
  int last_bin_ = kBins - 1, turn_ = 0;
  bool by_mass_ = false;
  Cut cut_;
};

}  // namespace vericache::cuda
