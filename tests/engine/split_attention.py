# SPDX-License-Identifier: Apache-2.0
"""Attention over pages in plain torch with a free choice of the key split: right to rounding, bitwise another order."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def read_page(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy of the page at a raw address."""
    count = 1
    for n in shape:
        count *= n
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def split_attention(
    q: Tensor,
    table: Tensor,
    row_offsets: Tensor,
    row_position: Tensor,
    kv_heads: int,
    page_size: int,
    scale: float,
    parts: int,
) -> Tensor:
    """As ops.paged_attention without a window, each row's keys cut into ``parts`` equal parts, merged in order.

    Args:
        q: (T) [rows, q_heads, head_dim]. The other arguments are the op's.
    """
    _rows, q_heads, dim = q.shape
    out = torch.zeros_like(q)
    for request in range(len(row_offsets) - 1):
        for row in range(int(row_offsets[request]), int(row_offsets[request + 1])):
            length = int(row_position[row]) + 1
            pages = [
                read_page(int(table[request, i]), (2, kv_heads, page_size, dim), q.dtype)
                for i in range(-(-length // page_size))
            ]
            k, v = (torch.cat([p[side] for p in pages], dim=1)[:, :length].float() for side in (0, 1))
            for head in range(q_heads):
                kv = head // (q_heads // kv_heads)
                scores = k[kv] @ q[row, head].float() * scale
                m = scores.max()
                weights = torch.exp(scores - m)
                chunk = -(-length // parts)
                total, acc = torch.zeros(()), torch.zeros(dim)
                for start in range(0, length, chunk):
                    piece = slice(start, start + chunk)
                    total = total + weights[piece].sum()
                    acc = acc + weights[piece] @ v[kv][piece]
                out[row, head] = (acc / total).to(q.dtype)
    return out
