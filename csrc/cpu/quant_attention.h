// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void quant_attention(const QuantAttentionParams& p);

}  // namespace vericache::cpu
