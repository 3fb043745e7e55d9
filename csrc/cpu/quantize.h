// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void kv_quantize(const QuantizeParams& p);
void kv_dequantize(const QuantizeParams& p);

}  // namespace vericache::cpu
