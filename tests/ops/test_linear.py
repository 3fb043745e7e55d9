# SPDX-License-Identifier: Apache-2.0
"""linear: right against float64, and invariant in bits over rows, position, threads and strides (R1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, assert_same_bytes, first_difference, poison_allocator
from vericache import ops
from vericache.errors import KernelError

# (n, k): tile multiples, remainders on both axes, one, and K past one block of the packed kernel.
SHAPES = [(64, 64), (61, 61), (1, 1), (130, 17), (7, 800), (36, 1027)]


def _inputs(rows: int, n: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, k, generator=rng).to(dtype)
    w = torch.randn(n, k, generator=rng).to(dtype)
    return x, w


@pytest.mark.parametrize("rows", [1, 6, 7, 61])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_against_float64(rows: int, n: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = _inputs(rows, n, k, dtype, rng)
    poison_allocator()
    got = ops.linear(x, w)
    assert got.dtype == dtype
    assert_close(got, x.double() @ w.double().T, x.double().abs() @ w.double().abs().T)


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("out_float32", [False, True])
def test_bias_and_residual(rows: int, out_float32: bool, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = _inputs(rows, 37, 90, dtype, rng)
    bias = torch.randn(37, generator=rng).to(dtype)
    residual = torch.randn(rows, 37, generator=rng).to(dtype)
    got = ops.linear(x, w, bias, residual, out_float32=out_float32)
    assert got.dtype == (torch.float32 if out_float32 else dtype)
    want = x.double() @ w.double().T + bias.double() + residual.double()
    magnitude = x.double().abs() @ w.double().abs().T + bias.double().abs() + residual.double().abs()
    assert_close(got, want, magnitude)
    # One rounding at the end: the float32 result rounded is the T result.
    assert_same_bytes(ops.linear(x, w, bias, residual, out_float32=True).to(dtype), ops.linear(x, w, bias, residual))


@pytest.mark.parametrize(("n", "k"), [(61, 61), (18, 800)])
def test_rows_do_not_depend_on_the_batch(n: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = _inputs(70, n, k, dtype, rng)
    alone = torch.cat([ops.linear(x[i : i + 1], w, out_float32=True) for i in range(70)])
    for rows in range(1, 71):
        assert_same_bytes(ops.linear(x[:rows], w, out_float32=True), alone[:rows])
        assert_same_bytes(ops.linear(x[70 - rows :], w, out_float32=True), alone[70 - rows :])
    order = torch.randperm(70, generator=rng)
    assert_same_bytes(ops.linear(x[order], w, out_float32=True), alone[order])


def test_columns_do_not_depend_on_their_neighbours(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = _inputs(9, 50, 333, dtype, rng)
    whole = ops.linear(x, w, out_float32=True)
    for start, stop in [(0, 1), (1, 50), (3, 46), (49, 50)]:
        assert_same_bytes(ops.linear(x, w[start:stop].contiguous(), out_float32=True), whole[:, start:stop])


def test_negative_control_a_split_that_follows_the_rows_is_seen(rng: torch.Generator) -> None:
    """The comparison above can fail: cut K where the row count says, and the bits move."""

    def split_by_rows(x: Tensor, w: Tensor) -> Tensor:
        cut = 256 if x.shape[0] == 1 else 512
        head = ops.linear(x[:, :cut].contiguous(), w[:, :cut].contiguous(), out_float32=True)
        return head + ops.linear(x[:, cut:].contiguous(), w[:, cut:].contiguous(), out_float32=True)

    x, w = _inputs(8, 61, 800, torch.float32, rng)
    alone = torch.cat([split_by_rows(x[i : i + 1], w) for i in range(8)])
    assert first_difference(split_by_rows(x, w), alone) is not None


def test_the_sum_order_is_the_documented_one(rng: torch.Generator) -> None:
    """16 lanes ascending, fused multiply-add, then halves folded: recomputed in float64, rounded each time."""
    x, w = _inputs(2, 3, 77, torch.float32, rng)
    pad = (0, 80 - 77)
    xs = torch.nn.functional.pad(x.double(), pad).reshape(2, 1, 5, 16)
    ws = torch.nn.functional.pad(w.double(), pad).reshape(1, 3, 5, 16)
    lanes = torch.zeros(2, 3, 16, dtype=torch.float64)
    for step in range(5):
        # A float32 product is exact in float64; sum and rounding to float32 are then one fused operation
        # but for a double rounding, which these values do not meet.
        lanes = (lanes + xs[:, :, step] * ws[:, :, step]).float().double()
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = (lanes[..., :half] + lanes[..., half:]).float().double()
    assert_same_bytes(ops.linear(x, w), lanes[..., 0].float())


def test_strides_and_threads_change_nothing(dtype: torch.dtype, rng: torch.Generator, threads: None) -> None:
    x, w = _inputs(33, 500, 256, dtype, rng)
    want = ops.linear(x, w)
    wide = torch.full((33, 300), float("nan"), dtype=dtype)
    wide[:, 20:276] = x
    assert_same_bytes(ops.linear(wide[:, 20:276], w), want)
    for count in (1, 2, 3, 5):
        ops.set_num_threads(count)
        assert_same_bytes(ops.linear(x, w), want)


def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = _inputs(14, 20, 40, dtype, rng)
    want = ops.linear(x, w)
    x[5, 39], x[9, 0] = float("nan"), float("inf")
    got = ops.linear(x, w)
    assert bool(got[5].isnan().all())
    assert not bool(got[9].isfinite().any())
    clean = [i for i in range(14) if i not in (5, 9)]
    assert_same_bytes(got[clean], want[clean])


@pytest.mark.cuda
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (7168, 1536), (28672, 256), (1000, 2048)])  # k in 4, 2, 1, 4 parts
@torch.inference_mode()
def test_many_rows_are_those_of_few_cuda(n: int, k: int, settled: bool, rng: torch.Generator) -> None:
    x, w = (t.to("cuda") for t in _inputs(600, n, k, torch.bfloat16, rng))
    want = torch.cat([ops.linear(part, w) for part in x.split(64)])
    poison_allocator()
    counts = (65, 128, 129, 192, 193, 248, 256, 257, 300, 600)
    got = [ops.linear(x[600 - rows :], w, weight_settled=settled) for rows in counts]  # each starts beside the last
    for rows, out in zip(counts, got, strict=True):
        assert_same_bytes(out, want[600 - rows :])
    assert first_difference(ops.linear(x[1:], w), want[:-1]) is not None


# (dim, k) of [gate; up]. On a Hopper GPU: k in one part and in several, an odd dim, a k that is no multiple of 8.
SWIGLU_SHAPES = [(61, 61), (8, 64), (152, 800), (1376, 512), (7168, 256)]


def _check_swiglu(rows: int, dim: int, k: int, dtype: torch.dtype, device: str, rng: torch.Generator) -> None:
    x, w = (t.to(device) for t in _inputs(rows, 2 * dim, k, dtype, rng))
    bias = torch.randn(2 * dim, generator=rng).to(dtype).to(device)
    poison_allocator()
    fused, with_bias = ops.linear_swiglu(x, w), ops.linear_swiglu(x, w, bias, weight_settled=True)
    assert fused.shape == (rows, dim)
    assert_same_bytes(fused, ops.silu_mul(ops.linear(x, w, weight_settled=True)))
    assert_same_bytes(with_bias, ops.silu_mul(ops.linear(x, w, bias)))
    assert first_difference(fused, ops.silu_mul(ops.linear(x, w.roll(dim, 0)))) is not None  # the halves matter


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize(("dim", "k"), SWIGLU_SHAPES[:3])
def test_swiglu_is_silu_mul_of_linear(rows: int, dim: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    _check_swiglu(rows, dim, k, dtype, "cpu", rng)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 130, 250])
@pytest.mark.parametrize(("dim", "k"), SWIGLU_SHAPES)
def test_swiglu_is_silu_mul_of_linear_cuda(
    rows: int, dim: int, k: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    _check_swiglu(rows, dim, k, dtype, "cuda", rng)


def test_swiglu_bad_input() -> None:
    with pytest.raises(KernelError, match=r"w has shape \[3, 8\]; its first axis holds gate, then up"):
        ops.linear_swiglu(torch.zeros(2, 8), torch.zeros(3, 8))


def test_empty(dtype: torch.dtype) -> None:
    assert ops.linear(torch.empty(0, 8, dtype=dtype), torch.empty(5, 8, dtype=dtype)).shape == (0, 5)
    assert ops.linear_swiglu(torch.empty(0, 8, dtype=dtype), torch.empty(6, 8, dtype=dtype)).shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "message"),
    [
        (torch.zeros(2, 8).half(), torch.zeros(3, 8), {}, "x has dtype float16"),
        (torch.zeros(2, 8), torch.zeros(3, 8).bfloat16(), {}, "w has dtype bfloat16; it must be float32"),
        (torch.zeros(2, 8), torch.zeros(3, 9), {}, r"w has shape \[3, 9\]; it must be \[\*, 8\]"),
        (torch.zeros(8), torch.zeros(3, 8), {}, r"x has shape \[8\]"),
        (torch.zeros(8, 2).T, torch.zeros(3, 8), {}, "last axis must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(8, 3).T, {}, "it must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(3, 8), {"bias": torch.zeros(4)}, r"bias has shape \[4\]"),
        (torch.zeros(2, 8), torch.zeros(3, 8), {"residual": torch.zeros(1, 3)}, r"residual has shape \[1, 3\]"),
        (torch.zeros(2, 0), torch.zeros(3, 0), {}, "must not be empty"),
    ],
)
def test_bad_input(x: Tensor, w: Tensor, kwargs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        ops.linear(x, w, **kwargs)
