// SPDX-License-Identifier: Apache-2.0
// Parameter structs: the contract between the bindings and the kernels.
//
// One plain struct a kernel, used alike by the CPU functions (csrc/cpu) and the CUDA launchers (csrc/kernels): the
// binding checks shapes and fills one, the callee trusts it. Every pointer names its shape and element type and says
// whether it may be null; the last axis is always contiguous; strides are int64, in elements, named by tensor and axis.
// `T` is the storage type, float32 or bfloat16, given by `dtype`. Accumulation is float32 everywhere.
//
// Pages. A full page holds `page_size` whole tokens of one layer of one request, K then V:
//     [2, kv_heads, page_size, head_dim] T, contiguous; the token at absolute position p is in page p / page_size,
//     slot p % page_size.
// A head page holds `page_size` rows of one KV head, in an order of its owner's choosing: [2, page_size, head_dim] T.
// A quantized page replaces one full page; its byte layout is QuantPageLayout below.
// Tables hold raw page addresses as int64 in the address space of the device that runs the kernel, so resident pages,
// staging slots and the tail look alike. All page addresses are 128-byte aligned.
//
// Rows. Query rows of one request are consecutive: request r owns rows row_offsets[r] .. row_offsets[r+1]-1. Rows
// past row_offsets[requests] are idle: their outputs are written as zeros.
#pragma once

#include <cstdint>

namespace vericache {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Full/verify attention (R1): keys are split at fixed absolute multiples, partial softmax states merged left to right;
// a row's bits depend on its q, its position and the K/V bytes only.
struct PagedAttentionParams {
  const void* q;                // [rows, q_heads, head_dim] T
  void* out;                    // [rows, q_heads, head_dim] T, contiguous
  const int64_t* page_table;    // [requests, max_pages] int64, full pages; entries past a request's last page unread
  const int32_t* row_offsets;   // [requests + 1] int32
  const int32_t* row_position;  // [rows] int32, absolute; the row attends to keys 0 .. position (last `window` of them)
  void* workspace;              // device scratch, null on the CPU; size from the launcher's *_workspace_bytes
  int64_t q_stride_row, q_stride_head;
  int64_t table_stride_request;
  int32_t rows, requests, q_heads, kv_heads, head_dim, page_size, max_pages;
  int32_t window;  // 0: none; w: keys position-w+1 .. position
  float scale;
  DType dtype;
  // CUDA only, and only for speed: no launch of this library still running or queued on the stream writes tables,
  // lengths, offsets or positions, so reading them may overlap the end of those before. False is always right.
  bool tables_settled = false;
  // The same for K and V at positions below a request's lowest row.
  bool cache_settled = false;
};

// Draft attention over kept tokens (free of R1): per-head compact head pages, then the full-precision tail.
struct KeptAttentionParams {
  const void* q;                // [rows, q_heads, head_dim] T
  void* out;                    // [rows, q_heads, head_dim] T, contiguous
  const int64_t* kept_table;    // [requests, kv_heads, max_kept_pages] int64, head pages
  const int32_t* kept_len;      // [requests, kv_heads] int32, kept rows of each head (0 allowed)
  const int64_t* tail_table;    // [requests, max_tail_pages] int64, full pages; entry 0 holds position tail_start
  const int32_t* tail_start;    // [requests] int32, a multiple of page_size
  const int32_t* row_offsets;   // [requests + 1] int32
  const int32_t* row_position;  // [rows] int32; the row attends to all kept rows and to tail_start .. position
  void* workspace;              // as above
  int64_t q_stride_row, q_stride_head;
  int64_t kept_stride_request, kept_stride_head, tail_stride_request;
  int32_t rows, requests, q_heads, kv_heads, head_dim, page_size, max_kept_pages, max_tail_pages;
  float scale;
  DType dtype;
  bool tables_settled = false;  // as above
  bool cache_settled = false;   // the same for kept rows
  bool as_full = false;         // paged_attention's bits are wanted: where no head has dropped a token and tails begin
                                // at multiples of 64
};

// Draft attention over a quantized cache (free of R1): quantized pages for positions 0 .. quant_len-1, then the tail.
struct QuantAttentionParams {
  const void* q;                // [rows, q_heads, head_dim] T
  void* out;                    // [rows, q_heads, head_dim] T, contiguous
  const int64_t* quant_table;   // [requests, max_quant_pages] int64, quantized pages
  const int32_t* quant_len;     // [requests] int32, a multiple of page_size, equal to tail_start
  const int64_t* tail_table;    // [requests, max_tail_pages] int64, full pages; entry 0 holds position quant_len
  const int32_t* row_offsets;   // [requests + 1] int32
  const int32_t* row_position;  // [rows] int32
  void* workspace;
  int64_t q_stride_row, q_stride_head;
  int64_t quant_stride_request, tail_stride_request;
  int32_t rows, requests, q_heads, kv_heads, head_dim, page_size, max_quant_pages, max_tail_pages;
  int32_t bits;   // 2 or 4 to 8
  int32_t group;  // tokens a K group, channels a V group; divides page_size and head_dim
  float scale;
  DType dtype;
  bool tables_settled = false;  // as above
  bool cache_settled = false;   // the same for quantized pages
};

// Byte layout of a quantized page (KIVI, arXiv 2402.02750: keys per channel, values per token). kv_heads head blobs in
// a row, each: k_codes | k_scale | k_zero | v_codes | v_scale | v_zero.
//   codes  2, 4 and 8 bits: [page_size, head_dim * bits / 8] uint8; element d of a row is in byte d*bits/8, least
//          significant bits first. 5, 6 and 7 bits: planes of 4, 2 and 1 bits (code_planes.h), as many bytes in all
//   k_scale, k_zero [page_size / group, head_dim] T;  v_scale, v_zero [page_size, head_dim / group] T
//   x ~= code * scale + zero, scale = (max - min) / (2^bits - 1), zero = min (a float)
struct QuantPageLayout {
  int64_t code_bytes, k_param_bytes, v_param_bytes;  // one codes block; one of k_scale/k_zero; one of v_scale/v_zero
  int64_t head_bytes, page_bytes;

  static constexpr QuantPageLayout make(int kv_heads, int page_size, int head_dim, int bits, int group, int elem) {
    QuantPageLayout l{};
    l.code_bytes = int64_t(page_size) * head_dim * bits / 8;
    l.k_param_bytes = int64_t(page_size / group) * head_dim * elem;
    l.v_param_bytes = int64_t(page_size) * (head_dim / group) * elem;
    l.head_bytes = 2 * (l.code_bytes + l.k_param_bytes + l.v_param_bytes);
    l.page_bytes = l.head_bytes * kv_heads;
    return l;
  }
};

// out = x @ w^T (+ bias) (+ residual), one rounding at the end. R1: the order of the K sum depends on (N, K) alone.
// With swiglu, w holds n / 2 rows for the gate, then n / 2 for up, and out = silu(gate) * up of the product (with its
// bias) rounded to T: the bits of silu_mul over the plain product.
struct LinearParams {
  const void* x;         // [rows, k] T
  const void* w;         // [n, k] T, contiguous
  const void* bias;      // [n] T, or null
  const void* residual;  // [rows, n] T, or null; may alias out; null with swiglu
  void* out;             // [rows, n] T, or float32 if out_float32; [rows, n / 2] T, contiguous, with swiglu
  void* workspace;       // null on the CPU
  int64_t x_stride_row, residual_stride_row, out_stride_row;
  int32_t rows, n, k;
  bool out_float32;
  DType dtype;
  bool swiglu = false;  // then n is even and out_float32 false
  // CUDA only, and only for speed: nothing that still runs or waits on the stream writes w, so that reading it may
  // overlap the launches before this one. False is always right.
  bool w_settled = false;
};

// residual_out = x (+ residual), rounded to T; out = residual_out / rms(residual_out) * weight.
struct RmsNormParams {
  const void* x;         // [rows, dim] T
  const void* residual;  // [rows, dim] T, or null
  const void* weight;    // [dim] T
  void* out;             // [rows, dim] T, contiguous
  void* residual_out;    // [rows, dim] T, contiguous; null if residual is null
  int64_t x_stride_row, residual_stride_row;
  int32_t rows, dim;
  float eps;
  DType dtype;
};

// Per-head QK-norm (optional), rotary embedding (half-split), and the write of K and V into their page.
struct RopeWriteParams {
  const void* qkv;              // [rows, (q_heads + 2 * kv_heads) * head_dim] T: all q heads, all k heads, all v heads
  const void* q_norm;           // [head_dim] T, or null
  const void* k_norm;           // [head_dim] T, or null
  const float* cos;             // [max_positions, head_dim / 2] float32
  const float* sin;             // [max_positions, head_dim / 2] float32
  const int32_t* row_position;  // [rows] int32
  const int64_t* row_page;      // [rows] int64, full page that holds row_position; 0: K and V are not written
  void* q_out;                  // [rows, q_heads, head_dim] T, contiguous
  int64_t qkv_stride_row;
  int32_t rows, q_heads, kv_heads, head_dim, page_size;
  float eps;
  DType dtype;
};

// rope_write of the product x @ w^T (+ bias), rounded to T between the two: the bits of linear, then rope_write. n is
// (q_heads + 2 * kv_heads) * head_dim. What the two hold in common must agree: rows and dtype.
struct LinearRopeWriteParams {
  LinearParams product;  // no residual, no swiglu, T out; `out`, its stride and `workspace` are not used
  RopeWriteParams rope;  // `qkv` and its stride are not used
  void* workspace;       // null on the CPU
};

// out = silu(gate) * up
struct SiluMulParams {
  const void* gate_up;  // [rows, 2 * dim] T: gate, then up
  void* out;            // [rows, dim] T, contiguous
  int64_t gate_up_stride_row;
  int32_t rows, dim;
  DType dtype;
};

// R4: token = argmax(filter(logits / temperature) + gumbel(seed, position)); ties go to the lowest index.
// temperature == 0, or so small that the largest quotient overflows: argmax(logits), no filter, no noise. Filters in
// this order: top_k, top_p, min_p.
// Filters keep by the total order (value descending, index ascending): top_k the first k; top_p, on the softmax of what
// is left, the shortest run whose sum reaches top_p (at least one token); min_p those with probability >= min_p times
// the largest.
// Noise for vocabulary entry i: Philox4x32-10, key = seed (low, high word), counter = (i / 4, position, 0, 0), lane
// i % 4; u = ((x >> 8) + 0.5) * 2^-24; g = -log(-log(u)). u has 25 significant bits: take u and both logarithms in
// float64 and round g to float32 at the end, for in float32 the largest u would be 1 and its noise infinite. The
// quotient logits / temperature and its sum with g are float32.
struct SampleParams {
  const float* logits;          // [rows, vocab] float32
  const float* temperature;     // [rows] float32, >= 0
  const int32_t* top_k;         // [rows] int32, 0: off
  const float* top_p;           // [rows] float32, 1: off
  const float* min_p;           // [rows] float32, 0: off
  const int64_t* seed;          // [rows] int64
  const int32_t* row_position;  // [rows] int32, absolute position of the token being drawn
  int64_t* token;               // [rows] int64; -1 if the row has no softmax: a NaN, a +infinity, or -infinity alone
  float* logprob;               // [rows] float32, log-softmax of the raw logits at the token; NaN with token -1
  void* workspace;
  int64_t logits_stride_row;
  int32_t rows, vocab;
};

// What a prompt's last `window` queries attend to: out[h, t] is the mean over the window of the causal softmax of
// scale * q . k. Query w is at position tokens - window + w; a key in a query's future counts as 0.
struct WindowScoresParams {
  const void* queries;  // [window, q_heads, head_dim] T, rotated
  const void* k;        // [kv_heads, tokens, head_dim] T, rotated
  float* out;           // [q_heads, tokens] float32, contiguous
  void* workspace;      // null on the CPU
  int64_t q_stride_row, q_stride_head, k_stride_head, k_stride_token;
  int32_t window, tokens;  // 1 <= window <= tokens
  int32_t q_heads, kv_heads, head_dim;
  float scale;  // above 0
  DType dtype;
};

// Full pages <-> quantized pages, page by page.
struct QuantizeParams {
  const int64_t* full_pages;   // [pages] int64, full pages (read by quantize, written by dequantize)
  const int64_t* quant_pages;  // [pages] int64, quantized pages (written by quantize, read by dequantize)
  int32_t pages, kv_heads, head_dim, page_size, bits, group;
  DType dtype;
};

// Rows of head pages <-> full pages. gather: head page row i of head h := full-cache row positions[h, i].
// scatter: the reverse. One request, one layer.
struct TokenMoveParams {
  const int64_t* page_table;  // [max_pages] int64, full pages
  const int64_t* head_table;  // [kv_heads, max_head_pages] int64, head pages
  const int32_t* positions;   // [kv_heads, capacity] int32, absolute positions
  const int32_t* counts;      // [kv_heads] int32, rows of each head
  int64_t head_stride, positions_stride;
  int32_t kv_heads, head_dim, page_size, capacity, max_pages, max_head_pages;
  DType dtype;
};

// Lossless packing of bfloat16 pages: 16 bits become about 12. Blocks of 2048 elements; in each, sign and mantissa lie
// in one plane of bytes and the exponent is a 4-bit code: 0 for exponent 0, 1 .. 14 for base + code, 15 for an escape.
// Element e of a block is element 8 * (e / 1024) + e % 8 of the 16 of lane e % 1024 / 8 (128 lanes).
//
// A packed page: Bf16PageHeader | headers [blocks] Bf16BlockHeader, zeros up to a multiple of 128 bytes | planes
// [blocks, 128 lanes, 16] uint8, sign << 7 | mantissa | codes [blocks, 128 lanes, 2] uint32, element j of half h in
// bits 4 * (j / 2) + 16 * (j % 2) of word h | overflow. All but the last have a fixed size. A block's overflow, in
// 16-byte units, is either its escapes, [count] uint32 of (position in the block) << 16 | (all 16 bits of the element),
// lane after lane, padded with zeros; or, if they are more than 256, the high nibbles of all exponents in the layout of
// the codes, which then hold the low ones.
struct Bf16PageHeader {
  uint32_t overflow_units;  // in use
  uint32_t blocks;
  uint64_t reserved;  // zero
};
struct Bf16BlockHeader {
  uint32_t offset;  // of its overflow, in units
  uint16_t count;   // escapes; kWide: high nibbles instead
  uint16_t base;

  static constexpr uint16_t kWide = 0xffff;
};
struct Bf16PackLayout {
  static constexpr int kBlock = 2048, kLanes = 128, kMaxEscapes = 256, kRetryEscapes = 64;
  static constexpr int kAlign = 128;                 // of planes and codes: what a read over the link asks for at once
  int64_t blocks, headers, planes, codes, overflow;  // count; byte offsets
  int64_t max_bytes;                                 // if every block overflows

  static constexpr Bf16PackLayout make(int64_t elems) {
    Bf16PackLayout l{};
    l.blocks = (elems + kBlock - 1) / kBlock;
    l.headers = int64_t(sizeof(Bf16PageHeader));
    l.planes = (l.headers + l.blocks * int64_t(sizeof(Bf16BlockHeader)) + kAlign - 1) / kAlign * kAlign;
    l.codes = l.planes + l.blocks * kBlock;
    l.overflow = l.codes + l.blocks * kBlock / 2;
    l.max_bytes = l.overflow + l.blocks * kBlock / 2;
    return l;
  }
};

// Raw pages <-> packed pages. Both are 16-byte aligned; packed pages may lie in pinned host memory.
struct Bf16PackParams {
  const int64_t* raw_pages;     // [pages] int64, [elems] bfloat16 each
  const int64_t* packed_pages;  // [pages] int64, Bf16PackLayout::make(elems).max_bytes of room each to pack into
  int64_t* packed_bytes;        // [pages] int64, written by pack: bytes in use; unused by unpack
  int64_t elems;                // a multiple of 8
  int32_t pages;
  int32_t max_blocks;  // CUDA unpack: thread blocks at most, to leave room beside it; 0: fill the device
};

}  // namespace vericache
