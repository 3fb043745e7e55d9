// SPDX-License-Identifier: Apache-2.0
// Attention kernels on the GPU: right, invariant, then fast. Speed is printed only after the checks passed.
//   attention_bench [results.json] [check|time]
//
// Checks. Against a float64 kernel: full, kept and quantized attention, with the memory of unread tokens full of NaN.
// Invariance (R1), on bytes: every position's row alone is the reference; then 1 .. 128 rows together, batches of mixed
// requests, shuffled pages, 20 repeats. A changed bit of one old key must be noticed (the control).
// Times: medians over replays of a CUDA graph of calls that rotate through input sets larger than the L2.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention_bench_data.cuh"
#include "kernels/launchers.h"

namespace {

using namespace vericache;
using namespace vericache::bench;

struct Request {
  int first, rows;  // query rows at positions first .. first + rows - 1
};

// A master sequence: K and V of `tokens` tokens and a q for each position. Requests are prefixes of it, so one
// position's row must come out with the same bits wherever it is asked for.
struct Master {
  int tokens, q_heads, kv_heads, head_dim, page_size, window;
  Buffer<uint16_t> k, v, q;

  Master(int t, int qh, int kh, int d, int page, int w)
      : tokens(t), q_heads(qh), kv_heads(kh), head_dim(d), page_size(page), window(w),
        k(size_t(t) * kh * d), v(size_t(t) * kh * d), q(size_t(t) * qh * d) {
    fill_random(k, 1, 1.f);
    fill_random(v, 2, 1.f);
    fill_random(q, 3, 2.f);
  }
  size_t page_elements() const { return size_t(2) * kv_heads * page_size * head_dim; }
  float scale() const { return 1.f / std::sqrt(float(head_dim)); }
};

// Runs a batch of requests with pages scattered at random; returns the output rows.
std::vector<uint16_t> run_full(const Master& m, const std::vector<Request>& requests, unsigned seed, int spare_pages) {
  int max_pages = 1, rows = 0;
  for (const Request& r : requests) {
    max_pages = std::max(max_pages, (r.first + r.rows + m.page_size - 1) / m.page_size + spare_pages);
    rows += r.rows;
  }
  std::vector<int> slots(requests.size() * max_pages);
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), std::mt19937(seed));
  Buffer<uint16_t> pool(slots.size() * m.page_elements());
  check(cudaMemset(pool.data, 0xff, pool.bytes()));  // NaN
  std::vector<int64_t> table(slots.size());
  std::vector<int32_t> offsets{0}, positions, lengths;
  for (size_t r = 0; r < requests.size(); ++r) {
    for (int i = 0; i < max_pages; ++i)
      table[r * max_pages + i] = int64_t(pool.data + slots[r * max_pages + i] * m.page_elements());
    for (int i = 0; i < requests[r].rows; ++i) positions.push_back(requests[r].first + i);
    offsets.push_back(offsets.back() + requests[r].rows);
    lengths.push_back(requests[r].first + requests[r].rows);
  }
  const Buffer<int64_t> device_table(table);
  const Buffer<int32_t> device_offsets(offsets), device_positions(positions), device_lengths(lengths);
  write_pages(m.k.data, m.v.data, device_table.data, device_lengths.data, int(requests.size()), max_pages, m.kv_heads,
              m.page_size, m.head_dim);
  const size_t row_elements = size_t(m.q_heads) * m.head_dim;
  Buffer<uint16_t> q(rows * row_elements), out(rows * row_elements);
  for (int i = 0; i < rows; ++i)
    check(cudaMemcpyAsync(q.data + i * row_elements, m.q.data + positions[i] * row_elements, row_elements * 2,
                          cudaMemcpyDeviceToDevice));
  check(cudaMemset(out.data, 0xff, out.bytes()));

  PagedAttentionParams p{};
  p.q = q.data, p.out = out.data, p.page_table = device_table.data, p.row_offsets = device_offsets.data;
  p.row_position = device_positions.data;
  p.q_stride_row = int64_t(row_elements), p.q_stride_head = m.head_dim, p.table_stride_request = max_pages;
  p.rows = rows, p.requests = int(requests.size()), p.q_heads = m.q_heads, p.kv_heads = m.kv_heads;
  p.head_dim = m.head_dim, p.page_size = m.page_size, p.max_pages = max_pages, p.window = m.window;
  p.scale = m.scale(), p.dtype = DType::kBFloat16;
  Buffer<char> workspace(cuda::paged_attention_workspace_bytes(p));
  check(cudaMemset(workspace.data, 0xff, workspace.bytes()));
  p.workspace = workspace.data;
  cuda::paged_attention(p, nullptr);
  check(cudaGetLastError());
  return out.to_host();
}

bool check_full(int q_heads, int kv_heads, int head_dim, int page_size, int window, int tokens) {
  const Master m(tokens, q_heads, kv_heads, head_dim, page_size, window);
  const size_t row = size_t(q_heads) * head_dim;
  std::vector<std::vector<uint16_t>> bits(tokens);
  double worst = 0;
  long compared = 0;
  std::string failure;
  const auto reference = [&](int position) {
    if (!bits[position].empty()) return;
    bits[position] = run_full(m, {{position, 1}}, 1, 0);
    const int lo = window > 0 ? std::max(0, position + 1 - window) : 0;
    const double error = error_of(bits[position], m.q.data + position * row, Dense{m.k.data, m.v.data}, lo,
                                  position + 1 - lo, q_heads, kv_heads, head_dim, m.scale());
    worst = error > worst || std::isnan(error) ? error : worst;
  };
  const auto compare = [&](const std::vector<Request>& requests, unsigned seed, const char* what) {
    const std::vector<uint16_t> out = run_full(m, requests, seed, int(seed % 3));
    size_t at = 0;
    for (const Request& r : requests)
      for (int i = 0; i < r.rows; ++i, at += row) {
        const int position = r.first + i;
        reference(position);
        ++compared;
        if (failure.empty() && std::memcmp(out.data() + at, bits[position].data(), row * 2) != 0)
          failure = std::string(what) + ", position " + std::to_string(position);
      }
  };
  for (int rows = 1; rows <= 128; ++rows) compare({{tokens - rows, rows}}, unsigned(rows), "row count");
  std::mt19937 random(5);
  for (int trial = 0; trial < 12; ++trial) {
    std::vector<Request> requests;
    for (int i = 0, n = 1 + int(random() % 9); i < n; ++i) {
      const int rows = random() % 3 ? 1 : int(random() % 40);
      const int edge[] = {0, 63, 64, page_size - 1, page_size, 511, 512, tokens - 40, tokens - 128};
      requests.push_back({std::clamp(edge[random() % 9], 0, tokens - rows), rows});
    }
    compare(requests, unsigned(100 + trial), "batch mix");
  }
  for (int repeat = 0; repeat < 20; ++repeat)
    compare({{tokens - 32, 32}, {tokens - 1, 1}, {100, 5}}, unsigned(200 + repeat), "repeat");
  // The control: one changed bit of a key that every row sees must be noticed.
  uint16_t element;
  uint16_t* changed = m.k.data + size_t(window > 0 ? tokens - 10 : 7) * kv_heads * head_dim;
  check(cudaMemcpy(&element, changed, 2, cudaMemcpyDeviceToHost));
  element ^= 0x40;
  check(cudaMemcpy(changed, &element, 2, cudaMemcpyHostToDevice));
  const bool noticed = run_full(m, {{tokens - 1, 1}}, 1, 0) != bits[tokens - 1];
  const bool ok = failure.empty() && noticed && worst < 6e-3;
  std::printf("full %2d/%d heads D %3d page %3d window %4d, %d tokens: %ld rows bitwise %s, worst error %.1e, control %s  %s\n",
              q_heads, kv_heads, head_dim, page_size, window, tokens, compared,
              failure.empty() ? "equal" : ("DIFFER at " + failure).c_str(), worst, noticed ? "fails" : "MISSED",
              ok ? "ok" : "FAILED");
  return ok;
}

// Kept attention over one request of random kept tokens and a tail.
bool check_kept(int q_heads, int kv_heads, int head_dim, int page_size) {
  const int tokens = 3000, tail_start = 2816, rows = 3;
  const Master m(tokens, q_heads, kv_heads, head_dim, page_size, 0);
  KeptSetup setup(1, q_heads, kv_heads, head_dim, page_size, tail_start, 700, tokens - tail_start, rows);
  std::vector<std::vector<int>> visible;  // per head: master tokens
  std::mt19937 random(3);
  for (int h = 0; h < kv_heads; ++h) {
    std::vector<int> kept(tail_start);
    std::iota(kept.begin(), kept.end(), 0);
    std::shuffle(kept.begin(), kept.end(), random);
    kept.resize(h == 0 ? 0 : 150 + 61 * h);
    setup.write_head(0, h, kept, m.k.data, m.v.data);
    visible.push_back(kept);
  }
  setup.write_tail(m.k.data, m.v.data);
  const size_t row = size_t(q_heads) * head_dim;
  check(cudaMemcpy(setup.q.data, m.q.data, rows * row * 2, cudaMemcpyDeviceToDevice));
  const std::vector<uint16_t> out = setup.run();
  double worst = 0;
  for (int i = 0; i < rows; ++i)
    for (int h = 0; h < q_heads; ++h) {
      std::vector<int> seen = visible[h / (q_heads / kv_heads)];
      for (int t = tail_start; t <= tokens - rows + i; ++t) seen.push_back(t);
      worst = std::max(worst, error_of_head(out, i, h, m.q.data + i * row, Dense{m.k.data, m.v.data}, seen, q_heads,
                                            kv_heads, head_dim, m.scale()));
    }
  std::printf("kept %2d/%d heads D %3d page %3d: worst error %.1e  %s\n", q_heads, kv_heads, head_dim, page_size, worst,
              worst < 6e-3 ? "ok" : "FAILED");
  return worst < 6e-3;
}

bool check_quant(int q_heads, int kv_heads, int head_dim, int page_size, int bits, int group) {
  const int pages = 1536 / page_size, tail = 37, rows = 1;
  QuantSetup setup(2, q_heads, kv_heads, head_dim, page_size, bits, group, pages, tail, rows);
  const int tokens = pages * page_size + tail;
  double worst = 0;
  const std::vector<uint16_t> out = setup.run();
  for (int r = 0; r < 2; ++r) {
    const DenseCopy dense = setup.dequantized(r);
    std::vector<int> seen(tokens);
    std::iota(seen.begin(), seen.end(), 0);
    for (int h = 0; h < q_heads; ++h)
      worst = std::max(worst, error_of_head(out, r, h, setup.q.data + size_t(r) * q_heads * head_dim, dense.view(),
                                            seen, q_heads, kv_heads, head_dim, 1.f / std::sqrt(float(head_dim))));
  }
  std::printf("int%d %2d/%d heads D %3d page %3d group %d: worst error %.1e  %s\n", bits, q_heads, kv_heads, head_dim,
              page_size, group, worst, worst < 1.5e-2 ? "ok" : "FAILED");
  return worst < 1.5e-2;
}

struct Line {
  std::string name;
  double us, tb_s, ratio;  // ratio to full attention at one row; 0: none
};

int time_all(std::vector<Line>& lines) {
  constexpr int kQHeads = 32, kKvHeads = 8, kHeadDim = 128, kPage = 64;
  const auto add = [&](const std::string& name, double seconds, double bytes, double base) {
    lines.push_back({name, seconds * 1e6, bytes / seconds * 1e-12, base > 0 ? seconds / base : 0});
    std::printf("%-28s %9.1f us  %6.3f TB/s", name.c_str(), lines.back().us, lines.back().tb_s);
    if (base > 0) std::printf("  %5.3f x full", lines.back().ratio);
    std::printf("\n");
    std::fflush(stdout);
  };
  const struct {
    int batch, tokens;
  } shapes[] = {{8, 4096}, {8, 32768}, {8, 131072}, {1, 32768}, {1, 131072}};
  for (const auto& s : shapes) {
    const std::string shape = std::to_string(s.batch) + "x" + std::to_string(s.tokens / 1024) + "K";
    const double kv_bytes = 2.0 * s.batch * s.tokens * kKvHeads * kHeadDim * 2;
    double full = 0;
    {
      FullSetup setup(s.batch, kQHeads, kKvHeads, kHeadDim, kPage, s.tokens, 128);
      full = setup.time(1);
      add("full " + shape, full, kv_bytes, 0);
      for (int rows : {4, 8, 16, 32})
        if (s.tokens == 32768 || rows == 8)
          add("verify " + std::to_string(rows) + " rows " + shape, setup.time(rows), kv_bytes, full);
    }
    if (s.tokens < 32768) continue;
    {
      KeptSetup setup(s.batch, kQHeads, kKvHeads, kHeadDim, kPage, s.tokens, s.tokens / 8 * 3, 64, 1);
      add("kept 0.25 " + shape, setup.time(0.25), kv_bytes * 0.25, full);
    }
    for (int bits : {8, 4, 2}) {
      QuantSetup setup(s.batch, kQHeads, kKvHeads, kHeadDim, kPage, bits, 32, s.tokens / kPage, 64, 1);
      add("int" + std::to_string(bits) + " " + shape, setup.time(), setup.bytes(), full);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[2] : "";
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors, L2 %d MB\n", device.name, device.multiProcessorCount, device.l2CacheSize >> 20);
  bool ok = true;
  if (mode != "time") {
    ok &= check_full(32, 8, 128, 64, 0, 9001);
    ok &= check_full(8, 1, 64, 16, 0, 5000);
    ok &= check_full(16, 1, 128, 256, 0, 700);
    ok &= check_full(8, 2, 64, 64, 1000, 2100);
    ok &= check_kept(32, 8, 128, 64);
    ok &= check_kept(8, 2, 64, 16);
    for (int bits : {8, 4, 2}) {
      ok &= check_quant(32, 8, 128, 64, bits, 32);
      ok &= check_quant(8, 2, 64, 128, bits, 64);
    }
    ok &= check_quant(4, 2, 64, 16, 4, 16);
  }
  if (!ok) {
    std::printf("checks FAILED: no times\n");
    return 1;
  }
  std::vector<Line> lines;
  if (mode != "check") time_all(lines);
  if (argc > 1) {
    std::ofstream json(argv[1]);
    json << "{\"device\": \"" << device.name << "\", \"checks\": \"" << (mode == "time" ? "skipped" : "passed")
         << "\", \"times\": [";
    for (size_t i = 0; i < lines.size(); ++i)
      json << (i ? ",\n  " : "\n  ") << "{\"name\": \"" << lines[i].name << "\", \"us\": " << lines[i].us
           << ", \"tb_s\": " << lines[i].tb_s << ", \"ratio_to_full\": " << lines[i].ratio << "}";
    json << "]}\n";
  }
  return 0;
}
