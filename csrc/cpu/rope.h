// SPDX-License-Identifier: Apache-2.0
// QK-norm, rotary embedding and the write of K and V into their page.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// For each q and k head h of a row: with a norm weight, h = round(h / rms(h) * weight), reduced over head_dim as
// norm.h does; then, with c and s the row's cos and sin,
//     first half  = round(h1 * c - h2 * s)        second half = round(h2 * c + h1 * s)
// in float32, each product and sum rounded on its own. v is copied. Rows are independent.
// Held by tests/ops/test_norm_rope.py.
void rope_write(const RopeWriteParams& p);

}  // namespace vericache::cpu
