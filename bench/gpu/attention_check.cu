// SPDX-License-Identifier: Apache-2.0
// Attention kernels: right and invariant. attention_check [results.json [quick]]; exit code 1 if anything failed.
// `quick` is for compute-sanitizer: the same checks on few rows and tokens.
//
// Against float64: full, kept and quantized attention, with NaN in every slot that must not be read. Kept attention,
// free of R1, twice more in other pages: the same bits; where nothing has been dropped, those of full attention.
// Batches of quantized requests against each request alone, and calls that overlap against calls that do not
// (quant_batch.cuh). Invariance (R1), on bytes: a position's row alone is the reference; then 1 .. 128 rows together,
// batches of mixed requests, shuffled pages, 20 repeats. The control, one changed bit of each element of one old key,
// must be noticed. The same at the sizes that attention_bench times (attention_bitwise.cuh): the rows named `bitwise`.
#include "attention_bitwise.cuh"
#include "attention_cases.cuh"
#include "kernels/device/splits.cuh"
#include "quant_batch.cuh"

namespace {

using namespace vericache;
using namespace vericache::bench;

std::vector<int> range(int lo, int hi) {
  std::vector<int> tokens(hi - lo);
  std::iota(tokens.begin(), tokens.end(), lo);
  return tokens;
}

std::string shape_name(const char* op, const Heads& h) {
  const std::string name = text(op, " ", h.q_heads, "/", h.kv_heads, " D", h.head_dim, " page ", h.page_size);
  return h.sharpness == 1.f ? name : text(name, " scores x", h.sharpness);
}

void check_full(Report& report, Heads h, int window, int tokens, bool quick = false) {
  const Sequence s(h, tokens);
  std::vector<std::vector<uint16_t>> bits(tokens);
  double worst = 0;
  long compared = 0;
  std::string failure;
  const auto reference = [&](int position) -> const std::vector<uint16_t>& {
    if (bits[position].empty()) {
      bits[position] = run_full(s, window, {{position, 1}}, 1);
      if (position % 8 == 0 || position == tokens - 1) {
        const auto seen = range(window > 0 ? std::max(0, position + 1 - window) : 0, position + 1);
        worst = std::max(worst, relative_error(s.q_at(position), s.k_floats.get<float>(), s.v_floats.get<float>(), h,
                                               {std::vector<std::vector<int>>(h.kv_heads, seen)}, bits[position]));
      }
    }
    return bits[position];
  };
  const auto compare = [&](const std::vector<FullRequest>& requests, unsigned seed, const char* what) {
    const auto out = run_full(s, window, requests, seed);
    size_t at = 0;
    for (const auto& r : requests)
      for (int i = 0; i < r.rows; ++i, at += h.q_row()) {
        ++compared;
        if (std::memcmp(out.data() + at, reference(r.first + i).data(), h.q_row() * 2) != 0 && failure.empty())
          failure = text(what, ", seed ", seed, ", position ", r.first + i);
      }
  };
  for (int rows = 1; rows <= 128; rows += quick ? 31 : 1) compare({{tokens - rows, rows}}, unsigned(rows), "row count");
  std::mt19937 random(5);
  for (unsigned trial = 0; trial < (quick ? 2 : 16); ++trial) {
    std::vector<FullRequest> requests;
    for (unsigned i = 0, n = 1 + random() % 9; i < n; ++i) {
      const int rows = int(random() % 3 ? 1 : random() % 40);
      const int edges[] = {0, 1, 63, 64, h.page_size - 1, h.page_size, 511, 512, tokens - 40, tokens - 128};
      requests.push_back({std::clamp(edges[random() % 10], 0, tokens - std::max(rows, 1)), rows});
    }
    requests.push_back({tokens - 1, 1});
    compare(requests, 100 + trial, "batch mix");
  }
  for (unsigned repeat = 0; repeat < (quick ? 1 : 20); ++repeat)
    compare({{tokens - 32, 32}, {tokens - 1, 1}, {100, 5}}, 200 + repeat, "repeat");

  change_key(s.k.get<uint16_t>() + size_t(tokens - 10) * h.kv_heads * h.head_dim, h.head_dim);
  const bool noticed = run_full(s, window, {{tokens - 1, 1}}, 1) != bits[tokens - 1];
  report.check(text(shape_name("full", h), " window ", window), failure.empty() && noticed && worst < 6e-3,
               text(tokens, " tokens, ", compared, " rows ", failure.empty() ? "bitwise equal" : "DIFFER at " + failure,
                    ", error ", worst, ", control ", noticed ? "noticed" : "MISSED"));
}

enum class Keep { kSome, kOneHead, kAll };

// `requests` of one sequence, each with fewer kept tokens than the one before; kOneHead: almost all in one head. How
// the key axis is cut depends on all of them, so what must hold is the value, and the bits when the same call comes
// again with other pages. kAll: nothing is dropped, and the bits are those of full attention.
void check_kept(Report& report, Heads h, int requests = 1, int rows = 3, Keep keep = Keep::kSome) {
  const int tokens = 6000, tail_start = 5888;
  const Sequence s(h, tokens);
  const bool all = keep == Keep::kAll;
  const int max_kept_pages = (all ? tail_start : 5200) / h.page_size + 1;
  const int max_tail_pages = 2 + (tokens - tail_start) / h.page_size;
  std::vector<std::vector<int>> kept(h.kv_heads);
  std::mt19937 random(3);
  for (int head = 0; head < h.kv_heads; ++head) {
    kept[head] = range(0, tail_start);
    if (all) continue;
    std::shuffle(kept[head].begin(), kept[head].end(), random);
    kept[head].resize(head == 0 ? 0 : head == 1 ? 5133 : keep == Keep::kOneHead ? 40 : 100 + 61 * head);
  }
  std::vector<int32_t> kept_len, offsets{0}, positions;
  std::vector<std::vector<std::vector<int>>> seen;
  const Buffer q(size_t(requests) * rows * h.q_row() * 2);
  for (int r = 0; r < requests; ++r) {
    std::vector<std::vector<int>> visible;
    for (const auto& own : kept) {
      visible.emplace_back(own.begin(), own.begin() + std::max(0, int(own.size()) - (all ? 0 : 301 * r)));
      kept_len.push_back(int(visible.back().size()));
    }
    VC_CUDA_CHECK(cudaMemcpy(q.get<Element>() + r * rows * h.q_row(), s.q_at(tokens - rows), rows * h.q_row() * 2,
                             cudaMemcpyDeviceToDevice));
    for (int position = tokens - rows; position < tokens; ++position) {
      positions.push_back(position);
      seen.push_back(visible);
      for (auto& head : seen.back())
        for (int token = tail_start; token <= position; ++token) head.push_back(token);
    }
    offsets.push_back(int(positions.size()));
  }
  const Buffer len = upload(kept_len), start = upload(std::vector<int32_t>(requests, tail_start)),
               row_offsets = upload(offsets), row_position = upload(positions);
  KeptAttentionParams p{};
  p.q = q.get(), p.kept_len = len.get<int>(), p.tail_start = start.get<int>();
  p.row_offsets = row_offsets.get<int>(), p.row_position = row_position.get<int>();
  p.q_stride_row = int64_t(h.q_row()), p.q_stride_head = h.head_dim, p.kept_stride_head = max_kept_pages;
  p.rows = rows * requests, p.requests = requests, p.q_heads = h.q_heads, p.kv_heads = h.kv_heads;
  p.head_dim = h.head_dim, p.page_size = h.page_size, p.max_kept_pages = max_kept_pages;
  p.max_tail_pages = max_tail_pages, p.scale = h.scale(), p.dtype = DType::kBFloat16;
  p.kept_stride_request = int64_t(h.kv_heads) * max_kept_pages, p.tail_stride_request = max_tail_pages;
  p.as_full = all;

  bool in_a_row = true;
  const auto run = [&](unsigned seed, bool settled) {
    const int head_pages = h.kv_heads * max_kept_pages;
    const Buffer kept_pool(head_pages * h.head_page_bytes()), tail_pool(max_tail_pages * h.page_bytes());
    kept_pool.poison();
    tail_pool.poison();
    auto kept_pages = scattered(kept_pool, h.head_page_bytes(), head_pages, seed);
    auto tail_pages = scattered(tail_pool, h.page_bytes(), max_tail_pages, seed + 1);
    for (int r = 1; r < requests; ++r) {  // all share them
      kept_pages.insert(kept_pages.end(), kept_pages.begin(), kept_pages.begin() + head_pages);
      tail_pages.insert(tail_pages.end(), tail_pages.begin(), tail_pages.begin() + max_tail_pages);
    }
    const Buffer kept_table = upload(kept_pages), tail_table = upload(tail_pages);
    for (int head = 0; head < h.kv_heads; ++head) {
      if (kept[head].empty()) continue;
      const Buffer list = upload(kept[head]);
      fill_pages<<<int(kept[head].size()), 128>>>(s.k.get<Element>(), s.v.get<Element>(),
                                                  kept_table.get<int64_t>() + head * max_kept_pages, 0, list.get<int>(),
                                                  h, head);
      VC_CUDA_CHECK(cudaDeviceSynchronize());
    }
    fill_pages<<<tokens - tail_start, 128>>>(s.k.get<Element>(), s.v.get<Element>(), tail_table.get<int64_t>(),
                                             tail_start, nullptr, h, -1);
    VC_CUDA_CHECK(cudaDeviceSynchronize());
    p.kept_table = kept_table.get<int64_t>(), p.tail_table = tail_table.get<int64_t>();
    p.tables_settled = p.cache_settled = settled;
    const Buffer workspace = workspace_for(p, cuda::kept_attention_workspace_bytes);
    workspace.poison();
    std::vector<Buffer> outs;  // of calls one right after another, each beside the end of the one before if settled
    for (int call = 0; call < (settled ? 6 : 1); ++call) {
      outs.emplace_back(q.bytes());
      outs.back().poison();
    }
    VC_CUDA_CHECK(cudaDeviceSynchronize());
    for (const Buffer& to : outs) {
      p.out = to.get();
      cuda::kept_attention(p, nullptr);
    }
    const auto first = outs[0].to_host<uint16_t>();
    for (const Buffer& to : outs) in_a_row = in_a_row && to.to_host<uint16_t>() == first;
    return first;
  };
  const auto got = run(1, false);
  const bool same = run(2, false) == got && run(3, true) == got && in_a_row;
  const double error = relative_error(q.get<Element>(), s.k_floats.get<float>(), s.v_floats.get<float>(), h, seen, got);
  bool as_full = true;
  if (all) {
    const auto full = run_full(s, 0, {{tokens - rows, rows}}, 1);
    for (int r = 0; r < requests; ++r)
      as_full = as_full && std::equal(full.begin(), full.end(), got.begin() + int64_t(r) * rows * h.q_row());
  }
  // Of a head that is alone in its output one key in 5000 can vanish in the rounding.
  for (int i = 0; i < 100; ++i)
    change_key(s.k.get<uint16_t>() + (size_t(kept[1][i]) * h.kv_heads + 1) * h.head_dim, h.head_dim);
  const bool noticed = run(1, false) != got;
  constexpr const char* kNames[] = {"", " uneven", " all"};
  report.check(text(shape_name("kept", h), " requests ", requests, " rows ", rows, kNames[int(keep)]),
               same && noticed && as_full && error < 6e-3,
               text("error ", error, same ? ", the same in other pages" : ", NOT the same in other pages",
                    !all      ? ""
                    : as_full ? ", bits of full attention"
                              : ", NOT the bits of full attention",
                    ", control ", noticed ? "noticed" : "MISSED"));
}

void check_quant(Report& report, Heads h, int bits, int group, int rows = 2) {
  const int pages = 1536 / h.page_size, quantized = pages * h.page_size, tail = 37, tokens = quantized + tail;
  const Sequence s(h, tokens);
  const auto layout = QuantPageLayout::make(h.kv_heads, h.page_size, h.head_dim, bits, group, 2);
  const int tail_pages = tail / h.page_size + 2;
  const Buffer pool(size_t(layout.page_bytes) * pages), tail_pool(tail_pages * h.page_bytes());
  tail_pool.poison();
  fill_quant<<<1024, 256>>>(pool.get<uint8_t>(), int64_t(pool.bytes()), layout, bits);
  const Buffer table = upload(scattered(pool, size_t(layout.page_bytes), pages, 4));
  const Buffer tail_table = upload(scattered(tail_pool, h.page_bytes(), tail_pages, 5));
  fill_pages<<<tail, 128>>>(s.k.get<Element>(), s.v.get<Element>(), tail_table.get<int64_t>(), quantized, nullptr, h,
                            -1);
  for (int page = 0; page < pages; ++page)  // the dense floats of the quantized tokens; the tail's stay
    dequantize_page<<<h.page_size, 128>>>(table.get<int64_t>(), page, layout.head_bytes, layout, h, bits, group,
                                          s.k_floats.get<float>(), s.v_floats.get<float>());
  VC_CUDA_CHECK(cudaGetLastError());
  const Buffer len = upload(std::vector<int32_t>{quantized}), offsets = upload(std::vector<int32_t>{0, rows}),
               positions = upload(range(tokens - rows, tokens));
  const Buffer out(rows * h.q_row() * 2);
  out.poison();
  QuantAttentionParams p{};
  p.q = s.q_at(tokens - rows), p.out = out.get(), p.quant_table = table.get<int64_t>(), p.quant_len = len.get<int>();
  p.tail_table = tail_table.get<int64_t>(), p.row_offsets = offsets.get<int>(), p.row_position = positions.get<int>();
  p.q_stride_row = int64_t(h.q_row()), p.q_stride_head = h.head_dim, p.quant_stride_request = pages;
  p.tail_stride_request = tail_pages, p.rows = rows, p.requests = 1, p.q_heads = h.q_heads, p.kv_heads = h.kv_heads;
  p.head_dim = h.head_dim, p.page_size = h.page_size, p.max_quant_pages = pages, p.max_tail_pages = tail_pages;
  p.bits = bits, p.group = group, p.scale = h.scale(), p.dtype = DType::kBFloat16;
  const Buffer workspace = workspace_for(p, cuda::quant_attention_workspace_bytes);
  cuda::quant_attention(p, nullptr);
  const auto got = out.to_host<uint16_t>();
  out.poison();
  p.tables_settled = p.cache_settled = true;
  cuda::quant_attention(p, nullptr);
  const bool same = out.to_host<uint16_t>() == got;
  std::vector<std::vector<std::vector<int>>> seen;
  for (int i = 0; i < rows; ++i) seen.emplace_back(h.kv_heads, range(0, tokens - rows + i + 1));
  const double error =
      relative_error(s.q_at(tokens - rows), s.k_floats.get<float>(), s.v_floats.get<float>(), h, seen, got);
  report.check(text(shape_name("quant", h), " bits ", bits, " group ", group, " rows ", rows), same && error < 1.2e-2,
               text("error ", error, same ? "" : ", not the same twice"));
}

}  // namespace

int main(int argc, char** argv) try {
  Report report(argc > 1 ? argv[1] : "");
  if (argc > 2 && std::string(argv[2]) == "quick") {
    check_full(report, {8, 2, 128, 64}, 0, 700, true);
    check_full(report, {8, 2, 64, 64}, 100, 600, true);
    check_full(report, {7, 1, 128, 64}, 0, 200, true);  // a group that does not divide a block's rows
    check_kept(report, {4, 2, 64, 64});
    check_kept(report, {4, 2, 64, 64}, 20, 1);  // many units
    check_kept(report, {8, 2, 128, 64}, 1, 1);
    for (const int bits : {8, 4, 2}) check_quant(report, {8, 2, 128, 64}, bits, 32);
    check_quant(report, {8, 2, 128, 64}, 2, 32, 1);
    check_quant_batch(report, {8, 2, 128, 64}, 4, 1);
    std::printf("%d failures\n", report.failures());
    return report.failures() > 0;
  }
  if (argc <= 2 || std::string(argv[2]) != "quant") {
    check_full(report, {32, 8, 128, 64}, 0, 9001);
    check_full(report, {8, 1, 64, 16}, 0, 5000);
    check_full(report, {16, 1, 128, 256}, 0, 700);
    check_full(report, {8, 2, 64, 64}, 1000, 2100);
    check_full(report, {7, 1, 128, 64}, 0, 700);  // a group that does not divide a block's rows
    check_full(report, {4, 4, 64, 32}, 0, 700);
    check_full(report, {32, 1, 128, 64}, 0, 700);
    check_full(report, {6, 2, 96, 64}, 0, 300);  // no tensor cores
    for (const int requests : {1, 2, 9})         // few units, and with 9 many
      for (const int rows : {1, 3, 40}) check_kept(report, {32, 8, 128, 64}, requests, rows);
    check_kept(report, {32, 32, 128, 64}, 1, 1, Keep::kOneHead);  // one head with more states than are loaded at once
    check_kept(report, {32, 32, 64, 64}, 1, 1, Keep::kOneHead);   // and with more pieces than there is memory for
    for (const int page : {16, 64, 256})
      for (const int rows : {1, 2}) check_kept(report, {8, 2, 128, page}, 1, rows);
    check_kept(report, {12, 2, 128, 32}, 1, 1);
    // The largest score so far rises by more than a weight may exceed one.
    check_kept(report, {32, 8, 128, 64, 6.f}, 1, 1);
    check_kept(report, {8, 8, 128, 64}, 200, 1);  // so many units that an H200's ring is shorter
    for (const int requests : {1, 3})
      for (const int rows : {1, 7}) check_kept(report, {32, 8, 128, 64}, requests, rows, Keep::kAll);
    check_kept(report, {8, 2, 64, 16});
    check_kept(report, {8, 2, 64, 16}, 3, 1);
  }
  for (const int bits : {8, 4, 2}) {
    check_quant(report, {32, 8, 128, 64}, bits, 32);
    check_quant(report, {8, 2, 64, 128}, bits, 64);
    check_quant(report, {32, 8, 128, 64}, bits, 32, 1);
    check_quant(report, {6, 2, 64, 256}, bits, 32, 1);
    check_quant(report, {8, 1, 128, 128}, bits, 64, 1);
    check_quant(report, {8, 1, 64, 64}, bits, 32, 9);
  }
  for (const int bits : {5, 6, 7}) {
    check_quant(report, {32, 8, 128, 64}, bits, 32);
    check_quant(report, {32, 8, 128, 64}, bits, 32, 1);
    check_quant(report, {8, 1, 128, 128}, bits, 64, 9);
    check_quant(report, {6, 2, 128, 256}, bits, 32, 1);
    check_quant(report, {8, 2, 64, 128}, bits, 64);  // 5 and 7: no tensor cores
  }
  check_quant(report, {6, 2, 64, 64}, 6, 32, 1);
  check_quant(report, {4, 2, 64, 16}, 4, 16);  // no tensor cores
  check_quant(report, {4, 2, 64, 16}, 6, 16);
  for (const int bits : {8, 7, 6, 5, 4, 2})
    for (const int rows : {1, 2}) check_quant_batch(report, {32, 8, 128, 64}, bits, rows);
  check_quant_batch(report, {8, 1, 64, 64}, 4, 9);
  constexpr int kTimed[][2] = {{8, 4}, {8, 32}, {8, 128}, {1, 32}, {1, 128}};  // requests, K tokens
  for (const auto& [requests, kilo] : kTimed) BitwiseAttention(requests, kilo * 1024).check(report);
  BitwiseAttention(1, cuda::AbsoluteSplits::kMiddleEnd + 64).check(report);  // rows on both sides of a new length
  std::printf("%d failures\n", report.failures());
  return report.failures() > 0;
} catch (const std::exception& e) {
  std::printf("FAIL %s\n", e.what());
  return 1;
}
