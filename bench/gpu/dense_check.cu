// SPDX-License-Identifier: Apache-2.0
// Checks of the CUDA kernels other than attention, without torch: against the CPU kernels (the executable
// specification), against double precision, and bit for bit against themselves where R1 applies. Outputs are poisoned
// before each run; every buffer has a guard behind it. Exit status 1 if a check fails.
//
//   dense_check [--quick] [--only PART] [results.json]      --quick: small shapes only, for compute-sanitizer
//                                                           PART: linear, rope, layer, sample, pages or window
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "cpu/activation.h"
#include "cpu/bf16_codec.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/quantize.h"
#include "cpu/rope.h"
#include "cpu/sampler.h"
#include "cpu/token_move.h"
#include "harness.cuh"
#include "kernels/launchers.h"
#include "linear_check.cuh"
#include "linear_rope_check.cuh"
#include "window_check.cuh"

namespace vericache::bench {
namespace {

// ---- norm, rope, silu: against the CPU kernels ----------------------------------------------------------------------

// Largest |a - b| / (1 + |b|), infinity if one is NaN.
template <class H>
double worst_difference(const std::vector<H>& a, const std::vector<H>& b) {
  double worst = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = std::abs(to_double(a[i]) - to_double(b[i])) / (1 + std::abs(to_double(b[i])));
    if (std::isnan(d)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, d);
  }
  return worst;
}

template <class T, class H>
void norm_checks(Report& report, DType dtype, double bound, bool quick) {
  double worst = 0;
  uint64_t different = 0;
  for (const int dim : {1, 61, 512, 1000, 4096, 5120, 8192, 16384}) {
    for (const bool with_residual : {false, true}) {
      const int rows = quick ? 5 : 33, stride = dim + 8;
      const Buffer x = random_buffer<T>(size_t(rows) * stride, 21), residual = random_buffer<T>(size_t(rows) * dim, 22);
      const Buffer weight = random_buffer<T>(dim, 23);
      const size_t bytes = size_t(rows) * dim * sizeof(T);
      const Buffer out(bytes), sum(bytes), one(bytes), one_sum(bytes);
      RmsNormParams p{x.get(),
                      with_residual ? residual.get() : nullptr,
                      weight.get(),
                      out.get(),
                      with_residual ? sum.get() : nullptr,
                      stride,
                      dim,
                      rows,
                      dim,
                      1e-5f,
                      dtype};
      out.poison(), sum.poison(), one.poison(), one_sum.poison();
      cuda::rms_norm(p, nullptr);
      for (int r = 0; r < rows; ++r) {
        RmsNormParams q = p;
        q.rows = 1;
        q.x = x.get<T>() + size_t(r) * stride;
        q.residual = with_residual ? residual.get<T>() + size_t(r) * dim : nullptr;
        q.out = one.get<T>() + size_t(r) * dim;
        q.residual_out = with_residual ? one_sum.get<T>() + size_t(r) * dim : nullptr;
        cuda::rms_norm(q, nullptr);
      }
      different += differences(out.get(), one.get(), nullptr, rows, dim * sizeof(T));
      if (with_residual) different += differences(sum.get(), one_sum.get(), nullptr, rows, dim * sizeof(T));
      // The same rows at an odd stride: other loads, the same bits.
      const Buffer odd(size_t(rows) * (dim + 1) * sizeof(T));
      VC_CUDA_CHECK(cudaMemcpy2D(odd.get(), (dim + 1) * sizeof(T), x.get(), stride * sizeof(T), dim * sizeof(T), rows,
                                 cudaMemcpyDeviceToDevice));
      RmsNormParams q = p;
      q.x = odd.get(), q.x_stride_row = dim + 1, q.out = one.get(),
      q.residual_out = with_residual ? one_sum.get() : nullptr;
      cuda::rms_norm(q, nullptr);
      different += differences(out.get(), one.get(), nullptr, rows, dim * sizeof(T));

      const auto hx = x.to_host<H>(), hr = residual.to_host<H>(), hw = weight.to_host<H>();
      std::vector<H> ho(size_t(rows) * dim), hs(size_t(rows) * dim);
      q = p;
      q.x = hx.data(), q.residual = with_residual ? hr.data() : nullptr, q.weight = hw.data(), q.out = ho.data();
      q.residual_out = with_residual ? hs.data() : nullptr;
      cpu::rms_norm(q);
      worst = std::max(worst, worst_difference(out.to_host<H>(), ho));
      if (with_residual) worst = std::max(worst, 1e3 * worst_difference(sum.to_host<H>(), hs));
    }
  }
  report.check(
      text("norm_", dtype_name(dtype)), worst < bound && different == 0,
      text("largest difference from the CPU ", worst, ", ", different, " bits differ over rows and alignment"));
}

template <class T, class H>
void rope_checks(Report& report, DType dtype, double bound) {
  double worst = 0;
  uint64_t different = 0;
  bool untouched = true;
  struct Case {
    int rows, q_heads, kv_heads, head_dim;
    bool norm;
  };
  for (const Case& c : {Case{5, 32, 8, 128, false}, Case{61, 8, 2, 64, true}, Case{3, 5, 5, 80, true},
                        Case{2, 3, 1, 32, false}, Case{4, 16, 2, 256, true}}) {
    const int page_size = 16, positions = 300, half = c.head_dim / 2;
    const int64_t width = int64_t(c.q_heads + 2 * c.kv_heads) * c.head_dim;
    const Buffer qkv = random_buffer<T>(c.rows * width, 31), qn = random_buffer<T>(c.head_dim, 32);
    const Buffer kn = random_buffer<T>(c.head_dim, 33);
    const Buffer cos = random_buffer<float>(size_t(positions) * half, 34);
    const Buffer sin = random_buffer<float>(size_t(positions) * half, 35);
    const size_t page_elems = size_t(2) * c.kv_heads * page_size * c.head_dim;
    const Buffer pages(page_elems * c.rows * sizeof(T)), q_out(size_t(c.rows) * c.q_heads * c.head_dim * sizeof(T));
    const Buffer pages_alone(pages.bytes()), q_alone(q_out.bytes());
    std::vector<int32_t> position(c.rows);
    std::vector<int64_t> page(c.rows), host_page(c.rows), page_alone(c.rows);
    std::vector<H> host_pages(page_elems * c.rows), host_q(size_t(c.rows) * c.q_heads * c.head_dim);
    std::memset(host_pages.data(), 0xff, host_pages.size() * sizeof(H));
    for (int r = 0; r < c.rows; ++r) {
      position[r] = (r * 71 + 15) % positions;
      const bool write = r % 3 != 1;
      page[r] = write ? pages.address() + int64_t(r * page_elems * sizeof(T)) : 0;
      page_alone[r] = write ? pages_alone.address() + int64_t(r * page_elems * sizeof(T)) : 0;
      host_page[r] = write ? reinterpret_cast<int64_t>(host_pages.data() + r * page_elems) : 0;
    }
    const Buffer d_position = upload(position), d_page = upload(page), d_page_alone = upload(page_alone);
    pages.poison(), q_out.poison(), pages_alone.poison(), q_alone.poison();
    RopeWriteParams p{};
    p.qkv = qkv.get(), p.q_norm = c.norm ? qn.get() : nullptr, p.k_norm = c.norm ? kn.get() : nullptr;
    p.cos = cos.get<float>(), p.sin = sin.get<float>(), p.row_position = d_position.get<int32_t>();
    p.row_page = d_page.get<int64_t>(), p.q_out = q_out.get(), p.qkv_stride_row = width, p.rows = c.rows;
    p.q_heads = c.q_heads, p.kv_heads = c.kv_heads, p.head_dim = c.head_dim, p.page_size = page_size;
    p.eps = 1e-6f, p.dtype = dtype;
    cuda::rope_write(p, nullptr);
    for (int r = 0; r < c.rows; ++r) {
      RopeWriteParams q = p;
      q.rows = 1, q.qkv = qkv.get<T>() + r * width, q.row_position = p.row_position + r;
      q.row_page = d_page_alone.get<int64_t>() + r;
      q.q_out = q_alone.get<T>() + int64_t(r) * c.q_heads * c.head_dim;
      cuda::rope_write(q, nullptr);
    }
    different += differences(pages.get(), pages_alone.get(), nullptr, c.rows, page_elems * sizeof(T));
    different += differences(q_out.get(), q_alone.get(), nullptr, c.rows, c.q_heads * c.head_dim * sizeof(T));

    const auto h_qkv = qkv.to_host<H>(), h_qn = qn.to_host<H>(), h_kn = kn.to_host<H>();
    const auto h_cos = cos.to_host<float>(), h_sin = sin.to_host<float>();
    RopeWriteParams q = p;
    q.qkv = h_qkv.data(), q.q_norm = c.norm ? h_qn.data() : nullptr, q.k_norm = c.norm ? h_kn.data() : nullptr;
    q.cos = h_cos.data(), q.sin = h_sin.data(), q.row_position = position.data(), q.row_page = host_page.data();
    q.q_out = host_q.data();
    cpu::rope_write(q);
    worst = std::max(worst, worst_difference(q_out.to_host<H>(), host_q));
    const auto got = pages.to_host<H>();
    H poison;
    std::memset(&poison, 0xff, sizeof poison);
    for (size_t i = 0; i < got.size(); ++i) {
      const bool got_poison = std::memcmp(&got[i], &poison, sizeof poison) == 0;
      const bool want_poison = std::memcmp(&host_pages[i], &poison, sizeof poison) == 0;
      untouched &= got_poison == want_poison;
      if (!want_poison)
        worst = std::max(
            worst, std::abs(to_double(got[i]) - to_double(host_pages[i])) / (1 + std::abs(to_double(host_pages[i]))));
    }
  }
  report.check(text("rope_write_", dtype_name(dtype)), worst < bound && different == 0 && untouched,
               text("largest difference from the CPU ", worst, ", ", different, " bits differ over rows, other slots ",
                    untouched ? "untouched" : "written"));
}

template <class T, class H>
void silu_checks(Report& report, DType dtype, double bound) {
  double worst = 0;
  for (const int dim : {1, 61, 1376, 14336}) {
    const int rows = 9, stride = 2 * dim + (dim % 2 ? 3 : 8);
    const Buffer gate_up = random_buffer<T>(size_t(rows) * stride, 41, 3.0f), out(size_t(rows) * dim * sizeof(T));
    out.poison();
    SiluMulParams p{gate_up.get(), out.get(), stride, rows, dim, dtype};
    cuda::silu_mul(p, nullptr);
    const auto host = gate_up.to_host<H>();
    std::vector<H> want(size_t(rows) * dim);
    p.gate_up = host.data(), p.out = want.data();
    cpu::silu_mul(p);
    worst = std::max(worst, worst_difference(out.to_host<H>(), want));
  }
  report.check(text("silu_mul_", dtype_name(dtype)), worst < bound, text("largest difference from the CPU ", worst));
}

// ---- sampler: the CPU's tokens --------------------------------------------------------------------------------------

void sample_checks(Report& report, bool quick) {
  Rng rng(6);
  int rows_total = 0, wrong = 0, reruns = 0;
  double worst = 0;
  std::string first;
  for (const int vocab : {1, 5, 61, 1000, 32000, 128256, 151936, 500000}) {  // the last is not kept on the chip
    if (quick && vocab != 61 && vocab != 1000) continue;
    for (int kind = 0; kind < 7; ++kind) {
      if (quick && vocab == 1000 && kind != 2 && kind != 4) continue;  // racecheck takes 25 s for one
      const int rows = quick ? 2 : vocab > 200000 ? 4 : vocab > 1000 ? 24 : 64, stride = vocab + int(rng() % 5);
      std::vector<float> logits(size_t(rows) * stride), temperature(rows), top_p(rows), min_p(rows);
      std::vector<int32_t> top_k(rows), position(rows);
      std::vector<int64_t> seed(rows);
      std::normal_distribution<float> normal(0.0f, kind == 1 ? 0.3f : 4.0f);
      for (float& x : logits) x = normal(rng);
      if (kind == 2)  // many ties
        for (float& x : logits) x = std::round(x);
      if (kind == 3)
        for (size_t i = 0; i < logits.size(); i += 3) logits[i] = -std::numeric_limits<float>::infinity();
      if (kind == 5)  // a few likely tokens
        for (size_t i = 0; i < logits.size(); i += size_t(vocab) / 5 + 1) logits[i] = 16.0f + float(rng() % 64) / 16;
      if (kind == 6)  // more ties than any list of candidates holds
        for (size_t i = 0; i < logits.size(); ++i) logits[i] = i % 997 == 0 ? 1.0f : 0.5f;
      for (int r = 0; r < rows; ++r) {
        if (kind == 4 && r % 4 == 0)
          logits[size_t(r) * stride + rng() % vocab] = std::numeric_limits<float>::quiet_NaN();
        if (kind == 4 && r % 4 == 1)
          std::fill_n(logits.begin() + r * stride, vocab, -std::numeric_limits<float>::infinity());
        if (kind == 4 && r % 4 == 2)
          logits[size_t(r) * stride + rng() % vocab] = std::numeric_limits<float>::infinity();
        const float temperatures[] = {0.0f, 1.0f, 0.7f, 1.5f};
        temperature[r] = temperatures[rng() % 4];
        const int32_t ks[] = {0, 1, 5, 50, vocab / 2, vocab + 7};
        top_k[r] = rng() % 2 ? 0 : ks[rng() % 6];
        const float ps[] = {0.0f, 0.3f, 0.9f, 0.99f};
        top_p[r] = rng() % 2 ? 1.0f : ps[rng() % 4];
        min_p[r] = rng() % 3 ? 0.0f : 0.05f;
        position[r] = int32_t(rng() % 100000);
        seed[r] = int64_t(rng());
      }
      std::vector<int64_t> want_token(rows);
      std::vector<float> want_logprob(rows);
      SampleParams p{};
      p.logits = logits.data(), p.temperature = temperature.data(), p.top_k = top_k.data(), p.top_p = top_p.data();
      p.min_p = min_p.data(), p.seed = seed.data(), p.row_position = position.data();
      p.token = want_token.data(), p.logprob = want_logprob.data();
      p.logits_stride_row = stride, p.rows = rows, p.vocab = vocab;
      SampleParams d = p;
      const Buffer b_logits = upload(logits), b_t = upload(temperature), b_k = upload(top_k), b_p = upload(top_p);
      const Buffer b_m = upload(min_p), b_seed = upload(seed), b_pos = upload(position);
      const Buffer token(rows * 8), logprob(rows * 4), token2(rows * 8), logprob2(rows * 4);
      token.poison(), logprob.poison();
      d.logits = b_logits.get<float>(), d.temperature = b_t.get<float>(), d.top_k = b_k.get<int32_t>();
      d.top_p = b_p.get<float>(), d.min_p = b_m.get<float>(), d.seed = b_seed.get<int64_t>();
      d.row_position = b_pos.get<int32_t>(), d.token = token.get<int64_t>(), d.logprob = logprob.get<float>();
      cuda::sample(d, nullptr);
      for (int i = 0; i < (quick ? 1 : 3); ++i) {
        SampleParams e = d;
        token2.poison(), logprob2.poison();
        e.token = token2.get<int64_t>(), e.logprob = logprob2.get<float>();
        cuda::sample(e, nullptr);
        reruns += differences(token.get(), token2.get(), nullptr, 1, rows * 8) > 0;
        reruns += differences(logprob.get(), logprob2.get(), nullptr, 1, rows * 4) > 0;
      }
      cpu::sample(p);
      const auto got = token.to_host<int64_t>();
      const auto got_logprob = logprob.to_host<float>();
      for (int r = 0; r < rows; ++r, ++rows_total) {
        if (got[r] != want_token[r]) {
          if (!wrong++)
            first = text("; first: vocab ", vocab, " kind ", kind, " row ", r, " got ", got[r], " want ", want_token[r],
                         " T ", temperature[r], " k ", top_k[r], " p ", top_p[r], " m ", min_p[r]);
          continue;
        }
        const float a = got_logprob[r], b = want_logprob[r];
        if (std::isnan(a) || std::isnan(b) || std::isinf(b))
          worst = std::isnan(a) == std::isnan(b) && (std::isnan(a) || a == b) ? worst : 1e9;
        else
          worst = std::max(worst, double(std::abs(a - b)) / (1 + std::abs(b)));
      }
    }
  }
  report.check("sample", wrong == 0 && worst < 1e-4 && reruns == 0,
               text(wrong, " of ", rows_total, " tokens differ from the CPU's, logprob within ", worst, ", ", reruns,
                    " reruns differ", first));
}

// ---- pages: the CPU's bytes -----------------------------------------------------------------------------------------

// Bytes in which the heads of two quantized pages differ. A scale or zero that is NaN in both is equal: which NaN is
// not specified.
template <class H>
uint64_t quantized_differences(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b,
                               const QuantPageLayout& layout, int heads) {
  uint64_t different = 0;
  const auto compare = [&](int64_t begin, int64_t bytes, bool values) {
    const int64_t width = values ? int64_t(sizeof(H)) : 1;
    for (int64_t at = begin; at < begin + bytes; at += width) {
      if (values) {
        H x, y;
        std::memcpy(&x, &a[size_t(at)], sizeof x), std::memcpy(&y, &b[size_t(at)], sizeof y);
        if (std::isnan(to_float(x)) && std::isnan(to_float(y))) continue;
      }
      for (int64_t i = at; i < at + width; ++i) different += a[size_t(i)] != b[size_t(i)];
    }
  };
  for (int head = 0; head < heads; ++head) {
    int64_t at = head * layout.head_bytes;
    for (const int64_t params : {2 * layout.k_param_bytes, 2 * layout.v_param_bytes}) {
      compare(at, layout.code_bytes, false);
      compare(at + layout.code_bytes, params, true);
      at += layout.code_bytes + params;
    }
  }
  return different;
}

template <class T, class H>
void quantize_checks(Report& report, DType dtype) {
  uint64_t different = 0, back_different = 0, total = 0;
  struct Case {
    int pages, kv_heads, head_dim, page_size, group;
  };
  for (const Case& c :
       {Case{3, 2, 128, 64, 32}, Case{2, 8, 64, 32, 32}, Case{5, 1, 128, 16, 16}, Case{1, 2, 256, 128, 64},
        Case{2, 3, 64, 128, 64}, Case{2, 5, 256, 32, 16}, Case{1, 3, 128, 256, 128}}) {
    for (const int bits : {2, 4, 5, 6, 7, 8}) {
      const size_t full_elems = size_t(2) * c.kv_heads * c.page_size * c.head_dim;
      const auto layout = QuantPageLayout::make(c.kv_heads, c.page_size, c.head_dim, bits, c.group, sizeof(T));
      const Buffer full = random_buffer<T>(full_elems * c.pages, 51), quant(layout.page_bytes * c.pages);
      const Buffer back(full.bytes());
      auto host_full = full.to_host<H>();
      // Ties in the first half of the keys, a constant group, one of -0, one of both zeros, a NaN and an infinity.
      for (size_t i = 0; i < full_elems / 4; ++i)
        host_full[i] = from_float<H>(std::round(to_float(host_full[i]) * 4.0f) / 4.0f);
      for (int i = 0; i < c.group; ++i) host_full[size_t(i) * c.head_dim + 3] = host_full[3];
      for (int i = 0; i < c.group; ++i) {
        host_full[size_t(i) * c.head_dim + 17] = from_float<H>(-0.0f);
        host_full[size_t(i) * c.head_dim + 18] = from_float<H>(i % 2 ? -0.0f : 0.0f);
        host_full[full_elems - 1 - size_t(i)] = from_float<H>(-0.0f);
      }
      host_full[5] = from_float<H>(std::numeric_limits<float>::quiet_NaN());
      host_full[full_elems / 2 + 9] = from_float<H>(std::numeric_limits<float>::infinity());
      VC_CUDA_CHECK(cudaMemcpy(full.get(), host_full.data(), full.bytes(), cudaMemcpyHostToDevice));
      std::vector<uint8_t> host_quant(layout.page_bytes * c.pages);
      std::vector<H> host_back(host_full.size());
      const auto full_table = [&](const void* first) {
        return page_table(first, int64_t(full_elems * sizeof(T)), c.pages);
      };
      const auto h_full = full_table(host_full.data()), h_back = full_table(host_back.data());
      const auto h_quant = page_table(host_quant.data(), layout.page_bytes, c.pages);
      const Buffer t_full = upload(full_table(full.get())), t_back = upload(full_table(back.get()));
      const Buffer t_quant = upload(page_table(quant.get(), layout.page_bytes, c.pages));
      quant.poison(), back.poison();
      QuantizeParams p{t_full.get<int64_t>(),
                       t_quant.get<int64_t>(),
                       c.pages,
                       c.kv_heads,
                       c.head_dim,
                       c.page_size,
                       bits,
                       c.group,
                       dtype};
      cuda::kv_quantize(p, nullptr);
      QuantizeParams q = p;
      q.full_pages = t_back.get<int64_t>();
      cuda::kv_dequantize(q, nullptr);
      const auto got = quant.to_host<uint8_t>();
      const auto got_back = back.to_host<H>();
      q.full_pages = h_full.data(), q.quant_pages = h_quant.data();
      cpu::kv_quantize(q);
      different += quantized_differences<H>(got, host_quant, layout, c.pages * c.kv_heads);
      total += got.size();
      std::memcpy(host_quant.data(), got.data(), got.size());
      q.full_pages = h_back.data();
      cpu::kv_dequantize(q);
      for (size_t i = 0; i < got_back.size(); ++i) {
        const float a = to_float(got_back[i]), b = to_float(host_back[i]);
        back_different += !(a == b || (std::isnan(a) && std::isnan(b)));
      }
    }
  }
  report.check(
      text("kv_quantize_", dtype_name(dtype)), different == 0 && back_different == 0,
      text(different, " of ", total, " bytes differ from the CPU's, ", back_different, " values after dequantize"));
}

template <class T, class H>
void token_move_checks(Report& report, DType dtype) {
  Rng rng(7);
  uint64_t different = 0, restored = 0;
  const int kv_heads = 3, head_dim = 64, page_size = 16, tokens = 200, capacity = 77;
  const int pages = (tokens + page_size - 1) / page_size, head_pages = (capacity + page_size - 1) / page_size;
  const size_t full_elems = size_t(2) * kv_heads * page_size * head_dim, head_elems = size_t(2) * page_size * head_dim;
  const Buffer full = random_buffer<T>(full_elems * pages, 61), heads(head_elems * kv_heads * head_pages * sizeof(T));
  const auto host_full = full.to_host<H>();
  std::vector<H> host_heads(head_elems * kv_heads * head_pages), host_back(host_full.size());
  std::memset(host_heads.data(), 0xff, host_heads.size() * sizeof(H));
  std::vector<int32_t> positions(kv_heads * capacity), counts{capacity, 1, 0};
  for (int h = 0; h < kv_heads; ++h) {
    std::vector<int32_t> all(tokens);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), rng);
    std::copy_n(all.begin(), capacity, positions.begin() + h * capacity);
  }
  const auto full_table = [&](const void* first) { return page_table(first, int64_t(full_elems * sizeof(T)), pages); };
  const auto head_table = [&](const void* first) {
    return page_table(first, int64_t(head_elems * sizeof(T)), kv_heads * head_pages);
  };
  auto h_pages = full_table(host_full.data());
  const auto h_heads = head_table(host_heads.data());
  const Buffer t_pages = upload(full_table(full.get())), t_heads = upload(head_table(heads.get()));
  const Buffer t_pos = upload(positions), t_counts = upload(counts);
  heads.poison();
  TokenMoveParams p{t_pages.get<int64_t>(),
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
                    dtype};
  cuda::gather_tokens(p, nullptr);
  TokenMoveParams q = p;
  q.page_table = h_pages.data(), q.head_table = h_heads.data(), q.positions = positions.data(),
  q.counts = counts.data();
  cpu::gather_tokens(q);
  const auto got = heads.to_host<H>();
  different = std::memcmp(got.data(), host_heads.data(), got.size() * sizeof(H)) != 0;
  // Scatter into poisoned pages, on both sides.
  full.poison();
  std::memset(host_back.data(), 0xff, host_back.size() * sizeof(H));
  h_pages = full_table(host_back.data());
  q.page_table = h_pages.data();
  cuda::scatter_tokens(p, nullptr);
  cpu::scatter_tokens(q);
  const auto back = full.to_host<H>();
  restored = std::memcmp(back.data(), host_back.data(), back.size() * sizeof(H)) != 0;
  report.check(text("token_move_", dtype_name(dtype)), different == 0 && restored == 0,
               text("gather ", different ? "differs" : "equal", ", scatter ", restored ? "differs" : "equal"));
}

// ---- codec: the CPU's bytes, and every value back -------------------------------------------------------------------

std::vector<uint16_t> codec_values(const char* kind, int64_t count, Rng& rng) {
  std::vector<uint16_t> x(static_cast<size_t>(count));
  std::normal_distribution<float> normal;
  const std::string k = kind;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = k == "outliers" && i % 128 == 7 ? 60.0f : 1.0f;
    x[i] = to_bf16(normal(rng) * scale).bits;
    if (k == "all_bits") x[i] = uint16_t(i * 40503u);
    if (k == "random_bits") x[i] = uint16_t(rng());
    if (k == "zeros") x[i] = 0;
    if (k == "half_zeros" && i % 2) x[i] = 0x8000;
    if (k == "rare" && rng() % 300 == 0) x[i] = uint16_t(rng());
    if (k == "subnormal") x[i] &= 0x81ff;
    if (k == "nan_inf" && i % 50 == 0) x[i] = uint16_t(0x7f80 | (rng() & 0x807f));
  }
  return x;
}

void codec_checks(Report& report) {
  Rng rng(8);
  int bytes_differ = 0, values_differ = 0, cases = 0;
  double normal_bits = 0;
  for (const char* kind :
       {"normal", "outliers", "all_bits", "random_bits", "zeros", "half_zeros", "rare", "subnormal", "nan_inf"}) {
    for (const int64_t elems : {int64_t(8), int64_t(2048), int64_t(2056), int64_t(65536), int64_t(131072 + 1000)}) {
      const int pages = 3;
      const auto layout = Bf16PackLayout::make(elems);
      const auto host = codec_values(kind, elems * pages, rng);
      const size_t room = size_t(layout.max_bytes + 15) / 16 * 16;
      std::vector<uint8_t> want(room * pages);
      std::vector<int64_t> want_bytes(pages);
      const Buffer raw = upload(host), packed(room * pages), back(elems * pages * 2), bytes(pages * 8);
      const auto raw_table = [&](const void* first) { return page_table(first, elems * 2, pages); };
      const auto packed_table = [&](const void* first) { return page_table(first, int64_t(room), pages); };
      auto h_raw = raw_table(host.data());
      const auto h_packed = packed_table(want.data());
      cpu::bf16_pack({h_raw.data(), h_packed.data(), want_bytes.data(), elems, pages, 0});
      const Buffer t_raw = upload(raw_table(raw.get())), t_back = upload(raw_table(back.get()));
      const Buffer t_packed = upload(packed_table(packed.get()));
      packed.poison(), back.poison(), bytes.poison();
      cuda::bf16_pack({t_raw.get<int64_t>(), t_packed.get<int64_t>(), bytes.get<int64_t>(), elems, pages, 0}, nullptr);
      cuda::bf16_unpack({t_back.get<int64_t>(), t_packed.get<int64_t>(), nullptr, elems, pages, cases % 2 ? 2 : 0},
                        nullptr);
      const auto got = packed.to_host<uint8_t>();
      const auto got_bytes = bytes.to_host<int64_t>();
      values_differ += back.to_host<uint16_t>() != host;
      for (int i = 0; i < pages; ++i)
        bytes_differ += got_bytes[i] != want_bytes[i] ||
                        std::memcmp(got.data() + i * room, want.data() + i * room, size_t(want_bytes[i])) != 0;
      // The CPU's way back, and the GPU's from pinned host memory.
      std::vector<uint16_t> again(host.size());
      h_raw = raw_table(again.data());
      cpu::bf16_unpack({h_raw.data(), h_packed.data(), nullptr, elems, pages, 0});
      values_differ += again != host;
      const Pinned pinned(want.size());
      std::memcpy(pinned.get(), want.data(), want.size());
      const Buffer t_pinned = upload(packed_table(pinned.get()));
      back.poison();
      cuda::bf16_unpack({t_back.get<int64_t>(), t_pinned.get<int64_t>(), nullptr, elems, pages, 0}, nullptr);
      values_differ += back.to_host<uint16_t>() != host;
      if (std::string(kind) == "normal" && elems == 65536) normal_bits = 8.0 * double(want_bytes[0]) / double(elems);
      ++cases;
    }
  }
  report.check("bf16_codec", bytes_differ == 0 && values_differ == 0 && normal_bits < 12.2,
               text(cases, " cases, ", bytes_differ, " pages differ from the CPU's bytes, ", values_differ,
                    " round trips are not exact, ", normal_bits, " bits an element of a normal distribution"));
}

int run(const std::string& path, bool quick, const std::string& only) {
  Report report(path);
  const auto wanted = [&](const char* part) { return only.empty() || only == part; };
  if (wanted("linear")) linear_checks(report, quick);
  if (wanted("rope")) linear_rope_checks(report, quick);
  if (wanted("layer")) {
    norm_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16, 1e-2, quick);
    norm_checks<float, float>(report, DType::kFloat32, 1e-5, quick);
    rope_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16, 2e-2);
    rope_checks<float, float>(report, DType::kFloat32, 1e-5);
    silu_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16, 1e-2);
    silu_checks<float, float>(report, DType::kFloat32, 1e-5);
  }
  if (wanted("sample")) sample_checks(report, quick);
  if (wanted("pages")) {
    quantize_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16);
    quantize_checks<float, float>(report, DType::kFloat32);
    token_move_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16);
    token_move_checks<float, float>(report, DType::kFloat32);
    codec_checks(report);
  }
  if (wanted("window")) {
    window_checks<__nv_bfloat16, bf16>(report, DType::kBFloat16, 2e-4, quick);
    window_checks<float, float>(report, DType::kFloat32, 5e-5, quick);
  }
  VC_CUDA_CHECK(cudaDeviceSynchronize());
  std::printf("%d checks failed\n", report.failures());
  return report.failures() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vericache::bench

int main(int argc, char** argv) {
  try {
    bool quick = false;
    std::string path, only;
    for (int i = 1; i < argc; ++i) {
      const std::string arg = argv[i];
      if (arg == "--quick")
        quick = true;
      else if (arg == "--only" && i + 1 < argc)
        only = argv[++i];
      else
        path = arg;
    }
    constexpr const char* kParts[] = {"", "linear", "rope", "layer", "sample", "pages", "window"};
    if (std::find(std::begin(kParts), std::end(kParts), only) == std::end(kParts)) {
      std::fprintf(stderr, "dense_check: --only is %s; it takes linear, rope, layer, sample, pages or window.\n",
                   only.c_str());
      return 2;
    }
    return vericache::bench::run(path, quick, only);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "dense_check: %s\n", e.what());
    return 2;
  }
}
