# SPDX-License-Identifier: Apache-2.0
"""linear_rope_write: bit for bit linear, then rope_write, q and pages alike, whatever rows share the call, with
QK-norm and without."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bytes, first_difference, poison_allocator
from tests.ops.pages import addresses
from vericache import ops
from vericache.errors import KernelError

EPS = 1e-6
PAGE_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a call. On a Hopper GPU they also say which kernel runs: the comments below."""

    q_heads: int
    kv_heads: int
    head_dim: int
    k: int

    @property
    def heads(self) -> int:
        return self.q_heads + 2 * self.kv_heads

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "page_size": PAGE_SIZE,
            "eps": EPS,
        }


SMALL = [Shape(4, 2, 64, 72), Shape(3, 1, 128, 264), Shape(5, 5, 10, 61), Shape(6, 1, 80, 64)]
LARGE = [
    Shape(32, 8, 128, 4096),  # 4 parts of k, tiles of three heads
    Shape(28, 4, 128, 3584),  # the same, with more rows a tile than linear takes
    Shape(40, 8, 128, 5120),  # 2 parts
    Shape(14, 2, 64, 896),  # 2 parts, heads of one run
    Shape(13, 3, 128, 2048),  # a last tile with heads that do not exist
    Shape(20, 4, 256, 128),  # 1 part
    Shape(64, 64, 128, 128),  # 1 part, several tiles a block
]


class Call:
    """Inputs of one call, with pages of its own; page i of `pages` is that of row `order[i]`."""

    def __init__(self, shape: Shape, rows: int, dtype: torch.dtype, device: str, rng: torch.Generator) -> None:
        self.shape = shape
        n = shape.heads * shape.head_dim
        self.x = torch.randn(rows, shape.k, generator=rng).to(dtype).to(device)
        self.w = (torch.randn(n, shape.k, generator=rng) * shape.k**-0.5).to(dtype).to(device)
        self.bias = torch.randn(n, generator=rng).to(dtype).to(device)
        self.norms = [(torch.rand(shape.head_dim, generator=rng) + 0.5).to(dtype).to(device) for _ in range(2)]
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        angles = torch.rand(301, shape.head_dim // 2, generator=rng) * 6
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        self.position = torch.randint(301, (rows,), generator=rng, dtype=torch.int32).to(device)
        self.order = torch.randperm(rows, generator=rng).tolist()
        self.null = [row for row in range(rows) if row % 5 == 3]

    def pages(self) -> tuple[Tensor, Tensor]:
        """Poisoned pages, one a row in a shuffled order, and their addresses; some rows have none."""
        s, rows = self.shape, len(self.order)
        memory = torch.full(
            (rows, 2, s.kv_heads, PAGE_SIZE, s.head_dim), float("nan"), dtype=self.x.dtype, device=self.x.device
        )
        at = addresses([memory[i] for i in self.order])
        return memory, torch.tensor(
            [0 if row in self.null else at[row] for row in range(rows)], device=self.x.device
        )

    def fused(self, bias: Tensor | None, rows: slice = slice(None), settled: bool = False) -> tuple[Tensor, Tensor]:
        memory, table = self.pages()
        poison_allocator()
        q = ops.linear_rope_write(
            self.x[rows], self.w, bias, self.q_norm, self.k_norm, self.cos, self.sin, self.position[rows],
            table[rows], weight_settled=settled, **self.shape.sizes,
        )  # fmt: skip
        return q, memory

    def separate(self, bias: Tensor | None, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        memory, table = self.pages()
        q = ops.rope_write(
            ops.linear(self.x[rows], self.w, bias), self.q_norm, self.k_norm, self.cos, self.sin,
            self.position[rows], table[rows], **self.shape.sizes,
        )  # fmt: skip
        return q, memory


def _check(shape: Shape, rows: int, dtype: torch.dtype, device: str, rng: torch.Generator) -> None:
    call = Call(shape, rows, dtype, device, rng)
    for norms, (bias, settled) in product(
        ((None, None), (call.norms[0], None), (None, call.norms[1]), call.norms), ((None, True), (call.bias, False))
    ):
        call.q_norm, call.k_norm = norms
        (q, pages), (want_q, want_pages) = call.fused(bias, settled=settled), call.separate(bias)
        assert_same_bytes(q, want_q)
        assert_same_bytes(pages, want_pages)
    assert_same_bytes(call.fused(None, slice(rows // 2, rows))[0], call.fused(None)[0][rows // 2 :])
    # Negative controls: a bias, the norms, another position and the other half of a head are seen.
    assert first_difference(call.fused(None)[0], want_q) is not None
    call.q_norm, call.k_norm = call.k_norm, call.q_norm
    for got, want in zip(call.fused(call.bias), (want_q, want_pages), strict=True):
        assert first_difference(got, want) is not None
    call.q_norm, call.k_norm = call.k_norm, call.q_norm
    call.position = (call.position + 1) % 301
    moved_q, moved_pages = call.fused(call.bias)
    assert first_difference(moved_q, want_q) is not None
    assert first_difference(moved_pages, want_pages) is not None
    call.position = (call.position + 300) % 301
    call.w = call.w.roll(shape.head_dim // 2, 0)
    assert first_difference(call.fused(call.bias)[0], want_q) is not None


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_is_rope_write_of_linear(shape: Shape, rows: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    _check(shape, rows, dtype, "cpu", rng)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 33, 64, 65, 130])
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_is_rope_write_of_linear_cuda(shape: Shape, rows: int, rng: torch.Generator) -> None:
    _check(shape, rows, torch.bfloat16, "cuda", rng)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_is_rope_write_of_linear_float32_cuda(shape: Shape, rng: torch.Generator) -> None:
    _check(shape, 9, torch.float32, "cuda", rng)


@pytest.mark.cuda
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.inference_mode()
def test_every_row_count_gives_a_row_its_bits_cuda(qk_norm: bool, rng: torch.Generator) -> None:
    call = Call(LARGE[0], 128, torch.bfloat16, "cuda", rng)
    if qk_norm:
        call.q_norm, call.k_norm = call.norms
    want_q, want_pages = call.separate(call.bias)
    for rows in range(1, 129):
        part = slice(128 - rows, 128)
        q, pages = call.fused(call.bias, part, settled=rows % 2 == 0)
        assert_same_bytes(q, want_q[part])
        written = [call.order[row] for row in range(128 - rows, 128)]
        assert_same_bytes(pages[written], want_pages[written])


@pytest.mark.cuda
def test_unaligned_tables_take_the_other_way_cuda(rng: torch.Generator) -> None:
    call = Call(Shape(4, 2, 128, 256), 9, torch.bfloat16, "cuda", rng)
    want_q, want_pages = call.fused(call.bias)
    odd = torch.empty(call.cos.numel() + 2, device="cuda")[2:].view_as(call.cos)
    call.cos = odd.copy_(call.cos)
    q, pages = call.fused(call.bias)
    assert_same_bytes(q, want_q)
    assert_same_bytes(pages, want_pages)


@pytest.mark.cuda
@torch.inference_mode()
def test_calls_one_right_after_another_cuda(rng: torch.Generator) -> None:
    # Each starts beside the one before it, whose clusters still exchange the sums of its norms.
    calls = [Call(shape, rows, torch.bfloat16, "cuda", rng) for shape in LARGE[:3] for rows in (64, 1, 9, 40)]
    for call in calls:
        call.q_norm, call.k_norm = call.norms
    want = [call.separate(call.bias) for call in calls]
    torch.cuda.synchronize()
    for _ in range(3):
        got = [call.fused(call.bias, settled=True) for call in calls]
        for (q, pages), (want_q, want_pages) in zip(got, want, strict=True):
            assert_same_bytes(q, want_q)
            assert_same_bytes(pages, want_pages)


def test_strided_rows_and_no_rows(dtype: torch.dtype, rng: torch.Generator) -> None:
    call = Call(SMALL[0], 6, dtype, "cpu", rng)
    want_q, want_pages = call.separate(call.bias)
    wide = torch.full((6, 100), float("nan"), dtype=dtype)
    wide[:, 8:80] = call.x
    call.x = wide[:, 8:80]
    q, pages = call.fused(call.bias)
    assert_same_bytes(q, want_q)
    assert_same_bytes(pages, want_pages)
    assert call.fused(None, slice(0, 0))[0].shape == (0, 4, 64)


def test_bad_input(rng: torch.Generator) -> None:
    call = Call(SMALL[0], 2, torch.float32, "cpu", rng)
    _, table = call.pages()
    good: dict[str, Any] = {
        "x": call.x, "w": call.w, "bias": call.bias, "q_norm": call.norms[0], "k_norm": None,
        "cos": call.cos, "sin": call.sin, "row_position": call.position, "row_page": table, **call.shape.sizes,
    }  # fmt: skip

    def run(**changed: Tensor | int) -> None:
        ops.linear_rope_write(**good | changed)

    run()
    with pytest.raises(KernelError, match=r"w has shape \[512, 72\]; it must be \[576, 72\]"):
        run(q_heads=5)
    with pytest.raises(KernelError, match=r"row_position\[1\] is 301; cos and sin hold positions 0 to 300"):
        run(row_position=torch.tensor([0, 301], dtype=torch.int32))
    with pytest.raises(KernelError, match="row_page has dtype int32"):
        run(row_page=table.int())
    with pytest.raises(KernelError, match=r"bias has shape \[3\]"):
        run(bias=torch.zeros(3))
    with pytest.raises(KernelError, match="x has dtype float16"):
        run(x=call.x.half())
    with pytest.raises(KernelError, match="head_dim is 63"):
        run(head_dim=63)
    with pytest.raises(KernelError, match=r"q_norm has shape \[63\]; it must be \[64\]"):
        run(q_norm=call.norms[0][:63])
    with pytest.raises(KernelError, match="k_norm has dtype float64"):
        run(k_norm=call.norms[1].double())
    with pytest.raises(KernelError, match="eps is -1"):
        run(eps=-1.0)
