# SPDX-License-Identifier: Apache-2.0
"""The full store: what of a request's full KV cache lies in host memory, layer by layer."""

from __future__ import annotations

import numpy as np

from vericache import _C
from vericache.errors import VericacheError


class HostKV:
    """One request's part of the host store.

    A layer is one contiguous host extent, so that a fetch is one large copy. What an extent holds is the draft
    cache's affair (whole pages, or only the rows the device has not kept): the store moves bytes.
    """

    def __init__(self, pool: _C.HostPool, copies: _C.CopyEngine, layers: int) -> None:
        self._pool = pool
        self._copies = copies
        self._extent: list[int] = [0] * layers
        self._capacity: list[int] = [0] * layers
        self._used: list[int] = [0] * layers
        self._pending: list[int] = []
        self.stored_bytes = 0

    def open_layer(self, layer: int, capacity: int) -> None:
        """Allocate the layer's extent of ``capacity`` bytes (0: the layer stores nothing)."""
        if capacity:
            self._extent[layer] = self._pool.allocate(capacity)
        self._capacity[layer] = capacity

    def used(self, layer: int) -> int:
        """Bytes the layer holds."""
        return self._used[layer]

    def append(self, parts: list[tuple[int, int, int]], stream: int = 0) -> int | None:
        """Store device bytes behind what the layers hold: one submission of (layer, source address, bytes) rows.

        Returns the copy's ticket (None: nothing to store). The source must stay as it is until the ticket is ready.
        """
        rows = []
        for layer, source, nbytes in parts:
            if not nbytes:
                continue
            offset = self._used[layer]
            if offset + nbytes > self._capacity[layer]:
                raise AssertionError(
                    f"host extent of layer {layer} holds {self._capacity[layer]} bytes, "
                    f"asked to append {nbytes} at {offset}"
                )
            rows.append((source, self._extent[layer] + offset, nbytes))
            self._used[layer] = offset + nbytes
            self.stored_bytes += nbytes
        if not rows:
            return None
        ticket = self._copies.submit(np.asarray(rows, dtype=np.int64), "d2h", after_stream=stream)
        self._pending.append(ticket)
        return ticket

    def settle(self) -> None:
        """Wait until everything appended so far has arrived; orders fetches after the stores they read.

        Raises:
            KernelError: a store failed; the layer's bytes must not be used.
        """
        while self._pending:
            self._copies.wait(self._pending.pop(0))

    def fetch_table(self, layer: int, destination: int) -> np.ndarray:
        """The copy table that brings the layer to ``destination``: int64 [1, 3] (source, destination, bytes)."""
        return np.asarray([(self._extent[layer], destination, self._used[layer])], dtype=np.int64)

    def close(self) -> None:
        """Free the extents. Copies still in flight are waited for first: they write this memory."""
        while self._pending:
            try:
                self.settle()
            except VericacheError:
                continue  # the request is going away; what matters is that nothing writes here any more
        for address in self._extent:
            if address:
                self._pool.free(address)
        self._extent = [0] * len(self._extent)
