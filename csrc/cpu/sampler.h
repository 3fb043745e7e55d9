// SPDX-License-Identifier: Apache-2.0
// Sampling as a pure function of logits, parameters, seed and position (R4).
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// The rule is SampleParams's. Rows are independent, one thread each. Orders inside a row, functions of the row's own
// values: the log-softmax's sum is 16 float32 lanes over ascending indices, then hsum's tree; top_p adds float32
// weights in float64, by 1/32-nat buckets of the value, in index order inside a bucket and in the filters' order (value
// descending, index ascending) inside the one where the sum crosses top_p.
// Held by tests/ops/test_sample.py.
void sample(const SampleParams& p);

}  // namespace vericache::cpu
