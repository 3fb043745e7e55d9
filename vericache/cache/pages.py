# SPDX-License-Identifier: Apache-2.0
"""Page geometry and the rings of full pages that a request owns on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; the kernels ask for 128, the copy engine likes 256


def aligned_bytes(nbytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor of ``nbytes`` whose first byte is aligned to ``ALIGNMENT``."""
    raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    offset = -raw.data_ptr() % ALIGNMENT
    return raw[offset : offset + nbytes]


def round_up(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class KVGeometry:
    """Shape of one model's KV cache.

    A full page is [2, kv_heads, page_size, head_dim] of ``dtype``: whole tokens of one layer, K then V. A head page
    is [2, page_size, head_dim].
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def elem(self) -> int:
        """Bytes an element."""
        return self.dtype.itemsize

    @property
    def head_page_bytes(self) -> int:
        """Bytes of a head page."""
        return 2 * self.page_size * self.head_dim * self.elem

    @property
    def page_bytes(self) -> int:
        """Bytes of a full page of one layer."""
        return self.kv_heads * self.head_page_bytes

    def pages(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def bytes_per_token(self) -> int:
        """Full KV bytes of one token, all layers."""
        return self.layers * self.page_bytes // self.page_size


class PageRing:
    """Full pages of one request in all layers: absolute page p of every layer lies in slot ``p % slots``.

    With as many slots as the request has pages it is the whole resident cache of mode ``full``; with a few it is the
    tail. Addresses of layer l are those of layer 0 plus ``l * layer_stride``.
    """

    def __init__(self, geometry: KVGeometry, slots: int) -> None:
        self.geometry = geometry
        self.slots = slots
        self.layer_stride = slots * geometry.page_bytes
        self.buffer = aligned_bytes(geometry.layers * self.layer_stride, geometry.device)
        self.base = self.buffer.data_ptr()

    @staticmethod
    def bytes_needed(geometry: KVGeometry, slots: int) -> int:
        """Device bytes of a ring of ``slots`` pages a layer."""
        return geometry.layers * slots * geometry.page_bytes + ALIGNMENT

    def address(self, page: int) -> int:
        """Layer-0 address of absolute page ``page``."""
        return self.base + (page % self.slots) * self.geometry.page_bytes

    def addresses(self, first: int, last: int) -> np.ndarray:
        """Layer-0 addresses of pages ``first .. last-1``, int64."""
        return self.base + (np.arange(first, last, dtype=np.int64) % self.slots) * self.geometry.page_bytes

    def page(self, layer: int, page: int) -> Tensor:
        """View of one page: [2, kv_heads, page_size, head_dim]."""
        g = self.geometry
        start = layer * self.layer_stride + (page % self.slots) * g.page_bytes
        flat = self.buffer[start : start + g.page_bytes].view(g.dtype)
        return flat.view(2, g.kv_heads, g.page_size, g.head_dim)


class LayerSlab:
    """Contiguous full pages of one layer: where a prompt's KV of the layer being prefilled lies."""

    def __init__(self, geometry: KVGeometry, pages: int) -> None:
        self.geometry = geometry
        self.pages = pages
        self.buffer = aligned_bytes(max(pages, 1) * geometry.page_bytes, geometry.device)
        self.base = self.buffer.data_ptr()

    def addresses(self, first: int, last: int) -> np.ndarray:
        """Addresses of pages ``first .. last-1``, int64."""
        return self.base + np.arange(first, last, dtype=np.int64) * self.geometry.page_bytes

    def tensor(self) -> Tensor:
        """All pages: [pages, 2, kv_heads, page_size, head_dim]."""
        g = self.geometry
        return self.buffer.view(g.dtype).view(-1, 2, g.kv_heads, g.page_size, g.head_dim)

    def dense(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V of the first ``tokens`` tokens: two [kv_heads, tokens, head_dim]."""
        g = self.geometry
        both = self.tensor().permute(1, 2, 0, 3, 4).reshape(2, g.kv_heads, -1, g.head_dim)[:, :, :tokens]
        return both[0], both[1]
