# SPDX-License-Identifier: Apache-2.0
"""The model's seam: what a forward pass needs to know of rows and of the KV cache, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Consecutive rows that run the same layers.

    A row outside its span's layers keeps its residual stream untouched: a verifying request's rows wait
    between iterations with theirs, and a prefill chunk is a span of one layer at a time.

    Attributes:
        start: first row.
        stop: one past the last row.
        layer_lo: first layer these rows run.
        layer_hi: one past the last layer these rows run.
    """

    start: int
    stop: int
    layer_lo: int
    layer_hi: int


class KVView(Protocol):
    """Where K and V lie, as the model sees it. Implemented by the engine's caches and by `reference.py`."""

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        ...

    def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
        """Pages that receive the active rows' K and V.

        Args:
            layer: the layer about to run.
            active: indices of the spans that run this layer; their rows come in span order.

        Returns:
            int64 [active rows]: address of the full page that holds each row's position; 0: not written.
        """
        ...

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        """Attention of the active rows, after their K and V were written.

        Args:
            layer: the running layer.
            q (T) [active rows, q_heads, head_dim]: normalised and rotated queries.
            active: as in `write_pages`.

        Returns:
            (T) [active rows, q_heads, head_dim].
        """
        ...
