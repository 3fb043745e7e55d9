// SPDX-License-Identifier: Apache-2.0
// The CUDA launchers, one an op of params.h. Each checks what only it can know (a head_dim without an instantiation),
// launches on `stream` and returns; none synchronizes. Where a launcher needs scratch, p.workspace points to at least
// <name>_workspace_bytes(p) bytes, 256-byte aligned, free to be reused once the stream has passed the call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "common/params.h"

namespace vericache::cuda {

size_t paged_attention_workspace_bytes(const PagedAttentionParams& p);
void paged_attention(const PagedAttentionParams& p, cudaStream_t stream);

size_t kept_attention_workspace_bytes(const KeptAttentionParams& p);
void kept_attention(const KeptAttentionParams& p, cudaStream_t stream);

size_t quant_attention_workspace_bytes(const QuantAttentionParams& p);
void quant_attention(const QuantAttentionParams& p, cudaStream_t stream);

size_t linear_workspace_bytes(const LinearParams& p);
void linear(const LinearParams& p, cudaStream_t stream);
size_t linear_rope_write_workspace_bytes(const LinearRopeWriteParams& p);
void linear_rope_write(const LinearRopeWriteParams& p, cudaStream_t stream);

void rms_norm(const RmsNormParams& p, cudaStream_t stream);
void rope_write(const RopeWriteParams& p, cudaStream_t stream);
void silu_mul(const SiluMulParams& p, cudaStream_t stream);
size_t sample_workspace_bytes(const SampleParams& p);
void sample(const SampleParams& p, cudaStream_t stream);

size_t window_scores_workspace_bytes(const WindowScoresParams& p);
void window_scores(const WindowScoresParams& p, cudaStream_t stream);

void kv_quantize(const QuantizeParams& p, cudaStream_t stream);
void kv_dequantize(const QuantizeParams& p, cudaStream_t stream);
void gather_tokens(const TokenMoveParams& p, cudaStream_t stream);
void scatter_tokens(const TokenMoveParams& p, cudaStream_t stream);

void bf16_pack(const Bf16PackParams& p, cudaStream_t stream);
void bf16_unpack(const Bf16PackParams& p, cudaStream_t stream);

}  // namespace vericache::cuda
