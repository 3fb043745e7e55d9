// SPDX-License-Identifier: Apache-2.0
// The attention that a window of queries pays to all keys of a sequence, averaged over the window.
#pragma once

#include "common/params.h"

namespace vericache::cpu {

// Two passes over K, no matrix of scores: the softmax state of every query and every kSplit keys, then the scores
// again, as weights. Reduction order: a score is score_tile's chain, a state softmax_row's; a query's states are merged
// left to right; a key's weights are added query after query, oldest first, by fused multiply-add with 1 / (window *
// sum). It depends on the shape alone, never on threads. Held by tests/ops/test_window_scores.py.
void window_scores(const WindowScoresParams& p);

}  // namespace vericache::cpu
