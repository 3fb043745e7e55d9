// SPDX-License-Identifier: Apache-2.0
// Times of the CUDA kernels other than attention: CUDA graph replays, medians, inputs rotated past the L2. The floor is
// the bytes that must move over the copy rate measured first in the same run; for linear, which writes next to nothing,
// over the read rate.
//
//   dense_bench [results.json]
#include "harness.cuh"
#include "kernels/launchers.h"

namespace vericache::bench {
namespace {

constexpr size_t kPastL2 = size_t(400) << 20;  // bytes that one rotation walks over, at least
double g_copy_rate = 0;                        // bytes a microsecond, read plus written
double g_read_rate = 0;                        // bytes a microsecond, read alone

int sets_for(size_t bytes) { return int(std::clamp<size_t>((kPastL2 + bytes - 1) / bytes, 2, 64)); }

// Eight 16-byte loads in flight a thread; what the chip's memory gives to plain code.
template <bool kWrite>
__global__ void __launch_bounds__(512) stream_kernel(const uint4* in, uint4* out, int64_t count) {
  constexpr int kDeep = 8;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  uint32_t folded = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += kDeep * step) {
    uint4 v[kDeep];
#pragma unroll
    for (int j = 0; j < kDeep; ++j) v[j] = i + j * step < count ? __ldcs(in + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kDeep; ++j) {
      if (kWrite && i + j * step < count) __stcs(out + i + j * step, v[j]);
      if (!kWrite) folded ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  }
  if (!kWrite && folded == 0x12345679u) out[0] = make_uint4(folded, 0, 0, 0);  // keeps the loads
}

// The ceilings of this run. The runtime's own copy is shown beside them: it is slower.
void measure_rates(Report& report) {
  const size_t bytes = size_t(1) << 30;
  const Buffer a = random_buffer<float>(bytes / 4, 1), b(bytes);
  const double runtime_us = time_graph(4, 7, [&](int, cudaStream_t s) {
    VC_CUDA_CHECK(cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, s));
  });
  report.time("cudaMemcpy 1 GiB, read + written", runtime_us, 2.0 * bytes, runtime_us);
  double copy_us = 1e30, read_us = 1e30;
  for (const int blocks : {264, 528, 1056, 4096}) {
    copy_us = std::min(copy_us, time_graph(4, 7, [&](int, cudaStream_t s) {
                         stream_kernel<true><<<blocks, 512, 0, s>>>(a.get<uint4>(), b.get<uint4>(), bytes / 16);
                       }));
    read_us = std::min(read_us, time_graph(4, 7, [&](int, cudaStream_t s) {
                         stream_kernel<false><<<blocks, 512, 0, s>>>(a.get<uint4>(), b.get<uint4>(), bytes / 16);
                       }));
  }
  g_copy_rate = 2.0 * bytes / copy_us;
  g_read_rate = bytes / read_us;
  report.time("copy kernel 1 GiB, read + written", copy_us, 2.0 * bytes, copy_us);
  report.time("read kernel 1 GiB", read_us, bytes, read_us);
}

void linear_times(Report& report, int n, int k) {
  using T = __nv_bfloat16;
  const size_t w_bytes = size_t(n) * k * 2;
  const int sets = sets_for(w_bytes);
  std::vector<Buffer> w;
  for (int i = 0; i < sets; ++i) w.push_back(random_buffer<T>(size_t(n) * k, 100 + i, 0.02f));
  const Buffer x = random_buffer<T>(size_t(512) * k, 1), out(size_t(512) * n * 4);
  const bool logits = n > 100000;
  for (const int rows : {1, 8, 16, 32, 64, 128, 256, 512}) {
    if (rows == 512 && logits) continue;
    for (const bool settled : {false, true}) {
      if (settled && rows > 64) continue;
      LinearParams p{};
      p.x = x.get(), p.out = out.get(), p.x_stride_row = k, p.out_stride_row = n;
      p.rows = rows, p.n = n, p.k = k, p.out_float32 = logits, p.dtype = DType::kBFloat16, p.w_settled = settled;
      const int launches = std::max(sets, 12);
      const double us = time_graph(launches, 9, [&](int i, cudaStream_t s) {
        p.w = w[size_t(i % sets)].get();
        cuda::linear(p, s);
      });
      const double bytes = double(w_bytes) + double(rows) * k * 2 + double(rows) * n * (logits ? 4 : 2);
      report.time(text("linear M=", rows, " N=", n, " K=", k, settled ? " w_settled" : ""), us, bytes,
                  bytes / g_read_rate);
    }
  }
}

void layer_op_times(Report& report) {
  using T = __nv_bfloat16;
  for (const int rows : {1, 8, 64}) {
    const int dim = 4096, inter = 14336, q_heads = 32, kv_heads = 8, head_dim = 128, page_size = 64;
    const Buffer x = random_buffer<T>(size_t(rows) * dim, 1), residual = random_buffer<T>(size_t(rows) * dim, 2);
    const Buffer weight = random_buffer<T>(dim, 3), out(size_t(rows) * dim * 2), sum(size_t(rows) * dim * 2);
    const RmsNormParams norm{x.get(), residual.get(), weight.get(), out.get(), sum.get(),       dim,
                             dim,     rows,           dim,          1e-5f,     DType::kBFloat16};
    double bytes = 4.0 * rows * dim * 2;
    report.time(text("add_rms_norm rows=", rows),
                time_graph(32, 9, [&](int, cudaStream_t s) { cuda::rms_norm(norm, s); }), bytes, bytes / g_copy_rate);

    const Buffer gate_up = random_buffer<T>(size_t(rows) * 2 * inter, 4), act(size_t(rows) * inter * 2);
    const SiluMulParams silu{gate_up.get(), act.get(), 2 * inter, rows, inter, DType::kBFloat16};
    bytes = 3.0 * rows * inter * 2;
    report.time(text("silu_mul rows=", rows), time_graph(32, 9, [&](int, cudaStream_t s) { cuda::silu_mul(silu, s); }),
                bytes, bytes / g_copy_rate);

    const int64_t width = (q_heads + 2 * kv_heads) * head_dim;
    const size_t page_bytes = size_t(2) * kv_heads * page_size * head_dim * 2;
    const Buffer qkv = random_buffer<T>(rows * width, 5), q_out(size_t(rows) * q_heads * head_dim * 2);
    const Buffer norm_weight = random_buffer<T>(head_dim, 6), pages(page_bytes * rows);
    const Buffer angles = random_buffer<float>(size_t(4096) * head_dim / 2, 7);
    std::vector<int32_t> position(rows);
    std::vector<int64_t> page(rows);
    for (int r = 0; r < rows; ++r) position[r] = 40 * r, page[r] = pages.address() + int64_t(r * page_bytes);
    const Buffer d_position = upload(position), d_page = upload(page);
    RopeWriteParams rope{};
    rope.qkv = qkv.get(), rope.q_norm = rope.k_norm = norm_weight.get(), rope.cos = rope.sin = angles.get<float>();
    rope.row_position = d_position.get<int32_t>(), rope.row_page = d_page.get<int64_t>(), rope.q_out = q_out.get();
    rope.qkv_stride_row = width, rope.rows = rows, rope.q_heads = q_heads, rope.kv_heads = kv_heads;
    rope.head_dim = head_dim, rope.page_size = page_size, rope.eps = 1e-6f, rope.dtype = DType::kBFloat16;
    bytes = 2.0 * rows * width * 2;
    report.time(text("rope_write rows=", rows),
                time_graph(32, 9, [&](int, cudaStream_t s) { cuda::rope_write(rope, s); }), bytes, bytes / g_copy_rate);
  }
}

// qkv, rotation and page write in one launch and in two; alone, and behind the norm as in a layer.
void linear_rope_times(Report& report) {
  using T = __nv_bfloat16;
  constexpr int kQHeads = 32, kKvHeads = 8, kHeadDim = 128, kPageSize = 64, kPositions = 4096;
  constexpr int n = (kQHeads + 2 * kKvHeads) * kHeadDim, k = 4096, kMostRows = 64;
  const size_t w_bytes = size_t(n) * k * 2, page_bytes = size_t(2) * kKvHeads * kPageSize * kHeadDim * 2;
  const int sets = sets_for(w_bytes);
  std::vector<Buffer> w;
  for (int i = 0; i < sets; ++i) w.push_back(random_buffer<T>(size_t(n) * k, 100 + i, 0.02f));
  const Buffer x = random_buffer<T>(size_t(kMostRows) * k, 1), normed = random_buffer<T>(size_t(kMostRows) * k, 4);
  const Buffer weight = random_buffer<T>(k, 2), head_weight = random_buffer<T>(kHeadDim, 5);
  const Buffer qkv(size_t(kMostRows) * n * 2), q_out(size_t(kMostRows) * kQHeads * kHeadDim * 2);
  const Buffer pages(page_bytes * kMostRows), angles = random_buffer<float>(size_t(kPositions) * kHeadDim / 2, 3);
  std::vector<int32_t> position(kMostRows);
  for (int r = 0; r < kMostRows; ++r) position[r] = 61 * r;
  const Buffer d_position = upload(position);
  const Buffer d_page = upload(page_table(pages.get(), int64_t(page_bytes), kMostRows));
  for (const int rows : {1, 8, 16, 32, 64}) {
    const RmsNormParams norm{x.get(), nullptr, weight.get(), normed.get(),    nullptr, k, 0,
                             rows,    k,       1e-5f,        DType::kBFloat16};
    LinearRopeWriteParams p{};
    p.product.x = normed.get(), p.product.out = qkv.get(), p.product.x_stride_row = k, p.product.out_stride_row = n;
    p.product.rows = rows, p.product.n = n, p.product.k = k, p.product.dtype = DType::kBFloat16;
    p.product.w_settled = true, p.workspace = qkv.get();
    p.rope.qkv = qkv.get(), p.rope.cos = p.rope.sin = angles.get<float>(), p.rope.q_out = q_out.get();
    p.rope.row_position = d_position.get<int32_t>(), p.rope.row_page = d_page.get<int64_t>();
    p.rope.qkv_stride_row = n, p.rope.rows = rows, p.rope.q_heads = kQHeads, p.rope.kv_heads = kKvHeads;
    p.rope.head_dim = kHeadDim, p.rope.page_size = kPageSize, p.rope.dtype = DType::kBFloat16;
    const double bytes = double(w_bytes) + double(rows) * (k + n) * 2;
    for (const auto [qk_norm, with_norm] : {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
      p.rope.q_norm = p.rope.k_norm = qk_norm ? head_weight.get() : nullptr;
      const auto time = [&](const char* name, const std::function<void(cudaStream_t)>& run) {
        const double us = time_graph(std::max(sets, 12), 9, [&](int i, cudaStream_t s) {
          if (with_norm) cuda::rms_norm(norm, s);
          p.product.w = w[size_t(i % sets)].get();
          run(s);
        });
        report.time(text(with_norm ? "norm, " : "", name, qk_norm ? ", QK-norm" : "", " rows=", rows), us, bytes,
                    bytes / g_read_rate);
      };
      time("linear, rope_write", [&](cudaStream_t s) {
        cuda::linear(p.product, s);
        cuda::rope_write(p.rope, s);
      });
      time("linear_rope_write", [&](cudaStream_t s) { cuda::linear_rope_write(p, s); });
    }
  }
}

void sample_times(Report& report) {
  const int vocab = 128256;
  for (const int rows : {1, 8, 64, 256}) {
    const Buffer logits = random_buffer<float>(size_t(rows) * vocab, 1, 4.0f), token(rows * 8), logprob(rows * 4);
    struct Case {
      const char* name;
      float temperature, top_p, min_p;
      int top_k;
    };
    for (const Case& c :
         {Case{"greedy", 0, 1, 0, 0}, Case{"T=1", 1, 1, 0, 0}, Case{"T=0.7 top_p=0.9", 0.7f, 0.9f, 0, 0},
          Case{"T=0.7 top_k=50 top_p=0.9", 0.7f, 0.9f, 0, 50}}) {
      const Buffer t = upload(std::vector<float>(rows, c.temperature)), tp = upload(std::vector<float>(rows, c.top_p));
      const Buffer mp = upload(std::vector<float>(rows, c.min_p)), tk = upload(std::vector<int32_t>(rows, c.top_k));
      const Buffer seed = upload(std::vector<int64_t>(rows, 7)), position = upload(std::vector<int32_t>(rows, 9));
      SampleParams p{};
      p.logits = logits.get<float>(), p.temperature = t.get<float>(), p.top_k = tk.get<int32_t>(),
      p.top_p = tp.get<float>();
      p.min_p = mp.get<float>(), p.seed = seed.get<int64_t>(), p.row_position = position.get<int32_t>();
      p.token = token.get<int64_t>(), p.logprob = logprob.get<float>(), p.logits_stride_row = vocab, p.rows = rows;
      p.vocab = vocab;
      const double bytes = 4.0 * rows * vocab;
      report.time(text("sample rows=", rows, " ", c.name),
                  time_graph(16, 9, [&](int, cudaStream_t s) { cuda::sample(p, s); }), bytes, bytes / g_copy_rate);
    }
  }
}

void page_times(Report& report) {
  const int kv_heads = 8, head_dim = 128, page_size = 64, group = 32, pages = 2048;  // 512 MiB of full pages
  const size_t full_bytes = size_t(2) * kv_heads * page_size * head_dim * 2;
  const Buffer full = random_buffer<__nv_bfloat16>(full_bytes / 2 * pages, 1);
  const Buffer t_full = upload(page_table(full.get(), int64_t(full_bytes), pages));
  for (const int bits : {8, 4, 2}) {
    const auto layout = QuantPageLayout::make(kv_heads, page_size, head_dim, bits, group, 2);
    const Buffer quant(size_t(layout.page_bytes) * pages);
    const Buffer t_quant = upload(page_table(quant.get(), layout.page_bytes, pages));
    const QuantizeParams p{
        t_full.get<int64_t>(), t_quant.get<int64_t>(), pages, kv_heads, head_dim, page_size, bits, group,
        DType::kBFloat16};
    const double bytes = double(full_bytes + layout.page_bytes) * pages;
    report.time(text("kv_quantize bits=", bits),
                time_graph(3, 7, [&](int, cudaStream_t s) { cuda::kv_quantize(p, s); }), bytes, bytes / g_copy_rate);
    report.time(text("kv_dequantize bits=", bits),
                time_graph(3, 7, [&](int, cudaStream_t s) { cuda::kv_dequantize(p, s); }), bytes, bytes / g_copy_rate);
  }
  const int capacity = pages * page_size / 4, head_pages = capacity / page_size;
  const size_t head_bytes = size_t(2) * page_size * head_dim * 2;
  const Buffer heads(head_bytes * kv_heads * head_pages);
  std::vector<int32_t> positions(size_t(kv_heads) * capacity), counts(kv_heads, capacity);
  for (int h = 0; h < kv_heads; ++h)
    for (int i = 0; i < capacity; ++i) positions[size_t(h) * capacity + i] = 4 * i + int(hash32(h * 977 + i) % 4);
  const Buffer t_heads = upload(page_table(heads.get(), int64_t(head_bytes), int64_t(kv_heads) * head_pages)),
               t_pos = upload(positions), t_counts = upload(counts);
  const TokenMoveParams p{t_full.get<int64_t>(),
                          t_heads.get<int64_t>(),
                          t_pos.get<int32_t>(),
                          t_counts.get<int32_t>(),
                          head_pages,
                          capacity,
                          kv_heads,
                          head_dim,
                          page_size,
                          capacity,
                          pages,
                          head_pages,
                          DType::kBFloat16};
  const double bytes = 2.0 * heads.bytes();
  report.time("gather_tokens ratio=0.25", time_graph(3, 7, [&](int, cudaStream_t s) { cuda::gather_tokens(p, s); }),
              bytes, bytes / g_copy_rate);
  report.time("scatter_tokens ratio=0.25", time_graph(3, 7, [&](int, cudaStream_t s) { cuda::scatter_tokens(p, s); }),
              bytes, bytes / g_copy_rate);
}

// Time of an unpack whose packed pages come through a ring in device memory: the copy engine brings `chunk` pages at a
// time, and a kernel unpacks each chunk while the next arrives. Page i is at pinned + at[i].
double time_staged(const Bf16PackParams& pages, const uint8_t* pinned, const std::vector<int64_t>& at, int chunk) {
  constexpr int kSlots = 3, kWarmups = 1, kRuns = 3;
  const int count = pages.pages;
  int64_t slot_bytes = 0;
  for (int i = 0; i < count; i += chunk) slot_bytes = std::max(slot_bytes, at[std::min(count, i + chunk)] - at[i]);
  const Buffer ring(size_t(slot_bytes) * kSlots);
  std::vector<int64_t> table(count);
  for (int i = 0; i < count; ++i)
    table[i] = ring.address() + slot_bytes * (i / chunk % kSlots) + at[i] - at[i / chunk * chunk];
  const Buffer t_ring = upload(table);
  cudaStream_t copy, compute;
  VC_CUDA_CHECK(cudaStreamCreateWithFlags(&copy, cudaStreamNonBlocking));
  VC_CUDA_CHECK(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
  cudaEvent_t start, stop, ready[kSlots], released[kSlots];
  VC_CUDA_CHECK(cudaEventCreate(&start));
  VC_CUDA_CHECK(cudaEventCreate(&stop));
  for (int s = 0; s < kSlots; ++s) {
    VC_CUDA_CHECK(cudaEventCreateWithFlags(&ready[s], cudaEventDisableTiming));
    VC_CUDA_CHECK(cudaEventCreateWithFlags(&released[s], cudaEventDisableTiming));
  }
  std::vector<double> times;
  for (int r = 0; r < kWarmups + kRuns; ++r) {
    VC_CUDA_CHECK(cudaDeviceSynchronize());
    VC_CUDA_CHECK(cudaEventRecord(start, compute));
    VC_CUDA_CHECK(cudaStreamWaitEvent(copy, start, 0));
    for (int first = 0; first < count; first += chunk) {
      const int s = first / chunk % kSlots, last = std::min(count, first + chunk);
      if (first >= kSlots * chunk) VC_CUDA_CHECK(cudaStreamWaitEvent(copy, released[s], 0));
      VC_CUDA_CHECK(cudaMemcpyAsync(ring.get<uint8_t>() + slot_bytes * s, pinned + at[first],
                                    size_t(at[last] - at[first]), cudaMemcpyHostToDevice, copy));
      VC_CUDA_CHECK(cudaEventRecord(ready[s], copy));
      VC_CUDA_CHECK(cudaStreamWaitEvent(compute, ready[s], 0));
      Bf16PackParams p = pages;
      p.raw_pages += first, p.packed_pages = t_ring.get<int64_t>() + first, p.pages = last - first;
      cuda::bf16_unpack(p, compute);
      VC_CUDA_CHECK(cudaEventRecord(released[s], compute));
    }
    VC_CUDA_CHECK(cudaEventRecord(stop, compute));
    VC_CUDA_CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    VC_CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (r >= kWarmups) times.push_back(ms * 1000.0);
  }
  for (int s = 0; s < kSlots; ++s) {
    VC_CUDA_CHECK(cudaEventDestroy(ready[s]));
    VC_CUDA_CHECK(cudaEventDestroy(released[s]));
  }
  VC_CUDA_CHECK(cudaEventDestroy(start));
  VC_CUDA_CHECK(cudaEventDestroy(stop));
  VC_CUDA_CHECK(cudaStreamDestroy(copy));
  VC_CUDA_CHECK(cudaStreamDestroy(compute));
  return median(std::move(times));
}

// Unpack from pinned host memory, where packed pages lie as closely as their alignment lets them, against a plain copy
// of the raw bytes. Only what came out right is timed.
void codec_link_times(Report& report, const Buffer& raw, const Buffer& packed, size_t room,
                      const std::vector<int64_t>& packed_bytes, int64_t elems) {
  constexpr int kPages = 512, kChunkPages = 40;  // chunks of 7.9 MB
  const size_t raw_bytes = size_t(elems) * 2 * kPages;
  std::vector<int64_t> at(kPages + 1), table(kPages);
  for (int i = 0; i < kPages; ++i) at[i + 1] = at[i] + (packed_bytes[i] + 127) / 128 * 128;
  const Pinned pinned{size_t(at[kPages])}, pinned_raw(raw_bytes);
  for (int i = 0; i < kPages; ++i) {
    table[i] = reinterpret_cast<int64_t>(pinned.get() + at[i]);
    VC_CUDA_CHECK(cudaMemcpy(pinned.get() + at[i], packed.get<uint8_t>() + i * room, size_t(packed_bytes[i]),
                             cudaMemcpyDeviceToHost));
  }
  VC_CUDA_CHECK(cudaMemcpy(pinned_raw.get(), raw.get(), raw_bytes, cudaMemcpyDeviceToHost));
  const Buffer back(raw_bytes), t_pinned = upload(table), t_back = upload(page_table(back.get(), elems * 2, kPages));
  // In turns, several times: how much the link carries changes within a second.
  constexpr int kRounds = 7;
  Bf16PackParams p{t_back.get<int64_t>(), t_pinned.get<int64_t>(), nullptr, elems, kPages, 0};
  struct Path {
    std::string name;
    std::function<double()> time;
    std::vector<double> us = {};
  };
  std::vector<Path> paths = {
      {"plain copy from pinned", [&] {
         return time_graph(1, 1, [&](int, cudaStream_t s) {
           VC_CUDA_CHECK(cudaMemcpyAsync(back.get(), pinned_raw.get(), raw_bytes, cudaMemcpyHostToDevice, s));
         });
       }}};
  for (const int blocks : {16, 32, 64, 0})
    paths.push_back({text("bf16_unpack from pinned, blocks=", blocks), [&, blocks] {
                       p.max_blocks = blocks;
                       return time_graph(1, 1, [&](int, cudaStream_t s) { cuda::bf16_unpack(p, s); });
                     }});
  paths.push_back({"bf16_unpack staged", [&] { return time_staged(p, pinned.get(), at, kChunkPages); }});
  for (int round = 0; round < kRounds; ++round)
    for (Path& path : paths) {
      back.poison();
      path.us.push_back(path.time());
      VC_CHECK(differences(raw.get(), back.get(), nullptr, kPages, elems * 2) == 0, path.name, ": the output differs.");
    }
  const double copy_us = median(paths[0].us);
  for (const Path& path : paths)
    report.time(path.name + ", bytes of output", median(path.us), double(raw_bytes),
                &path == &paths[0] ? copy_us : copy_us * double(at[kPages]) / double(raw_bytes));
}

void codec_times(Report& report) {
  const int64_t elems = 2 * 8 * 64 * 128;
  const int pages = 2048;
  const auto layout = Bf16PackLayout::make(elems);
  const size_t room = size_t(layout.max_bytes + 127) / 128 * 128;
  const Buffer raw = random_buffer<__nv_bfloat16>(size_t(elems) * pages, 1), packed(room * pages), bytes(pages * 8);
  const Buffer t_raw = upload(page_table(raw.get(), elems * 2, pages));
  const Buffer t_packed = upload(page_table(packed.get(), int64_t(room), pages));
  const Bf16PackParams p{t_raw.get<int64_t>(), t_packed.get<int64_t>(), bytes.get<int64_t>(), elems, pages, 0};
  const double raw_bytes = 2.0 * double(elems) * pages;
  const double pack_us = time_graph(3, 7, [&](int, cudaStream_t s) { cuda::bf16_pack(p, s); });
  const auto page_bytes = bytes.to_host<int64_t>();
  double packed_bytes = 0;
  for (const int64_t b : page_bytes) packed_bytes += double(b);
  report.value("bf16_pack bits an element", 8 * packed_bytes / (double(elems) * pages));
  report.time("bf16_pack", pack_us, raw_bytes + packed_bytes, (raw_bytes + packed_bytes) / g_copy_rate);
  codec_link_times(report, raw, packed, room, page_bytes, elems);
  const double us = time_graph(3, 7, [&](int, cudaStream_t s) { cuda::bf16_unpack(p, s); });
  report.time("bf16_unpack from HBM", us, raw_bytes + packed_bytes, (raw_bytes + packed_bytes) / g_copy_rate);
  report.time("bf16_unpack from HBM, bytes of output", us, raw_bytes, (raw_bytes + packed_bytes) / g_copy_rate);
}

// Bytes: K once and the output. The kernel reads K twice, the second time as far as it can from the L2.
void window_times(Report& report) {
  using T = __nv_bfloat16;
  const int q_heads = 32, kv_heads = 8, head_dim = 128;
  for (const int tokens : {8192, 32768, 131072}) {
    const size_t k_elems = size_t(kv_heads) * tokens * head_dim;
    const int sets = sets_for(k_elems * sizeof(T));
    std::vector<Buffer> k;
    for (int i = 0; i < sets; ++i) k.push_back(random_buffer<T>(k_elems, 300 + i));
    for (const int window : {32, 64}) {
      const Buffer q = random_buffer<T>(size_t(window) * q_heads * head_dim, 2), out(size_t(q_heads) * tokens * 4);
      WindowScoresParams p{};
      p.queries = q.get(), p.k = k[0].get(), p.out = out.get<float>();
      p.q_stride_row = int64_t(q_heads) * head_dim, p.q_stride_head = head_dim;
      p.k_stride_head = int64_t(tokens) * head_dim, p.k_stride_token = head_dim;
      p.window = window, p.tokens = tokens, p.q_heads = q_heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
      p.scale = 0.0883883f, p.dtype = DType::kBFloat16;
      const Buffer workspace(cuda::window_scores_workspace_bytes(p));
      p.workspace = workspace.get();
      const double bytes = double(k_elems * sizeof(T) + out.bytes());
      const double us = time_graph(std::max(sets, 4), 9, [&](int i, cudaStream_t s) {
        p.k = k[size_t(i % sets)].get();
        cuda::window_scores(p, s);
      });
      report.time(text("window_scores tokens=", tokens, " window=", window), us, bytes, bytes / g_read_rate);
    }
  }
}

int run(const std::string& path) {
  cudaDeviceProp prop;
  VC_CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
  std::printf("%s, %d multiprocessors, %d MiB of L2\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
  Report report(path);
  measure_rates(report);
  constexpr int kShapes[][2] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {128256, 4096}};
  for (const auto& s : kShapes) linear_times(report, s[0], s[1]);
  linear_rope_times(report);
  layer_op_times(report);
  sample_times(report);
  page_times(report);
  codec_times(report);
  window_times(report);
  return 0;
}

}  // namespace
}  // namespace vericache::bench

int main(int argc, char** argv) {
  try {
    return vericache::bench::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "dense_bench: %s\n", e.what());
    return 2;
  }
}
