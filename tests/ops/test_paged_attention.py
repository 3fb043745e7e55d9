# SPDX-License-Identifier: Apache-2.0
"""paged_attention: right, and the same bits whatever else is in the call (R1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.ops.pages import (
    DEVICES,
    DTYPES,
    assert_close,
    assert_same_bits,
    attention64,
    full_pages,
    int32,
    normal,
    poison_allocator,
    table,
)
from vericache import ops
from vericache.errors import KernelError

SPLIT = 256  # the kernels' absolute cut; only the negative controls need to know it
CUDA_SPLIT = 512  # of the first 4096 keys (csrc/kernels/device/splits.cuh)


@dataclass
class Request:
    """One request's cache and the query rows that attend to it."""

    tokens: int
    positions: list[int]
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.kv_heads, self.tokens, self.head_dim)
        self.k = normal(shape, self.dtype, self.device, self.seed)
        self.v = normal(shape, self.dtype, self.device, self.seed + 1)
        self.v[:, ::7] = -0.0
        q_shape = (len(self.positions), self.q_heads, self.head_dim)
        self.q = normal(q_shape, self.dtype, self.device, self.seed + 2)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def attend(
    requests: list[Request],
    page_size: int = 64,
    window: int = 0,
    rows: slice = slice(None),
    idle: int = 0,
    seed: int = 0,
) -> Tensor:
    """The op on rows `rows` of each request, all in one call, with `idle` rows behind them."""
    first = requests[0]
    pages = [full_pages(r.k, r.v, page_size, seed=seed + i) for i, r in enumerate(requests)]
    q = torch.cat([r.q[rows] for r in requests] + [normal((idle, *first.q.shape[1:]), first.dtype, first.device, 99)])
    positions = [p for r in requests for p in r.positions[rows]] + [-5] * idle
    offsets = [0]
    for r in requests:
        offsets.append(offsets[-1] + len(r.positions[rows]))
    poison_allocator(q)
    return ops.paged_attention(
        q,
        table([address for _, address in pages], first.device),
        int32(offsets, first.device),
        int32(positions, first.device),
        kv_heads=first.kv_heads,
        page_size=page_size,
        scale=first.scale,
        window=window,
    )


def one_row_at_a_time(request: Request, page_size: int = 64, window: int = 0) -> Tensor:
    return torch.cat([attend([request], page_size, window, slice(i, i + 1)) for i in range(len(request.positions))])


def reference(request: Request, window: int = 0) -> Tensor:
    rows = []
    for q, position in zip(request.q, request.positions, strict=True):
        keys = slice(max(0, position + 1 - window) if window else 0, position + 1)
        rows.append(attention64(q, request.k[:, keys], request.v[:, keys], request.scale))
    return torch.stack(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"),
    [(8, 2, 64), (3, 3, 32), (7, 1, 80), (4, 1, 96), (16, 1, 128), (12, 2, 64), (10, 2, 128)],
)
@pytest.mark.parametrize("window", [0, 1, 100, 300])
def test_against_float64(device, dtype, q_heads, kv_heads, head_dim, window):
    positions = [0, 1, 14, 15, 16, 60, 61, 254, 255, 256, 257, 511, 512, 700]
    request = Request(701, positions, q_heads, kv_heads, head_dim, dtype, device)
    got = attend([request], window=window)
    assert_close(got, reference(request, window), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 77])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 80)])
def test_row_count_changes_no_bit(device, dtype, window, q_heads, kv_heads, head_dim):
    # Rows at consecutive positions over a cut, as a verify or a prefill chunk has them: 1 .. 40 of them, from either
    # end, against one at a time.
    request = Request(540, list(range(500, 540)), q_heads, kv_heads, head_dim, dtype, device)
    alone = one_row_at_a_time(request, window=window)
    for count in range(1, 41):
        assert_same_bits(attend([request], window=window, rows=slice(0, count)), alone[:count], f"first {count} rows")
        if count % 3 == 0:
            got = attend([request], window=window, rows=slice(40 - count, 40))
            assert_same_bits(got, alone[40 - count :], f"last {count} rows")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_chunk_equals_single_rows(device, dtype):
    request = Request(700, list(range(300, 700)), 8, 2, 64, dtype, device)
    whole = attend([request])
    for i in (0, 1, 31, 32, 211, 212, 399):
        assert_same_bits(whole[i : i + 1], attend([request], rows=slice(i, i + 1)), f"row {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mix_changes_no_bit(device, dtype):
    sizes = [(1, 1), (300, 5), (61, 40), (1000, 1), (65, 17)]
    requests = [
        Request(n, list(range(n - rows, n)), dtype=dtype, device=device, seed=10 * i)
        for i, (n, rows) in enumerate(sizes)
    ]
    alone = [attend([r]) for r in requests]
    mixed = attend(requests, idle=3, seed=5)
    used = sum(len(r.positions) for r in requests)
    assert_same_bits(mixed[:used], torch.cat(alone), "mixed batch")
    assert_same_bits(mixed[used:], torch.zeros_like(mixed[used:]), "idle rows")
    backwards = attend(requests[::-1])
    assert_same_bits(backwards, torch.cat(alone[::-1]), "the batch turned round")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_placement_and_size_change_no_bit(device, dtype):
    request = Request(900, [0, 15, 16, 255, 256, 600, 899], 8, 2, 64, dtype, device)
    want = attend([request], page_size=64, window=300, seed=1)
    for page_size in (16, 32, 64, 128, 256):
        for seed in (2, 3):
            got = attend([request], page_size=page_size, window=300, seed=seed)
            assert_same_bits(got, want, f"page_size {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_long_contexts_change_no_bit(dtype):
    # A few rows share out the splits of a block among the threads and keep their states; 150 rows have blocks enough to
    # merge as they go.
    request = Request(6000, list(range(5850, 6000)), dtype=dtype)
    before = ops.num_threads()
    try:
        whole = attend([request])
        for threads in (1, 2, 3, 7):
            ops.set_num_threads(threads)
            for first in (149, 147, 0):
                got = attend([request], rows=slice(first, 150))
                assert_same_bits(got, whole[first:], f"{150 - first} rows, {threads} threads")
    finally:
        ops.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_masked_keys_are_not_touched(device, dtype, bad):
    # Rows 0 .. 3 at positions 298 .. 301; the token at 300 is bad: rows before it must not notice, rows from it must.
    request = Request(302, [298, 299, 300, 301], dtype=dtype, device=device)
    clean = attend([request])
    request.k[:, 300] = bad
    request.v[:, 300] = bad
    # Tensor cores multiply a masked key's weight, an exact zero, with its value: a value that is not finite then
    # reaches rows that share a call and a tile with one that reads it (docs/exactness.md). Apart, it must not.
    apart = device == "cuda" and dtype == torch.bfloat16
    got = torch.cat([attend([request], rows=s) for s in (slice(0, 2), slice(2, 4))]) if apart else attend([request])
    assert_same_bits(got[:2], clean[:2], "rows before the bad token")
    assert got[2:].isnan().all()
    # Behind the window it is as far away as ahead of the position.
    request.positions = [304, 305, 306, 307]
    more = Request(308, request.positions, dtype=dtype, device=device)
    clean = attend([more], window=5)
    more.k[:, 300] = bad
    more.v[:, 300] = bad
    if apart:
        return  # a tile is read whole: what the window has just left is multiplied by an exact zero too
    got = attend([more], window=5)
    assert got[0].isnan().all()
    assert_same_bits(got[1:], clean[1:], "rows whose window begins past the bad token")


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_one_row_stays_there(device):
    request = Request(400, list(range(390, 400)), device=device)
    clean = attend([request])
    request.q[4] = float("nan")
    got = attend([request])
    assert got[4].isnan().all()
    keep = [i for i in range(10) if i != 4]
    assert_same_bits(got[keep], clean[keep], "the other rows")


@pytest.mark.parametrize("device", DEVICES)
def test_a_split_of_minus_infinity_has_no_weight(device):
    request = Request(600, [599], device=device)
    request.q.abs_()
    request.k[:, :256, 3] = -float("inf")
    want = attention64(request.q[0], request.k[:, 256:], request.v[:, 256:], request.scale)[None]
    assert_close(attend([request]), want, torch.float32)
    request.k[:, :, 3] = -float("inf")  # nothing left: 0 / 0, as torch has it; on CUDA nothing left is no keys: zeros
    nothing = attend([request])
    assert nothing.isnan().all() if device == "cpu" else (nothing.isnan() | (nothing == 0)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores(device):
    request = Request(700, [699], device=device)
    request.q *= 100
    request.k *= 10
    want = reference(request)
    assert (attend([request]).double() - want).abs().max() < 2e-3  # the scores themselves carry 2^-24 x 1e4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "width", "first"), [(torch.float32, 70, 3), (torch.bfloat16, 72, 8)])
def test_strided_q_and_table(device, dtype, width, first):
    request = Request(300, [100, 299], dtype=dtype, device=device)
    want = attend([request])
    wide = torch.full((2, 12, width), float("nan"), dtype=dtype, device=device)
    wide[:, 2:10, first : first + 64] = request.q
    pages, address = full_pages(request.k, request.v, 64)
    wide_table = torch.ones(1, 20, dtype=torch.int64, device=device)
    wide_table[0, 4 : 4 + len(address)] = torch.tensor(address, device=device)
    got = ops.paged_attention(
        wide[:, 2:10, first : first + 64], wide_table[:, 4:12], int32([0, 2], device), int32([100, 299], device),
        kv_heads=2, page_size=64, scale=request.scale,
    )  # fmt: skip
    assert len(pages) == 5
    assert_same_bits(got, want, "strided")


@pytest.mark.cuda
def test_q_off_16_bytes_is_refused_cuda():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs read q 4 bytes at a time")
    request = Request(300, [100, 299], dtype=torch.bfloat16, device="cuda")
    _, address = full_pages(request.k, request.v, 64)
    wide = torch.zeros(2, 8, 70, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(KernelError, match=r"strides 560, 70 elements .* contiguous"):
        ops.paged_attention(
            wide[:, :, 2:66], torch.tensor([address], device="cuda"), int32([0, 2], "cuda"), int32([100, 299], "cuda"),
            kv_heads=2, page_size=64, scale=request.scale,
        )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(device, dtype):
    q = torch.empty(0, 8, 64, dtype=dtype, device=device)
    none = torch.empty(0, 4, dtype=torch.int64, device=device)
    kwargs = {"kv_heads": 2, "page_size": 64, "scale": 1.0}
    out = ops.paged_attention(q, none, int32([0], device), int32([], device), **kwargs)
    assert out.shape == (0, 8, 64) and out.dtype == dtype
    idle = ops.paged_attention(
        normal((3, 8, 64), dtype, device, 0), none, int32([0], device), int32([7, 7, 7], device), **kwargs
    )
    assert_same_bits(idle, torch.zeros(3, 8, 64, dtype=dtype, device=device), "only idle rows")


# Negative controls: what the tests above compare does tell one order of reduction from another.


def merged_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, cut: int) -> Tensor:
    """Float32 attention of one row, states cut every `cut` keys and merged from left to right."""
    m, lsum, o = torch.full((q.shape[0],), -math.inf), torch.zeros(q.shape[0]), torch.zeros_like(q)
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    for at in range(0, k.shape[1], cut):
        scores = torch.einsum("hd,hkd->hk", q, k[:, at : at + cut]) * scale
        top = torch.maximum(m, scores.amax(-1))
        weights = (scores - top[:, None]).exp()
        fade = (m - top).exp()
        lsum = lsum * fade + weights.sum(-1)
        o = o * fade[:, None] + torch.einsum("hk,hkd->hd", weights, v[:, at : at + cut])
        m = top
    return o / lsum[:, None]


def test_a_cut_that_depends_on_the_row_count_would_show():
    request = Request(1000, [998, 999])
    pair = [merged_softmax(q, request.k, request.v, request.scale, cut=1000 // 2) for q in request.q]
    single = [merged_softmax(q, request.k, request.v, request.scale, cut=SPLIT) for q in request.q]
    torch.testing.assert_close(torch.stack(pair), torch.stack(single), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="differ, first at"):
        assert_same_bits(torch.stack(pair), torch.stack(single))


@pytest.mark.parametrize("device", DEVICES)
def test_the_cut_is_absolute(device):
    # The same keys and the same query 100 positions later: the same attention, cut elsewhere. By a whole split: the
    # same cut and the same bits.
    request = Request(700, [699], device=device)
    want = attend([request], window=700)
    split = SPLIT if device == "cpu" else CUDA_SPLIT
    for shift, same in ((100, False), (split, True)):
        moved = Request(700 + shift, [699 + shift], device=device)
        moved.q, moved.k[:, shift:], moved.v[:, shift:] = request.q, request.k, request.v
        got = attend([moved], window=700)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        if same:
            assert_same_bits(got, want, "moved by a split")
        else:
            with pytest.raises(AssertionError, match="differ, first at"):
                assert_same_bits(got, want)


# Bad input.


def good_arguments() -> dict[str, object]:
    request = Request(100, [98, 99])
    pages, address = full_pages(request.k, request.v, 64)
    return {
        "q": request.q,
        "page_table": table([address], "cpu"),
        "row_offsets": int32([0, 2], "cpu"),
        "row_position": int32([98, 99], "cpu"),
        "kv_heads": 2,
        "page_size": 64,
        "scale": 0.125,
        "window": 0,
        "keep": pages,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 8, 64, dtype=torch.float16), "q has dtype float16"),
        ("q", torch.zeros(2, 8 * 64), r"q has shape \[2, 512\]"),
        ("q", torch.zeros(2, 8, 40), "head_dim is 40"),
        ("q", torch.zeros(2, 64, 8).transpose(1, 2), "q has strides"),
        ("page_table", torch.zeros(1, 2, dtype=torch.int32), "page_table has dtype int32"),
        ("page_table", torch.tensor([[0, 0]]), "page_table has no page at entry 0"),
        ("row_offsets", torch.tensor([0, 2]), "row_offsets has dtype int64"),
        ("row_offsets", int32([0, 1, 2], "cpu"), r"row_offsets has shape \[3\]"),
        ("row_offsets", int32([1, 2], "cpu"), "row_offsets begins with 1"),
        ("row_offsets", int32([0, -1], "cpu"), "row_offsets falls from 0 to -1"),
        ("row_offsets", int32([0, 3], "cpu"), "row_offsets ends with 3"),
        ("row_position", int32([98], "cpu"), r"row_position has shape \[1\]"),
        ("row_position", int32([98, 128], "cpu"), "row_position of row 1 is 128"),
        ("row_position", int32([-1, 5], "cpu"), "row_position of row 0 is -1"),
        ("kv_heads", 3, "q has 8 heads for kv_heads 3"),
        ("kv_heads", 0, "kv_heads is 0"),
        ("page_size", 48, "page_size is 48"),
        ("page_size", 8, "page_size is 8"),
        ("page_size", 512, "page_size is 512"),
        ("scale", math.nan, "scale is nan"),
        ("window", -1, "window is -1"),
    ],
)
def test_bad_input(name, value, message):
    arguments = good_arguments()
    pages = arguments.pop("keep")
    arguments[name] = value
    with pytest.raises(KernelError, match=message):
        ops.paged_attention(**arguments)
    assert pages


def test_opcheck():
    arguments = good_arguments()
    pages = arguments.pop("keep")
    torch.library.opcheck(torch.ops.vericache.paged_attention.default, tuple(arguments.values()))
    assert pages
