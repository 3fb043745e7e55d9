# SPDX-License-Identifier: Apache-2.0
"""What the tests share: byte comparison that names the first difference, and tolerances against float64."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE_DTYPES = [torch.float32, torch.bfloat16]
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def first_difference(got: Tensor, want: Tensor) -> str | None:
    """The first element whose bytes differ (NaN and -0.0 count), in words; None if all are equal."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} against {want.dtype} {list(want.shape)}"
    word = _WORD[got.element_size()]
    differ = got.contiguous().cpu().view(word) != want.contiguous().cpu().view(word)
    if not bool(differ.any()):
        return None
    flat = int(differ.flatten().to(torch.int8).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    return (
        f"first difference at {where}: {got[where].item()!r} against {want[where].item()!r}; "
        f"{int(differ.sum())} of {differ.numel()} elements differ"
    )


def assert_same_bytes(got: Tensor, want: Tensor) -> None:
    """Fail with the first differing coordinate and both values."""
    difference = first_difference(got, want)
    assert difference is None, difference


def assert_close(got: Tensor, want: Tensor, magnitude: Tensor | float = 0.0, *, ulps: float = 2.0) -> None:
    """Compare with a float64 reference.

    Args:
        got (T) [any]: what the op returned.
        want (float64) [same]: reference.
        magnitude: the size of what was summed on the way (for a dot product |x| @ |w|), which scales the
            float32 rounding of the accumulation.
        ulps: roundings to T allowed at the end.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = magnitude if isinstance(magnitude, Tensor) else torch.tensor(magnitude, dtype=torch.float64)
    final = ulps / 2 * torch.finfo(got.dtype).eps * want.abs()
    allowed = final + 16 * torch.finfo(torch.float32).eps * scale + 1e-30
    error = (got.double() - want).abs()
    worst = int((error - allowed).flatten().argmax()) if error.numel() else 0
    assert bool((error <= allowed).all()), (
        f"element {worst}: {got.flatten()[worst].item()} against {want.flatten()[worst].item()}, "
        f"error {error.flatten()[worst].item():.3g}, allowed {allowed.flatten()[worst].item():.3g}"
    )


def poison_allocator(nbytes: int = 1 << 20) -> None:
    """Fill and free blocks of the sizes ops allocate: an op that does not write its output must not pass."""
    sizes = [nbytes >> shift for shift in range(0, 18, 2)]
    blocks = [torch.full((size,), 0x7F, dtype=torch.uint8) for size in sizes]
    del blocks
