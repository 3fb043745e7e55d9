// SPDX-License-Identifier: Apache-2.0
// Attention kernels: speed. attention_bench [results.json] [largest batch x tokens in K, default 1024] [part of a name]
//
// 32 query heads, 8 KV heads, head_dim 128, pages of 64 in random order. Medians over replays of a CUDA graph of calls
// that rotate through input sets larger than the L2. Bytes are the K and V that must be read; for kept and quantized
// attention those of the compressed cache, scales included, with a tail of 64 tokens.
#include <chrono>
#include <thread>

#include "attention_cases.cuh"

namespace {

using namespace vericache;
using namespace vericache::bench;

constexpr Heads kHeads{32, 8, 128, 64};
constexpr size_t kPastL2 = size_t(1) << 30;
// Calls of a graph read so much at least, for its start takes 6 to 11 us: then that is 1% of any.
constexpr size_t kGraphBytes = size_t(4) << 30;
constexpr auto kPause = std::chrono::milliseconds(200);  // 128 rows bring clocks down for what is timed next
constexpr int kReplays = 9;

struct Batch {
  int requests, tokens;
  std::string name() const { return text(requests, "x", tokens / 1024, "K"); }
};

struct Rows {
  Buffer q, out, offsets, positions;
  int count;
  Rows(const Batch& b, int each, int last_position)
      : q(random_buffer<Element>(size_t(b.requests) * each * kHeads.q_row(), 7)),
        out(q.bytes()),
        offsets(4 * (b.requests + 1)),
        positions(4 * b.requests * each),
        count(b.requests * each) {
    std::vector<int32_t> o{0}, p;
    for (int r = 0; r < b.requests; ++r) {
      for (int i = 0; i < each; ++i) p.push_back(last_position - each + 1 + i);
      o.push_back(int(p.size()));
    }
    VC_CUDA_CHECK(cudaMemcpy(offsets.get(), o.data(), offsets.bytes(), cudaMemcpyHostToDevice));
    VC_CUDA_CHECK(cudaMemcpy(positions.get(), p.data(), positions.bytes(), cudaMemcpyHostToDevice));
  }
  template <class Params>
  void into(Params& p, const Batch& b) const {
    p.q = q.get(), p.out = out.get(), p.row_offsets = offsets.get<int>(), p.row_position = positions.get<int>();
    p.q_stride_row = int64_t(kHeads.q_row()), p.q_stride_head = kHeads.head_dim, p.rows = count;
    p.requests = b.requests, p.q_heads = kHeads.q_heads, p.kv_heads = kHeads.kv_heads;
    p.head_dim = kHeads.head_dim, p.page_size = kHeads.page_size, p.scale = kHeads.scale();
    p.dtype = DType::kBFloat16, p.tables_settled = true;  // no launch writes them
  }
};

int sets_for(size_t bytes) { return int(std::max<size_t>(1, (kPastL2 + bytes - 1) / bytes)); }

class Bench {
 public:
  Bench(Report& report, std::string only) : report_(report), only_(std::move(only)) {}

  void run(const Batch& b) {
    const size_t pages = size_t(b.requests) * (b.tokens / kHeads.page_size);
    const double kv_bytes = double(pages) * double(kHeads.page_bytes());
    const int sets = sets_for(size_t(kv_bytes));
    {
      const Buffer pool = random_buffer<Element>(size_t(kv_bytes) / 2 * sets, 11);
      const Buffer table = upload(scattered(pool, kHeads.page_bytes(), pages * sets, 9));
      for (const int rows : {1, 4, 8, 16, 32, 128}) {
        if (rows > 1 && b.tokens != 32768 && rows != 32) continue;
        const Rows r(b, rows, b.tokens - 1);
        PagedAttentionParams p{};
        r.into(p, b);
        p.max_pages = b.tokens / kHeads.page_size;
        p.cache_settled = true;
        p.table_stride_request = p.max_pages;
        const Buffer workspace = workspace_for(p, cuda::paged_attention_workspace_bytes);
        time(rows == 1 ? "full " + b.name() : text("verify ", rows, " rows ", b.name()), kv_bytes, sets,
             [&](int set, cudaStream_t stream) {
               p.page_table = table.get<int64_t>() + size_t(set) * pages;
               cuda::paged_attention(p, stream);
             });
      }
    }
    if (b.tokens < 32768) return;
    kept(b, kv_bytes);
    for (const int bits : {8, 4, 2}) quant(b, bits);
    if (b.requests == 8 && b.tokens == 32768)
      for (const int bits : {7, 6, 5}) quant(b, bits);
  }

 private:
  // Kept lengths 0.125 .. 0.375 of the context, 0.25 on average; a tail of one page.
  void kept(const Batch& b, double kv_bytes) {
    const int max_pages = b.tokens * 3 / 8 / kHeads.page_size, heads = b.requests * kHeads.kv_heads;
    const int sets = sets_for(size_t(kv_bytes / 4));
    const size_t pool_pages = size_t(heads) * max_pages * sets;
    const Buffer pool = random_buffer<Element>(pool_pages * kHeads.head_page_bytes() / 2, 12);
    const Buffer table = upload(scattered(pool, kHeads.head_page_bytes(), pool_pages, 3));
    const Buffer tail_pool = random_buffer<Element>(b.requests * kHeads.page_bytes() / 2, 13);
    const Buffer tail_table = upload(scattered(tail_pool, kHeads.page_bytes(), b.requests, 4));
    std::vector<int32_t> lengths;
    for (int i = 0; i < heads; ++i)
      lengths.push_back(int(b.tokens * (0.125 + 0.25 * (i % kHeads.kv_heads) / (kHeads.kv_heads - 1))));
    const double tokens = std::accumulate(lengths.begin(), lengths.end(), 0.0) + 64.0 * heads;
    const Buffer len = upload(lengths), start = upload(std::vector<int32_t>(b.requests, b.tokens));
    const Rows r(b, 1, b.tokens + 63);
    KeptAttentionParams p{};
    r.into(p, b);
    p.kept_len = len.get<int>(), p.tail_table = tail_table.get<int64_t>(), p.tail_start = start.get<int>();
    p.kept_stride_request = int64_t(kHeads.kv_heads) * max_pages, p.kept_stride_head = max_pages;
    p.tail_stride_request = 1, p.max_kept_pages = max_pages, p.max_tail_pages = 1, p.cache_settled = true;
    const Buffer workspace = workspace_for(p, cuda::kept_attention_workspace_bytes);
    time("kept 0.25 " + b.name(), tokens * kHeads.head_dim * 4, sets, [&](int set, cudaStream_t stream) {
      p.kept_table = table.get<int64_t>() + size_t(set) * heads * max_pages;
      cuda::kept_attention(p, stream);
    });
  }

  void quant(const Batch& b, int bits) {
    constexpr int kGroup = 32;
    const auto layout = QuantPageLayout::make(kHeads.kv_heads, kHeads.page_size, kHeads.head_dim, bits, kGroup, 2);
    const int each = b.tokens / kHeads.page_size;
    const size_t pages = size_t(b.requests) * each;
    const double bytes = double(pages) * double(layout.page_bytes);
    const int sets = sets_for(size_t(bytes));
    const Buffer pool(size_t(bytes) * sets);
    fill_quant<<<4096, 256>>>(pool.get<uint8_t>(), int64_t(pool.bytes()), layout, bits);
    VC_CUDA_CHECK(cudaGetLastError());
    const Buffer table = upload(scattered(pool, size_t(layout.page_bytes), pages * sets, 5));
    const Buffer tail_pool = random_buffer<Element>(b.requests * kHeads.page_bytes() / 2, 13);
    const Buffer tail_table = upload(scattered(tail_pool, kHeads.page_bytes(), b.requests, 4));
    const Buffer len = upload(std::vector<int32_t>(b.requests, b.tokens));
    const Rows r(b, 1, b.tokens + 63);
    QuantAttentionParams p{};
    r.into(p, b);
    p.quant_len = len.get<int>(), p.tail_table = tail_table.get<int64_t>(), p.quant_stride_request = each;
    p.tail_stride_request = 1, p.max_quant_pages = each, p.max_tail_pages = 1, p.bits = bits, p.group = kGroup;
    p.cache_settled = true;
    const Buffer workspace = workspace_for(p, cuda::quant_attention_workspace_bytes);
    time(text("int", bits, " ", b.name()), bytes + double(b.requests) * double(kHeads.page_bytes()), sets,
         [&](int set, cudaStream_t stream) {
           p.quant_table = table.get<int64_t>() + size_t(set) * pages;
           cuda::quant_attention(p, stream);
         });
  }

  void time(const std::string& name, double bytes, int sets, const std::function<void(int, cudaStream_t)>& call) {
    if (name.find(only_) == std::string::npos) return;
    const int launches = std::max(4, int(double(kGraphBytes) / bytes + 1.0));
    std::this_thread::sleep_for(kPause);
    const double us = time_graph(launches, kReplays, [&](int i, cudaStream_t s) { call(i % sets, s); });
    report_.time(name, us, bytes, bytes / memory_rate() * 1e6);
  }

  Report& report_;
  std::string only_;
};

}  // namespace

int main(int argc, char** argv) try {
  Report report(argc > 1 ? argv[1] : "");
  const int largest = argc > 2 ? std::atoi(argv[2]) : 1024;
  cudaDeviceProp device;
  VC_CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  Bench bench(report, argc > 3 ? argv[3] : "");
  for (const Batch b : {Batch{8, 4096}, Batch{8, 32768}, Batch{1, 32768}, Batch{1, 131072}, Batch{8, 131072}})
    if (b.requests * (b.tokens / 1024) <= largest) bench.run(b);
  return 0;
} catch (const std::exception& e) {
  std::printf("FAIL %s\n", e.what());
  return 1;
}
