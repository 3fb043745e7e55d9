# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op without running it (torch.compile, opcheck); imported by vericache.ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake


@register_fake("vericache::paged_attention")
def _paged_attention(
    q: Tensor, page_table: Tensor, row_offsets: Tensor, row_position: Tensor,
    kv_heads: int, page_size: int, scale: float, window: int, settled: bool = False,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@register_fake("vericache::kept_attention")
def _kept_attention(
    q: Tensor, kept_table: Tensor, kept_len: Tensor, tail_table: Tensor, tail_start: Tensor,
    row_offsets: Tensor, row_position: Tensor, page_size: int, scale: float, settled: bool = False,
    as_full: bool = False,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@register_fake("vericache::quant_attention")
def _quant_attention(
    q: Tensor, quant_table: Tensor, quant_len: Tensor, tail_table: Tensor, row_offsets: Tensor,
    row_position: Tensor, kv_heads: int, page_size: int, bits: int, group: int, scale: float,
    settled: bool = False,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@register_fake("vericache::linear")
def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, out_float32: bool,
    weight_settled: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.float32 if out_float32 else x.dtype)


@register_fake("vericache::linear_swiglu")
def _linear_swiglu(x: Tensor, w: Tensor, bias: Tensor | None, weight_settled: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0] // 2))


@register_fake("vericache::linear_rope_write")
def _linear_rope_write(
    x: Tensor, w: Tensor, bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor,
    sin: Tensor, row_position: Tensor, row_page: Tensor, q_heads: int, kv_heads: int, head_dim: int,
    page_size: int, eps: float, weight_settled: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], q_heads, head_dim))


@register_fake("vericache::rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("vericache::add_rms_norm")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@register_fake("vericache::rope_write")
def _rope_write(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, row_position: Tensor,
    row_page: Tensor, q_heads: int, kv_heads: int, head_dim: int, page_size: int, eps: float,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], q_heads, head_dim))


@register_fake("vericache::silu_mul")
def _silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@register_fake("vericache::sample")
def _sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    row_position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.int64), logits.new_empty((rows,))


@register_fake("vericache::window_scores")
def _window_scores(queries: Tensor, k: Tensor) -> Tensor:
    return k.new_empty((queries.shape[1], k.shape[1]), dtype=torch.float32)


@register_fake("vericache::kv_quantize")
def _kv_quantize(
    full_pages: Tensor, quant_pages: Tensor, like: Tensor, kv_heads: int, head_dim: int, page_size: int,
    bits: int, group: int,
) -> None:  # fmt: skip
    return None


@register_fake("vericache::kv_dequantize")
def _kv_dequantize(
    full_pages: Tensor, quant_pages: Tensor, like: Tensor, kv_heads: int, head_dim: int, page_size: int,
    bits: int, group: int,
) -> None:  # fmt: skip
    return None


@register_fake("vericache::gather_tokens")
def _gather_tokens(
    page_table: Tensor, head_table: Tensor, positions: Tensor, counts: Tensor, like: Tensor,
    head_dim: int, page_size: int,
) -> None:  # fmt: skip
    return None


@register_fake("vericache::scatter_tokens")
def _scatter_tokens(
    page_table: Tensor, head_table: Tensor, positions: Tensor, counts: Tensor, like: Tensor,
    head_dim: int, page_size: int,
) -> None:  # fmt: skip
    return None


@register_fake("vericache::bf16_pack")
def _bf16_pack(raw_pages: Tensor, packed_pages: Tensor, like: Tensor, elems: int, room: int) -> Tensor:
    return raw_pages.new_empty(raw_pages.shape)


@register_fake("vericache::bf16_unpack")
def _bf16_unpack(
    packed_pages: Tensor, packed_bytes: Tensor, raw_pages: Tensor, like: Tensor, elems: int, max_blocks: int
) -> None:
    return None
