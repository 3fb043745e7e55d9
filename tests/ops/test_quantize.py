# SPDX-License-Identifier: Apache-2.0
"""kv_quantize and kv_dequantize against a quantizer and a bit packer written here, byte for byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.ops.pages import DEVICES, DTYPES, Pool, addresses, assert_same_bits, full_pages, normal
from vericache import ops
from vericache.errors import KernelError

# head_dim, page_size, group
SHAPES = [(64, 64, 32), (64, 16, 16), (80, 32, 16), (128, 128, 128), (96, 64, 32), (32, 256, 32)]


def page_bytes(
    kv_heads: int, head_dim: int, page_size: int, bits: int, group: int, dtype: torch.dtype = torch.float32
) -> int:
    codes = page_size * head_dim * bits // 8
    params = 2 * page_size * head_dim // group * dtype.itemsize  # scale and zero
    return kv_heads * 2 * (codes + params)


def quantized(x: Tensor, bits: int, axis: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale, zero of x [tokens, head_dim] T, in groups along `axis`; KIVI's rule, scale and zero in T."""
    levels = 2**bits - 1
    groups = x.float().unflatten(axis, (-1, group))
    low, high = groups.amin(axis + 1, keepdim=True), groups.amax(axis + 1, keepdim=True)
    scale, zero = ((high - low) / levels).to(x.dtype), low.to(x.dtype)
    codes = ((groups - zero.float()) / scale.float()).round().clamp(0, levels)  # torch rounds half to even
    codes = torch.where(scale.float() > 0, codes, torch.zeros_like(codes))
    return codes.flatten(axis, axis + 1).to(torch.int64), scale.squeeze(axis + 1), zero.squeeze(axis + 1)


def plane_widths(bits: int) -> list[int]:
    """Of the planes of a block of codes, in their order; none if codes are not split."""
    return [width for width in (4, 2, 1) if bits & width] if bits in (5, 6, 7) else []


def plane_places(head_dim: int, width: int) -> Tensor:
    """int64 [head_dim]: the lowest bit of each channel in a row of a plane."""
    part, channel = torch.arange(4 // width)[:, None], torch.arange(head_dim * width // 4)
    unit, element = channel // 4, channel % 4
    return (16 * unit + 8 * (element // 2) + width * (2 * part + element % 2)).flatten()


def packed(codes: Tensor, bits: int) -> Tensor:
    """Element d of a row is in byte d * bits / 8, least significant bits first; 5 to 7 bits: the planes."""
    if planes := plane_widths(bits):
        blocks, left = [], bits
        for width in planes:  # the most significant bits first
            left -= width
            flags = codes.new_zeros(len(codes), codes.shape[1] * width)
            for bit in range(width):
                flags[:, plane_places(codes.shape[1], width) + bit] = codes >> (left + bit) & 1
            blocks.append((flags.unflatten(1, (-1, 8)) << torch.arange(8)).sum(-1).to(torch.uint8).flatten())
        return torch.cat(blocks)
    rows = []
    for row in codes.tolist():
        number = sum(code << (d * bits) for d, code in enumerate(row))
        rows.append(torch.tensor(list(number.to_bytes(len(row) * bits // 8, "little")), dtype=torch.uint8))
    return torch.stack(rows)


def unpacked(data: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [rows, bytes] -> int64 [rows, bytes * 8 / bits]."""
    if planes := plane_widths(bits):
        (rows, row_bytes), at = data.shape, 0
        codes = torch.zeros(rows, row_bytes * 8 // bits, dtype=torch.int64)
        for width in planes:
            size = codes.numel() * width // 8
            plane = data.flatten()[at : at + size].view(rows, -1).to(torch.int64)
            flags = (plane[..., None] >> torch.arange(8) & 1).flatten(1)
            for bit in reversed(range(width)):
                codes = codes << 1 | flags[:, plane_places(codes.shape[1], width) + bit]
            at += size
        return codes
    shifts = torch.arange(0, 8, bits)
    return (data.to(torch.int64)[..., None] >> shifts & (2**bits - 1)).flatten(-2)


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).flatten()


def dequantized(
    page: Tensor, kv_heads: int, head_dim: int, page_size: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Float64 [2, kv_heads, page_size, head_dim] of one quantized page (uint8), read by its documented layout."""
    data, at = page.cpu(), 0

    def take(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        nonlocal at
        size = torch.Size(shape).numel() * kind.itemsize
        block = data[at : at + size].clone().view(kind).view(shape)
        at += size
        return block

    out = torch.empty(2, kv_heads, page_size, head_dim, dtype=torch.float64)
    for h in range(kv_heads):
        for half in range(2):
            shape = (page_size // group, head_dim) if half == 0 else (page_size, head_dim // group)
            codes = unpacked(take((page_size, head_dim * bits // 8), torch.uint8), bits).double()
            scale, zero = (take(shape, dtype).double().repeat_interleave(group, half) for _ in range(2))
            out[half, h] = codes * scale + zero
    assert at == data.numel()
    return out.to(page.device)


class Case:
    """Pages of random K and V, and the quantized pages the op made of them."""

    def __init__(self, shape: tuple[int, int, int], bits: int, dtype: torch.dtype, device: str, pages: int = 3) -> None:
        head_dim, page_size, group = shape
        self.heads, self.dtype, self.device = 2, dtype, device
        self.sizes = {"kv_heads": 2, "head_dim": head_dim, "page_size": page_size, "bits": bits, "group": group}
        self.k = normal((2, pages * page_size, head_dim), dtype, device, 1)
        self.v = normal((2, pages * page_size, head_dim), dtype, device, 2, scale=3.0)
        self.like = torch.empty(0, dtype=dtype, device=device)
        pool = Pool(pages + 1, (page_bytes(dtype=dtype, **self.sizes),), torch.uint8, device)
        self.quant = [pool.take() for _ in range(pages)]
        self.memory = pool.memory

    def quantize(self) -> None:
        self.full, full_address = full_pages(self.k, self.v, self.sizes["page_size"])
        ops.kv_quantize(self.addresses(full_address), self.addresses(addresses(self.quant)), self.like, **self.sizes)

    def dequantize(self) -> list[Tensor]:
        sizes = self.sizes
        pool = Pool(len(self.quant), (2, self.heads, sizes["page_size"], sizes["head_dim"]), self.dtype, self.device)
        out = [pool.take() for _ in self.quant]
        ops.kv_dequantize(
            self.addresses(addresses(out)), self.addresses(addresses(self.quant)), self.like, **self.sizes
        )
        return out

    def addresses(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_page_bytes(device, dtype, bits, shape):
    case = Case(shape, bits, dtype, device)
    case.k[:, 5, 3] = 1000.0  # an outlier spreads the groups it is in
    case.k[1, :, 7] = -2.5  # a constant channel: scale 0
    case.v[0, 9] = 0.0
    case.quantize()
    group = case.sizes["group"]
    for i, page in enumerate(case.quant):
        rows = slice(i * case.sizes["page_size"], (i + 1) * case.sizes["page_size"])
        want = []
        for h in range(2):
            for x, axis in ((case.k[h, rows], 0), (case.v[h, rows], 1)):
                codes, scale, zero = quantized(x.cpu(), bits, axis, group)
                want += [packed(codes, bits).flatten(), as_bytes(scale), as_bytes(zero)]
        assert_same_bits(page.cpu(), torch.cat(want), f"page {i}")
    used = sum(page.numel() for page in case.quant)
    assert int((case.memory == 0xFF).sum()) >= case.memory.numel() - used  # the rest is as it was


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(device, dtype, bits, shape):
    case = Case(shape, bits, dtype, device)
    case.quantize()
    out = case.dequantize()
    for i, (page, got) in enumerate(zip(case.quant, out, strict=True)):
        want = dequantized(page, dtype=dtype, **case.sizes)
        ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
        assert ((got.double() - want).abs() <= want.abs() * ulp + 1e-6).all(), f"page {i}"
        # Half a step, and the roundings of scale (times up to 2^bits - 1), zero and result to T.
        original = case.full[i].double()
        for half, axis in ((0, 1), (1, 2)):
            x = original[half]
            groups = x.unflatten(axis, (-1, case.sizes["group"]))
            low, high = groups.amin(axis + 1, keepdim=True), groups.amax(axis + 1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            slack = ((high - low) + low.abs() + high.abs()) * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-22)
            error = (got[half].double() - x).abs().unflatten(axis, (-1, case.sizes["group"]))
            assert (error <= step / 2 + slack).all(), f"page {i}"


@pytest.mark.parametrize("device", DEVICES)
def test_error_falls_with_bits(device):
    errors = []
    for bits in (2, 4, 5, 6, 7, 8):
        case = Case((64, 64, 32), bits, torch.float32, device, pages=1)
        case.quantize()
        errors.append(float((case.dequantize()[0] - case.full[0]).abs().mean()))
    ratios = [a / b for a, b in pairwise(errors[1:])]
    assert errors[0] > 3 * errors[1] and all(1.8 < ratio < 2.3 for ratio in ratios), errors


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_first_plane_is_a_coarser_code(bits):
    case = Case((64, 64, 32), bits, torch.float32, "cpu", pages=1)
    case.quantize()
    block = case.quant[0][: 64 * 64 * bits // 8].view(64, -1)  # keys of head 0
    assert_same_bits(unpacked(block.flatten()[: 64 * 32].view(64, -1), 4), unpacked(block, bits) >> (bits - 4), "plane")


@pytest.mark.parametrize("device", DEVICES)
def test_half_steps_round_to_even(device):
    case = Case((64, 64, 32), 2, torch.float32, device, pages=1)
    ramp = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 0.25], device=device)  # in steps of scale 1
    case.k.copy_(ramp.repeat(8)[None, :, None])
    case.v.copy_(ramp.repeat(8))
    case.quantize()
    got = case.dequantize()[0]
    want = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 0.0], device=device).repeat(8)
    assert_same_bits(got[0, 0, :, 0], want, "keys")
    assert_same_bits(got[1, 0, 0], want, "values")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_are_exact(device, dtype):
    case = Case((64, 32, 32), 4, dtype, device, pages=1)
    case.k.copy_(normal((2, 1, 64), dtype, device, 5).expand_as(case.k))
    case.v.copy_(normal((2, 32, 1), dtype, device, 6).expand_as(case.v))
    case.quantize()
    got = case.dequantize()[0]
    assert_same_bits(got, case.full[0], "constant groups")


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_spoils_its_group_only(device):
    case = Case((64, 64, 32), 4, torch.float32, device, pages=1)
    case.quantize()
    clean = case.dequantize()[0]
    case.k[0, 40, 3] = float("nan")
    case.v[1, 9, 50] = float("nan")
    case.quantize()
    got = case.dequantize()[0]
    spoilt = torch.zeros_like(got, dtype=torch.bool)
    spoilt[0, 0, 32:, 3] = True
    spoilt[1, 1, 9, 32:] = True
    assert got[spoilt].isnan().all()
    assert_same_bits(got[~spoilt], clean[~spoilt], "the other groups")


def test_no_pages():
    none = torch.empty(0, dtype=torch.int64)
    sizes = {"kv_heads": 2, "head_dim": 64, "page_size": 64, "bits": 4, "group": 32}
    ops.kv_quantize(none, none, torch.empty(0), **sizes)
    ops.kv_dequantize(none, none, torch.empty(0), **sizes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("full_pages", torch.zeros(1, dtype=torch.int64), "full_pages has no page at entry 0"),
        ("quant_pages", torch.zeros(1, dtype=torch.int64), "quant_pages has no page at entry 0"),
        ("quant_pages", torch.zeros(2, dtype=torch.int64), r"quant_pages has shape \[2\]"),
        ("full_pages", torch.zeros(1), "full_pages has dtype float32"),
        ("like", torch.zeros(1, dtype=torch.float64), "like has dtype float64"),
        ("bits", 16, "bits is 16"),
        ("group", 48, "group is 48"),
        ("group", 8, "group is 8"),
        ("page_size", 100, "page_size is 100"),
        ("head_dim", 24, "head_dim is 24"),
        ("kv_heads", -2, "kv_heads is -2"),
    ],
)
def test_bad_input(name, value, message):
    one = torch.ones(1, dtype=torch.int64)  # never reached
    arguments = {
        "full_pages": one, "quant_pages": one, "like": torch.empty(0),
        "kv_heads": 2, "head_dim": 64, "page_size": 64, "bits": 4, "group": 32,
    }  # fmt: skip
    arguments[name] = value
    for op in (ops.kv_quantize, ops.kv_dequantize):
        with pytest.raises(KernelError, match=message):
            op(**arguments)


def test_opcheck():
    none = torch.empty(0, dtype=torch.int64)
    for op in (torch.ops.vericache.kv_quantize.default, torch.ops.vericache.kv_dequantize.default):
        torch.library.opcheck(op, (none, none, torch.empty(0), 2, 64, 64, 4, 32))
