# SPDX-License-Identifier: Apache-2.0
"""Named ranges for a profiler's timeline: prefill, swap, draft, verify, accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vericache import _C


@contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """An NVTX range around the block; costs next to nothing where no profiler can see it."""
    _C.nvtx_push(name)
    try:
        yield
    finally:
        _C.nvtx_pop()
