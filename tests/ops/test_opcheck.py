# SPDX-License-Identifier: Apache-2.0
"""Every op passes torch.library.opcheck: schema, fake kernel, dispatch under compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vericache import ops

ROWS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, BITS, GROUP = 5, 4, 2, 64, 32, 4, 32


class Cases:
    """Arguments for each op; owns the pages that the tables point to."""

    def __init__(self, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(5)
        self.full = torch.randn(4, 2, KV_HEADS, PAGE, HEAD_DIM, generator=rng).to(dtype)
        self.head = torch.randn(KV_HEADS, 2, 2, PAGE, HEAD_DIM, generator=rng).to(dtype)
        self.quant = torch.zeros(2, 2 * KV_HEADS * PAGE * HEAD_DIM * dtype.itemsize, dtype=torch.uint8)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(dtype)

        def i32(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        def addresses(pages: Tensor) -> Tensor:
            return torch.tensor([page.data_ptr() for page in pages])

        full, quant = addresses(self.full), addresses(self.quant)
        heads = torch.stack([addresses(pages) for pages in self.head])
        q, offsets, scale = rand(ROWS, Q_HEADS, HEAD_DIM), i32(0, 2, ROWS), HEAD_DIM**-0.5
        positions = i32(40, 41, 33, 34, 35)
        tails, starts = full[[1, 3]].view(2, 1), i32(PAGE, PAGE)
        like = torch.empty(0, dtype=dtype)
        bf16 = torch.randn(2, 4096, generator=rng).to(torch.bfloat16)
        room = ops.bf16_packed_bound(4096)
        self.raw, self.packed = bf16, torch.zeros(2, room, dtype=torch.uint8)
        raw, packed, codec_like = addresses(bf16), addresses(self.packed), bf16[:0]
        packed_bytes = ops.bf16_pack(raw, packed, codec_like, elems=4096, room=room)
        sizes = (like, KV_HEADS, HEAD_DIM, PAGE, BITS, GROUP)
        moved = torch.arange(20, dtype=torch.int32).repeat(KV_HEADS, 1)
        self.arguments: dict[str, tuple[Any, ...]] = {
            "kv_quantize": (full[:2], quant, *sizes),
            "kv_dequantize": (full[:2], quant, *sizes),
            "gather_tokens": (full, heads, moved, i32(20, 7), like, HEAD_DIM, PAGE),
            "scatter_tokens": (full, heads, moved, i32(20, 7), like, HEAD_DIM, PAGE),
            "bf16_pack": (raw, packed, codec_like, 4096, room),
            "bf16_unpack": (packed, packed_bytes, raw, codec_like, 4096, 0),
            "paged_attention": (q, full.view(2, 2), offsets, positions, KV_HEADS, PAGE, scale, 0),
            "kept_attention": (
                q, heads.expand(2, -1, -1).contiguous(), i32(33, 0, 5, 64).view(2, 2), tails, starts,
                offsets, positions, PAGE, scale,
            ),
            "quant_attention": (
                q, quant.view(2, 1), starts, tails, offsets, positions, KV_HEADS, PAGE, BITS, GROUP, scale,
            ),
            "linear": (rand(ROWS, 48), rand(20, 48), rand(20), rand(ROWS, 20), True),
            "linear_swiglu": (rand(ROWS, 48), rand(20, 48), rand(20), True),
            "linear_rope_write": (
                rand(ROWS, 48), rand((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, 48), None, rand(HEAD_DIM), None,
                torch.randn(64, HEAD_DIM // 2), torch.randn(64, HEAD_DIM // 2), positions,
                full[[1, 1, 3, 3, 0]], Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, 1e-6, True,
            ),
            "rms_norm": (rand(ROWS, 48), rand(48), 1e-6),
            "add_rms_norm": (rand(ROWS, 48), rand(ROWS, 48), rand(48), 1e-6),
            "rope_write": (
                rand(ROWS, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM), rand(HEAD_DIM), rand(HEAD_DIM),
                torch.randn(64, HEAD_DIM // 2), torch.randn(64, HEAD_DIM // 2), positions,
                full[[1, 1, 3, 3, 0]], Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, 1e-6,
            ),
            "silu_mul": (rand(ROWS, 48),),
            "window_scores": (rand(ROWS, Q_HEADS, HEAD_DIM), rand(KV_HEADS, 40, HEAD_DIM)),
            "sample": (
                torch.randn(ROWS, 99, generator=rng), torch.ones(ROWS), i32(0, 5, 0, 1, 2),
                torch.full((ROWS,), 0.9), torch.zeros(ROWS), torch.arange(ROWS), positions,
            ),
        }  # fmt: skip


OPS = sorted(Cases(torch.float32).arguments)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    cases = Cases(dtype)
    torch.library.opcheck(getattr(torch.ops.vericache, name), cases.arguments[name])


def test_every_op_is_covered_and_has_a_cpu_kernel() -> None:
    registered = {
        schema.name.removeprefix("vericache::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("vericache::")
    }
    assert registered == set(OPS)
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vericache::{name}", "CPU"), name
        assert hasattr(ops, name), name


def test_a_wrong_fake_kernel_is_seen() -> None:
    """Negative control: opcheck as called here does look at the fake kernel's shapes."""
    with torch.library._scoped_library("vericache_control", "FRAGMENT") as library:
        library.define("halve(Tensor x) -> Tensor")
        library.impl("halve", lambda x: x[: x.shape[0] // 2].clone(), "CPU")
        torch.library.register_fake("vericache_control::halve", lambda x: x.new_empty(x.shape), lib=library)
        with pytest.raises(Exception, match=r"(?i)shape|size"):
            torch.library.opcheck(torch.ops.vericache_control.halve.default, (torch.randn(4),))
