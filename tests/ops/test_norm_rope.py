# SPDX-License-Identifier: Apache-2.0
"""rms_norm, add_rms_norm, rope_write, silu_mul: against float64, invariant over rows, written in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, assert_same_bytes, first_difference, poison_allocator
from vericache import ops
from vericache.errors import KernelError

EPS = 1e-6


def _rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dim", [1, 16, 61, 384])
def test_rms_norm(dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x = torch.randn(7, dim, generator=rng).to(dtype)
    weight = torch.randn(dim, generator=rng).to(dtype)
    poison_allocator()
    assert_close(ops.rms_norm(x, weight, EPS), _rms(x, weight), _rms(x, weight).abs())


@pytest.mark.parametrize("dim", [1, 61, 384])
def test_add_rms_norm(dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, residual = (torch.randn(7, dim, generator=rng).to(dtype) for _ in range(2))
    weight = torch.randn(dim, generator=rng).to(dtype)
    out, stream = ops.add_rms_norm(x, residual, weight, EPS)
    assert_same_bytes(stream, (x.float() + residual.float()).to(dtype))
    assert_same_bytes(out, ops.rms_norm(stream, weight, EPS))


def test_norm_rows_do_not_depend_on_the_batch(dtype: torch.dtype, rng: torch.Generator, threads: None) -> None:
    x = torch.randn(70, 389, generator=rng).to(dtype)
    weight = torch.randn(389, generator=rng).to(dtype)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, EPS) for i in range(70)])
    for rows in (1, 2, 16, 61, 70):
        assert_same_bytes(ops.rms_norm(x[70 - rows :], weight, EPS), alone[70 - rows :])
    ops.set_num_threads(3)
    assert_same_bytes(ops.rms_norm(x, weight, EPS), alone)
    wide = torch.cat([x, x], dim=1)[:, :389]
    assert_same_bytes(ops.rms_norm(wide, weight, EPS), alone)
    # Negative control: a sum of squares taken in another order is seen by the comparison.
    other = x.float() * (x.float().flip(-1).square().cumsum(-1)[:, -1:] / 389 + EPS).rsqrt() * weight.float()
    assert first_difference(other, ops.rms_norm(x, weight, EPS).float()) is not None


def _rope_reference(head: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """[rows, heads, head_dim] of T -> float64, the QK-norm's result rounded to T on the way."""
    if weight is not None:
        head = _rms(head, weight).to(head.dtype)
    a, b = head.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


@pytest.mark.parametrize("head_dim", [2, 64, 90])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_write(head_dim: int, qk_norm: bool, dtype: torch.dtype, rng: torch.Generator) -> None:
    rows, q_heads, kv_heads, page_size = 19, 4, 2, 16
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim, generator=rng).to(dtype)
    angles = torch.rand(64, head_dim // 2, generator=rng) * 6
    cos, sin = angles.cos(), angles.sin()
    weights = [torch.rand(head_dim, generator=rng).add(0.5).to(dtype) if qk_norm else None for _ in range(2)]
    position = torch.arange(7, 7 + rows, dtype=torch.int32)  # pages 0 and 1, from the middle of one
    pages = torch.full((2, 2, kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    row_page = torch.tensor([pages[p // page_size].data_ptr() for p in position.tolist()])
    row_page[3] = 0  # a row whose K and V go nowhere
    counts = {"q_heads": q_heads, "kv_heads": kv_heads}
    sizes = {**counts, "head_dim": head_dim, "page_size": page_size, "eps": EPS}
    poison_allocator()
    q = ops.rope_write(qkv, *weights, cos, sin, position, row_page, **sizes)

    heads = qkv.view(rows, -1, head_dim)
    at = position.long()
    magnitude = torch.full(q.shape, 4.0, dtype=torch.float64)
    if qk_norm and dtype == torch.bfloat16:  # the float64 norm may round to bfloat16's other neighbour
        magnitude *= 4 * 2**-8 / (16 * torch.finfo(torch.float32).eps)
    assert_close(q, _rope_reference(heads[:, :q_heads], weights[0], cos[at], sin[at]), magnitude)
    k_want = _rope_reference(heads[:, q_heads : q_heads + kv_heads], weights[1], cos[at], sin[at])
    for row in range(rows):
        page, slot = int(at[row]) // page_size, int(at[row]) % page_size
        if row == 3:
            assert bool(pages[page, :, :, slot].isnan().all())
            continue
        assert_close(pages[page, 0, :, slot], k_want[row], magnitude[0, :kv_heads])
        assert_same_bytes(pages[page, 1, :, slot], heads[row, q_heads + kv_heads :])
    written = torch.zeros(2 * page_size, dtype=torch.bool)
    written[at] = True
    untouched = pages.permute(0, 3, 1, 2, 4).reshape(2 * page_size, -1)[~written]
    assert bool(untouched.isnan().all())

    alone = [
        ops.rope_write(qkv[i : i + 1], *weights, cos, sin, position[i : i + 1], row_page[i : i + 1], **sizes)
        for i in range(rows)
    ]
    assert_same_bytes(torch.cat(alone), q)


def test_rope_bad_input() -> None:
    args = {"q_heads": 2, "kv_heads": 1, "head_dim": 8, "page_size": 4, "eps": EPS}
    qkv, table = torch.zeros(1, 32), torch.zeros(5, 4)
    page = torch.zeros(1, dtype=torch.int64)

    def call(position: int = 0, row_page: Tensor = page, **changed: int) -> None:
        at = torch.tensor([position], dtype=torch.int32)
        ops.rope_write(qkv, None, None, table, table, at, row_page, **{**args, **changed})  # type: ignore[arg-type]

    with pytest.raises(KernelError, match=r"row_position\[0\] is 5; cos and sin hold positions 0 to 4"):
        call(position=5)
    with pytest.raises(KernelError, match=r"row_position\[0\] is -1"):
        call(position=-1)
    with pytest.raises(KernelError, match=r"qkv has shape \[1, 32\]; it must be \[\*, 40\]"):
        call(q_heads=3)
    with pytest.raises(KernelError, match="head_dim is 7"):
        call(head_dim=7)
    with pytest.raises(KernelError, match="page_size is 0"):
        call(page_size=0)
    with pytest.raises(KernelError, match="row_page has dtype int32"):
        call(row_page=page.int())


@pytest.mark.parametrize("dim", [1, 16, 61])
def test_silu_mul(dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    gate_up = (torch.randn(9, 2 * dim, generator=rng) * 20).to(dtype)
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = -200.0, 200.0, 0.0
    poison_allocator()
    got = ops.silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = gate * torch.sigmoid(gate) * up
    assert_close(got, want, want.abs().clamp_min(1e-30))
    assert_same_bytes(torch.cat([ops.silu_mul(gate_up[i : i + 1]) for i in range(9)]), got)


def test_silu_mul_keeps_nan() -> None:
    assert bool(ops.silu_mul(torch.tensor([[float("nan"), 1.0, 1.0, 1.0]]))[0, 0].isnan())


def test_empty_and_bad_shapes(dtype: torch.dtype) -> None:
    weight = torch.ones(8, dtype=dtype)
    assert ops.rms_norm(torch.empty(0, 8, dtype=dtype), weight, EPS).shape == (0, 8)
    assert ops.silu_mul(torch.empty(0, 8, dtype=dtype)).shape == (0, 4)
    with pytest.raises(KernelError, match=r"weight has shape \[8\]; it must be \[9\]"):
        ops.rms_norm(torch.zeros(2, 9, dtype=dtype), weight, EPS)
    with pytest.raises(KernelError, match="eps is -1"):
        ops.rms_norm(torch.zeros(2, 8, dtype=dtype), weight, -1.0)
    with pytest.raises(KernelError, match=r"residual has shape \[1, 8\]"):
        ops.add_rms_norm(torch.zeros(2, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype), weight, EPS)
    with pytest.raises(KernelError, match="gate, then up"):
        ops.silu_mul(torch.zeros(2, 7, dtype=dtype))
