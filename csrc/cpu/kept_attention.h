// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void kept_attention(const KeptAttentionParams& p);

}  // namespace vericache::cpu
