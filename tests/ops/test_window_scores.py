# SPDX-License-Identifier: Apache-2.0
"""window_scores: against the plain softmax in float64, on strided inputs, with a bound window, the same every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bytes, poison_allocator
from tests.ops.pages import DEVICES
from vericache import ops
from vericache.errors import KernelError

# window, q_heads, kv_heads, tokens, head_dim. Tile, split and 32-query boundaries with one to spare; groups 1 to 16.
SHAPES = [
    (1, 1, 1, 1, 64),
    (1, 3, 3, 61, 128),
    (61, 4, 1, 61, 64),
    (32, 8, 2, 777, 128),
    (33, 4, 2, 257, 64),
    (7, 6, 2, 300, 128),
    (64, 8, 1, 513, 128),
    (130, 7, 1, 200, 64),
    (16, 16, 1, 65, 128),
    (32, 4, 2, 200, 80),
    (5, 2, 1, 40, 33),
]
BOUND = {torch.float32: 5e-5, torch.bfloat16: 2e-4}  # relative, of every weight


def plain(q: Tensor, k: Tensor) -> Tensor:
    """[q_heads, tokens] in float64: the whole matrix at once."""
    window, q_heads, head_dim = q.shape
    kv_heads, tokens, _ = k.shape
    keys = k.double().repeat_interleave(q_heads // kv_heads, 0)
    scores = torch.einsum("whd,htd->hwt", q.double(), keys) * head_dim**-0.5
    future = torch.ones(window, tokens, dtype=torch.bool, device=q.device).triu(tokens - window + 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1).mean(1)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    window, q_heads, kv_heads, tokens, head_dim = shape
    q = 2 * torch.randn(window, q_heads, head_dim, generator=rng)
    k = torch.randn(kv_heads, tokens, head_dim, generator=rng)
    return q.to(device, dtype), k.to(device, dtype)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest relative difference; infinity for a NaN, or where a weight that is 0 is not."""
    ratio = (got.double() - want).abs() / want
    return float(torch.where((got == 0) & (want == 0), 0.0, ratio).nan_to_num(float("inf")).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_plain_softmax(
    shape: tuple[int, ...], device: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    q, k = inputs(shape, dtype, device, rng)
    poison_allocator()
    got = ops.window_scores(q, k)
    assert got.dtype == torch.float32 and got.shape == (shape[1], shape[3]) and got.is_contiguous()
    assert worst(got, plain(q, k)) < BOUND[dtype]
    for _ in range(3):
        assert_same_bytes(ops.window_scores(q, k), got)
    if shape[3] > shape[0]:  # negative control: the comparison sees one key turned round
        k[0, 0] = -k[0, 0]
        assert worst(got, plain(q, k)) > 10 * BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """K as a layer's slab hands it out: heads further apart than their tokens; what lies between is never used."""
    q, k = inputs((32, 8, 2, 300, 64), dtype, device, rng)
    want = ops.window_scores(q, k)
    for gap in (8, 1):  # with 1, rows are no multiple of 16 bytes: on CUDA the simple kernel
        wide_k = torch.full((2, 320, 64 + gap), float("nan"), dtype=dtype, device=device)
        wide_k[:, :300, :64] = k
        wide_q = torch.full((32, 9, 64 + gap), float("nan"), dtype=dtype, device=device)
        wide_q[:, :8, :64] = q
        got = ops.window_scores(wide_q[:, :8, :64], wide_k[:, :300, :64])
        if gap == 8 or device == "cpu":
            assert_same_bytes(got, want)
        else:
            assert worst(got, plain(q, k)) < BOUND[dtype]
    by_token = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bytes(ops.window_scores(q, by_token), want)


@pytest.mark.parametrize("device", DEVICES)
def test_causal_and_normalized(device: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    q, k = inputs((40, 4, 2, 500, 128), dtype, device, rng)
    got = ops.window_scores(q, k)
    torch.testing.assert_close(got.sum(1), torch.ones(4, device=device), atol=2e-6, rtol=0)
    # The last key is seen by the last query alone: turning it round moves that query's share and no other.
    changed = k.clone()
    changed[:, -1] = -changed[:, -1]
    moved = 40 * (ops.window_scores(q, changed) - got)
    alone = ops.window_scores(q[-1:], changed) - ops.window_scores(q[-1:], k)
    torch.testing.assert_close(moved, alone, atol=2e-6, rtol=0)
    assert float(alone.abs().max()) > 1e-3
    # A query that attends to one key alone gives all of its share to it, even where scores are large.
    q[:], q[..., 0], k[:], k[..., 0] = 0, 100, 0, -100
    k[:, 123, 0] = 100
    want = torch.zeros(4, 500, device=device)
    want[:, 123] = 1
    torch.testing.assert_close(ops.window_scores(q, k), want, atol=1e-6, rtol=0)


def test_threads_do_not_matter(dtype: torch.dtype, rng: torch.Generator, threads: None) -> None:
    q, k = inputs((9, 4, 2, 1500, 64), dtype, "cpu", rng)
    ops.set_num_threads(1)
    want = ops.window_scores(q, k)
    ops.set_num_threads(3)
    assert_same_bytes(ops.window_scores(q, k), want)


def test_bad_input() -> None:
    def call(q: Tensor | None = None, k: Tensor | None = None) -> None:
        ops.window_scores(torch.zeros(4, 6, 64) if q is None else q, torch.zeros(3, 10, 64) if k is None else k)

    call()
    with pytest.raises(KernelError, match=r"queries has 4 rows and k 3 tokens; .* pass the last rows alone"):
        call(k=torch.zeros(3, 3, 64))
    with pytest.raises(KernelError, match="queries has 0 rows and k 10 tokens"):
        call(q=torch.zeros(0, 6, 64))
    with pytest.raises(KernelError, match=r"queries has 4 heads and k 3; .* multiple"):
        call(q=torch.zeros(4, 4, 64))
    with pytest.raises(KernelError, match=r"queries has shape \[4, 6, 32\]; it must be \[\*, \*, 64\]"):
        call(q=torch.zeros(4, 6, 32))
    with pytest.raises(KernelError, match="k has dtype float16; convert it to float32 or bfloat16"):
        call(k=torch.zeros(3, 10, 64).half())
    with pytest.raises(KernelError, match="queries has dtype bfloat16; it must be float32"):
        call(q=torch.zeros(4, 6, 64).bfloat16())
    with pytest.raises(KernelError, match=r"k has strides .*; its last axis must be contiguous"):
        call(k=torch.zeros(3, 64, 10).transpose(1, 2))
    with pytest.raises(KernelError, match="head_dim is 288; it must be from 1 to 256"):
        call(q=torch.zeros(4, 6, 288), k=torch.zeros(3, 10, 288))


@pytest.mark.cuda
def test_bad_device() -> None:
    with pytest.raises(KernelError, match="queries is on cpu and k on cuda:0; move them to one device"):
        ops.window_scores(torch.zeros(4, 6, 64), torch.zeros(3, 10, 64, device="cuda"))
