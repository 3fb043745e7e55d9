# SPDX-License-Identifier: Apache-2.0
"""Host memory with known bytes, for the runtime's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

POISON = 0xA5


class Buffer:
    """Memory at a 256-aligned address that stays put: poisoned unless filled."""

    def __init__(self, nbytes: int, *, seed: int | None = None) -> None:
        self._memory = np.full(nbytes + 256, POISON, dtype=np.uint8)
        skip = -self._memory.ctypes.data % 256
        self.bytes: NDArray[np.uint8] = self._memory[skip : skip + nbytes]
        if seed is not None:
            # Never the poison: a byte that equals it could not tell a copy from none.
            self.bytes[:] = np.random.default_rng(seed).integers(0, POISON, nbytes, dtype=np.uint8)
        self.address = self.bytes.ctypes.data

    def poisoned(self) -> bool:
        """Whether no byte was written."""
        return bool((self.bytes == POISON).all())


def table(*rows: Sequence[int]) -> NDArray[np.int64]:
    """A copy table, int64 [n, 3] of (src, dst, bytes)."""
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3)


def whole(source: Buffer, target: Buffer) -> NDArray[np.int64]:
    """The table that copies one buffer to another of the same size."""
    assert len(source.bytes) == len(target.bytes)
    return table((source.address, target.address, len(source.bytes)))
