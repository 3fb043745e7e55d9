# SPDX-License-Identifier: Apache-2.0
"""bf16_pack and bf16_unpack: every bfloat16 comes back bit for bit, from any memory, and the size is bounded."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from tests.ops.pages import DEVICES, addresses, assert_same_bits, normal
from vericache import ops
from vericache.errors import KernelError

BLOCK = 2048  # elements a block of the format
GUARD = 256  # bytes behind every buffer that must stay as they were


def bits(values: Tensor) -> Tensor:
    """int [any] of 16-bit patterns -> bfloat16."""
    return ((values + 0x8000) % 0x10000 - 0x8000).to(torch.int16).view(torch.bfloat16)


def inputs(kind: str, count: int) -> Tensor:
    """bfloat16 [count] on the CPU."""
    rng = torch.Generator().manual_seed(count)
    x = normal([count], torch.bfloat16, "cpu", count)
    words = x.view(torch.int16).to(torch.int64) & 0xFFFF
    noise = torch.randint(0, 0x10000, (count,), generator=rng)
    match kind:
        case "normal":
            return x
        case "keys":  # a few channels are far larger than the rest
            return (x.float() * torch.where(torch.arange(count) % 128 == 7, 60.0, 1.0)).to(torch.bfloat16)
        case "every value":
            return bits(torch.arange(count) * 40503)  # odd: a permutation of all 65536
        case "random bits":
            return bits(noise)
        case "zeros":
            return torch.zeros(count, dtype=torch.bfloat16)
        case "negative zeros":
            return bits(torch.where(torch.arange(count) % 2 == 1, 0x8000, words))
        case "subnormals":
            return bits(words & 0x807F)
        case "NaN and infinities":
            return bits(torch.where(torch.arange(count) % 50 == 0, 0x7F80 | noise & 0x807F, words))
        case "rare exponents":
            return bits(torch.where(noise % 300 == 0, noise * 7 % 0x10000, words))
    raise AssertionError(kind)


KINDS = [
    "normal", "keys", "every value", "random bits", "zeros", "negative zeros", "subnormals", "NaN and infinities",
    "rare exponents",
]  # fmt: skip
SIZES = [8, 61 * 8, BLOCK, BLOCK + 8, 5 * BLOCK - 16, 65536]


class Pages:
    """Uint8 buffers of `size` bytes, 128-byte aligned, poisoned, each with a guard behind it."""

    def __init__(self, count: int, size: int, device: str, *, pinned: bool = False) -> None:
        self.size, stride = size, (size + GUARD + 127) // 128 * 128
        self.memory = torch.full((count * stride + 128,), 0xA5, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -self.memory.data_ptr() % 128
        self.blocks = [self.memory[start + i * stride :][: size + GUARD] for i in range(count)]

    def table(self, device: str) -> Tensor:
        return torch.tensor(addresses(self.blocks), dtype=torch.int64, device=device)

    def fill(self, pages: list[Tensor]) -> Pages:
        for block, page in zip(self.blocks, pages, strict=True):
            block[: page.numel()] = page
        return self

    def used(self, sizes: list[int]) -> list[Tensor]:
        """The first bytes of each on the CPU; what lies behind its size must be untouched."""
        for block in self.blocks:
            assert bool((block[self.size :] == 0xA5).all()), "written past the end"
        return [block[:size].cpu() for block, size in zip(self.blocks, sizes, strict=True)]


def pack(values: list[Tensor], device: str) -> list[Tensor]:
    """uint8, the bytes in use of each packed page, on the CPU."""
    elems, count = values[0].numel(), len(values)
    raw = Pages(count, elems * 2, device).fill([v.view(torch.uint8).to(device) for v in values])
    packed = Pages(count, ops.bf16_packed_bound(elems), device)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    sizes = ops.bf16_pack(raw.table(device), packed.table(device), like, elems=elems, room=packed.size)
    assert_same_bits(torch.stack(raw.used([elems * 2] * count)).view(torch.bfloat16), torch.stack(values), "the input")
    return packed.used(sizes.tolist())


def unpack(packed: list[Tensor], elems: int, device: str, *, pinned: bool = False, max_blocks: int = 0) -> list[Tensor]:
    room = max(page.numel() for page in packed)
    source = Pages(len(packed), room, "cpu" if pinned else device, pinned=pinned).fill(packed)
    raw = Pages(len(packed), elems * 2, device)
    sizes = torch.tensor([page.numel() for page in packed], device=device)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    ops.bf16_unpack(source.table(device), sizes, raw.table(device), like, elems=elems, max_blocks=max_blocks)
    return [page.view(torch.bfloat16) for page in raw.used([elems * 2] * len(packed))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("elems", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, elems: int, device: str) -> None:
    values = list(inputs(kind, 3 * elems).view(3, elems))
    packed = pack(values, device)
    for page in packed:
        assert page.numel() % 16 == 0 and page.numel() <= ops.bf16_packed_bound(elems)
    for i, (got, want) in enumerate(zip(unpack(packed, elems, device), values, strict=True)):
        assert_same_bits(got, want, f"page {i}")


def test_every_value_is_among_the_inputs() -> None:
    assert inputs("every value", 65536).view(torch.int16).unique().numel() == 65536


@pytest.mark.cuda
@pytest.mark.parametrize("elems", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_packs_the_bytes_of_the_cpu(kind: str, elems: int) -> None:
    values = list(inputs(kind, 2 * elems).view(2, elems))
    for i, (got, want) in enumerate(zip(pack(values, "cuda"), pack(values, "cpu"), strict=True)):
        assert_same_bits(got, want, f"page {i}")


@pytest.mark.cuda
@pytest.mark.parametrize("max_blocks", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_unpacks_from_pinned_memory(kind: str, max_blocks: int) -> None:
    elems = 5 * BLOCK - 16
    values = list(inputs(kind, 7 * elems).view(7, elems))
    got = unpack(pack(values, "cpu"), elems, "cuda", pinned=True, max_blocks=max_blocks)
    for i, (page, want) in enumerate(zip(got, values, strict=True)):
        assert_same_bits(page, want, f"page {i}")


@pytest.mark.parametrize("device", DEVICES)
def test_size(device: str) -> None:
    elems = 65536
    size = {kind: 8 * pack([inputs(kind, elems)], device)[0].numel() / elems for kind in KINDS}
    assert size["normal"] <= 12.2
    assert size["zeros"] <= 12.2
    assert size["rare exponents"] <= 12.4
    assert max(size.values()) <= 8 * ops.bf16_packed_bound(elems) / elems <= 16.1


@pytest.mark.parametrize("device", DEVICES)
def test_no_pages(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    sizes = ops.bf16_pack(none, none, like, elems=64, room=ops.bf16_packed_bound(64))
    assert sizes.shape == (0,) and sizes.dtype == torch.int64
    ops.bf16_unpack(none, none, none, like, elems=64)


def test_threads_do_not_change_the_bytes(threads: None) -> None:
    values = list(inputs("rare exponents", 8 * 4096).view(8, 4096))
    want = pack(values, "cpu")
    ops.set_num_threads(1)
    for got, page in zip(pack(values, "cpu"), want, strict=True):
        assert_same_bits(got, page)


ELEMS = 2 * BLOCK
HEADER, BLOCK_HEADER = "<IIQ", "<IHH"  # overflow units, blocks, zero; offset, count, base


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda page: page[:-16], "packed page 1 of .* bytes is no packed page of 4096 elements"),
        (lambda page: page[:4096], "packed page 1 has 4096 bytes; 4096 elements take at least"),
        (lambda page: page[:0], "packed page 1 has 0 bytes"),
        (lambda page: patched(page, 0, HEADER, 1 << 20, 2, 0), "its header says 2 blocks in 16783488 bytes"),
        (lambda page: patched(page, 4, "<I", 3), "its header says 3 blocks"),
        (lambda page: patched(page, 24, BLOCK_HEADER, 1 << 20, 4, 100), "the header of block 1 .* unit 1048576"),
        (lambda page: patched(page, 16, BLOCK_HEADER, 0, 9999, 100), "the header of block 0 has 9999 escapes"),
        (lambda page: patched(page, 16, BLOCK_HEADER, 0, 0, 255), "the header of block 0 .* base 255"),
    ],
)  # fmt: skip
def test_damaged_pages_are_refused(damage, message: str) -> None:
    values = [inputs("rare exponents", ELEMS), inputs("rare exponents", ELEMS)]
    first, second = pack(values, "cpu")
    with pytest.raises(KernelError, match=message):
        unpack([first, damage(second)], ELEMS, "cpu")


def patched(page: Tensor, at: int, layout: str, *fields: int) -> Tensor:
    """A copy of a packed page with the header fields at `at` replaced."""
    data = torch.frombuffer(bytearray(struct.pack(layout, *fields)), dtype=torch.uint8)
    return torch.cat([page[:at], data, page[at + data.numel() :]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elems": 0}, "elems is 0"),
        ({"elems": 12}, "elems is 12"),
        ({"room": 100}, r"room is 100 bytes; 64 elements may pack to \d+"),
        ({"like": torch.empty(0)}, "like has dtype float32"),
        ({"packed_pages": torch.tensor([0])}, "packed_pages has no page at entry 0"),
        ({"raw_pages": torch.tensor([8])}, "raw_pages has an address at entry 0 that is 8 bytes off"),
        ({"packed_pages": torch.tensor([16, 16])}, r"packed_pages has shape \[2\]; it must be \[1\]"),
        ({"raw_pages": torch.tensor([16], dtype=torch.int32)}, "raw_pages has dtype int32"),
        ({"packed_bytes": torch.tensor([1, 2])}, r"packed_bytes has shape \[2\]"),
        ({"max_blocks": -1}, "max_blocks is -1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    raw, packed = Pages(1, 128, "cpu"), Pages(1, ops.bf16_packed_bound(64), "cpu")
    arguments = {
        "raw_pages": raw.table("cpu"),
        "packed_pages": packed.table("cpu"),
        "like": torch.empty(0, dtype=torch.bfloat16),
        "elems": 64,
    }
    calls = [(ops.bf16_pack, {"room": packed.size}), (ops.bf16_unpack, {"packed_bytes": torch.tensor([0])})]
    calls[1][1]["max_blocks"] = 0
    tried = 0
    for op, own in calls:
        known = arguments | own
        if change.keys() <= known.keys():
            with pytest.raises(KernelError, match=message):
                op(**(known | change))
            tried += 1
    assert tried
    assert all(bool((pages.memory == 0xA5).all()) for pages in (raw, packed)), "refused before any work"
