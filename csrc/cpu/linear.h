// SPDX-License-Identifier: Apache-2.0
// Batch-invariant linear layer.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// out = x @ w^T (+ bias) (+ residual). Reduction order (R1), a function of K alone: 16 lanes, lane l adds the products
// of k = l, l + 16, l + 32, ... in ascending order, each with one fused multiply-add, the last run padded with zeros;
// the lanes are then folded i with i + 8, i + 4, i + 2, i + 1. Then (sum + bias) + residual in float32, rounded once.
// swiglu: the product goes through memory of its own to silu_mul. Held by tests/ops/test_linear.py.
void linear(const LinearParams& p);

// The same product, through memory of its own to rope_write. Held by tests/ops/test_linear_rope.py.
void linear_rope_write(const LinearRopeWriteParams& p);

}  // namespace vericache::cpu
