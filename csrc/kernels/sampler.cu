// SPDX-License-Identifier: Apache-2.0
// Draws one token a row: argmax(filter(logits / temperature) + gumbel(seed, position)), and its log-softmax (R4). One
// launch, nothing returns to the host in between.
//
// Grid: one cluster of 8 blocks a row (of 1 block before sm_90); block i reads the i-th eighth of the vocabulary, in
// quads of 4 entries (device/sampler_row.cuh). Block: 512 threads, two blocks a multiprocessor. Shared memory: 31 KB
// for the filters, and the block's part of the row if it fits; otherwise each walk over the part reads global memory.
//
// Walks over the row: one for the softmax; with a filter one more, to list the few entries that may be kept, from which
// the cluster's first block draws (device/sampler_few.cuh). If they are not few, and without a filter: one to draw; two
// for top-k and two for top-p (device/sampler_filter.cuh). These filters leave a range of logits, so that no walk but
// theirs divides by the temperature.
//
// The draw computes the noise in double precision for the few entries that can win alone: an upper bound of each score
// is one logarithm away from the Philox word, a lower bound of a block's best score follows from that of each thread's
// best entry, and only entries whose upper bound reaches it are looked at. Entries that no noise could lift to the
// score of the largest logit do not even need a Philox word.
//
// Reduction order (R1): the log-softmax's sum is a running one a thread (quads tid, tid + 512, ... of the block's
// part), then the butterflies of device/reduce.cuh, then the blocks left to right; it depends on the vocabulary alone.
// All else is integers, maxima and comparisons. Held by bench/gpu/dense_check.cu (sample).
#include <cfloat>
#include <cmath>

#include "device/cluster.cuh"
#include "device/cp_async.cuh"
#include "device/fast_math.cuh"
#include "device/launch.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "device/sampler_few.cuh"
#include "device/sampler_filter.cuh"
#include "device/sampler_noise.cuh"
#include "device/sampler_row.cuh"
#include "device/shared_memory.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kMaxVocab = 500000;  // an index has 24 bits, a sum of masses 64

struct Shared {
  SampleExchange exchange;
  union {  // one after the other
    FewShared few;
    FilterShared filter;
  };
  float sum_scratch[32], log_sum;  // the latter of the thread that writes the results
  alignas(16) float4 part[];
};

// sum + e^x. The rounding of the sum takes in the last product of the exponential: written out, so that it does so
// wherever this is compiled.
__device__ __forceinline__ float add_exp(float x, float sum) {
  const float scaled = __fmaf_rd(__saturatef(__fmaf_rn(x, 0x1.77313ap-8f, 0.5f)), 252.0f, 0x1.800002p23f);
  const float whole = __fadd_rn(scaled, -0x1.8000fep23f);
  const float rest = __fmaf_rn(x, 0x1.4ae0cp-26f, __fmaf_rn(x, 0x1.715476p0f, -whole));
  return __fmaf_rn(fast_exp2(rest), __uint_as_float(__float_as_uint(scaled) << 23), sum);
}

template <bool kResident>
class RowSampler {
 public:
  __device__ RowSampler(const SampleParams& p, Shared& shared)
      : p_(p),
        s_(shared),
        cluster_(shared.exchange),
        part_(p.logits + block_row() * p.logits_stride_row, p.vocab, shared.part) {}

  __device__ void run() {
    fetch_settings();
    if (!softmax()) return finish(-1);
    temperature_ = s_.exchange.settings.temperature;
    largest_ = largest_logit_ / temperature_;
    if (temperature_ == 0.0f || !isfinite(largest_)) return finish(argmax_);  // the limit of a temperature of 0
    int32_t token = -1;
    FewEntries<kResident> few(part_, s_.few, s_.exchange.settings, p_.vocab);
    if (few.worth_trying() && few.run(cluster_, temperature_, largest_, token)) return finish(token);
    RowFilter<kResident> filter(part_, s_.filter, p_.vocab, temperature_, largest_);
    finish(draw(filter.run(s_.exchange.settings)));
  }

 private:
  // They arrive while the logits are read. The last warp asks for them, which has the least to read.
  __device__ void fetch_settings() {
    const int lane = int(threadIdx.x) - (kSampleThreads - 32);
    if (lane < 0) return;
    SampleSettings& s = s_.exchange.settings;
    const int64_t row = block_row();
    const void* const from[] = {p_.temperature + row, p_.top_p + row,        p_.min_p + row,
                                p_.top_k + row,       p_.row_position + row, p_.seed + row};
    void* const to[] = {&s.temperature, &s.top_p, &s.min_p, &s.top_k, &s.position, &s.seed[0]};
#pragma unroll
    for (int i = 0; i < 6; ++i)
      if (lane == i) cp_async4(smem_address(to[i]), from[i]);
    if (lane == 6) cp_async4(smem_address(&s.seed[1]), reinterpret_cast<const uint32_t*>(p_.seed + row) + 1);
  }

  // Largest logit, its lowest index, and the log of the sum of exp(logit - largest). False if there is no softmax: the
  // sums of a row with a NaN or +infinity are NaN.
  __device__ bool softmax() {
    float largest = -INFINITY, sum = 0.0f;
    int32_t argmax = -1;
    part_.read([&](float4 v, int first) {
      const float top_of_quad = largest_of(v);
      if (top_of_quad > largest)
        argmax = first + (v.x == top_of_quad ? 0 : v.y == top_of_quad ? 1 : v.z == top_of_quad ? 2 : 3);
      const float top = fmaxf(largest, top_of_quad);
      const float base = top == -INFINITY ? 0.0f : top;  // then all exponentials are 0, unless there is a NaN
      const float quad = add_exp(v.w - base, add_exp(v.z - base, add_exp(v.y - base, add_exp(v.x - base, 0.0f))));
      sum = __fadd_rn(quad, __fmul_rn(sum, expf(largest - base)));
      largest = top;
    });
    cp_async_commit();
    cp_async_wait<0>();  // the settings
    const float peak = largest;
    const Best best = cluster_.block_best({largest, argmax});
    if (largest != -INFINITY) sum = __fmul_rn(sum, expf(largest - best.score));
    sum = block_sum(sum, s_.sum_scratch);

    cluster_wait();  // all blocks of the cluster have started
    FewEntries<kResident> few(part_, s_.few, s_.exchange.settings, p_.vocab);
    if (few.worth_trying()) few.send_peak(peak);
    cluster_.exchange(make_float4(best.score, sum, __int_as_float(best.index), 0.0f));
    Best all;
    float sums = 0.0f;
    for (int r = 0; r < kRowBlocks; ++r) {
      const float4 m = cluster_.message(r);
      all.offer(m.x, __float_as_int(m.z));
      sums += m.y;
    }
    largest_logit_ = all.score, argmax_ = all.index;
    if (writes()) {
      sum = 0.0f;
      for (int r = 0; r < kRowBlocks; ++r) {
        const float4 m = cluster_.message(r);
        if (m.x != -INFINITY) sum = __fmaf_rn(m.y, expf(m.x - largest_logit_), sum);
      }
      s_.log_sum = logf(sum);
    }
    return isfinite(sums) && isfinite(largest_logit_);
  }

  __device__ __forceinline__ PhiloxWords words(int32_t index) const {
    const SampleSettings& s = s_.exchange.settings;
    return philox4x32(uint32_t(index) / 4, s.position, s.seed[0], s.seed[1]);
  }

  __device__ __forceinline__ float exact_score(float logit, uint32_t bits) const {
    return logit / temperature_ + gumbel(bits);
  }

  __device__ int32_t draw(const Cut& cut) {
    // Bounds multiply by the reciprocal; if that overflows, every entry may win.
    const float reciprocal = 1.0f / temperature_;
    const bool usable = reciprocal < INFINITY;
    const float scale = usable ? reciprocal : 0.0f, offset = usable ? 0.0f : INFINITY;
    const auto upper_bound = [&](float x, uint32_t bits) { return fmaf(x, scale, gumbel_bound(bits, offset)); };

    // A lower bound of the winner's score, that of the largest logit's; and a logit that no noise lifts above it, as no
    // lower one: division and addition are monotonic.
    float least = -INFINITY, floor = cut.floor;
    if (cut.keeps(largest_logit_, argmax_))
      least = largest_ + gumbel_estimate(words(argmax_)[argmax_ % 4]) - score_margin(largest_);
    const float hopeless = (least - kLargestGumbel - score_margin(least)) * temperature_;
    if (hopeless / temperature_ + kLargestGumbel < least) floor = fmaxf(floor, hopeless);

    float first = -INFINITY, second = -INFINITY;  // this thread's two largest upper bounds
    int32_t index = -1;
    uint32_t noise = 0;
    part_.each([&](float4 v, int at) {
      if (!(largest_of(v) > floor)) return;
      const PhiloxWords bits = words(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = element(v, i);
        const float bound = upper_bound(x, bits[i]);  // in every lane: cheaper than a branch
        const float upper = (x > floor) & ((x > cut.surely) | (at + i <= cut.last_index)) ? bound : -INFINITY;
        second = fmaxf(second, fminf(first, upper));
        if (upper > first) first = upper, index = at + i, noise = bits[i];
      }
    });
    Best lower;
    if (index >= 0 && first < INFINITY)
      lower = {first - gumbel_bound(noise) + gumbel_estimate(noise) - score_margin(first), index};
    least = fmaxf(least, cluster_.block_best(lower).score);

    Best best;
    const auto reaches = [&](float upper) { return upper + score_margin(upper) >= least; };
    if (index >= 0 && reaches(first)) {
      best.offer(exact_score(part_[index], noise), index);
      if (reaches(second)) {
        part_.each([&](float4 v, int at) {
          if (!(largest_of(v) > floor)) return;
          const PhiloxWords bits = words(at);
#pragma unroll 1
          for (int i = 0; i < 4; ++i) {
            const float x = element(v, i);
            if (x > floor && cut.keeps(x, at + i) && reaches(upper_bound(x, bits[i])))
              best.offer(exact_score(x, bits[i]), at + i);
          }
        });
      }
    }
    best = cluster_.block_best(best);
    cluster_.exchange(make_float4(best.score, __int_as_float(best.index), 0.0f, 0.0f));
    Best all;
    for (int r = 0; r < kRowBlocks; ++r) all.offer(cluster_.message(r).x, __float_as_int(cluster_.message(r).y));
    return all.index < 0 ? argmax_ : all.index;
  }

  __device__ static bool writes() { return block_rank() == 0 && threadIdx.x == 0; }

  __device__ void finish(int32_t token) {
    if (!writes()) return;
    const float* logits = p_.logits + block_row() * p_.logits_stride_row;
    float logprob = NAN;
    if (token >= 0) logprob = (token == argmax_ ? 0.0f : logits[token] - logits[argmax_]) - s_.log_sum;
    p_.token[block_row()] = token;
    p_.logprob[block_row()] = logprob;
  }

  const SampleParams& p_;
  Shared& s_;
  RowCluster cluster_;
  const RowPart<kResident> part_;
  float largest_logit_ = 0.0f, temperature_ = 1.0f, largest_ = 0.0f;
  int32_t argmax_ = -1;
};

template <bool kResident>
__global__ void __launch_bounds__(kSampleThreads, kResident ? 2 : 1)
    sample_rows(const __grid_constant__ SampleParams p) {
  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_start();
  RowSampler<kResident>(p, *reinterpret_cast<Shared*>(dynamic_smem())).run();
}

template <bool kResident>
void start(const SampleParams& p, LaunchShape shape, const DeviceInfo& info, cudaStream_t stream) {
  allow_all_smem<sample_rows<kResident>>(info);
  launch(sample_rows<kResident>, shape, info, stream, p);
}

}  // namespace

size_t sample_workspace_bytes(const SampleParams&) { return 0; }

void sample(const SampleParams& p, cudaStream_t stream) {
  if (p.rows <= 0) return;
  VC_CHECK(p.vocab > 0 && p.vocab <= kMaxVocab, "sample: the vocabulary has ", p.vocab, " entries; 1 to ", kMaxVocab,
           " are supported.");
  const DeviceInfo info = device_info();
  LaunchShape shape;
  shape.cluster = info.hopper_or_later ? kMostBlocks : 1;
  shape.grid = dim3(unsigned(p.rows) * unsigned(shape.cluster));
  shape.block = dim3(kSampleThreads);
  shape.smem = sizeof(Shared);
  VC_CHECK(int(shape.smem) <= info.smem_optin, "sample: needs ", shape.smem,
           " bytes of shared memory a block, this GPU has ", info.smem_optin, ".");
  const int quads = (p.vocab + 3) / 4, largest_part = (quads + shape.cluster - 1) / shape.cluster;
  const size_t with_part = shape.smem + sizeof(float4) * size_t(largest_part);
  if (with_part <= size_t(info.smem_optin)) {
    shape.smem = with_part;
    start<true>(p, shape, info, stream);
  } else {
    start<false>(p, shape, info, stream);
  }
}

}  // namespace vericache::cuda
