# SPDX-License-Identifier: Apache-2.0
"""Pages made of plain tensors, float64 references and byte comparisons, for the tests of the attention and cache ops.

Every pool is filled with NaN first: a kernel that reads a slot it must not read shows it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vericache import ops

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(
                not (torch.cuda.is_available() and ops.with_cuda()), reason="needs a GPU and a CUDA build"
            ),
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16]


class Pool:
    """`count` blocks of T, 128-byte aligned, all NaN, handed out in a random order."""

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        stride = (size + 127) // 128 * 128 + 128  # a guard of NaN behind each block
        self.memory = torch.full((count * stride + 128,), 0xFF, dtype=torch.uint8, device=device)
        start = -self.memory.data_ptr() % 128
        offsets = [start + i * stride for i in range(count)]
        random.Random(seed).shuffle(offsets)
        self.blocks = [self.memory[o : o + size].view(dtype).view(*shape) for o in offsets]
        self.free = list(range(count))

    def take(self) -> Tensor:
        return self.blocks[self.free.pop()]


def full_pages(k: Tensor, v: Tensor, page_size: int, start: int = 0, seed: int = 0) -> tuple[list[Tensor], list[int]]:
    """K and V [kv_heads, tokens, head_dim] from position `start` on, in full pages of a fresh pool."""
    heads, tokens, dim = k.shape
    count = (tokens - start + page_size - 1) // page_size
    pool = Pool(count, (2, heads, page_size, dim), k.dtype, str(k.device), seed)
    pages = [pool.take() for _ in range(count)]
    for i, page in enumerate(pages):
        chunk = slice(start + i * page_size, min(start + (i + 1) * page_size, tokens))
        page[0, :, : chunk.stop - chunk.start] = k[:, chunk]
        page[1, :, : chunk.stop - chunk.start] = v[:, chunk]
    return pages, addresses(pages)


def head_pages(k: Tensor, v: Tensor, page_size: int, seed: int = 0) -> tuple[list[Tensor], list[int]]:
    """Rows K and V [rows, head_dim] of one head, in head pages."""
    pages, _ = full_pages(k[None], v[None], page_size, seed=seed)
    pages = [page[:, 0] for page in pages]
    return pages, addresses(pages)


def addresses(pages: Sequence[Tensor]) -> list[int]:
    return [page.data_ptr() for page in pages]


def table(rows: Sequence[Sequence[int]], device: str, width: int = 0) -> Tensor:
    """int64 [len(rows), width]: rows of addresses, short ones filled with an address that must not be read."""
    width = max([width, *(len(row) for row in rows)])
    return torch.tensor([[*row, *[1] * (width - len(row))] for row in rows], dtype=torch.int64, device=device).view(
        len(rows), width
    )


def int32(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Float64 attention of one row: q [q_heads, head_dim], k and v [kv_heads, keys, head_dim]."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("hd,hkd->hk", q.double(), k) * scale
    return torch.einsum("hk,hkd->hd", scores.softmax(-1), v)


def poison_allocator(like: Tensor) -> None:
    """Leave NaN in the memory that the next output of this shape is likely to get."""
    for _ in range(3):
        torch.full_like(like, float("nan"))


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype, want.dtype)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    differs = got.contiguous().view(word) != want.contiguous().view(word)
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} differ, first at {at}: "
            f"{got[at].item()!r} != {want[at].item()!r}"
        )


def assert_close(got: Tensor, want64: Tensor, dtype: torch.dtype) -> None:
    """Within the float32 accumulation error and one rounding to the storage type.

    Tensor cores take softmax weights and dequantized keys in bfloat16: each is off by 2^-9 of itself, which moves a
    mean of values (the tests' are normal, the largest about 4) by at most 2^-9 * 4 a rounding; two are allowed for.
    """
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    error = (got.double() - want64).abs()
    bound = want64.abs() * ulp + 4e-6 * want64.abs().amax().clamp(min=1.0)
    if got.is_cuda and dtype == torch.bfloat16:
        bound = bound + 2 * 2.0**-9 * 4
    assert not got.isnan().any()
    assert (error <= bound).all(), f"largest error {error.max().item():.3g}, over the bound at {error.argmax().item()}"
