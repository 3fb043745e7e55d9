# SPDX-License-Identifier: Apache-2.0
"""The thread pool under callers that meet: same bits, no deadlock, an honest thread count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers import assert_same_bytes
from vericache import ops
from vericache.errors import KernelError


def test_concurrent_callers_get_the_same_bits(rng: torch.Generator, threads: None) -> None:
    x, w = torch.randn(40, 256, generator=rng), torch.randn(700, 256, generator=rng)
    ops.set_num_threads(1)
    want = ops.linear(x, w)
    ops.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        for got in callers.map(lambda _: ops.linear(x, w), range(60)):
            assert_same_bytes(got, want)


def test_thread_count_may_change_while_ops_run(rng: torch.Generator, threads: None) -> None:
    x, w = torch.randn(40, 256, generator=rng), torch.randn(700, 256, generator=rng)
    want = ops.linear(x, w)
    with ThreadPoolExecutor(2) as callers:
        running = [callers.submit(ops.linear, x, w) for _ in range(40)]
        for count in (1, 4, 2, 3, 1, 2):
            ops.set_num_threads(count)
            assert ops.num_threads() == count
        for future in running:
            assert_same_bytes(future.result(), want)


def test_bad_thread_count() -> None:
    with pytest.raises(KernelError, match="threads is 0; it must be at least 1"):
        ops.set_num_threads(0)
