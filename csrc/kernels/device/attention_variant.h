// SPDX-License-Identifier: Apache-2.0
// Which attention kernel runs, for experiments of the benchmark; to go once they are decided.
#pragma once

namespace vericache::cuda {

// For the benchmark: 0 warpgroup_attention.cuh, 1 (default) split_attention.cuh, 2 a merge kernel always, 3 one block a
// multiprocessor, 4 producers fence and announce, 5 no fence.
inline int attention_variant = 1;

}  // namespace vericache::cuda
