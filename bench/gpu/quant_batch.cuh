// SPDX-License-Identifier: Apache-2.0
// Quantized attention over batches: units that one block works on as a whole and units that the ends of blocks cut,
// rows without keys, idle rows; and such calls one right after another in one workspace that holds anything at first,
// where each starts beside the one before it. Used by attention_check.cu.
#pragma once

#include "attention_cases.cuh"

namespace vericache::bench {

class QuantBatch {
 public:
  struct Request {
    int quantized, tail, rows;  // tokens; the rows are the last positions
  };

  QuantBatch(Heads heads, int bits, const std::vector<Request>& requests, int idle_rows, unsigned seed)
      : h_(heads),
        bits_(bits),
        requests_(requests),
        layout_(QuantPageLayout::make(h_.kv_heads, h_.page_size, h_.head_dim, bits, kGroup, 2)),
        pages_(1 + longest(&Request::quantized) / h_.page_size),
        tail_pages_(1 + longest(&Request::tail) / h_.page_size),
        pool_(requests.size() * pages_ * size_t(layout_.page_bytes)),
        tail_pool_(random_buffer<Element>(requests.size() * tail_pages_ * h_.page_bytes() / 2, seed)),
        table_(upload(scattered(pool_, size_t(layout_.page_bytes), requests.size() * pages_, seed))),
        tail_table_(upload(scattered(tail_pool_, h_.page_bytes(), requests.size() * tail_pages_, seed + 1))),
        lists_(requests),
        rows_(lists_.offsets.back() + idle_rows),
        q_(random_buffer<Element>(rows_ * h_.q_row(), seed + 2, 2.f)),
        lengths_(upload(lists_.lengths)),
        offsets_(upload(lists_.offsets)),
        positions_(4 * rows_) {
    fill_quant<<<1024, 256>>>(pool_.get<uint8_t>(), int64_t(pool_.bytes()), layout_, bits);
    VC_CUDA_CHECK(cudaGetLastError());
    positions_.poison();
    VC_CUDA_CHECK(
        cudaMemcpy(positions_.get(), lists_.positions.data(), 4 * lists_.positions.size(), cudaMemcpyHostToDevice));
  }

  // Of all requests.
  QuantAttentionParams params() const {
    QuantAttentionParams p{};
    p.q = q_.get(), p.quant_table = table_.get<int64_t>(), p.quant_len = lengths_.get<int>();
    p.tail_table = tail_table_.get<int64_t>(), p.row_offsets = offsets_.get<int>();
    p.row_position = positions_.get<int>(), p.q_stride_row = int64_t(h_.q_row()), p.q_stride_head = h_.head_dim;
    p.quant_stride_request = pages_, p.tail_stride_request = tail_pages_, p.rows = rows_;
    p.requests = int(requests_.size()), p.q_heads = h_.q_heads, p.kv_heads = h_.kv_heads, p.head_dim = h_.head_dim;
    p.page_size = h_.page_size, p.max_quant_pages = pages_, p.max_tail_pages = tail_pages_, p.bits = bits_;
    p.group = kGroup, p.scale = h_.scale(), p.dtype = DType::kBFloat16;
    return p;
  }
  // One call of the kernel with nothing beside it.
  std::vector<uint16_t> run(QuantAttentionParams p) const {
    const Buffer out(p.rows * h_.q_row() * 2);
    out.poison();
    p.out = out.get();
    const Buffer workspace = workspace_for(p, cuda::quant_attention_workspace_bytes);
    cuda::quant_attention(p, nullptr);
    VC_CUDA_CHECK(cudaGetLastError());
    return out.to_host<uint16_t>();
  }
  // The largest difference of a request's rows from those of a call for it alone; infinite if a row without keys has
  // anything but zeros.
  double difference_from_alone(const std::vector<uint16_t>& out) const {
    double worst = 0;
    for (size_t r = 0; r <= requests_.size(); ++r) {
      const int first = lists_.offsets[r], last = r < requests_.size() ? lists_.offsets[r + 1] : rows_;
      if (first == last) continue;
      std::vector<uint16_t> alone((last - first) * h_.q_row());
      if (r < requests_.size() && requests_[r].quantized + requests_[r].tail > 0) {
        const Buffer offsets = upload(std::vector<int32_t>{0, last - first});
        QuantAttentionParams p = params();
        p.q = q_.get<uint16_t>() + first * h_.q_row(), p.quant_table += r * pages_, p.quant_len += r;
        p.tail_table += r * tail_pages_, p.row_offsets = offsets.get<int>(), p.row_position += first;
        p.rows = last - first, p.requests = 1;
        alone = run(p);
      }
      double difference = 0, norm = 0;
      for (size_t i = 0; i < alone.size(); ++i) {
        const double want = to_float(bf16{alone[i]}), got = to_float(bf16{out[first * h_.q_row() + i]});
        if (std::isnan(got) || std::isnan(want)) return INFINITY;
        difference += (got - want) * (got - want);
        norm += want * want;
      }
      if (difference > 0) worst = std::max(worst, std::sqrt(difference / norm));
    }
    return worst;
  }
  size_t out_bytes() const { return rows_ * h_.q_row() * 2; }

 private:
  static constexpr int kGroup = 32;
  int longest(int Request::* tokens) const {
    int most = 0;
    for (const auto& r : requests_) most = std::max(most, r.*tokens);
    return most;
  }

  struct Lists {
    std::vector<int32_t> offsets{0}, lengths, positions;
    explicit Lists(const std::vector<Request>& requests) {
      for (const auto& r : requests) {
        for (int i = 0; i < r.rows; ++i) positions.push_back(r.quantized + r.tail - r.rows + i);
        offsets.push_back(int(positions.size()));
        lengths.push_back(r.quantized);
      }
    }
  };

  Heads h_;
  int bits_;
  std::vector<Request> requests_;
  QuantPageLayout layout_;
  int pages_, tail_pages_;  // of a request
  Buffer pool_, tail_pool_, table_, tail_table_;
  Lists lists_;
  int rows_;
  Buffer q_, lengths_, offsets_, positions_;
};

inline void check_quant_batch(Report& report, Heads h, int bits, int rows) {
  std::vector<QuantBatch> batches;
  const auto add = [&](const std::vector<QuantBatch::Request>& requests, int idle_rows) {
    batches.emplace_back(h, bits, requests, idle_rows, unsigned(10 * batches.size()));
  };
  add({{6400, 37, rows}, {0, 0, rows}, {64, 9, rows}, {0, 5, rows}, {12800, 64, rows}, {1280, 300, rows}, {256, 64, 0}},
      2);
  std::vector<QuantBatch::Request> many;
  for (int i = 0; i < 40; ++i) many.push_back({64 * (i % 7 * 5), i % 3 * 20, i % 4 ? rows : 0});
  add(many, 0);
  add({{25600, 64, rows}}, 0);
  add({{6400, 20, rows}}, 0);  // single requests one right after another
  add({{0, 5, rows}}, 0);
  add({{1280, 64, rows}}, 2);
  add({{1280, 64, 0}}, 1);

  double worst = 0;
  std::vector<std::vector<uint16_t>> alone;  // each call by itself
  size_t workspace_bytes = 0;
  for (const auto& b : batches) {
    alone.push_back(b.run(b.params()));
    worst = std::max(worst, b.difference_from_alone(alone.back()));
    workspace_bytes = std::max(workspace_bytes, cuda::quant_attention_workspace_bytes(b.params()));
  }
  const Buffer workspace(workspace_bytes);  // of all calls, as in a model
  workspace.poison();
  std::vector<Buffer> outs;
  for (int call = 0; call < 30; ++call) {
    outs.emplace_back(batches[call % batches.size()].out_bytes());
    outs.back().poison();
  }
  VC_CUDA_CHECK(cudaDeviceSynchronize());
  for (size_t call = 0; call < outs.size(); ++call) {
    QuantAttentionParams p = batches[call % batches.size()].params();
    p.out = outs[call].get(), p.workspace = workspace.get(), p.tables_settled = p.cache_settled = true;
    cuda::quant_attention(p, nullptr);
  }
  VC_CUDA_CHECK(cudaDeviceSynchronize());
  int different = 0;
  for (size_t call = 0; call < outs.size(); ++call)
    different += outs[call].to_host<uint16_t>() != alone[call % batches.size()];
  report.check(text("quant batches ", h.q_heads, "/", h.kv_heads, " D", h.head_dim, " bits ", bits, " rows ", rows),
               worst < 1.7e-2 && different == 0,
               text("difference ", worst, ", ", different, " of ", outs.size(), " calls in a row differ"));
}

}  // namespace vericache::bench
