// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void gather_tokens(const TokenMoveParams& p);
void scatter_tokens(const TokenMoveParams& p);

}  // namespace vericache::cpu
