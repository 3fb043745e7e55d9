# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import STORAGE_DTYPES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        from vericache import ops

        if ops.with_cuda():
            return
    skip = pytest.mark.skip(reason="needs a CUDA device and a build with CUDA kernels")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=STORAGE_DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each storage type in turn."""
    return request.param


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator of the test's own."""
    return torch.Generator().manual_seed(20260531)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the kernels' thread count after a test that changes it."""
    from vericache import ops

    before = ops.num_threads()
    yield
    ops.set_num_threads(before)
