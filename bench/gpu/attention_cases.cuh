// SPDX-License-Identifier: Apache-2.0
// Inputs for the attention kernels: pages scattered over a pool with NaN wherever nothing may be read, and a float64
// reference on the device. Used by attention_check.cu and attention_bench.cu.
#pragma once

#include <cmath>
#include <numeric>
#include <random>

#include "harness.cuh"
#include "kernels/launchers.h"

namespace vericache::bench {

using Element = __nv_bfloat16;

struct Heads {
  int q_heads, kv_heads, head_dim, page_size;
  float sharpness = 1.f;  // a factor of all scores
  size_t page_bytes() const { return size_t(2) * kv_heads * page_size * head_dim * 2; }
  size_t head_page_bytes() const { return size_t(2) * page_size * head_dim * 2; }
  size_t q_row() const { return size_t(q_heads) * head_dim; }
  float scale() const { return sharpness / std::sqrt(float(head_dim)); }
};

// Makes a key half as long or twice as long in each channel: for controls, which must notice it. One channel alone can
// vanish in the rounding of the output.
inline void change_key(void* key, int head_dim) {
  std::vector<uint16_t> elements(head_dim);
  VC_CUDA_CHECK(cudaMemcpy(elements.data(), key, elements.size() * 2, cudaMemcpyDeviceToHost));
  for (auto& element : elements) element ^= 0x80;
  VC_CUDA_CHECK(cudaMemcpy(key, elements.data(), elements.size() * 2, cudaMemcpyHostToDevice));
}

// Pages of a pool in random order.
inline std::vector<int64_t> scattered(const Buffer& pool, size_t page_bytes, size_t count, unsigned seed) {
  std::vector<int64_t> pages(count);
  for (size_t i = 0; i < count; ++i) pages[i] = pool.address() + int64_t(i * page_bytes);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(seed));
  return pages;
}

// Copies tokens of a dense sequence [tokens, kv_heads, head_dim] into pages: slot i of the table's row holds token
// list[i], or first + i without a list. Block: one slot of one row; grid: (count, rows). Full pages hold all heads,
// head pages the one head `head`.
static __global__ void fill_pages(const Element* k, const Element* v, const int64_t* table, int first, const int* list,
                                  Heads h, int head) {
  const int i = blockIdx.x, token = list ? list[i] : first + i;
  const int heads = head < 0 ? h.kv_heads : 1;
  auto* page = reinterpret_cast<Element*>(table[i / h.page_size]);
  for (int e = threadIdx.x; e < heads * h.head_dim; e += blockDim.x) {
    const int own = e / h.head_dim, d = e % h.head_dim;
    const int64_t from = (int64_t(token) * h.kv_heads + (head < 0 ? own : head)) * h.head_dim + d;
    const int64_t to = (int64_t(own) * h.page_size + i % h.page_size) * h.head_dim + d;
    page[to] = k[from];
    page[int64_t(heads) * h.page_size * h.head_dim + to] = v[from];
  }
}

// softmax(q k^T * scale) v in float64. Grid: (q_heads, rows); row r sees tokens seen[r * stride + kv_head * head_stride
// + i] for i < count[r * kv_heads + kv_head]. scratch: [rows, q_heads, stride] float64.
static __global__ void reference_attention(const Element* q, const float* k, const float* v, const int* seen,
                                           const int* count, int64_t stride, int64_t head_stride, Heads h, double* out,
                                           double* scratch) {
  const int head = blockIdx.x, row = blockIdx.y, kv = head / (h.q_heads / h.kv_heads);
  const int n = count[row * h.kv_heads + kv];
  const int* tokens = seen + row * stride + kv * head_stride;
  const Element* own_q = q + (int64_t(row) * h.q_heads + head) * h.head_dim;
  double* s = scratch + (int64_t(row) * h.q_heads + head) * head_stride;
  __shared__ double largest;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float* own_k = k + (int64_t(tokens[i]) * h.kv_heads + kv) * h.head_dim;
    double sum = 0;
    for (int d = 0; d < h.head_dim; ++d) sum += double(float(own_q[d])) * own_k[d];
    s[i] = sum * h.sharpness / sqrt(double(h.head_dim));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    largest = -1e300;
    for (int i = 0; i < n; ++i) largest = fmax(largest, s[i]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = exp(s[i] - largest);
  __syncthreads();
  for (int d = threadIdx.x; d < h.head_dim; d += blockDim.x) {
    double l = 0, o = 0;
    for (int i = 0; i < n; ++i) {
      l += s[i];
      o += s[i] * v[(int64_t(tokens[i]) * h.kv_heads + kv) * h.head_dim + d];
    }
    out[(int64_t(row) * h.q_heads + head) * h.head_dim + d] = o / l;
  }
}

static __global__ void to_floats(const Element* from, float* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = float(from[i]);
}

// seen[row][kv_head]: the tokens, in any order. Returns |got - want| / |want| over all rows; NaN counts as infinite.
inline double relative_error(const Element* q, const float* k, const float* v, const Heads& h,
                             const std::vector<std::vector<std::vector<int>>>& seen, const std::vector<uint16_t>& got) {
  const int rows = int(seen.size());
  size_t longest = 1;
  std::vector<int> counts, flat;
  for (const auto& row : seen)
    for (const auto& head : row) {
      longest = std::max(longest, head.size());
      counts.push_back(int(head.size()));
    }
  flat.resize(rows * h.kv_heads * longest);
  for (int r = 0; r < rows; ++r)
    for (int kv = 0; kv < h.kv_heads; ++kv)
      std::copy(seen[r][kv].begin(), seen[r][kv].end(), flat.begin() + (size_t(r) * h.kv_heads + kv) * longest);
  const Buffer device_seen = upload(flat), device_counts = upload(counts);
  const Buffer out(rows * h.q_row() * 8), scratch(size_t(rows) * h.q_heads * longest * 8);
  reference_attention<<<dim3(h.q_heads, rows), 256>>>(q, k, v, device_seen.get<int>(), device_counts.get<int>(),
                                                      int64_t(h.kv_heads * longest), int64_t(longest), h,
                                                      out.get<double>(), scratch.get<double>());
  VC_CUDA_CHECK(cudaGetLastError());
  const auto want = out.to_host<double>();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double x = to_float(bf16{got[i]});
    if (std::isnan(x)) return INFINITY;
    difference += (x - want[i]) * (x - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

// A workspace of exactly the size the launcher asks for, poisoned.
template <class Params>
Buffer workspace_for(Params& p, size_t (*bytes)(const Params&)) {
  Buffer workspace(bytes(p));
  workspace.poison();
  p.workspace = workspace.get();
  return workspace;
}

// A dense random sequence and a q for each of its positions.
struct Sequence {
  Heads h;
  int tokens;
  Buffer k, v, q, k_floats, v_floats;

  Sequence(Heads heads, int n)
      : h(heads),
        tokens(n),
        k(random_buffer<Element>(size_t(n) * h.kv_heads * h.head_dim, 1)),
        v(random_buffer<Element>(size_t(n) * h.kv_heads * h.head_dim, 2)),
        q(random_buffer<Element>(n * h.q_row(), 3, 2.f)),
        k_floats(k.bytes() * 2),
        v_floats(v.bytes() * 2) {
    to_floats<<<1024, 256>>>(k.get<Element>(), k_floats.get<float>(), int64_t(k.bytes() / 2));
    to_floats<<<1024, 256>>>(v.get<Element>(), v_floats.get<float>(), int64_t(v.bytes() / 2));
    VC_CUDA_CHECK(cudaGetLastError());
  }
  const Element* q_at(int position) const { return q.get<Element>() + position * h.q_row(); }
};

struct FullRequest {
  int first, rows;  // query rows at positions first .. first + rows - 1; the cache ends there
};

// Full attention for prefixes of one sequence; returns the output rows.
inline std::vector<uint16_t> run_full(const Sequence& s, int window, const std::vector<FullRequest>& requests,
                                      unsigned seed) {
  const Heads& h = s.h;
  int max_pages = 1 + int(seed % 3), rows = 0;
  for (const auto& r : requests) {
    max_pages = std::max(max_pages, (r.first + r.rows + h.page_size - 1) / h.page_size + int(seed % 3));
    rows += r.rows;
  }
  const Buffer pool(requests.size() * max_pages * h.page_bytes());
  pool.poison();
  const auto pages = scattered(pool, h.page_bytes(), requests.size() * max_pages, seed);
  const Buffer table = upload(pages);
  std::vector<int32_t> offsets{0}, positions;
  const Buffer q(rows * h.q_row() * 2), out(rows * h.q_row() * 2);
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& r = requests[i];
    if (r.rows > 0) {
      fill_pages<<<r.first + r.rows, 128>>>(s.k.get<Element>(), s.v.get<Element>(),
                                            table.get<int64_t>() + i * max_pages, 0, nullptr, h, -1);
      VC_CUDA_CHECK(cudaGetLastError());
      VC_CUDA_CHECK(cudaMemcpyAsync(q.get<Element>() + offsets.back() * h.q_row(), s.q_at(r.first),
                                    r.rows * h.q_row() * 2, cudaMemcpyDeviceToDevice));
    }
    for (int j = 0; j < r.rows; ++j) positions.push_back(r.first + j);
    offsets.push_back(offsets.back() + r.rows);
  }
  const Buffer row_offsets = upload(offsets), row_position = upload(positions);
  out.poison();
  PagedAttentionParams p{};
  p.q = q.get(), p.out = out.get(), p.page_table = table.get<int64_t>();
  p.row_offsets = row_offsets.get<int32_t>(), p.row_position = row_position.get<int32_t>();
  p.q_stride_row = int64_t(h.q_row()), p.q_stride_head = h.head_dim, p.table_stride_request = max_pages;
  p.rows = rows, p.requests = int(requests.size()), p.q_heads = h.q_heads, p.kv_heads = h.kv_heads;
  p.head_dim = h.head_dim, p.page_size = h.page_size, p.max_pages = max_pages, p.window = window;
  p.scale = h.scale(), p.dtype = DType::kBFloat16;
  const Buffer workspace = workspace_for(p, cuda::paged_attention_workspace_bytes);
  cuda::paged_attention(p, nullptr);
  VC_CUDA_CHECK(cudaGetLastError());
  return out.to_host<uint16_t>();
}

// Scales, zeros and codes of quantized pages, random; every scale is positive.
static __global__ void fill_quant(uint8_t* pages, int64_t bytes, QuantPageLayout l, int bits) {
  for (int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * 2; i < bytes;
       i += int64_t(gridDim.x) * blockDim.x * 2) {
    int64_t at = i % l.head_bytes;
    const uint32_t x = hash32(i * 0x9e3779b97f4a7c15ull);
    const float u = float(x >> 8) * 0x1p-24f;
    int part = 0;  // 0: codes, 1: scale, 2: zero
    if (at >= l.code_bytes + 2 * l.k_param_bytes) {
      at -= l.code_bytes + 2 * l.k_param_bytes;
      part = at < l.code_bytes ? 0 : at < l.code_bytes + l.v_param_bytes ? 1 : 2;
    } else {
      part = at < l.code_bytes ? 0 : at < l.code_bytes + l.k_param_bytes ? 1 : 2;
    }
    const Element param(part == 1 ? (1.5f + 2.5f * u) / float((1 << bits) - 1) : -1.f - u);
    *reinterpret_cast<uint16_t*>(pages + i) = part == 0 ? uint16_t(x) : *reinterpret_cast<const uint16_t*>(&param);
  }
}

// One page's K and V as floats, from the definition: code * scale + zero. Grid: page_size; table entry `page`.
static __global__ void dequantize_page(const int64_t* table, int page, int64_t layout_head_bytes, QuantPageLayout l,
                                       Heads h, int bits, int group, float* k, float* v) {
  const int slot = blockIdx.x;
  for (int e = threadIdx.x; e < h.kv_heads * h.head_dim; e += blockDim.x) {
    const int head = e / h.head_dim, d = e % h.head_dim;
    const auto* blob = reinterpret_cast<const uint8_t*>(table[page]) + head * layout_head_bytes;
    const auto code = [&](const uint8_t* codes) {
      const auto bits_at = [&](int64_t row_bytes, int bit, int width) {
        return codes[slot * row_bytes + bit / 8] >> bit % 8 & ((1 << width) - 1);
      };
      if (bits != 5 && bits != 6 && bits != 7) return float(bits_at(h.head_dim * bits / 8, d * bits, bits));
      int x = 0;
      for (int width = 4; width > 0; width /= 2) {  // the planes of csrc/common/code_planes.h
        if ((bits & width) == 0) continue;
        const int part = h.head_dim * width / 4, in_part = d % part;
        x = x << width | bits_at(h.head_dim * width / 8,
                                 in_part / 4 * 16 + in_part % 4 / 2 * 8 + width * (2 * (d / part) + in_part % 2),
                                 width);
        codes += int64_t(h.page_size) * h.head_dim * width / 8;
      }
      return float(x);
    };
    const auto* ks = reinterpret_cast<const Element*>(blob + l.code_bytes);
    const auto* kz = reinterpret_cast<const Element*>(blob + l.code_bytes + l.k_param_bytes);
    const uint8_t* values = blob + l.code_bytes + 2 * l.k_param_bytes;
    const auto* vs = reinterpret_cast<const Element*>(values + l.code_bytes);
    const auto* vz = reinterpret_cast<const Element*>(values + l.code_bytes + l.v_param_bytes);
    const int64_t to = (int64_t(page) * h.page_size + slot) * h.kv_heads * h.head_dim + e;
    const int kp = slot / group * h.head_dim + d, vp = slot * (h.head_dim / group) + d / group;
    k[to] = code(blob) * float(ks[kp]) + float(kz[kp]);
    v[to] = code(values) * float(vs[vp]) + float(vz[vp]);
  }
}

}  // namespace vericache::bench
