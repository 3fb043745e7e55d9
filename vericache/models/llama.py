# SPDX-License-Identifier: Apache-2.0
"""The Llama family in one forward function: Llama, Mistral, Qwen2 and Qwen3 differ in optional biases and
norms only.

The model does not know where K and V lie: it hands queries to a `KVView` and gets attention back. Prefill,
draft, verify and the one-token-at-a-time reference all run this code, and every op in it computes a row from
that row alone (R1), so a row's bits do not depend on which rows share its call or on how its layers are
spread over calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vericache import ops
from vericache.models.config import ModelConfig
from vericache.models.interface import KVView, RowSpan


class LayerWeights(NamedTuple):
    """One decoder layer, T on the model's device. Fused weights are stacked along their first axis."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(q_heads + 2 kv_heads) head_dim, hidden]: q, k, v
    qkv_bias: Tensor | None  # [(q_heads + 2 kv_heads) head_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    out: Tensor  # [hidden, q_heads head_dim]
    out_bias: Tensor | None  # [hidden]
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]: gate, up
    gate_up_bias: Tensor | None  # [2 intermediate]
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None  # [hidden]


class ModelWeights(NamedTuple):
    """All weights of a model; `lm_head` is `embedding` itself where they are tied."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Layers lo .. hi - 1, run by the same spans."""

    lo: int
    hi: int
    active: tuple[int, ...]


class CausalLM:
    """A decoder of the Llama family with its weights.

    Args:
        config: the model's shape.
        weights: T, on one device; whoever changes them later waits for that before the next call, since kernels
            read weights ahead of the stream's order.
        cos, sin (float32) [max_positions, head_dim / 2]: rotary tables on the same device.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, cos: Tensor, sin: Tensor):
        self.config = config
        self.weights = weights
        self.cos = cos
        self.sin = sin
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # from here on the weights are settled, as ops.linear means it

    @property
    def max_positions(self) -> int:
        """Positions a request may use, prompt and generated tokens together."""
        return self.cos.shape[0]

    @property
    def weight_bytes(self) -> int:
        """Device bytes of weights and rotary tables; storage shared by tied weights counts once."""
        w = self.weights
        tensors = [w.embedding, w.final_norm, w.lm_head, self.cos, self.sin]
        tensors += [tensor for layer in w.layers for tensor in layer if tensor is not None]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, uncompressed."""
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_dim * self.dtype.itemsize

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows.

        Args:
            tokens (int64) [rows]: ids below vocab_size.

        Returns:
            (T) [rows, hidden].
        """
        return torch.embedding(self.weights.embedding, tokens)

    def forward(self, hidden: Tensor, positions: Tensor, spans: Sequence[RowSpan], kv: KVView) -> Tensor:
        """Advances each span's rows through its layers.

        Args:
            hidden (T) [rows, hidden]: residual stream; not modified.
            positions (int32) [rows]: absolute position of each row.
            spans: disjoint spans in row order; rows in none, or outside their span's layers, stay as they
            are.
            kv: receives K and V of each layer and answers attention.

        Returns:
            (T) [rows, hidden]: the residual stream after the layers.
        """
        owned = False
        for segment in _segments(spans):
            rows = _merge([(spans[i].start, spans[i].stop) for i in segment.active])
            if not rows:
                continue
            if rows == [(0, hidden.shape[0])]:
                hidden = self._run(hidden, positions, segment, kv)
                owned = True
                continue
            if not owned:
                hidden = hidden.clone()
                owned = True
            part = self._run(_take(hidden, rows), _take(positions, rows), segment, kv)
            offset = 0
            for start, stop in rows:
                hidden[start:stop] = part[offset : offset + stop - start]
                offset += stop - start
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output projection.

        Args:
            hidden (T) [rows, hidden]: residual stream after the last layer.

        Returns:
            (float32) [rows, vocab].
        """
        w = self.weights
        normed = ops.rms_norm(hidden, w.final_norm, self.config.rms_norm_eps)
        return ops.linear(normed, w.lm_head, out_float32=True, weight_settled=True)

    def _run(self, x: Tensor, positions: Tensor, segment: _Segment, kv: KVView) -> Tensor:
        """Layers of one segment; x (T) [active rows, hidden] is the residual stream of exactly its rows."""
        c = self.config
        cos, sin, eps, page_size = self.cos, self.sin, c.rms_norm_eps, kv.page_size
        q_heads, kv_heads, head_dim, q_size = c.q_heads, c.kv_heads, c.head_dim, c.q_heads * c.head_dim
        active = segment.active
        for layer in range(segment.lo, segment.hi):
            w = self.weights.layers[layer]
            pages = kv.write_pages(layer, active)  # before the norm: nothing of torch's comes between ours
            normed = ops.rms_norm(x, w.input_norm, eps)
            q = ops.linear_rope_write(
                normed, w.qkv, w.qkv_bias, w.q_norm, w.k_norm, cos, sin, positions, pages,
                q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, eps=eps,
                weight_settled=True,
            )  # fmt: skip
            attended = kv.attend(layer, q, active)
            x = ops.linear(attended.view(-1, q_size), w.out, w.out_bias, x, weight_settled=True)
            normed = ops.rms_norm(x, w.post_norm, eps)
            active_up = ops.linear_swiglu(normed, w.gate_up, w.gate_up_bias, weight_settled=True)
            x = ops.linear(active_up, w.down, w.down_bias, x, weight_settled=True)
        return x


def _segments(spans: Sequence[RowSpan]) -> list[_Segment]:
    """Maximal runs of layers whose set of active spans does not change, in layer order."""
    if len(spans) == 1:
        span = spans[0]
        return [_Segment(span.layer_lo, span.layer_hi, (0,))] if span.layer_lo < span.layer_hi else []
    cuts = sorted({edge for span in spans for edge in (span.layer_lo, span.layer_hi)})
    segments = []
    for lo, hi in pairwise(cuts):
        active = tuple(i for i, span in enumerate(spans) if span.layer_lo <= lo and hi <= span.layer_hi)
        if active:
            segments.append(_Segment(lo, hi, active))
    return segments


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbouring ranges of rows; empty ones vanish."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def _take(tensor: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """The rows of some ranges, contiguous; a view where there is one range."""
    if len(rows) == 1:
        return tensor[rows[0][0] : rows[0][1]]
    return torch.cat([tensor[start:stop] for start, stop in rows])
