// SPDX-License-Identifier: Apache-2.0
// What one warp sums up over its tiles of a unit (request, up to 8 item rows, KV head), with mma m16n8k16.
//
// The operands are turned around: keys take the 16-wide side of the mma, item rows its 8-wide side, so the expensive
// operand, the codes, is built once: scores are s[key][row], outputs o[channel][row]; movmatrix turns the weights from
// one into the other. Codes enter as they are (quant_codes.cuh); scales belong to the other operand:
// - Keys: score = sum q' code + sum q zero, q' = q * scale, once a group of tokens; the second sum is the same for all
//   keys of a group and takes one mma a step for two groups.
// - Values: o = sum w' code + sum w zero, w' = w * scale, once a token and group of channels; the second sum has one
//   mma for 16 tokens, whose idle rows multiply ones: the sum of weights. The last code of a byte keeps the others of
//   it (get_open); deposit() takes off what they add.
//
// kPaired: up to four item rows, at 2 and 4 bits, use columns 4 .. 7 for the same rows over again, with other scales:
// - Keys: of the second group of tokens. So q' is built once for both groups, and of the scores of a block the columns
//   of its group count: lanes t < 2 weigh blocks 0 and 1, the others blocks 2 and 3, and give each other the weights.
// - Values: of the next group of channels. Eight units of 16 bits, which a row of ldmatrix gives the lanes, hold 64
//   channels at 2 bits: two groups of 32 in one mma. At 4 bits a group is such a row, and two rows share an operand.
//   Of each accumulator the half that belongs together is used.
// Unpaired, two groups in one mma have accumulators each.
//
// Lane (g, t) = (lane / 4, lane % 4). Of each 16-byte piece c of a key it has word t; of a value unit g. In a block of
// 16 tokens, slot s < 8 (row of the score tile, k index of the second product) is token 2s, slot 8 + s token 2s + 1.
//
// Weights are 2^(x - reference), raised by 2^kWeightShift; without that they are at most 2^kSlack (stale_maximum.cuh).
#pragma once

#include "element.cuh"
#include "mma.cuh"
#include "quant_tile.cuh"
#include "softmax_state.cuh"
#include "stale_maximum.cuh"

namespace vericache::cuda {

template <class Shape>
struct QuantState {
  using Codes = QuantCodes<Shape::kBits>;
  static constexpr int kUnit = Shape::kUnit, kChunks = Shape::kChunks, kChannels = Shape::kChunkChannels;
  static constexpr int kSets = kChannels == 2 * Shape::kGroup && !Shape::kPaired ? 2 : 1;
  static constexpr int kTiles = Shape::kHeadDim / 16;        // accumulator tiles of a set
  static constexpr int kQueryShift = Shape::kFp16 ? 0 : 60;  // q is raised by this power of two
  static constexpr int kWeightShift = Shape::kFp16 ? 4 : 64, kSlack = Shape::kFp16 ? 4 : 8;

  uint32_t q[kChunks * kUnit];                          // bf16, channels side by side, times 2^kQueryShift
  uint32_t q_half[Shape::kFp16 ? kChunks * kUnit : 1];  // the same in fp16
  float o[kSets][kTiles][4];                            // times powers of two, some with others added: see deposit()
  float sums[4];  // 0, 1: weights times zeros (V group g % 4; slots below 8 if g < 4, else the others); 2, 3: weights
  float reference[2];  // of columns 2t, 2t + 1; log2 units

  __device__ __forceinline__ static float power(int e) { return __uint_as_float(uint32_t(127 + e) << 23); }
  // bf16 pair times 2^(sign * place) of the codes in register j.
  template <int kSign>
  static __device__ __forceinline__ uint32_t placed(uint32_t pair, int j) {
    const int e = kSign * Codes::place(j);
    return e == 0 ? pair : multiply_bf16x2(pair, bf16_powers(e, e));
  }

  // q of the item row, of `items`, that this lane's column g stands for; null if there is none.
  static __device__ __forceinline__ const uint16_t* q_row(const QuantAttentionParams& p, int64_t query0, int first_item,
                                                          int items, int kv_head, int lane) {
    const int group = p.q_heads / p.kv_heads, i = first_item + lane / 4 % Shape::kItemRows;
    if (i >= items) return nullptr;
    return static_cast<const uint16_t*>(p.q) + (query0 + i / group) * p.q_stride_row +
           (kv_head * group + i % group) * p.q_stride_head;
  }
  // How many of the request's tokens from `before` on columns 2t, 2t + 1 see.
  static __device__ __forceinline__ void count_seen(int (&seen)[2], const QuantAttentionParams& p, int64_t query0,
                                                    int first_item, int items, int before, int lane) {
    const int group = p.q_heads / p.kv_heads;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first_item + (lane % 4 * 2 + r) % Shape::kItemRows;
      seen[r] = i < items ? p.row_position[query0 + i / group] + 1 - before : 0;
    }
  }

  // This lane's part of it: what other loads may follow before start() waits for it.
  struct Query {
    uint32_t words[kChunks][kUnit] = {};

    __device__ __forceinline__ Query(const uint16_t* q_row, int lane) {
      if (q_row != nullptr)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) load_words(words[c], q_row + c * kChannels + lane % 4 * (kChannels / 4));
    }
  };

  __device__ void start(const Query& query) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto& words = query.words[c];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if constexpr (Shape::kFp16) {
          q[c * kUnit + i] = words[i];
          q_half[c * kUnit + i] = half_from_bf16(words[i]);
        } else {
          q[c * kUnit + i] = multiply_bf16x2(words[i], bf16_powers(kQueryShift, kQueryShift));
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[set][n][e] = 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] = 0.f;
    reference[0] = reference[1] = negative_infinity();
  }

  // Weights of scores s * factor + bias (log2 units; bias by block and column) as B fragments, bf16 or fp16.
  template <bool kHalf, int kBlocks>
  __device__ __forceinline__ void weigh(const float (&s)[kBlocks][4], float factor, const float (&bias)[kBlocks][2],
                                        uint32_t (&weights)[kBlocks][2]) {
    const auto pack = [](float a, float b) { return kHalf ? pack_half(a, b) : pack_bf16(a, b); };
    uint32_t packed[kBlocks][2];
    const auto compute = [&](const float (&from)[2]) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          w[e] = fast_exp2(fmaf(s[b][e], factor, bias[b][e % 2] - (from[e % 2] - kWeightShift)));
        packed[b][0] = pack(w[0], w[1]);
        packed[b][1] = pack(w[2], w[3]);
      }
    };
    const auto largest = [&](int r) {
      float x = negative_infinity();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        x = fmaxf(x, fmaxf(fmaf(s[b][r], factor, bias[b][r]), fmaf(s[b][r + 2], factor, bias[b][r])));
      return x;
    };
    const auto rescale = [&](const float (&by)[2]) {
#pragma unroll
      for (int set = 0; set < kSets; ++set)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[set][n][e] *= by[e % 2];
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] *= by[e % 2];
    };
    weigh_against_stale<kHalf, kWeightShift + kSlack, Shape::kPaired ? 2 : 4>(reference, packed, compute, largest,
                                                                              rescale);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[b][half] = movmatrix_trans(packed[b][half]);
  }

  // The codes of a block of 16 tokens, 16-byte pieces c and c + 1 (only c if a token has but one): [piece][slots below
  // 8, from 8 on]. `codes`: shared address. kTrans: values.
  static constexpr int kPieces = kChunks > 1 ? 2 : 1;
  // The groups of channels that share an operand lie in two pieces, not in one.
  static constexpr bool kPairsPieces = Shape::kPaired && kChannels == Shape::kGroup;
  static_assert(!kPairsPieces || kPieces == 2);
  template <bool kTrans>
  static __device__ __forceinline__ void load_codes(uint32_t (&words)[kPieces][2], uint32_t codes, int block, int c,
                                                    int lane) {
    const int token = lane % 8 * 2 + lane / 8 % 2;  // of the block
    const uint32_t first = codes + Shape::place_of(token * Shape::kCodeRow + lane / 16 % kPieces * 16);
    const uint32_t at = Shape::place_after(first, block * 16 * Shape::kCodeRow + c * 16);
    if constexpr (kPieces == 2) {
      uint32_t r[4];
      kTrans ? ldmatrix_x4_trans(r, at) : ldmatrix_x4(r, at);
      words[0][0] = r[0], words[0][1] = r[1], words[1][0] = r[2], words[1][1] = r[3];
    } else {
      kTrans ? ldmatrix_x2_trans(words[0], at) : ldmatrix_x2(words[0], at);
    }
  }

  // The words of the other planes of 5 to 7 bits for the same block of tokens: [piece][slots], [slots].
  struct FineCodes {
    static constexpr int kPieces = Shape::kHeadDim / 64;  // of the 2-bit plane
    uint32_t middle[kPieces][2], low[2];
  };
  template <bool kTrans>
  static __device__ __forceinline__ void load_fine(FineCodes& fine, uint32_t codes, int block, int lane) {
    if constexpr (Shape::kPlanar) {
      const int token = block * 16 + lane % 8 * 2 + lane / 8 % 2;
      if constexpr ((Shape::kBits & 2) != 0) {
        constexpr int kPieces = FineCodes::kPieces;
        const uint32_t at =
            codes + Shape::plane_begin(2) + Shape::place_of((token * kPieces + lane / 16 % kPieces) * 16);
        if constexpr (kPieces == 2) {
          uint32_t r[4];
          kTrans ? ldmatrix_x4_trans(r, at) : ldmatrix_x4(r, at);
#pragma unroll
          for (int i = 0; i < 4; ++i) fine.middle[i / 2][i % 2] = r[i];
        } else {
          kTrans ? ldmatrix_x2_trans(fine.middle[0], at) : ldmatrix_x2(fine.middle[0], at);
        }
      }
      if constexpr ((Shape::kBits & 1) != 0) {
        static_assert(Shape::kHeadDim == 128, "a token's row of the 1-bit plane is one row of ldmatrix");
        const uint32_t at = codes + Shape::plane_begin(1) + Shape::place_of(token * 16);
        kTrans ? ldmatrix_x2_trans(fine.low, at) : ldmatrix_x2(fine.low, at);
      }
    }
  }
  // Register j of a word of 16-byte piece `chunk`; half: slots below 8 or from 8 on. kOpen: as get_open gives it.
  template <bool kOpen>
  static __device__ __forceinline__ uint32_t code(uint32_t word, const FineCodes& fine, int chunk, int half, int j) {
    if constexpr (Shape::kPlanar) {
      constexpr int kPieces = FineCodes::kPieces;
      const uint32_t middle = (Shape::kBits & 2) != 0 ? fine.middle[chunk % kPieces][half] : 0u;
      const uint32_t low = (Shape::kBits & 1) != 0 ? fine.low[half] : 0u;
      return Codes::get(word, middle, chunk / kPieces, low, chunk, j);
    } else {
      return kOpen ? Codes::get_open(word, j) : Codes::get(word, j);
    }
  }

  // Four of a lane's words of a key (or of a group's zeros), those that go with q[n] .. q[n + 3]; `from`: its first.
  static __device__ __forceinline__ void load_four(uint32_t (&to)[4], const unsigned char* from, int n) {
    constexpr int kWide = std::min(kUnit, 4);
#pragma unroll
    for (int i = 0; i < 4; i += kWide) {
      uint32_t words[kWide];
      load_words(words, from + ((n + i) / kUnit * kChannels + (n + i) % kUnit * 2) * 2);
#pragma unroll
      for (int k = 0; k < kWide; ++k) to[i + k] = words[k];
    }
  }

  // For columns 2t and 2t + 1, q times zeros of each group of a tile's tokens, or of theirs if kPaired. Rows of the
  // operand are groups: those of lanes below 16 the first, of the others the last. Four words of zeros side by side, as
  // they are loaded, are an operand whose rows below 8 have words 0 and 2 and whose others 1 and 3; either half counts
  // beside what of q belongs to it.
  static constexpr int kGroups = Shape::kKeyGroups;
  template <int kSums>
  __device__ __forceinline__ void sum_zeros(float (&sums_of)[kSums][2], const unsigned char* tile, int lane) {
    const auto* from =
        tile + Shape::kZero + (lane / 16 * (kGroups - 1) * Shape::kHeadDim + lane % 4 * (kChannels / 4)) * 2;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int n = 0; n < kChunks * kUnit; n += 4) {
      uint32_t zero[4];
      load_four(zero, from, n);
      mma_m16n8k16(even, zero, q[n], q[n + 2]);
      mma_m16n8k16(odd, zero, q[n + 1], q[n + 3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = even[r] + odd[r + 2];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int group = Shape::kPaired ? lane % 4 / 2 : i;
        sums_of[i][r] = kGroups == 1 ? sum : __shfl_sync(0xffffffffu, sum, group * 16 + lane % 4);
      }
    }
  }

  // A tile's keys to weights. `tile`, `address`: the place of its keys, below of its values, in shared memory.
  __device__ __forceinline__ void keys(const unsigned char* tile, uint32_t address, float c, int lane,
                                       uint32_t (&weights)[4][2]) {
    const int t = lane % 4;
    constexpr int kOperands = Shape::kPaired ? 1 : kGroups, kBlocks = 4 / kOperands;  // blocks: of an operand q'
    float s[4][4] = {};
    float zero_sums[kOperands][2];
    sum_zeros(zero_sums, tile, lane);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kPieces) {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        const int group = Shape::kPaired ? lane / 16 : operand;
        uint32_t scaled[kPieces][kUnit];  // q' * 2^-place, paired as codes are
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          uint32_t scale[kUnit];
          load_words(scale, tile + Shape::kScale +
                                (group * Shape::kHeadDim + (chunk + piece) * kChannels + t * (kChannels / 4)) * 2);
#pragma unroll
          for (int i = 0; i < kUnit; ++i)
            scale[i] = Shape::kFp16 ? multiply_half2(half_from_bf16(scale[i]),
                                                     q_half[Shape::kFp16 ? (chunk + piece) * kUnit + i : 0])
                                    : multiply_bf16x2(scale[i], q[(chunk + piece) * kUnit + i]);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) scaled[piece][j] = placed<-1>(pair_halves<kUnit>(scale, j), j);
        }
#pragma unroll
        for (int b = operand * kBlocks; b < (operand + 1) * kBlocks; ++b) {
          uint32_t words[kPieces][2];
          FineCodes fine;
          load_codes<false>(words, address, b, chunk, lane);
          load_fine<false>(fine, address, b, lane);
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
            for (int j = 0; j < kUnit; j += 2)
              multiply(s[b],
                       {code<false>(words[piece][0], fine, chunk + piece, 0, j),
                        code<false>(words[piece][1], fine, chunk + piece, 1, j),
                        code<false>(words[piece][0], fine, chunk + piece, 0, j + 1),
                        code<false>(words[piece][1], fine, chunk + piece, 1, j + 1)},
                       scaled[piece][j], scaled[piece][j + 1]);
        }
      }
    }
    const float factor = c * power(Codes::kExponent - kQueryShift), zero_factor = c * power(-kQueryShift);
    if constexpr (Shape::kPaired) {
      float own[2][4], bias[2][2];
      uint32_t packed[2][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e) own[b][e] = t < 2 ? s[b][e] : s[b + 2][e];
#pragma unroll
        for (int r = 0; r < 2; ++r) bias[b][r] = zero_sums[0][r] * zero_factor;
      }
      weigh<Shape::kFp16>(own, factor, bias, packed);
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          weights[b][half] = __shfl_sync(0xffffffffu, packed[b % 2][half], b / 2 * 16 + lane % 16);
    } else {
      float bias[4][2];
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) bias[b][r] = zero_sums[b / kBlocks][r] * zero_factor;
      weigh<Shape::kFp16>(s, factor, bias, weights);
    }
  }

  __device__ __forceinline__ void values(const unsigned char* tile, uint32_t address, int lane,
                                         const uint32_t (&weights)[4][2]) {
    constexpr int kRowGroups = Shape::kRowGroups;
    const int g = lane / 4, t = lane % 4;
    uint32_t zero[4];  // of V group g % 4, by block: two tokens, of the slots below 8 if g < 4, else of the others
    if constexpr (kRowGroups == 4) {
      ldmatrix_x4_trans(zero, address + Shape::kZero + lane * 16);
    } else {
      const auto* from =
          reinterpret_cast<const uint16_t*>(tile + Shape::kZero) + (t * 4 + g / 4) * kRowGroups + g % kRowGroups;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        zero[b] = uint32_t(from[b * 16 * kRowGroups]) | uint32_t(from[(b * 16 + 2) * kRowGroups]) << 16;
    }
    if constexpr (Shape::kFp16)
#pragma unroll
      for (int b = 0; b < 4; ++b) zero[b] = half_from_bf16(zero[b]);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      constexpr uint32_t kOnes = Shape::kFp16 ? 0x3c003c00u : 0x3f803f80u;
      multiply(sums, {g < 4 ? zero[b] : 0u, kOnes, g < 4 ? 0u : zero[b], kOnes}, weights[b][0], weights[b][1]);
      FineCodes fine;
      load_fine<true>(fine, address, b, lane);
      uint32_t scales[2 * kRowGroups];  // of tokens 4t .. 4t + 3
      load_words(scales, tile + Shape::kScale + (b * 16 + t * 4) * kRowGroups * 2);
      const auto scaled = [&](int group, bool odd, int half) {  // weights times scales of V group `group` + odd
        uint32_t pair;
        if constexpr (kRowGroups == 4)
          pair = pair_elements(scales[half * 2 + group / 2], scales[(half + 2) * 2 + group / 2], group % 2 || odd);
        else if constexpr (kRowGroups == 2)
          pair = pair_elements(scales[half], scales[half + 2], group % 2 || odd);
        else
          pair = pair_elements(scales[0], scales[1], half);
        return Shape::kFp16 ? multiply_half2(half_from_bf16(pair), weights[b][half])
                            : multiply_bf16x2(pair, weights[b][half]);
      };
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kPieces) {
        uint32_t words[kPieces][2];
        load_codes<true>(words, address, b, chunk, lane);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const int group = (chunk + (kPairsPieces ? 0 : piece)) * kChannels / Shape::kGroup;
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            const bool odd = Shape::kPaired ? g >= 4 : set == 1;
            const uint32_t b0 = scaled(group, odd, 0), b1 = scaled(group, odd, 1);
#pragma unroll
            for (int j = 0; j < kUnit; j += 2)
              multiply(o[set][((chunk + piece) * kUnit + j) / 2],
                       {code<true>(words[piece][0], fine, chunk + piece, 0, j),
                        code<true>(words[piece][0], fine, chunk + piece, 0, j + 1),
                        code<true>(words[piece][1], fine, chunk + piece, 1, j),
                        code<true>(words[piece][1], fine, chunk + piece, 1, j + 1)},
                       b0, b1);
          }
        }
      }
    }
  }

  // A tile of the tail: its first `valid` tokens were written, columns 2t, 2t + 1 see the first seen[0], seen[1].
  __device__ __forceinline__ void tail(const unsigned char* keys, const unsigned char* values, float c, int lane,
                                       int valid, const int (&seen)[2]) {
    constexpr int kTokens = Shape::kTailTokens, kRow = Shape::kTailRow;
    const int g = lane / 4, t = lane % 4;
    float s[1][4] = {};
#pragma unroll
    for (int n = 0; n < kChunks * kUnit; n += 4) {
      uint32_t k[2][4] = {};
#pragma unroll
      for (int half = 0; half < kTokens / 8; ++half)
        load_four(k[half], keys + (g + half * 8) * kRow + t * (kChannels / 4) * 2, n);
#pragma unroll
      for (int i = 0; i < 2; ++i)  // q's words in the pairs of sum_zeros: a pair lies in registers side by side
        mma_m16n8k16(s[0], {k[0][i], k[1][i], k[0][i + 2], k[1][i + 2]}, q[n + i], q[n + i + 2]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (g + e / 2 * 8 >= seen[e % 2] || e / 2 * 8 >= kTokens) s[0][e] = negative_infinity();
    const float bias[1][2] = {{0.f, 0.f}};
    uint32_t weights[1][2];
    weigh<false>(s, c * power(-kQueryShift), bias, weights);
    constexpr uint32_t kOnes = 0x3f803f80u;
    mma_m16n8k16(sums, {0u, kOnes, 0u, kOnes}, weights[0][0], weights[0][1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // in two steps: 2^-133 is no normal number
      constexpr int kFirst = Codes::kExponent / 2, kSecond = Codes::kExponent - kFirst;
      weights[0][half] = multiply_bf16x2(weights[0][half], bf16_powers(-kFirst, -kFirst));
      weights[0][half] = multiply_bf16x2(weights[0][half], bf16_powers(-kSecond, -kSecond));
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t v[4][kUnit / 2] = {};  // tokens 2t, 2t + 1, 8 + 2t, 9 + 2t
#pragma unroll
      for (int i = 0; i < 2 * (kTokens / 8); ++i) {
        const int token = t * 2 + i % 2 + i / 2 * 8;
        if (token < valid) load_words(v[i], values + token * kRow + (chunk * kChannels + g * kUnit) * 2);
      }
      const auto element = [&](int half, int j) {
        const uint32_t pair = pair_elements(v[half * 2][j / 2], v[half * 2 + 1][j / 2], j % 2);
        return placed<1>(pair, j);
      };
#pragma unroll
      for (int j = 0; j < kUnit; j += 2)
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          auto& sum = o[set][(chunk * kUnit + j) / 2];
          mma_m16n8k16(sum, {element(0, j), element(0, j + 1), element(1, j), element(1, j + 1)}, weights[0][0],
                       weights[0][1]);
#pragma unroll
          for (int k = Codes::open_first(j + 1); k < j + 1; ++k)
            mma_m16n8k16(sum, {0u, element(0, k), 0u, element(1, k)}, weights[0][0], weights[0][1]);
        }
    }
  }

  // Leaves the state in shared memory: to_o [kItemRows][head_dim] float, to_ml [kItemRows] (reference, sum of weights).
  __device__ void deposit(float* to_o, float2* to_ml, int lane) const {
    const int g = lane / 4, t = lane % 4;
    float zeros[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) zeros[r] = sums[r] + __shfl_xor_sync(0xffffffffu, sums[r], 16);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const bool mine = !Shape::kPaired || (kPairsPieces ? chunk % 2 : g / 4) == t / 2;
      const int group = chunk * kChannels / Shape::kGroup + (kChannels == 2 * Shape::kGroup ? g / 4 : 0);
      float z[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) z[r] = __shfl_sync(0xffffffffu, zeros[r], group * 4 + t) * power(-kWeightShift);
#pragma unroll
      for (int j = 0; j < kUnit; j += 2) {
        const float f0 = power(Codes::kExponent - kWeightShift - Codes::place(j));
        const float f1 = power(Codes::kExponent - kWeightShift - Codes::place(j + 1));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto at = [&](int j) {
            const int n = (chunk * kUnit + j) / 2, e = j % 2 * 2 + r;
            return kSets == 2 && g >= 4 ? o[kSets - 1][n][e] : o[0][n][e];
          };
          const float o0 = at(j);
          float o1 = at(j + 1);
#pragma unroll
          for (int k = Codes::open_first(j + 1); k < j + 1; ++k) o1 -= at(k);
          if (mine)
            *reinterpret_cast<float2*>(to_o + (2 * t + r) % Shape::kItemRows * Shape::kHeadDim + chunk * kChannels +
                                       g * kUnit + j) = make_float2(fmaf(o0, f0, z[r]), fmaf(o1, f1, z[r]));
        }
      }
    }
    if (g == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        to_ml[(2 * t + r) % Shape::kItemRows] = make_float2(reference[r], sums[2 + r] * power(-kWeightShift));
  }

 private:
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (Shape::kFp16)
      mma_m16n8k16_half(c, a, b0, b1);
    else
      mma_m16n8k16(c, a, b0, b1);
  }
};

}  // namespace vericache::cuda
