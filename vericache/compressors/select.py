# SPDX-License-Identifier: Apache-2.0
"""What token-dropping methods share: pooling of scores, top-k, byte arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from vericache.compressors.interface import KeptTokens


def budget(ratio: float, tokens: int) -> int:
    """Returns ceil(ratio * tokens) for the decimal the ratio is written as (0.07 of 100 is 7, not 8)."""
    return min(tokens, math.ceil(Fraction(str(ratio)) * tokens))


def pool(scores: Tensor, kernel: int, how: Literal["avg", "max"]) -> Tensor:
    """Smooths scores along tokens with stride 1, so that neighbours of a strong token survive with it.

    Args:
        scores: (float32) [heads, tokens].
        kernel: odd width; outside the sequence an average counts zeros, as the method's authors' does.
        how: `avg` or `max`.

    Returns:
        (float32) [heads, tokens].
    """
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    if how == "avg":
        return torch.nn.functional.avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
    return torch.nn.functional.max_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]


def group_mean(scores: Tensor, kv_heads: int) -> Tensor:
    """Averages query heads into their KV head: [q_heads, tokens] -> [kv_heads, tokens]."""
    q_heads, tokens = scores.shape
    return scores.reshape(kv_heads, q_heads // kv_heads, tokens).mean(dim=1)


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Picks the best positions under a total order: higher score first, then the lower position.

    Args:
        scores: (float32) [kv_heads, tokens].
        count: positions to pick, at most `tokens`.

    Returns:
        (int32) [kv_heads, count]: ascending positions.
    """
    # A plain topk breaks ties as it likes, and differently on each device.
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values.to(torch.int32)


def kept(positions: Tensor) -> KeptTokens:
    """Wraps positions of which every head keeps equally many."""
    heads, count = positions.shape
    counts = torch.full((heads,), count, dtype=torch.int32, device=positions.device)
    return KeptTokens(positions.contiguous(), counts)


def head_page_bytes(rows: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int) -> int:
    """Returns the bytes of the head pages ([2, page_size, head_dim]) that hold `rows` rows a KV head."""
    pages = -(-rows // page_size)
    return kv_heads * pages * 2 * page_size * head_dim * elem_size
