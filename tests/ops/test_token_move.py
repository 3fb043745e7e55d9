# SPDX-License-Identifier: Apache-2.0
"""gather_tokens and scatter_tokens: every byte where it belongs, no other byte touched."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.ops.pages import DEVICES, DTYPES, Pool, addresses, assert_same_bits, full_pages, int32, normal, table
from vericache import ops
from vericache.errors import KernelError

HEADS = 3


class Case:
    """A request's full pages, empty head pages, and a choice of positions for each head."""

    def __init__(
        self, counts: list[int], dtype: torch.dtype, device: str, head_dim: int = 64, page_size: int = 32
    ) -> None:
        self.counts, self.page_size, self.head_dim = counts, page_size, head_dim
        self.tokens = 5 * page_size + 7
        shape = (HEADS, self.tokens, head_dim)
        self.k, self.v = normal(shape, dtype, device, 1), normal(shape, dtype, device, 2)
        word = torch.int32 if dtype == torch.float32 else torch.int16
        self.k.view(word)[0, 3, :4] = torch.tensor(
            [-1, -2, 1, -(2 ** (8 * dtype.itemsize - 1))], dtype=word
        )  # NaNs, -0
        self.full, full_address = full_pages(self.k, self.v, page_size)
        width = 3
        pool = Pool(HEADS * width, (2, page_size, head_dim), dtype, device, seed=4)
        self.head_memory = pool.memory
        self.heads = [[pool.take() for _ in range(width)] for _ in range(HEADS)]
        chooser = random.Random(5)
        chosen = [chooser.sample(range(self.tokens), n) for n in counts]
        chosen[0][:1] = [3][: counts[0]]
        self.positions = [list(dict.fromkeys(row)) for row in chosen]
        self.counts = [len(row) for row in self.positions]
        capacity = max(self.counts) + 2
        self.arguments = {
            "page_table": torch.tensor(full_address, dtype=torch.int64, device=device),
            "head_table": table([addresses(pages) for pages in self.heads], device),
            "positions": torch.tensor([row + [-1] * (capacity - len(row)) for row in self.positions],
                                      dtype=torch.int32, device=device).view(HEADS, capacity),
            "counts": int32(self.counts, device),
            "like": torch.empty(0, dtype=dtype, device=device),
            "head_dim": head_dim,
            "page_size": page_size,
        }  # fmt: skip

    def head_row(self, head: int, i: int) -> Tensor:
        return self.heads[head][i // self.page_size][:, i % self.page_size]

    def full_row(self, head: int, position: int) -> Tensor:
        return self.full[position // self.page_size][:, head, position % self.page_size]


COUNTS = [[1, 61, 33], [0, 0, 0], [96, 0, 31], [32, 64, 95]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_gather(device, dtype, counts, head_dim):
    case = Case(counts, dtype, device, head_dim)
    untouched = case.head_memory.clone()
    full = [page.clone() for page in case.full]
    ops.gather_tokens(**case.arguments)
    for head, row in enumerate(case.positions):
        for i, position in enumerate(row):
            want = torch.stack([case.k[head, position], case.v[head, position]])
            assert_same_bits(case.head_row(head, i), want, f"head {head}, row {i}")
            case.head_row(head, i).view(torch.uint8).fill_(0xFF)
    assert_same_bits(case.head_memory, untouched, "the rest of the head pages' memory")
    for page, before in zip(case.full, full, strict=True):
        assert_same_bits(page, before, "full pages")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_scatter_undoes_gather(device, dtype, counts):
    case = Case(counts, dtype, device)
    before = [page.clone() for page in case.full]
    ops.gather_tokens(**case.arguments)
    heads = case.head_memory.clone()
    for head, row in enumerate(case.positions):
        for position in row:
            case.full_row(head, position).view(torch.uint8).fill_(0xA5)
    ops.scatter_tokens(**case.arguments)
    for page, want in zip(case.full, before, strict=True):
        assert_same_bits(page, want, "full pages")
    assert_same_bits(case.head_memory, heads, "head pages")


@pytest.mark.parametrize("device", DEVICES)
def test_strided_positions(device):
    case = Case([40, 40, 40], torch.bfloat16, device)
    want_case = Case([40, 40, 40], torch.bfloat16, device)
    ops.gather_tokens(**want_case.arguments)
    positions = case.arguments["positions"]
    wide = torch.full((HEADS, 100), -7, dtype=torch.int32, device=device)
    wide[:, 20 : 20 + positions.shape[1]] = positions
    ops.gather_tokens(**(case.arguments | {"positions": wide[:, 20 : 20 + positions.shape[1]]}))
    for head in range(HEADS):
        for i in range(case.counts[head]):
            assert_same_bits(case.head_row(head, i), want_case.head_row(head, i), f"head {head}, row {i}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", int32([1, 99, 0], "cpu"), "counts of head 1 is 99"),
        ("counts", int32([-1, 0, 0], "cpu"), "counts of head 0 is -1"),
        ("counts", int32([1, 1], "cpu"), r"counts has shape \[2\]"),
        ("positions", torch.full((3, 42), 9999, dtype=torch.int32), r"positions\[0, 0\] is 9999"),
        ("positions", torch.full((3, 42), -1, dtype=torch.int32), r"positions\[0, 0\] is -1"),
        ("positions", torch.zeros(3, 42, dtype=torch.int64), "positions has dtype int64"),
        ("page_table", torch.zeros(6, dtype=torch.int64), "page_table has no page at entry"),
        ("head_table", torch.zeros(3, 3, dtype=torch.int64), "head_table has no page at entry 0"),
        ("head_table", torch.zeros(2, 3, dtype=torch.int64), r"positions has shape \[3, 42\]"),
        ("head_dim", 20, "head_dim is 20"),
        ("page_size", 33, "page_size is 33"),
    ],
)
def test_bad_input(name, value, message):
    case = Case([40, 40, 40], torch.float32, "cpu")
    before = case.head_memory.clone()
    for op in (ops.gather_tokens, ops.scatter_tokens):
        with pytest.raises(KernelError, match=message):
            op(**(case.arguments | {name: value}))
    assert_same_bits(case.head_memory, before, "refused before any work")


def test_opcheck():
    case = Case([4, 4, 4], torch.float32, "cpu")
    for op in (torch.ops.vericache.gather_tokens.default, torch.ops.vericache.scatter_tokens.default):
        torch.library.opcheck(op, tuple(case.arguments.values()))
