// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/params.h"

namespace vericache::cpu {

void paged_attention(const PagedAttentionParams& p);

}  // namespace vericache::cpu
