// SPDX-License-Identifier: Apache-2.0
// Full pages <-> quantized pages (QuantPageLayout; KIVI, arXiv 2402.02750: keys per channel, values per token).
//
// Rounding as csrc/cpu/quantize.cpp has it: scale and zero are rounded to T first; the code is round-half-even of
// (x - zero) / scale with those, clamped; where the scale is 0 or NaN all codes are 0; a NaN or an infinity makes its
// group's scale and zero NaN.
//
// Grid: one block a (page, head, run of `group` tokens). Block: 128 threads; a thread works on packs of 8 channels.
// Keys: extremes down each channel; values: within a token's group. No order of addition matters: minima and maxima
// only. quantize_pages takes any shape: the run's keys lie in shared memory, thread d walks down channel d, the group /
// 8 threads of a group of values agree by shuffles. quantize_quick keeps keys and values in registers, knows the shape
// while compiling and has less than a third of the instructions; both give the same bytes.
// Codes of 5 to 7 bits take quantize_pages: they meet in shared memory, as bytes, and go to their planes from there.
#include <algorithm>
#include <type_traits>

#include "common/code_planes.h"
#include "device/element.cuh"
#include "device/launch.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kThreads = 128, kPack = 8, kMaxHeadDim = 256, kMaxGridY = 65535;
constexpr int kQuickBlocks = 8;  // a multiprocessor: 9 leave 56 registers and cost 11 to 17%, no bound 3% at 2 bits

// The code word of a pack: as in the page; a byte a code where codes are split into planes.
template <int kBits>
constexpr int kCodeStep = CodePlanes<kBits>::kSplit ? 8 : kBits;
template <int kBits>
using CodeWord =
    std::conditional_t<kCodeStep<kBits> == 8, uint64_t, std::conditional_t<kBits == 4, uint32_t, uint16_t>>;

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
  for (int j = 0; j < kPack; ++j) word |= CodeWord<kBits>(steps[j].code(x[j])) << (j * kCodeStep<kBits>);
  return word;
}

// Whole rows of codes, a byte each ([rows, head_dim] in shared memory), to their planes of a block of codes, from row
// row0 on. By all threads.
template <int kBits>
__device__ void put_planes(uint8_t* block, const uint8_t* codes, int row0, int rows, const QuantizeParams& p) {
  using Planes = CodePlanes<kBits>;
  const int dim = p.head_dim;
  Planes::each_plane([&]<int w>() {
    auto* out = reinterpret_cast<uint16_t*>(block + Planes::begin(p.page_size, dim, w) +
                                            int64_t(row0) * Planes::row_bytes(dim, w));
    const int units = dim * w / 16;  // of a row
    for (int i = threadIdx.x; i < rows * units; i += kThreads)
      out[i] = Planes::template unit<w>(reinterpret_cast<const uint32_t*>(codes + i / units * dim), dim, i % units);
  });
}

// The codes of a pack of a row.
template <int kBits>
__device__ __forceinline__ CodeWord<kBits> pack_of(const uint8_t* block, int row, int pack, const QuantizeParams& p) {
  if constexpr (CodePlanes<kBits>::kSplit) {
    const uint32_t low = CodePlanes<kBits>::load4(block, row, 2 * pack, p.page_size, p.head_dim);
    return low | uint64_t(CodePlanes<kBits>::load4(block, row, 2 * pack + 1, p.page_size, p.head_dim)) << 32;
  } else {
    return *reinterpret_cast<const CodeWord<kBits>*>(block + int64_t(row) * (p.head_dim * kBits / 8) + pack * kBits);
  }
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
  constexpr bool kSplit = CodePlanes<kBits>::kSplit;
  const int row0 = at.run * group, row_bytes = dim * kBits / 8;

  T* tile = reinterpret_cast<T*>(smem);  // [group, dim]
  float* scales = reinterpret_cast<float*>(tile + group * dim);
  float* zeros = scales + dim;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(zeros + dim);  // [group, dim] codes, if they are split into planes
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
    if constexpr (kSplit)
      *reinterpret_cast<uint64_t*>(bytes + i * kPack) = encode(x, steps);
    else
      *reinterpret_cast<CodeWord<kBits>*>(blob.v_codes + int64_t(row) * row_bytes + pack * kBits) = encode(x, steps);
  }

  __syncthreads();  // the tile and the codes are complete
  if constexpr (kSplit) put_planes<kBits>(blob.v_codes, bytes, row0, group, p);
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
  float scale[kPack], zero[kPack];
  load8(scales + pack * kPack, scale);
  load8(zeros + pack * kPack, zero);
  Steps<kBits> steps[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) steps[j].set(scale[j], zero[j]);
  const int first = int(threadIdx.x) < rows_a_pass * packs ? int(threadIdx.x) / packs : group;
  for (int i = first; i < group; i += rows_a_pass) {
    float x[kPack];
    load8(tile + i * dim + pack * kPack, x);
    if constexpr (kSplit)
      *reinterpret_cast<uint64_t*>(bytes + i * dim + pack * kPack) = encode(x, steps);
    else
      *reinterpret_cast<CodeWord<kBits>*>(blob.k_codes + int64_t(row0 + i) * row_bytes + pack * kBits) =
          encode(x, steps);
  }
  if constexpr (kSplit) {
    __syncthreads();  // the codes are complete
    put_planes<kBits>(blob.k_codes, bytes, row0, group, p);
  }
}

// ---- the usual case: bfloat16, a run of 2 or 4 packs a thread -------------------------------------------------------

// Of two bfloat16 at a time; a NaN stays.
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }

// Of the low or the high elements of a pair of minima and a pair of maxima: (smallest, -largest).
__device__ __forceinline__ uint32_t extent_low(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x5410) ^ 0x80000000u;
}
__device__ __forceinline__ uint32_t extent_high(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x7632) ^ 0x80000000u;
}

// Scale and zero as Steps has them. `inverse` is 0 where the short way to a code does not hold: a scale near the ends
// of the exponents, zero or not finite.
template <int kBits>
struct QuickSteps {
  float scale, zero, inverse;

  __device__ __forceinline__ explicit QuickSteps(uint32_t extent) {
    constexpr float kLevels = Steps<kBits>::kLevels, kInverse = 1.0f / kLevels;
    const float low = low_half(extent), high = -__uint_as_float(extent & 0xffff0000u);
    const float poison = 0.0f + low * 0.0f + high * 0.0f;  // NaN for a NaN or an infinity, else +0: zero is never -0
    const float span = high - low;
    float q = span * kInverse;  // Markstein's division, as in Steps::code
    q = span > 1e-30f && span < 1e30f ? fmaf(fmaf(-q, kLevels, span), kInverse, q) : span / kLevels;
    scale = round_to<__nv_bfloat16>(q + poison);
    zero = round_to<__nv_bfloat16>(low + poison);
    inverse = scale > 1e-30f && scale < 1e30f ? __frcp_rn(scale) : 0.0f;
  }
};

// Codes of a pack. zero is the smallest value itself, so none is negative; scale may have been rounded down, by less
// than 2^-8, which matters with 8 bits alone. Adding 1.5 * 2^23 rounds to an integer in the low bits of the float.
template <int kBits>
__device__ __forceinline__ CodeWord<kBits> encode_quick(uint4 raw, const float (&scale)[kPack],
                                                        const float (&zero)[kPack], const float (&inverse)[kPack]) {
  constexpr int kWords = kBits == 8 ? 2 : 1, kEach = kPack / kWords;
  constexpr uint32_t kMagic = 0x4b400000u;
  float x[kPack];
  Pack<__nv_bfloat16>{raw}.unpack(x);
  uint32_t word[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t offset = 0;
    word[w] = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int j = w * kEach + i;
      const float d = x[j] - zero[j];
      float q = d * inverse[j];
      q = fmaf(fmaf(-q, scale[j], d), inverse[j], q);
      if (kBits == 8) q = fminf(q, Steps<kBits>::kLevels);
      word[w] += __float_as_uint(__fadd_rn(q, __uint_as_float(kMagic))) << (kBits * i);
      offset += kMagic << (kBits * i);
    }
    word[w] -= offset;
  }
  if constexpr (kBits == 8)
    return word[0] | uint64_t(word[1]) << 32;
  else
    return CodeWord<kBits>(word[0]);
}

// The same for any scale. One element at a time: it is rare, and should cost the other way no registers.
template <int kBits, class F>
__device__ __forceinline__ CodeWord<kBits> encode_careful(uint4 raw, F scale_and_zero) {
  uint64_t low = raw.x | uint64_t(raw.y) << 32, high = raw.z | uint64_t(raw.w) << 32;
  CodeWord<kBits> word = 0;
#pragma unroll 1
  for (int j = 0; j < kPack; ++j) {
    const float2 s = scale_and_zero(j);
    Steps<kBits> steps;
    steps.set(s.x, s.y);
    word |= CodeWord<kBits>(steps.code(low_half(uint32_t(low)))) << (j * kBits);
    low = low >> 16 | high << 48, high >>= 16;
  }
  return word;
}

// A row has kRow packs, a thread kPacks of the run's keys and as many of its values. Extremes go through shared memory
// as words of two bfloat16, (smallest, -largest): one minimum joins two of them. Between two barriers thread t finds
// the steps of one channel of the keys and of one group of the values.
template <int kBits, int kPacks, int kRow>
__global__ void __launch_bounds__(kThreads, kQuickBlocks)
    quantize_quick(const __grid_constant__ QuantizeParams p, const __grid_constant__ QuantPageLayout layout) {
  using T = __nv_bfloat16;
  constexpr int kDim = kRow * kPack, kGroup = kThreads * kPacks / kRow;
  constexpr int kMembers = kGroup / kPack;  // packs a group of values
  constexpr int kSlices = kThreads / kRow;  // threads with the same channels
  constexpr int kRowBytes = kDim * kBits / 8;
  // Channel 8 pack + 4 half + c of the keys is at [half][pack][c]: whole 16-byte accesses of neighbours.
  __shared__ uint4 k_extents[kSlices][2][kRow];
  __shared__ float4 k_scales[2][kRow], k_zeros[2][kRow], k_inverses[2][kRow];
  __shared__ __align__(16) uint32_t v_extents[kThreads * kPacks];
  __shared__ float4 v_steps[kDim];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int runs = p.page_size / kGroup, run = int(blockIdx.x) & (runs - 1);  // powers of two
  const int head = int(blockIdx.x) >> (31 - __clz(runs));
  const int64_t page = int64_t(blockIdx.z) * kMaxGridY + blockIdx.y;
  if (page >= p.pages) return;
  const int64_t head_size = int64_t(p.page_size) * kDim;
  const T* keys = reinterpret_cast<const T*>(p.full_pages[page]) + head * head_size + int64_t(run) * kGroup * kDim;
  const T* values = keys + p.kv_heads * head_size;
  const HeadBlob<T> blob(p.quant_pages[page], layout, head);
  // Pack i of this thread: channels 8 pack .. 8 pack + 7 of row first_row + i * kSlices.
  const int thread = threadIdx.x, pack = thread % kRow, first_row = thread / kRow;

  uint4 k[kPacks], v[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) k[i] = __ldcs(reinterpret_cast<const uint4*>(keys) + thread + i * kThreads);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) v[i] = __ldcs(reinterpret_cast<const uint4*>(values) + thread + i * kThreads);

  uint4 low = k[0], high = k[0];
#pragma unroll
  for (int i = 1; i < kPacks; ++i) {
    low.x = min_pair(low.x, k[i].x), low.y = min_pair(low.y, k[i].y);
    low.z = min_pair(low.z, k[i].z), low.w = min_pair(low.w, k[i].w);
    high.x = max_pair(high.x, k[i].x), high.y = max_pair(high.y, k[i].y);
    high.z = max_pair(high.z, k[i].z), high.w = max_pair(high.w, k[i].w);
  }
  k_extents[first_row][0][pack] = make_uint4(extent_low(low.x, high.x), extent_high(low.x, high.x),
                                             extent_low(low.y, high.y), extent_high(low.y, high.y));
  k_extents[first_row][1][pack] = make_uint4(extent_low(low.z, high.z), extent_high(low.z, high.z),
                                             extent_low(low.w, high.w), extent_high(low.w, high.w));
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const uint32_t a = min_pair(min_pair(v[i].x, v[i].y), min_pair(v[i].z, v[i].w));
    const uint32_t b = max_pair(max_pair(v[i].x, v[i].y), max_pair(v[i].z, v[i].w));
    v_extents[thread + i * kThreads] = min_pair(extent_low(a, b), extent_high(a, b));
  }
  __syncthreads();

#pragma unroll
  for (int t = thread; t < kDim; t += kThreads) {
    const auto* extents = reinterpret_cast<const uint32_t*>(k_extents);
    uint32_t extent = extents[t];
#pragma unroll
    for (int i = 1; i < kSlices; ++i) extent = min_pair(extent, extents[i * kDim + t]);
    const QuickSteps<kBits> steps(extent);
    reinterpret_cast<float*>(k_scales)[t] = steps.scale;
    reinterpret_cast<float*>(k_zeros)[t] = steps.zero;
    reinterpret_cast<float*>(k_inverses)[t] = steps.inverse;
    const int channel = t % (kDim / 2) / 4 * kPack + t / (kDim / 2) * 4 + t % 4;
    blob.k_scale[run * kDim + channel] = from_float<T>(steps.scale);
    blob.k_zero[run * kDim + channel] = from_float<T>(steps.zero);
  }
#pragma unroll
  for (int t = thread; t < kDim; t += kThreads) {  // groups by token, then by channel
    uint32_t extent = v_extents[t * kMembers];
#pragma unroll
    for (int i = 1; i < kMembers; ++i) extent = min_pair(extent, v_extents[t * kMembers + i]);
    const QuickSteps<kBits> steps(extent);
    v_steps[t] = make_float4(steps.scale, steps.zero, steps.inverse, 0.0f);
    blob.v_scale[run * kDim + t] = from_float<T>(steps.scale);
    blob.v_zero[run * kDim + t] = from_float<T>(steps.zero);
  }
  __syncthreads();

  const int64_t code_at = int64_t(run * kGroup + first_row) * kRowBytes + pack * kBits;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const float4 steps = v_steps[(thread + i * kThreads) / kMembers];
    CodeWord<kBits> word;
    if (steps.z != 0.0f) {
      float scale[kPack], zero[kPack], inverse[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) scale[j] = steps.x, zero[j] = steps.y, inverse[j] = steps.z;
      word = encode_quick<kBits>(v[i], scale, zero, inverse);
    } else {
      word = encode_careful<kBits>(v[i], [&](int) { return make_float2(steps.x, steps.y); });
    }
    *reinterpret_cast<CodeWord<kBits>*>(blob.v_codes + code_at + i * kSlices * kRowBytes) = word;
  }

  float scale[kPack], zero[kPack], inverse[kPack];
  const auto both = [&](const float4(&from)[2][kRow], float (&to)[kPack]) {
    const float4 a = from[0][pack], b = from[1][pack];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  };
  both(k_scales, scale);
  both(k_zeros, zero);
  both(k_inverses, inverse);
  bool quick = true;
#pragma unroll
  for (int j = 0; j < kPack; ++j) quick &= inverse[j] != 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    CodeWord<kBits> word;
    if (quick)
      word = encode_quick<kBits>(k[i], scale, zero, inverse);
    else
      word = encode_careful<kBits>(k[i], [&](int j) {
        const int at = j / 4 * (kDim / 2) + pack * 4 + j % 4;
        return make_float2(reinterpret_cast<const float*>(k_scales)[at], reinterpret_cast<const float*>(k_zeros)[at]);
      });
    *reinterpret_cast<CodeWord<kBits>*>(blob.k_codes + code_at + i * kSlices * kRowBytes) = word;
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
  constexpr CodeWord<kBits> kMask = CodeWord<kBits>((1u << kBits) - 1);
  for (int i = threadIdx.x; i < p.group * packs; i += kThreads) {
    const int row = row0 + i / packs, pack = i % packs;
    const auto k_word = pack_of<kBits>(blob.k_codes, row, pack, p), v_word = pack_of<kBits>(blob.v_codes, row, pack, p);
    float scale[kPack], zero[kPack], k[kPack], v[kPack];
    load8(blob.k_scale + int64_t(at.run) * dim + pack * kPack, scale);
    load8(blob.k_zero + int64_t(at.run) * dim + pack * kPack, zero);
    const int64_t group_at = int64_t(row) * groups + pack * kPack / p.group;
    const float v_scale = to_float(blob.v_scale[group_at]), v_zero = to_float(blob.v_zero[group_at]);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      k[j] = fmaf(float(uint32_t(k_word >> (j * kCodeStep<kBits>)&kMask)), scale[j], zero[j]);
      v[j] = fmaf(float(uint32_t(v_word >> (j * kCodeStep<kBits>)&kMask)), v_scale, v_zero);
    }
    store8(keys + int64_t(row) * dim + pack * kPack, k);
    store8(values + int64_t(row) * dim + pack * kPack, v);
  }
}

void check(const char* op, const QuantizeParams& p) {
  VC_CHECK(are_code_bits(p.bits), op, ": bits is ", p.bits, "; it must be 2, 4, 5, 6, 7 or 8.");
  VC_CHECK(p.head_dim % (2 * kPack) == 0 && p.head_dim > 0 && p.head_dim <= kMaxHeadDim, op, ": head_dim is ",
           p.head_dim, "; it must be a multiple of ", 2 * kPack, " and at most ", kMaxHeadDim, ".");
  VC_CHECK(
      p.group >= kPack && (p.group & (p.group - 1)) == 0 && p.head_dim % p.group == 0 && p.page_size % p.group == 0, op,
      ": group is ", p.group, "; it must be a power of two of at least ", kPack, " that divides head_dim ", p.head_dim,
      " and page_size ", p.page_size, ".");
  const int64_t blocks = int64_t(p.pages) * p.kv_heads * (p.page_size / p.group);
  VC_CHECK(blocks <= INT32_MAX, op, ": ", p.pages, " pages in one call are too many; split the call.");
}

// The instance of quantize_quick for a shape, null if there is none.
template <int kBits>
auto quick_kernel(int head_dim, int group) -> decltype(&quantize_quick<kBits, 4, 16>) {
  switch (head_dim * 1000 + group) {
    case 64032:
      return quantize_quick<kBits, 2, 8>;
    case 64064:
      return quantize_quick<kBits, 4, 8>;
    case 128016:
      return quantize_quick<kBits, 2, 16>;
    case 128032:
      return quantize_quick<kBits, 4, 16>;
    case 256016:
      return quantize_quick<kBits, 4, 32>;
    default:
      return nullptr;
  }
}

template <class T, int kBits>
void launch_pages(const QuantizeParams& p, bool quantize, cudaStream_t stream) {
  const DeviceInfo info = device_info();
  const auto layout = QuantPageLayout::make(p.kv_heads, p.page_size, p.head_dim, p.bits, p.group, sizeof(T));
  LaunchShape shape;
  shape.grid = dim3(unsigned(int64_t(p.pages) * p.kv_heads * (p.page_size / p.group)));
  shape.block = dim3(kThreads);
  if (!quantize) return launch(dequantize_pages<T, kBits>, shape, info, stream, p, layout);
  if constexpr (std::is_same_v<T, __nv_bfloat16> && !CodePlanes<kBits>::kSplit) {
    const auto kernel = quick_kernel<kBits>(p.head_dim, p.group);
    if (kernel != nullptr && (p.page_size & (p.page_size - 1)) == 0) {
      shape.grid = dim3(unsigned(p.kv_heads * (p.page_size / p.group)), unsigned(std::min(p.pages, kMaxGridY)),
                        unsigned((p.pages + kMaxGridY - 1) / kMaxGridY));
      return launch(kernel, shape, info, stream, p, layout);
    }
  }
  shape.smem = size_t(p.group) * p.head_dim * sizeof(T) + size_t(p.head_dim) * 8 +
               (CodePlanes<kBits>::kSplit ? size_t(p.group) * p.head_dim : 0);
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
      case 7:
        return launch_pages<decltype(t), 7>(p, quantize, stream);
      case 6:
        return launch_pages<decltype(t), 6>(p, quantize, stream);
      case 5:
        return launch_pages<decltype(t), 5>(p, quantize, stream);
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
