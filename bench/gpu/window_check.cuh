// SPDX-License-Identifier: Apache-2.0
// Checks of window_scores: against double precision on the host, beside the CPU kernel; the same bits on every run;
// nothing read between rows or written past the end; and a control.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/window_scores.h"
#include "harness.cuh"
#include "kernels/launchers.h"

namespace vericache::bench {

struct WindowCase {
  int window, kv_heads, group, tokens, head_dim;
};

// [q_heads, tokens] in double, plainly.
template <class H>
std::vector<double> window_reference(const WindowScoresParams& p, const std::vector<H>& queries,
                                     const std::vector<H>& k) {
  std::vector<double> out(size_t(p.q_heads) * p.tokens), scores(static_cast<size_t>(p.tokens));
  for (int h = 0; h < p.q_heads; ++h)
    for (int w = 0; w < p.window; ++w) {
      const H* q = queries.data() + w * p.q_stride_row + h * p.q_stride_head;
      const int visible = p.tokens - p.window + w + 1;
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int t = 0; t < visible; ++t) {
        const H* key = k.data() + h / (p.q_heads / p.kv_heads) * p.k_stride_head + t * p.k_stride_token;
        double dot = 0;
        for (int d = 0; d < p.head_dim; ++d) dot += double(to_float(q[d])) * double(to_float(key[d]));
        scores[t] = dot / std::sqrt(double(p.head_dim));
        largest = std::max(largest, scores[t]);
      }
      for (int t = 0; t < visible; ++t) sum += scores[t] = std::exp(scores[t] - largest);
      for (int t = 0; t < visible; ++t) out[size_t(h) * p.tokens + t] += scores[t] / sum / p.window;
    }
  return out;
}

// Largest relative difference; infinity where one is NaN, or where a weight of 0 is not 0.
inline double worst_ratio(const float* got, const std::vector<double>& want) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (want[i] == 0 && got[i] == 0) continue;
    const double ratio = std::abs(got[i] - want[i]) / want[i];
    if (!(ratio < std::numeric_limits<double>::infinity())) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, ratio);
  }
  return worst;
}

template <class T, class H>
void window_checks(Report& report, DType dtype, double bound, bool quick) {
  double worst = 0, worst_cpu = 0, control = std::numeric_limits<double>::infinity();
  int reruns = 0, cases = 0;
  bool guard = true;
  std::vector<WindowCase> list = {{1, 1, 1, 1, 64},    {1, 3, 1, 61, 128}, {33, 2, 2, 515, 64}, {32, 2, 4, 300, 128},
                                  {7, 2, 3, 257, 128}, {61, 1, 4, 61, 64}, {16, 1, 16, 65, 64}, {32, 2, 4, 200, 80},
                                  {9, 1, 2, 100, 256}, {5, 2, 1, 40, 33}};
  if (!quick)
    for (const WindowCase& c :
         {WindowCase{64, 1, 4, 777, 128}, WindowCase{128, 1, 4, 130, 128}, WindowCase{200, 1, 5, 201, 128},
          WindowCase{32, 2, 8, 4099, 128}, WindowCase{32, 8, 4, 1000, 128}, WindowCase{100, 2, 1, 2049, 128},
          WindowCase{96, 1, 7, 640, 64}, WindowCase{32, 40, 1, 333, 128}})
      list.push_back(c);
  for (const WindowCase& c : list) {
    constexpr int kGap = 8;  // elements between rows, rows between heads: NaN
    WindowScoresParams p{};
    p.window = c.window, p.tokens = c.tokens, p.q_heads = c.kv_heads * c.group, p.kv_heads = c.kv_heads;
    p.head_dim = c.head_dim, p.scale = float(1 / std::sqrt(double(c.head_dim))), p.dtype = dtype;
    p.q_stride_head = c.head_dim + kGap, p.q_stride_row = p.q_heads * p.q_stride_head;
    p.k_stride_token = c.head_dim + kGap, p.k_stride_head = (c.tokens + kGap) * p.k_stride_token;
    const auto with_gaps = [&](int64_t elements, int64_t row, uint64_t seed, float scale) {
      auto host = random_buffer<T>(size_t(elements), seed, scale).template to_host<H>();
      for (int64_t i = 0; i < elements; ++i)
        if (i % row >= c.head_dim) host[size_t(i)] = from_float<H>(std::numeric_limits<float>::quiet_NaN());
      return host;
    };
    const auto h_q = with_gaps(c.window * p.q_stride_row, p.q_stride_head, 71 + cases, 2.0f);
    auto h_k = with_gaps(c.kv_heads * p.k_stride_head, p.k_stride_token, 171 + cases, 1.0f);
    for (int head = 0; head < c.kv_heads; ++head)
      for (int64_t i = c.tokens * p.k_stride_token; i < p.k_stride_head; ++i)
        h_k[size_t(head * p.k_stride_head + i)] = from_float<H>(std::numeric_limits<float>::quiet_NaN());
    const Buffer q = upload(h_q), k = upload(h_k);
    const size_t bytes = size_t(p.q_heads) * c.tokens * sizeof(float), guard_bytes = 256;
    const Buffer out(bytes + guard_bytes), again(bytes + guard_bytes);
    p.queries = q.get(), p.k = k.get(), p.out = out.get<float>();
    const Buffer workspace(cuda::window_scores_workspace_bytes(p) + guard_bytes);
    p.workspace = workspace.get();
    for (int run = 0; run < 6; ++run) {
      WindowScoresParams r = p;
      if (run > 0) r.out = again.get<float>();
      (run > 0 ? again : out).poison(), workspace.poison();
      cuda::window_scores(r, nullptr);
      if (run > 0) reruns += differences(out.get(), again.get(), nullptr, 1, int64_t(out.bytes())) > 0;
      const auto scratch = workspace.to_host<uint8_t>();
      for (size_t i = scratch.size() - guard_bytes; i < scratch.size(); ++i) guard = guard && scratch[i] == 0xff;
    }
    const auto raw = out.to_host<uint8_t>();
    for (size_t i = bytes; i < raw.size(); ++i) guard = guard && raw[i] == 0xff;
    const auto got = out.to_host<float>();
    std::vector<float> cpu(size_t(p.q_heads) * c.tokens);
    WindowScoresParams host = p;
    host.queries = h_q.data(), host.k = h_k.data(), host.out = cpu.data(), host.workspace = nullptr;
    cpu::window_scores(host);
    const auto want = window_reference(p, h_q, h_k);
    worst = std::max(worst, worst_ratio(got.data(), want));
    worst_cpu = std::max(worst_cpu, worst_ratio(cpu.data(), want));
    if (c.tokens > c.window) {  // with one key turned round, the reference must be missed
      for (int d = 0; d < c.head_dim; ++d) h_k[size_t(d)] = from_float<H>(-to_float(h_k[size_t(d)]));
      control = std::min(control, worst_ratio(got.data(), window_reference(p, h_q, h_k)));
    }
    ++cases;
  }
  report.check(text("window_scores_", dtype_name(dtype)),
               worst < bound && worst_cpu < bound && control > 10 * bound && reruns == 0 && guard,
               text(cases, " cases, largest relative difference from float64 ", worst, " (CPU ", worst_cpu,
                    ", control ", control, "), ", reruns, " reruns differ, guard ", guard ? "intact" : "TOUCHED"));
}

}  // namespace vericache::bench
