// SPDX-License-Identifier: Apache-2.0
// What copies and stores may say to the L2 (sm_90): which lines it may drop first, and which last.
#pragma once

#include <cstdint>

namespace vericache::cuda {

// As createpolicy.fractional encodes it. As numbers, for they are kernel arguments.
inline constexpr uint64_t kDropAsUsual = 0x1000000000000000, kDropFirst = 0x12f0000000000000,
                          kDropLast = 0x14f0000000000000;

}  // namespace vericache::cuda
