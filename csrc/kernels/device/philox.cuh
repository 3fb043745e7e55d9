// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011): the noise of R4, a pure function of counter and key.
#pragma once

#include <cstdint>

namespace vericache::cuda {

struct PhiloxWords {
  uint32_t word[4];
  __device__ __forceinline__ uint32_t operator[](int i) const {  // selects, so that the words stay in registers
    return i == 0 ? word[0] : i == 1 ? word[1] : i == 2 ? word[2] : word[3];
  }
};

// Counter (c0, c1, 0, 0).
__device__ __forceinline__ PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t key0, uint32_t key1) {
  uint32_t c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace vericache::cuda
