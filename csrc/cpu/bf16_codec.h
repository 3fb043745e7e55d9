// SPDX-License-Identifier: Apache-2.0
// Lossless packing of bfloat16 pages (Bf16PackLayout in params.h). The packed bytes are those of the CUDA kernel.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void bf16_pack(const Bf16PackParams& p);
void bf16_unpack(const Bf16PackParams& p);

// Throws if `bytes` bytes are not a packed page of `elems` elements, as far as its headers say: so that unpacking reads
// nothing outside them. `page` is its number, for the message.
void bf16_check_packed(const uint8_t* packed, int64_t bytes, int64_t elems, int64_t page);

}  // namespace vericache::cpu
