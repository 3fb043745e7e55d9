// SPDX-License-Identifier: Apache-2.0
// Full pages <-> quantized pages (QuantPageLayout; KIVI, arXiv 2402.02750: keys per channel, values per token).
//
// Rounding as csrc/cpu/quantize.cpp has it: scale and zero are rounded to T first; the code is round-half-even of
// (x - zero) / scale with those, clamped; where the scale is 0 or NaN all codes are 0; a NaN or an infinity makes its
// group's scale and zero NaN.
//
// Grid: one block a (page, head, run of `group` tokens). Block: 128 threads; a thread works on packs of 8 channels.
// Shared memory (quantize): the run's keys, then scale and zero of each channel as floats. Keys: thread d walks down
// channel d; values: the group / 8 threads of a group agree by shuffles. No order of addition matters: minima and
// maxima only.
#include <type_traits>

#include "device/element.cuh"
#include "device/launch.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kThreads = 128, kPack = 8, kMaxHeadDim = 256;

// The code word of a pack.
template <int kBits>
using CodeWord = std::conditional_t<kBits == 8, uint64_t, std::conditional_t<kBits == 4, uint32_t, uint16_t>>;

template <class T>
__device__ __forceinline__ void load8(const T* src, float (&x)[kPack]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 lo = reinterpret_cast<const float4*>(src)[0], hi = reinterpret_cast<const float4*>(src)[1];
    x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w, x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
  } else {
    Pack<T>::load(src).unpack(x);
  }
}

template <class T>
__device__ __forceinline__ void store8(T* dst, const float (&x)[kPack]) {
  if constexpr (std::is_same_v<T, float>) {
    reinterpret_cast<float4*>(dst)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(dst)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    Pack<T>::pack(x).store(dst);
  }
}

// The blocks of one head of one quantized page.
template <class T>
struct HeadBlob {
  uint8_t* k_codes;
  T *k_scale, *k_zero;
  uint8_t* v_codes;
  T *v_scale, *v_zero;

  __device__ HeadBlob(int64_t page, const QuantPageLayout& l, int head) {
    uint8_t* at = reinterpret_cast<uint8_t*>(page) + head * l.head_bytes;
    k_codes = at;
    k_scale = reinterpret_cast<T*>(k_codes + l.code_bytes);
    k_zero = reinterpret_cast<T*>(k_codes + l.code_bytes + l.k_param_bytes);
    v_codes = k_codes + l.code_bytes + 2 * l.k_param_bytes;
    v_scale = reinterpret_cast<T*>(v_codes + l.code_bytes);
    v_zero = reinterpret_cast<T*>(v_codes + l.code_bytes + l.v_param_bytes);
  }
};

struct Extent {
  float low = INFINITY, high = -INFINITY;
  float poison = 0.0f;  // NaN once a NaN or an infinity was seen

  __device__ __forceinline__ void add(float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    poison += x * 0.0f;
  }
};

// Scale and zero of a group, rounded to T.
template <int kBits>
struct Steps {
  float scale, zero, inverse;

  static constexpr float kLevels = float((1 << kBits) - 1);

  __device__ __forceinline__ void set(float s, float z) {
    scale = s;
    zero = z;
    inverse = 1.0f / s;
  }

  template <class T>
  __device__ __forceinline__ void fit(const Extent& e) {
    set(round_to<T>((e.high - e.low) / kLevels + e.poison), round_to<T>(e.low + e.poison));
  }

  // (x - zero) / scale, correctly rounded: with the rounded reciprocal one correction by the remainder is exact
  // (Markstein) wherever nothing over- or underflows.
  __device__ __forceinline__ uint32_t code(float x) const {
    const float d = x - zero;
    float q = d * inverse;
    q = scale > 1e-30f && scale < 1e30f ? fmaf(fmaf(-q, scale, d), inverse, q) : d / scale;
    q = fminf(fmaxf(q, 0.0f), kLevels);  // NaN -> 0
    return scale > 0.0f ? uint32_t(__float2int_rn(q)) : 0u;
  }
};

template <int kBits>
__device__ __forceinline__ CodeWord<kBits> encode(const float (&x)[kPack], const Steps<kBits> (&steps)[kPack]) {
  CodeWord<kBits> word = 0;
#pragma unroll
  for (int j = 0; j < kPack; ++j) word |= CodeWord<kBits>(steps[j].code(x[j])) << (j * kBits);
  return word;
}

struct Place {
  int64_t page;
  int head, run;
  __device__ Place(const QuantizeParams& p) {
    const int runs = p.page_size / p.group;
    run = int(blockIdx.x) % runs;
    head = int(blockIdx.x) / runs % p.kv_heads;
    page = int64_t(blockIdx.x) / runs / p.kv_heads;
  }
};

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads)
    quantize_pages(const __grid_constant__ QuantizeParams p, const __grid_constant__ QuantPageLayout layout) {
  extern __shared__ __align__(16) uint8_t smem[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Place at(p);
  const int dim = p.head_dim, packs = dim / kPack, group = p.group, total = group * packs;
  const int64_t head_size = int64_t(p.page_size) * dim, run_offset = int64_t(at.run) * group * dim;
  const T* keys = reinterpret_cast<const T*>(p.full_pages[at.page]) + at.head * head_size + run_offset;
  const T* values = keys + p.kv_heads * head_size;
  const HeadBlob<T> blob(p.quant_pages[at.page], layout, at.head);
  const int row0 = at.run * group, row_bytes = dim * kBits / 8;

  T* tile = reinterpret_cast<T*>(smem);  // [group, dim]
  float* scales = reinterpret_cast<float*>(tile + group * dim);
  float* zeros = scales + dim;
  constexpr int kVector = 16 / int(sizeof(T));
  for (int i = threadIdx.x; i < group * dim / kVector; i += kThreads)
    Pack<T>::load(keys + i * kVector).store(tile + i * kVector);

  // Values: every thread takes part in the shuffles.
  const int members = group / kPack, groups = dim / group;
  for (int first = 0; first < total; first += kThreads) {
    const int i = first + int(threadIdx.x);
    const bool active = i < total;  // the same for all members of a group
    float x[kPack] = {};
    if (active) load8(values + int64_t(i) * kPack, x);
    Extent e;
#pragma unroll
    for (int j = 0; j < kPack; ++j) e.add(x[j]);
    for (int mask = members / 2; mask > 0; mask /= 2) {
      const float low = __shfl_xor_sync(0xffffffffu, e.low, mask), high = __shfl_xor_sync(0xffffffffu, e.high, mask);
      e.poison += __shfl_xor_sync(0xffffffffu, e.poison, mask);
      e.low = low < e.low ? low : e.low;
      e.high = high > e.high ? high : e.high;
    }
    if (!active) continue;
    Steps<kBits> steps[kPack];
    steps[0].template fit<T>(e);
#pragma unroll
    for (int j = 1; j < kPack; ++j) steps[j] = steps[0];
    const int row = row0 + i / packs, pack = i % packs;
    if (pack % members == 0) {
      blob.v_scale[int64_t(row) * groups + pack / members] = from_float<T>(steps[0].scale);
      blob.v_zero[int64_t(row) * groups + pack / members] = from_float<T>(steps[0].zero);
    }
    *reinterpret_cast<CodeWord<kBits>*>(blob.v_codes + int64_t(row) * row_bytes + pack * kBits) = encode(x, steps);
  }

  __syncthreads();  // the tile is complete
  for (int d = threadIdx.x; d < dim; d += kThreads) {
    Extent e;
    for (int i = 0; i < group; ++i) e.add(to_float(tile[i * dim + d]));
    Steps<kBits> steps;
    steps.template fit<T>(e);
    scales[d] = steps.scale;
    zeros[d] = steps.zero;
    blob.k_scale[int64_t(at.run) * dim + d] = from_float<T>(steps.scale);
    blob.k_zero[int64_t(at.run) * dim + d] = from_float<T>(steps.zero);
  }
  __syncthreads();

  // A thread stays with one pack of channels, so their steps stay in registers.
  const int rows_a_pass = kThreads / packs, pack = int(threadIdx.x) % packs;
  if (int(threadIdx.x) >= rows_a_pass * packs) return;
  float scale[kPack], zero[kPack];
  load8(scales + pack * kPack, scale);
  load8(zeros + pack * kPack, zero);
  Steps<kBits> steps[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) steps[j].set(scale[j], zero[j]);
  for (int i = int(threadIdx.x) / packs; i < group; i += rows_a_pass) {
    float x[kPack];
    load8(tile + i * dim + pack * kPack, x);
    *reinterpret_cast<CodeWord<kBits>*>(blob.k_codes + int64_t(row0 + i) * row_bytes + pack * kBits) = encode(x, steps);
  }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_pages(const __grid_constant__ QuantizeParams p, const __grid_constant__ QuantPageLayout layout) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Place at(p);
  const int dim = p.head_dim, packs = dim / kPack, groups = dim / p.group, row0 = at.run * p.group;
  const int64_t head_size = int64_t(p.page_size) * dim;
  T* keys = reinterpret_cast<T*>(p.full_pages[at.page]) + at.head * head_size;
  T* values = keys + p.kv_heads * head_size;
  const HeadBlob<T> blob(p.quant_pages[at.page], layout, at.head);
  const int row_bytes = dim * kBits / 8;
  constexpr CodeWord<kBits> kMask = CodeWord<kBits>((1u << kBits) - 1);
  for (int i = threadIdx.x; i < p.group * packs; i += kThreads) {
    const int row = row0 + i / packs, pack = i % packs;
    const int64_t code_at = int64_t(row) * row_bytes + pack * kBits;
    const auto k_word = *reinterpret_cast<const CodeWord<kBits>*>(blob.k_codes + code_at);
    const auto v_word = *reinterpret_cast<const CodeWord<kBits>*>(blob.v_codes + code_at);
    float scale[kPack], zero[kPack], k[kPack], v[kPack];
    load8(blob.k_scale + int64_t(at.run) * dim + pack * kPack, scale);
    load8(blob.k_zero + int64_t(at.run) * dim + pack * kPack, zero);
    const int64_t group_at = int64_t(row) * groups + pack * kPack / p.group;
    const float v_scale = to_float(blob.v_scale[group_at]), v_zero = to_float(blob.v_zero[group_at]);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      k[j] = fmaf(float(uint32_t(k_word >> (j * kBits) & kMask)), scale[j], zero[j]);
      v[j] = fmaf(float(uint32_t(v_word >> (j * kBits) & kMask)), v_scale, v_zero);
    }
    store8(keys + int64_t(row) * dim + pack * kPack, k);
    store8(values + int64_t(row) * dim + pack * kPack, v);
  }
}

void check(const char* op, const QuantizeParams& p) {
  VC_CHECK(p.bits == 2 || p.bits == 4 || p.bits == 8, op, ": bits is ", p.bits, "; it must be 2, 4 or 8.");
  VC_CHECK(p.head_dim % kPack == 0 && p.head_dim > 0 && p.head_dim <= kMaxHeadDim, op, ": head_dim is ", p.head_dim,
           "; it must be a multiple of ", kPack, " and at most ", kMaxHeadDim, ".");
  VC_CHECK(
      p.group >= kPack && (p.group & (p.group - 1)) == 0 && p.head_dim % p.group == 0 && p.page_size % p.group == 0, op,
      ": group is ", p.group, "; it must be a power of two of at least ", kPack, " that divides head_dim ", p.head_dim,
      " and page_size ", p.page_size, ".");
  const int64_t blocks = int64_t(p.pages) * p.kv_heads * (p.page_size / p.group);
  VC_CHECK(blocks <= INT32_MAX, op, ": ", p.pages, " pages in one call are too many; split the call.");
}

template <class T, int kBits>
void launch_pages(const QuantizeParams& p, bool quantize, cudaStream_t stream) {
  const DeviceInfo info = device_info();
  const auto layout = QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, p.bits, p.group, sizeof(T));
  LaunchShape shape;
  shape.grid = dim3(unsigned(int64_t(p.pages) * p.kv_heads * (p.page_size / p.group)));
  shape.block = dim3(kThreads);
  if (!quantize) return launch(dequantize_pages<T, kBits>, shape, info, stream, p, layout);
  shape.smem = size_t(p.group) * p.head_dim * sizeof(T) + size_t(p.head_dim) * 8;
  VC_CHECK(int64_t(shape.smem) <= info.smem_optin, "kv_quantize: a group of ", p.group, " tokens needs ", shape.smem,
           " bytes of shared memory, this GPU has ", info.smem_optin, "; use a smaller group.");
  allow_all_smem<quantize_pages<T, kBits>>(info);
  launch(quantize_pages<T, kBits>, shape, info, stream, p, layout);
}

void run(const char* op, const QuantizeParams& p, bool quantize, cudaStream_t stream) {
  if (p.pages <= 0) return;
  check(op, p);
  dispatch_element(p.dtype, [&](auto t) {
    switch (p.bits) {
      case 8:
        return launch_pages<decltype(t), 8>(p, quantize, stream);
      case 4:
        return launch_pages<decltype(t), 4>(p, quantize, stream);
      default:
        return launch_pages<decltype(t), 2>(p, quantize, stream);
    }
  });
}

}  // namespace

void kv_quantize(const QuantizeParams& p, cudaStream_t stream) { run("kv_quantize", p, true, stream); }
void kv_dequantize(const QuantizeParams& p, cudaStream_t stream) { run("kv_dequantize", p, false, stream); }

}  // namespace vericache::cuda
