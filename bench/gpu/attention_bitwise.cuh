// SPDX-License-Identifier: Apache-2.0
// Verify rows against one-row decoding at the sizes that are timed (R1): 32 query heads, 8 KV heads, head_dim 128,
// pages of 64 in random order. Used by attention_check.cu.
#pragma once

#include "attention_cases.cuh"

namespace vericache::bench {

// Copies page from[i] to to[i]. Grid: pages.
static __global__ void copy_pages(const int64_t* from, const int64_t* to, int64_t page_bytes) {
  const auto* src = reinterpret_cast<const uint4*>(from[blockIdx.x]);
  auto* dst = reinterpret_cast<uint4*>(to[blockIdx.x]);
  for (int64_t i = threadIdx.x; i < page_bytes / 16; i += blockDim.x) dst[i] = src[i];
}

class BitwiseAttention {
 public:
  static constexpr int kRows = 128;  // the last positions of each request, which take turns as query rows

  BitwiseAttention(int requests, int tokens)
      : requests_(requests),
        tokens_(tokens),
        pages_(size_t(requests) * (tokens / kHeads.page_size)),
        pool_(random_buffer<Element>(pages_ * kHeads.page_bytes() / 2, 31)),
        moved_(pool_.bytes()),
        table_(upload(scattered(pool_, kHeads.page_bytes(), pages_, 41))),
        moved_table_(upload(scattered(moved_, kHeads.page_bytes(), pages_, 42))),
        q_(random_buffer<Element>(size_t(requests) * kRows * kHeads.q_row(), 32, 2.f)),
        alone_(q_.bytes()),
        some_q_(q_.bytes()),
        out_(q_.bytes()) {
    copy_pages<<<unsigned(pages_), 256>>>(table_.get<int64_t>(), moved_table_.get<int64_t>(),
                                          int64_t(kHeads.page_bytes()));
    VC_CUDA_CHECK(cudaGetLastError());
  }

  void check(Report& report) {
    for (int i = 0; i < requests_; ++i)
      for (int row = 0; row < kRows; ++row) decode_alone(i, row, alone_);
    for (int rows = 1; rows <= kRows; ++rows) compare(std::vector<Part>(requests_, {kRows - rows, rows}), rows % 2);
    std::mt19937 random(6);
    for (int trial = 0; trial < 16; ++trial) {
      std::vector<Part> parts;
      for (int i = 0; i < requests_; ++i) {
        const int rows = random() % 3 ? 1 : int(random() % kRows);  // 0: a request without rows
        parts.push_back({int(random() % (kRows - rows + 1)), rows});
      }
      compare(parts, trial % 2);
    }
    for (int repeat = 0; repeat < 20; ++repeat) compare(std::vector<Part>(requests_, {kRows - 32, 32}), repeat % 2);
    report.bitwise(text("full ", requests_, "x", tokens_ / 1024, "K"), "1 to 128", compared_, different_,
                   control_noticed());
  }

 private:
  static constexpr Heads kHeads{32, 8, 128, 64};
  struct Part {
    int first, rows;  // of the kRows
  };

  void run(const void* q, const Buffer& table, int64_t first_page, const std::vector<int32_t>& offsets,
           const std::vector<int32_t>& positions, void* out) {
    const Buffer device_offsets = upload(offsets), device_positions = upload(positions);
    PagedAttentionParams p{};
    p.q = q, p.out = out, p.page_table = table.get<int64_t>() + first_page;
    p.row_offsets = device_offsets.get<int32_t>(), p.row_position = device_positions.get<int32_t>();
    p.q_stride_row = int64_t(kHeads.q_row()), p.q_stride_head = kHeads.head_dim;
    p.max_pages = tokens_ / kHeads.page_size, p.table_stride_request = p.max_pages;
    p.rows = int(positions.size()), p.requests = int(offsets.size()) - 1, p.q_heads = kHeads.q_heads;
    p.kv_heads = kHeads.kv_heads, p.head_dim = kHeads.head_dim, p.page_size = kHeads.page_size;
    p.scale = kHeads.scale(), p.dtype = DType::kBFloat16;
    const Buffer workspace = workspace_for(p, cuda::paged_attention_workspace_bytes);
    cuda::paged_attention(p, nullptr);
    VC_CUDA_CHECK(cudaGetLastError());
    VC_CUDA_CHECK(cudaDeviceSynchronize());
  }

  int position(int row) const { return tokens_ - kRows + row; }
  size_t at(int request, int row) const { return (size_t(request) * kRows + row) * kHeads.q_row(); }

  void decode_alone(int request, int row, const Buffer& out) {
    const int64_t first_page = int64_t(request) * (tokens_ / kHeads.page_size);
    run(q_.get<Element>() + at(request, row), table_, first_page, {0, 1}, {position(row)},
        out.get<Element>() + at(request, row));
  }

  void compare(const std::vector<Part>& parts, bool moved) {
    std::vector<int32_t> offsets{0}, positions, reference;
    for (int i = 0; i < requests_; ++i) {
      const auto [first, rows] = parts[i];
      VC_CUDA_CHECK(cudaMemcpyAsync(some_q_.get<Element>() + positions.size() * kHeads.q_row(),
                                    q_.get<Element>() + at(i, first), rows * kHeads.q_row() * sizeof(Element),
                                    cudaMemcpyDeviceToDevice));
      for (int row = first; row < first + rows; ++row) {
        positions.push_back(position(row));
        reference.push_back(i * kRows + row);
      }
      offsets.push_back(int32_t(positions.size()));
    }
    if (positions.empty()) return;
    out_.poison();
    run(some_q_.get(), moved ? moved_table_ : table_, 0, offsets, positions, out_.get());
    const Buffer map = upload(reference);
    const auto rows = int64_t(reference.size());
    different_ +=
        differences(out_.get(), alone_.get(), map.get<int>(), rows, int64_t(kHeads.q_row() * sizeof(Element)));
    compared_ += rows;
  }

  // One key of the first request, half as long or twice as long in each channel, must be seen in its last row.
  bool control_noticed() {
    int64_t page;
    VC_CUDA_CHECK(cudaMemcpy(&page, table_.get(), 8, cudaMemcpyDeviceToHost));
    change_key(reinterpret_cast<void*>(page), kHeads.head_dim);
    decode_alone(0, kRows - 1, out_);
    const size_t row = at(0, kRows - 1);
    return differences(out_.get<Element>() + row, alone_.get<Element>() + row, nullptr, 1,
                       int64_t(kHeads.q_row() * sizeof(Element))) > 0;
  }

  int requests_, tokens_;
  size_t pages_;
  Buffer pool_, moved_, table_, moved_table_, q_, alone_, some_q_, out_;
  int64_t compared_ = 0;
  uint64_t different_ = 0;
};

}  // namespace vericache::bench
