# SPDX-License-Identifier: Apache-2.0
"""What token-dropping methods share: scores of a window of queries, pooling, top-k, byte arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from vericache.compressors.interface import KeptTokens

# Elements of a float32 block of scores held at a time (64 MiB): scoring a long prompt must not need more
# memory than serving it.
BLOCK_ELEMENTS = 1 << 24


def budget(ratio: float, tokens: int) -> int:
    """Returns ceil(ratio * tokens) for the decimal the ratio is written as (0.07 of 100 is 7, not 8)."""
    return min(tokens, math.ceil(Fraction(str(ratio)) * tokens))


def window_attention(queries: Tensor, k: Tensor, *, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
    """Averages the attention that the last queries of a sequence pay to its keys.

    The softmax is causal and in float32; each query row is computed whole, so the block size changes memory,
    not scores beyond the order of the mean.

    Args:
        queries: (T) [window, q_heads, head_dim]: rotated queries of positions tokens - window .. tokens - 1.
        k: (T) [kv_heads, tokens, head_dim]: rotated keys; q_heads is a multiple of kv_heads.
        block_elements: scores held at a time.

    Returns:
        (float32) [q_heads, tokens]: mean over the window; keys in a query's future count as 0.
    """
    window, q_heads, head_dim = queries.shape
    kv_heads, tokens, _ = k.shape
    group = q_heads // kv_heads
    first = tokens - window
    rows_per_block = max(1, block_elements // max(1, group * tokens))
    key_position = torch.arange(tokens, device=k.device)
    mean = torch.zeros(q_heads, tokens, dtype=torch.float32, device=k.device)
    for head in range(kv_heads):
        keys = k[head].float().t()
        heads = slice(head * group, (head + 1) * group)
        for start in range(0, window, rows_per_block):
            q = queries[start : start + rows_per_block, heads].float()
            scores = torch.matmul(q, keys).mul_(head_dim**-0.5)
            query_position = torch.arange(first + start, first + start + q.shape[0], device=k.device)
            scores.masked_fill_((key_position > query_position[:, None])[:, None], float("-inf"))
            mean[heads] += torch.softmax(scores, dim=-1).sum(dim=0)
    return mean.div_(window)


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
