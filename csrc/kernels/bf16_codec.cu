// SPDX-License-Identifier: Apache-2.0
// Lossless packing of bfloat16 pages (Bf16PackLayout in params.h): pack on the way out to the host, unpack on the way
// in, reading device memory or pinned host memory. Bit-exact for every bfloat16, NaN payloads and subnormals included.
//
// pack. Grid: one block a page, which walks its blocks of 2048 elements in order, so that the place of each block's
// overflow, and with it every byte, is the same as on the CPU. Block: 128 threads, 16 elements each.
// unpack. Grid: one block a run of kRun blocks of elements of a page (at most p.max_blocks, then a stride). Block: 128
// threads; thread t turns 16 bytes of the plane and 8 of the codes into two runs of 8 elements, 1024 apart, so that
// loads and stores are both whole 16-byte accesses of neighbours. Escapes are patched in after a barrier.
#include <algorithm>

#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "launchers.h"

namespace vericache::cuda {

namespace {

constexpr int kBlock = Bf16PackLayout::kBlock, kLanes = Bf16PackLayout::kLanes, kWarps = kLanes / 32;
constexpr int kWindow = 14, kCodeBytes = kBlock / 2;
constexpr uint32_t kEscape = 15;
constexpr int kRun = 4;  // blocks of elements asked for before the first is decoded
constexpr uint32_t kPair = 0x00010001u;

// A pair of neighbouring elements in one word: exponents, and sign and mantissa as bytes, in its two halves.
__device__ __forceinline__ uint32_t exponents(uint32_t pair) { return pair >> 7 & 0xff * kPair; }
__device__ __forceinline__ uint32_t sign_mantissa(uint32_t pair) {
  return (pair >> 8 & 0x80 * kPair) | (pair & 0x7f * kPair);
}

// The base whose window holds the most elements, the highest of several. Starts and ends with a barrier.
__device__ int best_window(const uint32_t (&pair)[8], int* histogram, int* scratch) {
  const int lane = threadIdx.x;
  __syncthreads();
  histogram[lane] = histogram[lane + kLanes] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t e = exponents(pair[i]);
    atomicAdd(&histogram[e & 0xffff], 1);
    atomicAdd(&histogram[e >> 16], 1);
  }
  __syncthreads();
  int best = 0;  // elements << 8 | base
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int base = lane + half * kLanes;
    if (base > 254 - kWindow) continue;
    int held = 0;
    for (int e = base + 1; e <= base + kWindow; ++e) held += histogram[e];
    best = max(best, held << 8 | base);
  }
  best = __reduce_max_sync(0xffffffffu, best);
  if (lane % 32 == 0) scratch[lane / 32] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) best = max(best, scratch[w]);
  __syncthreads();
  return best & 0xff;
}

__global__ void __launch_bounds__(kLanes)
    pack_pages(const __grid_constant__ Bf16PackParams p, const __grid_constant__ Bf16PackLayout l) {
  __shared__ int warp_top[kWarps], warp_count[kWarps], histogram[256];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto* raw = reinterpret_cast<const uint16_t*>(p.raw_pages[blockIdx.x]);
  uint8_t* packed = reinterpret_cast<uint8_t*>(p.packed_pages[blockIdx.x]);
  const int lane = threadIdx.x, warp = lane / 32;
  uint32_t units = 0;
  for (int64_t b = 0; b < l.blocks; ++b) {
    uint32_t pair[8];  // elements 2i, 2i+1 of this lane's 16
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = b * kBlock + h * (kBlock / 2) + lane * 8;
      const uint4 v = at < p.elems ? __ldcs(reinterpret_cast<const uint4*>(raw + at)) : make_uint4(0, 0, 0, 0);
      pair[4 * h] = v.x, pair[4 * h + 1] = v.y, pair[4 * h + 2] = v.z, pair[4 * h + 3] = v.w;
    }
    int top = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t e = exponents(pair[i]);
      const int low = int(e & 0xffff), high = int(e >> 16);
      if (low < 255) top = max(top, low);
      if (high < 255) top = max(top, high);
    }
    top = __reduce_max_sync(0xffffffffu, top);
    if (lane % 32 == 0) warp_top[warp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = max(top, warp_top[w]);
    int base = max(0, top - kWindow);

    uint32_t code[2], escaped;  // bit j: element j of the 16
    int count, before;          // escapes of the block, and of the lanes before this one
    const auto encode = [&] {
      code[0] = code[1] = escaped = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int e = int(pair[j / 2] >> (j % 2 * 16 + 7) & 0xff);
        const uint32_t c = e == 0 ? 0 : e > base && e <= base + kWindow ? uint32_t(e - base) : kEscape;
        code[j / 8] |= c << (4 * (j % 8 / 2) + 16 * (j % 2));
        escaped |= uint32_t(c == kEscape) << j;
      }
      int all;
      before = warp_sum_before(__popc(escaped), lane % 32, all);
      if (lane % 32 == 0) warp_count[warp] = all;
      __syncthreads();
      count = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += warp_count[w];
        count += warp_count[w];
      }
    };
    encode();
    if (count > Bf16PackLayout::kRetryEscapes) {  // a few large values have pulled the window up
      base = best_window(pair, histogram, warp_top);
      encode();
    }

    auto* overflow = reinterpret_cast<uint32_t*>(packed + l.overflow + int64_t(units) * 16);
    Bf16BlockHeader header{units, uint16_t(count), uint16_t(base)};
    if (count > Bf16PackLayout::kMaxEscapes) {
      header.count = Bf16BlockHeader::kWide;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t e = exponents(pair[4 * h + i]);
          low |= (e & 0xf * kPair) << (4 * i);
          high |= (e >> 4 & 0xf * kPair) << (4 * i);
        }
        code[h] = low;
        overflow[2 * lane + h] = high;
      }
      units += kCodeBytes / 16;
    } else {
      const int used = (count + 3) / 4;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (!(escaped >> j & 1)) continue;
        const uint32_t position = j / 8 * (kBlock / 2) + lane * 8 + j % 8;
        overflow[before++] = position << 16 | (pair[j / 2] >> (j % 2 * 16) & 0xffff);
      }
      if (lane < used * 4 - count) overflow[count + lane] = 0;
      units += uint32_t(used);
    }
    uint32_t plane[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      plane[i] = __byte_perm(sign_mantissa(pair[2 * i]), sign_mantissa(pair[2 * i + 1]), 0x6420);
    reinterpret_cast<uint4*>(packed + l.planes + int64_t(b) * kBlock)[lane] =
        make_uint4(plane[0], plane[1], plane[2], plane[3]);
    reinterpret_cast<uint2*>(packed + l.codes + int64_t(b) * kCodeBytes)[lane] = make_uint2(code[0], code[1]);
    if (lane == 0) reinterpret_cast<Bf16BlockHeader*>(packed + l.headers)[b] = header;
  }
  // The gap behind the headers.
  for (int64_t at = l.headers + l.blocks * int64_t(sizeof(Bf16BlockHeader)) + lane * 8; at < l.planes; at += kLanes * 8)
    *reinterpret_cast<uint2*>(packed + at) = make_uint2(0, 0);
  if (lane == 0) {
    *reinterpret_cast<Bf16PageHeader*>(packed) = Bf16PageHeader{units, uint32_t(l.blocks), 0};
    p.packed_bytes[blockIdx.x] = l.overflow + int64_t(units) * 16;
  }
}

// Bytes 2i, 2i+1 of a plane word, one a half.
__device__ __forceinline__ uint32_t spread_low(uint32_t x) { return __byte_perm(x, 0, 0x4140); }
__device__ __forceinline__ uint32_t spread_high(uint32_t x) { return __byte_perm(x, 0, 0x4342); }

// A pair of elements from its bytes and its exponents.
__device__ __forceinline__ uint32_t join(uint32_t bytes, uint32_t exponent) {
  return ((bytes & 0x80 * kPair) << 8) | (bytes & 0x7f * kPair) | exponent << 7;
}

// One lane's part of a block: 16 bytes of its plane, 8 of its codes.
struct Packed {
  uint4 plane;
  uint2 codes;
};

// Writes a block but for its escapes. `high`: this lane's high nibbles where the block is wide.
__device__ __forceinline__ void decode(const Packed& in, Bf16BlockHeader header, uint2 high, uint16_t* raw, int64_t at,
                                       int64_t elems) {
  const bool wide = header.count == Bf16BlockHeader::kWide;
  const uint32_t plane[4] = {in.plane.x, in.plane.y, in.plane.z, in.plane.w};
  const uint32_t codes[2] = {in.codes.x, in.codes.y}, highs[2] = {high.x, high.y};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = codes[h] >> (4 * i) & 0xf * kPair;
      uint32_t e;
      if (wide) {
        e = code | (highs[h] >> (4 * i) & 0xf * kPair) << 4;
      } else {
        const uint32_t nonzero = (code + 0xf * kPair) >> 4 & kPair;
        // An escape's exponent is base + 15, at most 255: nothing spills into the neighbour; patched afterwards.
        e = nonzero * header.base + code;
      }
      const uint32_t word = plane[2 * h + i / 2];
      out[i] = join(i % 2 == 0 ? spread_low(word) : spread_high(word), e);
    }
    const int64_t here = at + h * (kBlock / 2);
    if (here < elems) *reinterpret_cast<uint4*>(raw + here) = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

__device__ __forceinline__ Bf16BlockHeader header_of(uint2 x) { return {x.x, uint16_t(x.y), uint16_t(x.y >> 16)}; }

// The escapes of a run of blocks lie one after the other: word i of the run's overflow.
struct RunOverflow {
  const uint32_t* first;
  int words;
  const uint2* headers;  // of the run, in shared memory
  int blocks;

  __device__ RunOverflow(const uint8_t* packed, const Bf16PackLayout& l, const uint2* run_headers, int count)
      : headers(run_headers), blocks(count) {
    const Bf16BlockHeader head = header_of(headers[0]), last = header_of(headers[count - 1]);
    const int units = last.count == Bf16BlockHeader::kWide ? kCodeBytes / 16 : (last.count + 3) / 4;
    first = reinterpret_cast<const uint32_t*>(packed + l.overflow + int64_t(head.offset) * 16);
    words = (int(last.offset - head.offset) + units) * 4;
  }

  // The block that word i belongs to, -1 if it is no escape.
  __device__ __forceinline__ int owner(int i) const {
    int block = 0, start = 0;
#pragma unroll
    for (int u = 1; u < kRun; ++u) {
      const int at = u < blocks ? int(headers[u].x - headers[0].x) * 4 : INT32_MAX;
      if (at <= i) block = u, start = at;
    }
    const Bf16BlockHeader header = header_of(headers[block]);
    return header.count != Bf16BlockHeader::kWide && i - start < header.count ? block : -1;
  }
};

__global__ void __launch_bounds__(kLanes)
    unpack_pages(const __grid_constant__ Bf16PackParams p, const __grid_constant__ Bf16PackLayout l, uint32_t runs,
                 uint32_t total) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x;
  // Headers are fetched once for all warps: over a link, a request for 8 bytes costs as much as one for 64. Two sets,
  // used in turn: a set is written again only after a barrier that all reach when they have read it.
  __shared__ uint2 headers[2][kRun];
  int turn = 0;
  for (uint32_t run = blockIdx.x; run < total; run += gridDim.x, turn ^= 1) {
    const int64_t page = run / runs, b = int64_t(run % runs) * kRun;
    const int count = int(min(int64_t(kRun), l.blocks - b));
    const auto* packed = reinterpret_cast<const uint8_t*>(p.packed_pages[page]);
    if (lane < count) headers[turn][lane] = __ldcs(reinterpret_cast<const uint2*>(packed + l.headers) + b + lane);
    Packed in[kRun];
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      if (u >= count) break;
      in[u].plane = __ldcs(reinterpret_cast<const uint4*>(packed + l.planes + (b + u) * kBlock) + lane);
      in[u].codes = __ldcs(reinterpret_cast<const uint2*>(packed + l.codes + (b + u) * kCodeBytes) + lane);
    }
    __syncthreads();
    const RunOverflow overflow(packed, l, headers[turn], count);
    // Asked for before the blocks are decoded, put in place after.
    int owner = lane < overflow.words ? overflow.owner(lane) : -1;
    uint32_t entry = owner >= 0 ? __ldcs(overflow.first + lane) : 0;
    auto* raw = reinterpret_cast<uint16_t*>(p.raw_pages[page]);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      if (u >= count) break;
      const Bf16BlockHeader header = header_of(headers[turn][u]);
      uint2 high = make_uint2(0, 0);
      if (header.count == Bf16BlockHeader::kWide)
        high = __ldcs(reinterpret_cast<const uint2*>(packed + l.overflow + int64_t(header.offset) * 16) + lane);
      decode(in[u], header, high, raw, (b + u) * kBlock + lane * 8, p.elems);
    }
    if (overflow.words == 0) continue;  // the same for the whole block
    __syncthreads();                    // the escapes' places have been written, by other threads
    for (int i = lane;;) {
      if (owner >= 0) raw[(b + owner) * kBlock + (entry >> 16 & (kBlock - 1))] = uint16_t(entry);
      i += kLanes;
      if (i >= overflow.words) break;
      owner = overflow.owner(i);
      if (owner >= 0) entry = __ldcs(overflow.first + i);
    }
  }
}

void check(const char* op, const Bf16PackParams& p) {
  VC_CHECK(p.elems % 8 == 0, op, ": a page has ", p.elems, " elements; it must be a multiple of 8.");
}

}  // namespace

void bf16_pack(const Bf16PackParams& p, cudaStream_t stream) {
  check("bf16_pack", p);
  if (p.pages <= 0) return;
  LaunchShape shape;
  shape.grid = dim3(unsigned(p.pages));
  shape.block = dim3(kLanes);
  launch(pack_pages, shape, device_info(), stream, p, Bf16PackLayout::make(p.elems));
}

void bf16_unpack(const Bf16PackParams& p, cudaStream_t stream) {
  check("bf16_unpack", p);
  if (p.pages <= 0 || p.elems <= 0) return;
  const auto layout = Bf16PackLayout::make(p.elems);
  const int64_t total = layout.blocks * p.pages;
  VC_CHECK(total <= INT32_MAX, "bf16_unpack: ", p.pages, " pages of ", p.elems,
           " elements in one call; split the call.");
  const uint32_t runs = uint32_t((layout.blocks + kRun - 1) / kRun);
  const int64_t all_runs = int64_t(runs) * p.pages, most = p.max_blocks > 0 ? p.max_blocks : int64_t(1) << 30;
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::min(all_runs, most)));
  shape.block = dim3(kLanes);
  launch(unpack_pages, shape, device_info(), stream, p, layout, runs, uint32_t(all_runs));
}

}  // namespace vericache::cuda
