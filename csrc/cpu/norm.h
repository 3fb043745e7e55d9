// SPDX-License-Identifier: Apache-2.0
// RMSNorm, alone and after a residual addition.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// With p.residual: residual_out = round(x + residual), and the norm is of the rounded sum; without, of x.
// out = round((v * (1 / sqrt(mean(v^2) + eps))) * weight), float32 inside. Reduction order (R1), a function of dim
// alone: 16 lanes, lane l adds the squares of elements l, l + 16, ... in ascending order by fused multiply-add; then
// hsum's tree. Held by tests/ops/test_norm_rope.py.
void rms_norm(const RmsNormParams& p);

}  // namespace vericache::cpu
