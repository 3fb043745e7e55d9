// SPDX-License-Identifier: Apache-2.0
// The checks of linear, for dense_check: against double precision, and each row's bits among any others (R1).
#pragma once

#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "harness.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/launchers.h"

namespace vericache::cuda {
void linear_mma(const LinearParams& p, const DeviceInfo& info, cudaStream_t stream);
}

namespace vericache::bench {

using Rng = std::mt19937_64;

template <class T>
__global__ void linear_in_double(const T* x, const T* w, const T* bias, const T* residual, double* out, int rows, int n,
                                 int k) {
  const int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
  if (i >= int64_t(rows) * n) return;
  const int64_t row = i / n, col = i % n;
  double sum = 0.0;
  for (int j = threadIdx.x % 32; j < k; j += 32) sum += double(float(x[row * k + j])) * double(float(w[col * k + j]));
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 != 0) return;
  if (bias) sum += double(float(bias[col]));
  if (residual) sum += double(float(residual[i]));
  out[i] = sum;
}

inline LinearParams linear_params(const void* x, const void* w, void* out, int rows, int n, int k, DType dtype,
                                  bool f32) {
  LinearParams p{};
  p.x = x, p.w = w, p.out = out;
  p.x_stride_row = k, p.residual_stride_row = n, p.out_stride_row = n;
  p.rows = rows, p.n = n, p.k = k;
  p.out_float32 = f32, p.dtype = dtype;
  return p;
}

inline double to_double(float x) { return x; }
inline double to_double(bf16 x) { return to_float(x); }

template <class T>
double relative_error(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = to_double(got[i]) - want[i];
    error += d * d;
    norm += want[i] * want[i];
    if (std::isnan(d)) return std::numeric_limits<double>::infinity();
  }
  return std::sqrt(error / std::max(norm, 1e-300));
}

using Linear = void (*)(const LinearParams&, cudaStream_t);

// What cuda::linear does on a GPU that is no Hopper.
inline void other_gpus_linear(const LinearParams& p, cudaStream_t stream) {
  if (p.k % 8 != 0) return cuda::linear(p, stream);
  cuda::linear_mma(p, cuda::device_info(), stream);
}

// T: device element; H: the same on the host.
template <class T, class H>
void linear_against_double(Report& report, const char* name, DType dtype, double bound, bool quick, Linear linear) {
  struct Case {
    int rows, n, k;
    bool bias, residual, f32;
  };
  const Case cases[] = {
      {1, 6144, 4096, false, false, false},  {7, 4096, 4096, true, false, false},  {8, 4096, 4096, false, true, false},
      {9, 4096, 14336, false, true, false},  {33, 6144, 4096, true, true, false},  {64, 4096, 4096, false, false, true},
      {65, 1000, 1376, true, true, true},    {61, 257, 520, true, false, false},   {17, 61, 72, false, true, true},
      {256, 512, 512, true, true, false},    {200, 4096, 4096, true, true, false}, {300, 6144, 1024, false, true, true},
      {256, 28672, 512, true, false, false}, {100, 1, 8, false, false, false},     {3, 5, 61, true, true, false},
      {1, 28672, 4096, false, false, false}};
  double worst = 0;
  std::string at;
  bool guard = true;
  for (const Case& c : cases) {
    if (dtype == DType::kFloat32 && int64_t(c.rows) * c.n * c.k > int64_t(2) << 30) continue;
    if (quick && int64_t(c.n) * c.k > 1 << 18) continue;
    const size_t outs = size_t(c.rows) * c.n;
    const Buffer x = random_buffer<T>(size_t(c.rows) * c.k, 1), w = random_buffer<T>(size_t(c.n) * c.k, 2, 0.05f);
    const Buffer bias = random_buffer<T>(c.n, 3), residual = random_buffer<T>(outs, 4);
    const Buffer out((outs + 64) * (c.f32 ? 4 : sizeof(T))), want(outs * 8);
    out.poison();
    LinearParams p = linear_params(x.get(), w.get(), out.get(), c.rows, c.n, c.k, dtype, c.f32);
    p.bias = c.bias ? bias.get() : nullptr;
    p.residual = c.residual ? residual.get() : nullptr;
    linear(p, nullptr);
    linear_in_double<T><<<unsigned((outs * 32 + 255) / 256), 256>>>(
        x.get<T>(), w.get<T>(), c.bias ? bias.get<T>() : nullptr, c.residual ? residual.get<T>() : nullptr,
        want.get<double>(), c.rows, c.n, c.k);
    VC_CUDA_CHECK(cudaGetLastError());
    VC_CUDA_CHECK(cudaDeviceSynchronize());
    double error;
    if (c.f32) {
      auto got = out.to_host<float>();
      for (size_t i = outs; i < got.size(); ++i) guard &= std::bit_cast<uint32_t>(got[i]) == 0xffffffffu;
      error = relative_error(got, want.to_host<double>());
    } else {
      auto got = out.to_host<H>();
      const H poison = [] {
        H h;
        std::memset(&h, 0xff, sizeof h);
        return h;
      }();
      for (size_t i = outs; i < got.size(); ++i) guard &= std::memcmp(&got[i], &poison, sizeof poison) == 0;
      error = relative_error(got, want.to_host<double>());
    }
    if (error > worst) worst = error, at = text(c.rows, "x", c.n, "x", c.k);
  }
  report.check(text("linear_correct_", name), worst < bound && guard,
               text("worst relative error ", worst, " at ", at, ", guard ", guard ? "intact" : "overwritten"));
}

// Each row alone, then all row counts, then shuffled rows among NaN neighbours: the same bits.
template <class T>
void linear_invariance(Report& report, int n, int k, DType dtype, bool f32_out, bool quick) {
  // Under the sanitizer as few as reach every kernel: linear_narrow.cu takes the long matrix up to 64 rows.
  const int all_rows = !quick ? 256 : n * k < 1 << 18 ? 70 : n * k > 1 << 21 ? 40 : 12;
  const size_t out_elem = f32_out ? 4 : sizeof(T), row_bytes = n * out_elem;
  const Buffer x = random_buffer<T>(size_t(all_rows) * k, 11), w = random_buffer<T>(size_t(n) * k, 12, 0.05f);
  const Buffer alone(all_rows * row_bytes), out(all_rows * row_bytes), mixed(size_t(all_rows) * k * sizeof(T));
  uint64_t different = 0;
  int64_t compared = 0;
  alone.poison();
  for (int r = 0; r < all_rows; ++r)
    cuda::linear(linear_params(x.get<T>() + size_t(r) * k, w.get(), alone.get<uint8_t>() + r * row_bytes, 1, n, k,
                               dtype, f32_out),
                 nullptr);
  for (int rows = 1; rows <= all_rows; rows += quick ? std::max(all_rows / 3, 1) : 1) {
    const int first = (rows * 37) % (all_rows - rows + 1);
    out.poison();
    LinearParams p = linear_params(x.get<T>() + size_t(first) * k, w.get(), out.get(), rows, n, k, dtype, f32_out);
    p.w_settled = rows % 2 == 0;
    cuda::linear(p, nullptr);
    different += differences(out.get(), alone.get<uint8_t>() + first * row_bytes, nullptr, rows, row_bytes);
    compared += rows;
  }
  Rng rng(5);
  uint64_t shuffled = 0;
  for (int run = 0; run < (quick ? 2 : 20); ++run) {
    std::vector<int> order(all_rows);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    const int rows = 1 + int(rng() % all_rows);
    VC_CUDA_CHECK(cudaMemset(mixed.get(), 0xff, mixed.bytes()));  // NaN in the rows that are not compared
    std::vector<int> slots(all_rows);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    for (int i = 0; i < rows; ++i)
      VC_CUDA_CHECK(cudaMemcpyAsync(mixed.get<T>() + size_t(slots[i]) * k, x.get<T>() + size_t(order[i]) * k,
                                    k * sizeof(T), cudaMemcpyDeviceToDevice));
    out.poison();
    cuda::linear(linear_params(mixed.get(), w.get(), out.get(), all_rows, n, k, dtype, f32_out), nullptr);
    for (int i = 0; i < rows; i += 8, ++compared)
      shuffled += differences(out.get<uint8_t>() + slots[i] * row_bytes, alone.get<uint8_t>() + order[i] * row_bytes,
                              nullptr, 1, row_bytes);
  }
  // Control: one changed bit of one row must be seen.
  uint16_t bits;
  VC_CUDA_CHECK(cudaMemcpy(&bits, x.get(), 2, cudaMemcpyDeviceToHost));
  bits ^= 0x2000;
  VC_CUDA_CHECK(cudaMemcpy(mixed.get(), x.get(), x.bytes(), cudaMemcpyDeviceToDevice));
  VC_CUDA_CHECK(
      cudaMemcpy(mixed.get<uint8_t>() + (dtype == DType::kFloat32 ? 2 : 0), &bits, 2, cudaMemcpyHostToDevice));
  cuda::linear(linear_params(mixed.get(), w.get(), out.get(), 8, n, k, dtype, f32_out), nullptr);
  const bool control = differences(out.get(), alone.get(), nullptr, 8, row_bytes) > 0;
  report.bitwise(text("linear ", n, " x ", k, " ", dtype_name(dtype)), text("1 to ", all_rows), compared,
                 different + shuffled, control);
}

// SwiGLU is bit for bit silu_mul of the plain product, at all row counts.
inline void swiglu_equality(Report& report, int n, int k, bool quick) {
  using T = __nv_bfloat16;
  const int all_rows = quick ? 9 : 300, dim = n / 2;
  const Buffer x = random_buffer<T>(size_t(all_rows) * k, 51), w = random_buffer<T>(size_t(n) * k, 52, 0.05f);
  const Buffer bias = random_buffer<T>(n, 53), product(size_t(all_rows) * n * 2 + 64);
  const Buffer workspace(size_t(all_rows) * n * 2);
  const Buffer want(size_t(all_rows) * dim * 2), got(size_t(all_rows) * dim * 2 + 64);
  uint64_t different = 0;
  bool guard = true, control = true;
  for (const int rows : {1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 140, 200, 256, 300}) {
    if (rows > all_rows) break;
    for (const bool with_bias : {false, true}) {
      LinearParams p = linear_params(x.get(), w.get(), product.get(), rows, n, k, DType::kBFloat16, false);
      p.bias = with_bias ? bias.get() : nullptr;
      LinearParams fused = p;
      fused.swiglu = true, fused.out = got.get(), fused.out_stride_row = dim, fused.workspace = workspace.get();
      fused.w_settled = with_bias;
      got.poison();
      cuda::linear(fused, nullptr);
      cuda::linear(p, nullptr);
      cuda::silu_mul({product.get(), want.get(), n, rows, dim, DType::kBFloat16}, nullptr);
      different += differences(got.get(), want.get(), nullptr, rows, dim * 2);
      const auto host = got.to_host<uint16_t>();
      for (size_t i = size_t(rows) * dim; i < host.size(); ++i) guard &= host[i] == 0xffff;
      // Control: up and gate change places.
      cuda::silu_mul({product.get<T>() + 1, want.get(), n, rows, dim, DType::kBFloat16}, nullptr);
      if (dim > 1) control &= differences(got.get(), want.get(), nullptr, rows, dim * 2) > 0;
    }
  }
  report.check(text("linear_swiglu_", n, "x", k), different == 0 && guard && control,
               text(different, " differ from silu_mul(linear), guard ", guard ? "intact" : "overwritten", ", control ",
                    control ? "seen" : "missed"));
}

// Many rows at once against 64 at a time, with all that may follow the sums: the same bits, and nothing else written.
inline void many_rows_equality(Report& report, int n, int k, std::initializer_list<int> counts,
                               std::initializer_list<int> kinds = {0, 1, 2, 3}) {
  using T = __nv_bfloat16;
  const int all_rows = std::max(counts), stride = n + 8;
  const Buffer x = random_buffer<T>(size_t(all_rows + 1) * (k + 8), 71), w = random_buffer<T>(size_t(n) * k, 72, 0.05f);
  const Buffer bias = random_buffer<T>(n, 73), residual = random_buffer<T>(size_t(all_rows) * n, 74);
  const Buffer want(size_t(all_rows) * stride * 4), got(want.bytes() + 64), workspace(size_t(all_rows) * n * 2);
  uint64_t different = 0;
  bool control = true;
  for (const int rows : counts) {
    for (const int kind : kinds) {  // 0 plain float32; 1 bias; 2 bias and residual; 3 bias and SwiGLU
      LinearParams p = linear_params(x.get(), w.get(), got.get(), rows, n, k, DType::kBFloat16, kind == 0);
      p.x_stride_row = k + 8, p.out_stride_row = kind == 3 ? n / 2 : stride, p.w_settled = kind % 2 == 0;
      if (kind > 0) p.bias = bias.get();
      if (kind == 2) p.residual = residual.get();
      if (kind == 3) p.swiglu = true, p.workspace = workspace.get();
      const size_t row_bytes = size_t(p.out_stride_row) * (kind == 0 ? 4 : 2);
      got.poison(), want.poison();
      cuda::linear(p, nullptr);
      for (int row = 0; row < rows; row += 64) {
        LinearParams part = p;
        part.rows = std::min(64, rows - row);
        part.x = x.get<T>() + size_t(row) * p.x_stride_row;
        if (p.residual) part.residual = residual.get<T>() + size_t(row) * n;
        part.out = want.get<uint8_t>() + row * row_bytes;
        cuda::linear(part, nullptr);
      }
      different += differences(got.get(), want.get(), nullptr, all_rows, row_bytes);  // with what lies between the rows
      p.x = x.get<T>() + p.x_stride_row;                                              // control: every row is the next
      cuda::linear(p, nullptr);
      control &= differences(got.get(), want.get(), nullptr, 1, row_bytes) > 0;
    }
  }
  report.check(text("linear_many_rows_", n, "x", k), different == 0 && control,
               text(different, " differ from 64 rows at a time, control ", control ? "seen" : "missed"));
}

inline void linear_checks(Report& report, bool quick) {
  linear_against_double<__nv_bfloat16, bf16>(report, "bfloat16", DType::kBFloat16, 3e-3, quick, cuda::linear);
  linear_against_double<__nv_bfloat16, bf16>(report, "mma", DType::kBFloat16, 3e-3, quick, other_gpus_linear);
  linear_against_double<float, float>(report, "float32", DType::kFloat32, 2e-6, quick, cuda::linear);
  constexpr int kShapes[][2] = {{6144, 4096},
                                {4096, 4096},
                                {28672, 4096},
                                {4096, 14336},
                                {8192, 8192},
                                {257, 520},
                                {61, 72},
                                {1024, 1376},
                                {3200, 1280},
                                {16896, 128},
                                {3072, 1024},
                                {6141, 2120},
                                {4001, 4168},
                                {6144, 8448},
                                {17984, 9472},  // three waves
                                // Narrow tiles: of 48 rows with 4 parts of k; of 32, 48, 64, 96 rows with 2.
                                {5120, 5120},
                                {4096, 1024},
                                {6144, 1024},
                                {7168, 5120},
                                {10240, 5120}};
  for (const auto& s : kShapes)
    if (!quick || (s[0] * s[1] < 1 << 22 && s[0] != 3072))
      linear_invariance<__nv_bfloat16>(report, s[0], s[1], DType::kBFloat16, false, quick);
  constexpr int kSwiglu[][2] = {{28672, 4096}, {4096, 4096}, {6144, 4096}, {2752, 512}, {1376, 1024},
                                {48, 64},      {16, 2048},   {122, 72},    {122, 61}};
  for (const auto& s : kSwiglu)
    if (!quick || s[0] * s[1] < 1 << 22) swiglu_equality(report, s[0], s[1], quick);
  // Of linear_wide.cu: one part of k, two and four, and all sizes of tile.
  if (quick) {
    many_rows_equality(report, 96, 128, {66, 200}, {2, 3});
    many_rows_equality(report, 96, 1024, {130, 200}, {2, 3});
  } else {
    for (const auto& s : {std::pair{6144, 4096},
                          {4096, 4096},
                          {1024, 3072},
                          {7168, 5120},
                          {28672, 1024},
                          {4000, 4096},
                          {96, 128},
                          {10240, 1024},
                          {520, 64}})
      many_rows_equality(report, s.first, s.second,
                         {65, 72, 100, 128, 129, 136, 192, 193, 250, 256, 257, 300, 512, 700});
  }
  if (!quick) linear_invariance<__nv_bfloat16>(report, 128256, 4096, DType::kBFloat16, true, quick);
  linear_invariance<__nv_bfloat16>(report, 257, 61, DType::kBFloat16, false, quick);
  linear_invariance<float>(report, 768, 512, DType::kFloat32, false, quick);
}

}  // namespace vericache::bench
