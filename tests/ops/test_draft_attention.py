# SPDX-License-Identifier: Apache-2.0
"""kept_attention and quant_attention against float64, and what they must not read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.pages import (
    DEVICES,
    DTYPES,
    Pool,
    addresses,
    assert_close,
    assert_same_bits,
    attention64,
    full_pages,
    head_pages,
    int32,
    normal,
    poison_allocator,
    table,
)
from tests.ops.test_quantize import dequantized, page_bytes
from vericache import ops
from vericache.errors import KernelError


class KeptCase:
    """Requests with their own kept rows of each head, tails and query rows."""

    def __init__(self, kept: list[list[int]], tails: list[tuple[int, list[int]]], q_heads: int, head_dim: int,
                 dtype: torch.dtype, device: str, page_size: int = 32, seed: int = 0) -> None:  # fmt: skip
        self.device, self.page_size, self.scale = device, page_size, head_dim**-0.5
        heads = len(kept[0])
        self.keep_alive: list[object] = []
        self.rows: list[tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]] = []
        kept_table, tail_table, offsets, positions, queries = [], [], [0], [], []
        for r, (lengths, (start, at)) in enumerate(zip(kept, tails, strict=True)):
            head_k = [normal((n, head_dim), dtype, device, 100 * r + h) for h, n in enumerate(lengths)]
            head_v = [normal((n, head_dim), dtype, device, 100 * r + h + 50) for h, n in enumerate(lengths)]
            for k, v in zip(head_k, head_v, strict=True):
                pages, address = head_pages(k, v, page_size, seed=seed + r)
                self.keep_alive.append(pages)
                kept_table.append(address)
            end = max([start, *(p + 1 for p in at)])
            tail_k = normal((heads, end, head_dim), dtype, device, 100 * r + 70)
            tail_v = normal((heads, end, head_dim), dtype, device, 100 * r + 71)
            pages, address = full_pages(tail_k, tail_v, page_size, start=start, seed=seed + r)
            self.keep_alive.append(pages)
            tail_table.append(address)
            q = normal((len(at), q_heads, head_dim), dtype, device, 100 * r + 80)
            queries.append(q)
            offsets.append(offsets[-1] + len(at))
            positions += at
            for row, p in zip(q, at, strict=True):
                self.rows.append((row, head_k, head_v, tail_k[:, start : p + 1], tail_v[:, start : p + 1]))
        self.kept_len = torch.tensor(kept, dtype=torch.int32, device=device)
        self.kept_table = table(kept_table, device).view(len(kept), heads, -1)
        self.tail_table = table(tail_table, device)
        self.tail_start = int32([start for start, _ in tails], device)
        self.row_offsets, self.row_position = int32(offsets, device), int32(positions, device)
        self.q = torch.cat(queries)

    def run(self) -> Tensor:
        poison_allocator(self.q)
        return ops.kept_attention(
            self.q, self.kept_table, self.kept_len, self.tail_table, self.tail_start, self.row_offsets,
            self.row_position, page_size=self.page_size, scale=self.scale,
        )  # fmt: skip

    def reference(self) -> Tensor:
        out = []
        for q, head_k, head_v, tail_k, tail_v in self.rows:
            group = q.shape[0] // len(head_k)
            heads = [
                attention64(
                    q[h * group : (h + 1) * group],
                    torch.cat([k, tail_k[h]])[None],
                    torch.cat([v, tail_v[h]])[None],
                    self.scale,
                )
                for h, (k, v) in enumerate(zip(head_k, head_v, strict=True))
            ]
            out.append(torch.cat(heads))
        return torch.stack(out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "head_dim"), [(8, 64), (2, 32), (14, 80), (4, 128)])
def test_kept_against_float64(device, dtype, q_heads, head_dim):
    case = KeptCase(
        kept=[[300, 17], [0, 1], [256, 0], [33, 64], [5, 700]],
        tails=[(512, [520]), (32, [32, 60, 61]), (64, [63 + 65]), (0, [0]), (96, [95, 96, 130])],
        q_heads=q_heads, head_dim=head_dim, dtype=dtype, device=device,
    )  # fmt: skip
    assert_close(case.run(), case.reference(), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (128, torch.bfloat16)])
def test_kept_and_tail_can_be_empty(device, head_dim, dtype):
    # Request 0: no kept rows, head 1 has neither kept rows nor a tail to look at: nothing to attend to gives zeros.
    case = KeptCase([[40, 0]], [(64, [63])], 8, head_dim, dtype, device)
    got = case.run()
    assert_same_bits(got[:, 4:], torch.zeros_like(got[:, 4:]), "a head without keys")
    q, head_k, head_v, _, _ = case.rows[0]
    assert_close(got[0, :4], attention64(q[:4], head_k[0][None], head_v[0][None], case.scale), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (128, torch.bfloat16)])
def test_kept_idle_rows_are_zeros(device, head_dim, dtype):
    case = KeptCase([[700, 90]], [(768, [770])], 8, head_dim, dtype, device)
    want, alone = case.reference(), case.run()
    case.q = torch.cat([case.q, normal((2, 8, head_dim), dtype, device, 9)])
    case.row_position = int32([770, -5, -5], device)
    got = case.run()
    assert_close(got[:1], want, dtype)
    if device == "cpu":  # on a GPU more rows, idle or not, may be cut otherwise
        assert_same_bits(got[:1], alone, "beside idle rows")
    assert_same_bits(got[1:], torch.zeros_like(got[1:]), "idle rows")
    case.row_offsets, case.row_position = int32([0, 0], device), int32([-5, -5, -5], device)
    assert_same_bits(case.run(), torch.zeros_like(got), "only idle rows")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_as_full_gives_the_bits_of_paged(device, requests, rows, dtype):
    heads, head_dim, page_size, tail_start, tokens = 2, 128, 64, 1664, 1700
    k, v = (normal((heads, tokens, head_dim), dtype, device, seed) for seed in (1, 2))
    _pages, address = full_pages(k, v, page_size)
    _tail, tail_address = full_pages(k, v, page_size, start=tail_start)
    kept = [head_pages(k[h, :tail_start], v[h, :tail_start], page_size, seed=h) for h in range(heads)]
    q = normal((requests * rows, 8, head_dim), dtype, device, 3)
    where = {
        "row_offsets": int32([rows * r for r in range(requests + 1)], device),
        "row_position": int32(list(range(tokens - rows, tokens)) * requests, device),
        "page_size": page_size,
        "scale": head_dim**-0.5,
    }
    full = ops.paged_attention(q, table([address] * requests, device), **where, kv_heads=heads)
    got = ops.kept_attention(
        q, table([a for _, a in kept] * requests, device).view(requests, heads, -1),
        int32([tail_start] * heads * requests, device).view(requests, heads), table([tail_address] * requests, device),
        int32([tail_start] * requests, device), **where, as_full=True,
    )  # fmt: skip
    assert_same_bits(got, full, "nothing dropped")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("requests", [1, 2, 40])  # on CUDA one is cut otherwise than few, and few than many
def test_kept_does_not_depend_on_pages(device, dtype, head_dim, requests):
    kept = ([[3000, 2100], [10, 900]] * requests)[:requests]
    tails = ([(3200, [3210]), (960, [970, 968])] * requests)[:requests]
    case, moved = (KeptCase(kept, tails, 8, head_dim, dtype, device, seed=seed) for seed in (0, 50))
    assert not torch.equal(case.kept_table, moved.kept_table)
    got = case.run()
    assert_same_bits(moved.run(), got, "the same call in other pages")
    assert_close(got, case.reference(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_does_not_depend_on_threads_or_neighbours(dtype):
    case = KeptCase([[3000, 2100], [10, 900]], [(3200, [3210, 3211]), (960, [970])], 8, 64, dtype, "cpu", 64)
    before = ops.num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            results.append(case.run())
    finally:
        ops.set_num_threads(before)
    for got in results[1:]:
        assert_same_bits(got, results[0], "threads")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 2])
@pytest.mark.parametrize(
    ("q_heads", "head_dim", "page_size", "group"),
    [(8, 64, 64, 32), (4, 32, 16, 16), (14, 80, 32, 16), (2, 128, 128, 128)],
)
def test_quant_against_float64(device, dtype, bits, q_heads, head_dim, page_size, group):
    heads, scale = 2, head_dim**-0.5
    shape = {"kv_heads": heads, "head_dim": head_dim, "page_size": page_size, "bits": bits, "group": group}
    keep_alive: list[object] = []
    quant_rows, tail_rows, lengths, offsets, positions, queries, want = [], [], [], [0], [], [], []
    for r, (pages, at) in enumerate([(5, [0, 1, 40]), (0, [3]), (3, [-1]), (9, [17])]):
        length = pages * page_size
        tokens = length + max(at) + 1
        k = normal((heads, tokens, head_dim), dtype, device, 10 * r)
        v = normal((heads, tokens, head_dim), dtype, device, 10 * r + 1)
        full, full_address = full_pages(k[:, :length], v[:, :length], page_size, seed=r)
        tail, tail_address = full_pages(k, v, page_size, start=length, seed=r)
        pool = Pool(max(pages, 1), (page_bytes(dtype=dtype, **shape),), torch.uint8, device, seed=r)
        quant = [pool.take() for _ in range(pages)]
        keep_alive += [full, tail, quant]
        ops.kv_quantize(
            torch.tensor(full_address, dtype=torch.int64, device=device),
            torch.tensor(addresses(quant), dtype=torch.int64, device=device),
            torch.empty(0, dtype=dtype, device=device),
            **shape,
        )
        if pages:
            rough = [dequantized(page, dtype=dtype, **shape) for page in quant]
            k, v = k.double(), v.double()
            k[:, :length] = torch.cat([page[0] for page in rough], 1)
            v[:, :length] = torch.cat([page[1] for page in rough], 1)
        q = normal((len(at), q_heads, head_dim), dtype, device, 10 * r + 2)
        for row, offset in zip(q, at, strict=True):
            want.append(attention64(row, k[:, : length + offset + 1], v[:, : length + offset + 1], scale))
        quant_rows.append(addresses(quant))
        tail_rows.append(tail_address)
        lengths.append(length)
        offsets.append(offsets[-1] + len(at))
        positions += [length + offset for offset in at]
        queries.append(q)
    rows = torch.cat(queries)
    poison_allocator(rows)
    got = ops.quant_attention(
        rows, table(quant_rows, device), int32(lengths, device), table(tail_rows, device), int32(offsets, device),
        int32(positions, device), kv_heads=heads, page_size=page_size, bits=bits, group=group, scale=scale,
    )  # fmt: skip
    assert_close(got, torch.stack(want), dtype)


# Bad input.


def kept_arguments() -> tuple[dict[str, object], KeptCase]:
    case = KeptCase([[40, 20]], [(64, [70])], 8, 64, torch.float32, "cpu")
    names = ("q", "kept_table", "kept_len", "tail_table", "tail_start", "row_offsets", "row_position")
    return {name: getattr(case, name) for name in names} | {"page_size": 32, "scale": 0.125}, case


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kept_table", torch.zeros(1, 2, dtype=torch.int64), r"kept_table has shape \[1, 2\]"),
        ("kept_table", torch.zeros(1, 2, 2, dtype=torch.int64), "kept_table has no page at entry 0"),
        ("kept_len", torch.tensor([[40, 65]], dtype=torch.int32), "kept_len of request 0, head 1 is 65"),
        ("kept_len", torch.tensor([[-1, 5]], dtype=torch.int32), "kept_len of request 0, head 0 is -1"),
        ("tail_table", torch.zeros(1, 1, dtype=torch.int64), "tail_table has no page at entry 0"),
        ("tail_table", torch.zeros(2, 1, dtype=torch.int64), r"tail_table has shape \[2, 1\]"),
        ("tail_start", int32([48], "cpu"), "tail_start of request 0 is 48"),
        ("row_position", int32([62], "cpu"), "row_position of row 0 is 62"),
        ("row_position", int32([96], "cpu"), "row_position of row 0 is 96"),
    ],
)
def test_kept_bad_input(name, value, message):
    arguments, case = kept_arguments()
    arguments[name] = value
    with pytest.raises(KernelError, match=message):
        ops.kept_attention(**arguments)
    assert case


def quant_arguments() -> dict[str, object]:
    return {
        "q": torch.zeros(1, 8, 64),
        "quant_table": torch.zeros(1, 2, dtype=torch.int64),
        "quant_len": int32([0], "cpu"),
        "tail_table": torch.zeros(1, 1, dtype=torch.int64),
        "row_offsets": int32([0, 0], "cpu"),
        "row_position": int32([0], "cpu"),
        "kv_heads": 2,
        "page_size": 64,
        "bits": 4,
        "group": 32,
        "scale": 0.125,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits is 3; it must be 2, 4, 5, 6, 7 or 8"),
        ({"group": 24}, "group is 24"),
        ({"group": 128}, "group is 128"),
        ({"quant_len": int32([64], "cpu"), "row_offsets": int32([0, 1], "cpu")}, "quant_table has no page at entry 0"),
        ({"quant_len": int32([63], "cpu"), "row_offsets": int32([0, 1], "cpu")}, "quant_len of request 0 is 63"),
        ({"quant_len": int32([192], "cpu"), "row_offsets": int32([0, 1], "cpu")}, "quant_len of request 0 is 192"),
        ({"row_offsets": int32([0, 1], "cpu")}, "tail_table has no page at entry 0"),
    ],
)
def test_quant_bad_input(changes, message):
    with pytest.raises(KernelError, match=message):
        ops.quant_attention(**(quant_arguments() | changes))


def test_opcheck():
    arguments, case = kept_arguments()
    torch.library.opcheck(torch.ops.vericache.kept_attention.default, tuple(arguments.values()))
    torch.library.opcheck(torch.ops.vericache.quant_attention.default, tuple(quant_arguments().values()))
    assert case
