// SPDX-License-Identifier: Apache-2.0
// Codes of 5 to 7 bits in a quantized page: a plane for each binary digit of the width, the most significant bits of a
// code in the 4-bit plane, the next two (6 and 7 bits) in the 2-bit plane, the last one (5 and 7) in the 1-bit plane.
// So the 4-bit plane alone is a coarser code of the same values, and 4 + 2 of 7 another.
//
// A codes block is its planes, widest first, each [page_size, head_dim * w / 8] uint8 for width w. A row is made of
// 16-bit units and covers 4 / w equal parts of the channels at once: with n = head_dim * w / 16 units, unit u holds
// channels 4 (u + q n) .. + 3 of every part q, channel 4 (u + q n) + i in bits 8 (i / 2) + w (2 q + i % 2) .. of it.
// Why: 16 bytes of any plane, read by ldmatrix, give a lane channels of which it also has the 4-bit plane, and every
// second code of a unit lies in its own byte of each plane, so that the planes are joined two codes at a time.
#pragma once

#include <cstdint>

namespace vericache {

template <int kBits>
struct CodePlanes {
  static constexpr bool kSplit = kBits > 4 && kBits < 8;

  // Of the plane of width w: the lowest of its bits in a code; bytes of a row; where it begins in a block.
  static constexpr int place(int w) { return kBits & (w - 1); }
  static constexpr int row_bytes(int head_dim, int w) { return head_dim * w / 8; }
  static constexpr int64_t begin(int page_size, int head_dim, int w) {
    return int64_t(page_size) * row_bytes(head_dim, kBits & ~(2 * w - 1));
  }

  // The four codes of part q of a unit, a byte each; and back.
  template <int w>
  static constexpr uint32_t spread(uint32_t unit, int q) {
    uint32_t x = unit >> (2 * w * q) & ones(2 * w) * 0x0101u;
    x = (x | x << 8) & ones(2 * w) * 0x10001u;
    return (x | x << (8 - w)) & ones(w) * 0x01010101u;
  }
  template <int w>
  static constexpr uint32_t gather(uint32_t x, int q) {
    x &= ones(w) * 0x01010101u;
    x = (x | x >> (8 - w)) & ones(2 * w) * 0x10001u;
    return ((x | x >> 8) & ones(2 * w) * 0x0101u) << (2 * w * q);
  }

  // Calls f.operator()<w>() for every plane.
  template <class F>
  static constexpr void each_plane(F f) {
    f.template operator()<4>();
    if constexpr ((kBits & 2) != 0) f.template operator()<2>();
    if constexpr ((kBits & 1) != 0) f.template operator()<1>();
  }

  // The codes of channels 4k .. 4k + 3 of a row, a byte each.
  static constexpr uint32_t load4(const uint8_t* codes, int row, int k, int page_size, int head_dim) {
    uint32_t bytes = 0;
    each_plane([&]<int w>() {
      const auto* units = reinterpret_cast<const uint16_t*>(codes + begin(page_size, head_dim, w) +
                                                            int64_t(row) * row_bytes(head_dim, w));
      const int n = head_dim * w / 16;
      bytes |= spread<w>(units[k % n], k / n) << place(w);
    });
    return bytes;
  }

  // Unit u of the plane of width w, from a row of codes, a byte each, four in a word.
  template <int w>
  static constexpr uint16_t unit(const uint32_t* row, int head_dim, int u) {
    uint32_t x = 0;
    for (int q = 0; q < 4 / w; ++q) x |= gather<w>(row[u + q * (head_dim * w / 16)] >> place(w), q);
    return uint16_t(x);
  }

 private:
  static constexpr uint32_t ones(int count) { return (1u << count) - 1; }
};

constexpr bool are_code_bits(int64_t bits) { return bits == 2 || (bits >= 4 && bits <= 8); }

}  // namespace vericache
