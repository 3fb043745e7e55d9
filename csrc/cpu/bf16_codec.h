// SPDX-License-Identifier: Apache-2.0
// Lossless packing of bfloat16 pages (Bf16PackLayout in params.h). The packed bytes are those of the CUDA kernel.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void bf16_pack(const Bf16PackParams& p);
void bf16_unpack(const Bf16PackParams& p);

}  // namespace vericache::cpu
