// SPDX-License-Identifier: Apache-2.0
#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/simd.h"

namespace vericache::cpu {
namespace {

// A vocabulary entry that the filters have kept so far; value is logit / temperature.
struct Candidate {
  float value;
  int32_t index;
};

// The float32 exponential of the vector code, so that a weight has one value wherever it is taken.
float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(f32x16(x)));
  return lanes[0];
}

// The filters' total order.
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

void keep_top_k(std::vector<Candidate>& kept, int32_t k) {
  if (k <= 0 || size_t(k) >= kept.size()) return;
  std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), before);
  kept.resize(size_t(k));
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
}

constexpr int kBuckets = 1024;
constexpr float kBucketsPerNat = 32.0f;

// By distance from the largest value: buckets descend as the total order does.
int bucket_of(float value, float largest) {
  return int(std::min(float(kBuckets - 1), (largest - value) * kBucketsPerNat));
}

// Finds the bucket where the running sum crosses, then sorts that one alone: a flat distribution keeps most of the
// vocabulary, and sorting it would cost more than the rest of the step.
void keep_top_p(std::vector<Candidate>& kept, float top_p, float largest) {
  if (top_p >= 1.0f) return;
  std::vector<float> weights(kept.size());
  for_lanes(int64_t(kept.size()), [&](int64_t i, int n) {
    float lanes[kLanes] = {};
    for (int j = 0; j < n; ++j) lanes[j] = kept[size_t(i + j)].value - largest;
    store_n(weights.data() + i, exp(load(lanes)), n);
  });
  std::vector<double> sums(kBuckets, 0.0);
  for (size_t i = 0; i < kept.size(); ++i) sums[size_t(bucket_of(kept[i].value, largest))] += double(weights[i]);
  double total = 0.0;
  for (double sum : sums) total += sum;
  const double target = double(top_p) * total;

  double sum = 0.0;
  int crossing = 0;
  for (; crossing < kBuckets - 1 && sum + sums[size_t(crossing)] < target; ++crossing) sum += sums[size_t(crossing)];
  std::vector<Candidate> last;
  for (const Candidate& c : kept)
    if (bucket_of(c.value, largest) == crossing) last.push_back(c);
  std::sort(last.begin(), last.end(), before);
  size_t count = 0;
  while (count < last.size() && (count == 0 || sum < target))  // at least one, even if the target is 0
    sum += double(exp_one(last[count++].value - largest));
  last.resize(count);
  std::erase_if(kept, [&](const Candidate& c) { return bucket_of(c.value, largest) >= crossing; });
  kept.insert(kept.end(), last.begin(), last.end());
}

void keep_min_p(std::vector<Candidate>& kept, float min_p, float largest) {
  if (min_p <= 0.0f) return;
  const double floor = double(largest) + std::log(double(min_p));
  std::erase_if(kept, [&](const Candidate& c) { return double(c.value) < floor; });
}

// Largest of value + noise among those offered; on a tie the lowest index. Offers may come in any order.
class Winner {
 public:
  Winner(int64_t seed, int32_t position, float largest)
      : key0_(uint32_t(uint64_t(seed))),
        key1_(uint32_t(uint64_t(seed) >> 32)),
        position_(uint32_t(position)),
        largest_(largest) {}

  void offer(float value, int32_t index) {
    if (value + bound_ < best_) return;  // float addition is monotonic: no noise could make it win
    const uint32_t word = word_at(uint32_t(index)) >> 8;
    if (word < needed_) return;
    const double u = (double(word) + 0.5) * 0x1p-24;
    const float noisy = value + float(-std::log(-std::log(u)));
    if (noisy > best_ || (noisy == best_ && index < index_) || index_ < 0) {
      best_ = noisy;
      index_ = index;
      needed_ = needed_word();
    }
  }
  int32_t index() const { return index_; }

 private:
  uint32_t word_at(uint32_t index) {
    if (index / 4 != block_) {
      block_ = index / 4;
      bits_ = philox4x32({block_, position_, 0, 0}, key0_, key1_);
    }
    return bits_[index % 4];
  }

  // No smaller word can reach best_, even with the largest value: noise -log(-log(u)) <= -log(1 - u), so it takes
  // 1 - u <= exp(largest - best). The slack covers the roundings of the float32 sums.
  uint32_t needed_word() const {
    const double slack = 1e-3 + 1e-6 * (std::abs(double(best_)) + std::abs(double(largest_)));
    const double room = std::exp(double(largest_) - double(best_) + slack);
    return room < 1.0 ? uint32_t((1.0 - room) * 0x1p24) : 0;
  }

  uint32_t key0_, key1_, position_;
  float largest_;
  const float bound_ = float(-std::log(-std::log(1.0 - 0x1p-25)));  // of the largest u
  uint32_t block_ = std::numeric_limits<uint32_t>::max();
  std::array<uint32_t, 4> bits_{};
  float best_ = -std::numeric_limits<float>::infinity();
  int32_t index_ = -1;
  uint32_t needed_ = 0;
};

int32_t draw(const SampleParams& p, int64_t row, const float* logits, int32_t argmax) {
  const float temperature = p.temperature[row];
  if (temperature == 0.0f) return argmax;
  const float largest = logits[argmax] / temperature;
  if (!std::isfinite(largest)) return argmax;  // the limit of a temperature that goes to 0
  Winner winner(p.seed[row], p.row_position[row], largest);
  if (p.top_k[row] <= 0 && p.top_p[row] >= 1.0f && p.min_p[row] <= 0.0f) {
    winner.offer(largest, argmax);
    for (int32_t i = 0; i < p.vocab; ++i) winner.offer(logits[i] / temperature, i);
    return winner.index();
  }
  std::vector<Candidate> kept(size_t(p.vocab));
  for (int32_t i = 0; i < p.vocab; ++i) kept[size_t(i)] = {logits[i] / temperature, i};
  keep_top_k(kept, p.top_k[row]);
  keep_top_p(kept, p.top_p[row], largest);
  keep_min_p(kept, p.min_p[row], largest);
  for (const Candidate& c : kept) winner.offer(c.value, c.index);
  return winner.index();
}

void sample_row(const SampleParams& p, int64_t row) {
  const float* logits = p.logits + row * p.logits_stride_row;
  int32_t argmax = 0;
  bool nan = false;
  for (int32_t i = 0; i < p.vocab; ++i) {
    nan |= logits[i] != logits[i];
    if (logits[i] > logits[argmax]) argmax = i;
  }
  const float largest = logits[argmax];
  if (nan || !std::isfinite(largest)) {
    p.token[row] = -1;
    p.logprob[row] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  f32x16 sums(0.0f);
  for_lanes(p.vocab, [&](int64_t i, int n) {
    f32x16 e = exp(load_n(logits + i, n) - f32x16(largest));
    if (n < kLanes) {  // the padding of a partial run is a logit of 0, not of -infinity
      float lanes[kLanes];
      store(lanes, e);
      e = load_partial(lanes, n);
    }
    sums = sums + e;
  });
  const int32_t token = draw(p, row, logits, argmax);
  p.token[row] = token;
  p.logprob[row] = (logits[token] - largest) - std::log(hsum(sums));
}

}  // namespace

void sample(const SampleParams& p) {
  parallel_for(p.rows, 1 + (1 << 14) / p.vocab, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) sample_row(p, row);
  });
}

}  // namespace vericache::cpu
