// SPDX-License-Identifier: Apache-2.0
// Pages go to threads whole; within one, the blocks' overflow follows in order, so the bytes are always the same.
#include "cpu/bf16_codec.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/error.h"
#include "cpu/parallel.h"

namespace vericache::cpu {
namespace {

constexpr int kBlock = Bf16PackLayout::kBlock, kLanes = Bf16PackLayout::kLanes, kEach = kBlock / kLanes;
constexpr int kWindow = 14, kEscape = 15, kCodeBytes = kBlock / 2;

// Where element j of a lane's 16 lies in the block.
int position_of(int lane, int j) { return j / 8 * (kBlock / 2) + lane * 8 + j % 8; }

int exponent(uint16_t x) { return x >> 7 & 0xff; }

// Word and shift of element j's code.
struct CodePlace {
  int word, shift;
};
CodePlace code_place(int lane, int j) { return {2 * lane + j / 8, 4 * (j % 8 / 2) + 16 * (j % 2)}; }

using Block = std::array<uint16_t, kBlock>;
using Codes = std::array<uint32_t, kBlock / 8>;
using Escapes = std::array<uint32_t, Bf16PackLayout::kMaxEscapes>;

// The window just under the largest exponent.
int base_from_top(const Block& x) {
  int top = 0;
  for (const uint16_t v : x)
    if (exponent(v) < 255) top = std::max(top, exponent(v));
  return std::max(0, top - kWindow);
}

// The base whose window holds the most elements, the highest of several.
int best_window(const Block& x) {
  std::array<int, 256> histogram{};
  for (const uint16_t v : x) ++histogram[size_t(exponent(v))];
  int best = 0, most = -1;
  for (int base = 0; base <= 254 - kWindow; ++base) {
    int held = 0;
    for (int e = base + 1; e <= base + kWindow; ++e) held += histogram[size_t(e)];
    if (held >= most) most = held, best = base;
  }
  return best;
}

// Returns the number of escapes; those past kMaxEscapes are only counted.
int encode(const Block& x, int base, Codes& codes, Escapes& escapes) {
  int count = 0;
  codes.fill(0);
  escapes.fill(0);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int j = 0; j < kEach; ++j) {
      const int position = position_of(lane, j);
      const uint16_t v = x[size_t(position)];
      const int e = exponent(v), code = e == 0 ? 0 : e > base && e <= base + kWindow ? e - base : kEscape;
      const CodePlace at = code_place(lane, j);
      codes[size_t(at.word)] |= uint32_t(code) << at.shift;
      if (code != kEscape) continue;
      if (count < Bf16PackLayout::kMaxEscapes) escapes[size_t(count)] = uint32_t(position) << 16 | v;
      ++count;
    }
  return count;
}

void pack_page(const uint16_t* raw, uint8_t* packed, int64_t elems, const Bf16PackLayout& l, int64_t* bytes) {
  uint32_t units = 0;
  for (int64_t b = 0; b < l.blocks; ++b) {
    Block x{};
    std::copy_n(raw + b * kBlock, std::min<int64_t>(kBlock, elems - b * kBlock), x.begin());
    int base = base_from_top(x);
    Codes codes, high{};
    Escapes escapes;
    int count = encode(x, base, codes, escapes);
    if (count > Bf16PackLayout::kRetryEscapes) {  // a few large values have pulled the window up
      base = best_window(x);
      count = encode(x, base, codes, escapes);
    }
    uint8_t* plane = packed + l.planes + b * kBlock;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < kEach; ++j) {
        const uint16_t v = x[size_t(position_of(lane, j))];
        plane[lane * kEach + j] = uint8_t(v >> 8 & 0x80) | uint8_t(v & 0x7f);
      }
    uint8_t* overflow = packed + l.overflow + int64_t(units) * 16;
    Bf16BlockHeader header{units, uint16_t(count), uint16_t(base)};
    if (count > Bf16PackLayout::kMaxEscapes) {
      header.count = Bf16BlockHeader::kWide;
      codes.fill(0);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int j = 0; j < kEach; ++j) {
          const uint32_t e = uint32_t(exponent(x[size_t(position_of(lane, j))]));
          const CodePlace at = code_place(lane, j);
          codes[size_t(at.word)] |= (e & 15) << at.shift;
          high[size_t(at.word)] |= (e >> 4) << at.shift;
        }
      std::memcpy(overflow, high.data(), kCodeBytes);
      units += kCodeBytes / 16;
    } else {
      const uint32_t used = uint32_t(count + 3) / 4;
      std::memcpy(overflow, escapes.data(), used * 16);
      units += used;
    }
    std::memcpy(packed + l.codes + b * kCodeBytes, codes.data(), kCodeBytes);
    std::memcpy(packed + l.headers + b * int64_t(sizeof header), &header, sizeof header);
  }
  const int64_t headers_end = l.headers + l.blocks * int64_t(sizeof(Bf16BlockHeader));
  std::memset(packed + headers_end, 0, size_t(l.planes - headers_end));
  const Bf16PageHeader page{units, uint32_t(l.blocks), 0};
  std::memcpy(packed, &page, sizeof page);
  *bytes = l.overflow + int64_t(units) * 16;
}

void unpack_page(uint16_t* raw, const uint8_t* packed, int64_t elems, const Bf16PackLayout& l) {
  for (int64_t b = 0; b < l.blocks; ++b) {
    Bf16BlockHeader header;
    std::memcpy(&header, packed + l.headers + b * int64_t(sizeof header), sizeof header);
    const uint8_t* overflow = packed + l.overflow + int64_t(header.offset) * 16;
    Codes codes, high{};
    std::memcpy(codes.data(), packed + l.codes + b * kCodeBytes, kCodeBytes);
    const bool wide = header.count == Bf16BlockHeader::kWide;
    if (wide) std::memcpy(high.data(), overflow, kCodeBytes);
    Block x;
    const uint8_t* plane = packed + l.planes + b * kBlock;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < kEach; ++j) {
        const CodePlace at = code_place(lane, j);
        const uint32_t code = codes[size_t(at.word)] >> at.shift & 15, more = high[size_t(at.word)] >> at.shift & 15;
        const uint32_t e = wide ? more << 4 | code : code == 0 ? 0 : header.base + code;
        const uint32_t s = plane[lane * kEach + j];
        x[size_t(position_of(lane, j))] = uint16_t((s & 0x80) << 8 | (e & 0xff) << 7 | (s & 0x7f));
      }
    for (int i = 0; !wide && i < header.count; ++i) {
      uint32_t entry;
      std::memcpy(&entry, overflow + i * 4, sizeof entry);
      x[entry >> 16 & (kBlock - 1)] = uint16_t(entry);
    }
    std::copy_n(x.begin(), std::min<int64_t>(kBlock, elems - b * kBlock), raw + b * kBlock);
  }
}

void check(const char* op, const Bf16PackParams& p) {
  VC_CHECK(p.elems >= 0 && p.elems % 8 == 0, op, ": a page has ", p.elems, " elements; it must be a multiple of 8.");
}

}  // namespace

void bf16_pack(const Bf16PackParams& p) {
  check("bf16_pack", p);
  const auto layout = Bf16PackLayout::make(p.elems);
  parallel_for(p.pages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_page(reinterpret_cast<const uint16_t*>(p.raw_pages[i]), reinterpret_cast<uint8_t*>(p.packed_pages[i]),
                p.elems, layout, &p.packed_bytes[i]);
  });
}

void bf16_unpack(const Bf16PackParams& p) {
  check("bf16_unpack", p);
  const auto layout = Bf16PackLayout::make(p.elems);
  parallel_for(p.pages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      unpack_page(reinterpret_cast<uint16_t*>(p.raw_pages[i]), reinterpret_cast<const uint8_t*>(p.packed_pages[i]),
                  p.elems, layout);
  });
}

void bf16_check_packed(const uint8_t* packed, int64_t bytes, int64_t elems, int64_t page) {
  const auto layout = Bf16PackLayout::make(elems);
  VC_CHECK(bytes >= layout.overflow, "packed page ", page, " has ", bytes, " bytes; ", elems,
           " elements take at least ", layout.overflow, ": it is cut off, or of another size.");
  Bf16PageHeader header;
  std::memcpy(&header, packed, sizeof header);
  const int64_t used = layout.overflow + int64_t(header.overflow_units) * 16;
  VC_CHECK(int64_t(header.blocks) == layout.blocks && header.reserved == 0 && used == bytes, "packed page ", page,
           " of ", bytes, " bytes is no packed page of ", elems, " elements: its header says ", header.blocks,
           " blocks in ", used, " bytes; it is damaged, or of another size.");
  for (int64_t b = 0; b < layout.blocks; ++b) {
    Bf16BlockHeader block;
    std::memcpy(&block, packed + layout.headers + b * int64_t(sizeof block), sizeof block);
    const bool wide = block.count == Bf16BlockHeader::kWide;
    const int64_t units = wide ? kCodeBytes / 16 : (int64_t(block.count) + 3) / 4;
    VC_CHECK((wide || block.count <= Bf16PackLayout::kMaxEscapes) && block.base <= 254 - kWindow &&
                 block.offset + units <= header.overflow_units,
             "packed page ", page, " is damaged: the header of block ", b, " has ", block.count, " escapes, base ",
             block.base, " and overflow unit ", block.offset, " of ", header.overflow_units, ".");
  }
}

}  // namespace vericache::cpu
