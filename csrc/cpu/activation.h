// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// out = round(gate / (1 + exp(-gate)) * up), float32 inside, element by element: no reduction.
// Held by tests/ops/test_norm_rope.py.
void silu_mul(const SiluMulParams& p);

}  // namespace vericache::cpu
