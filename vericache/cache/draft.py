# SPDX-License-Identifier: Apache-2.0
"""Draft caches: the compressed KV that a request keeps on the device, built layer by layer from the prompt.

Both kinds answer the same questions: what must go to the host so that draft cache + stored bytes are the full cache
bit for bit, how large a staging slot a layer needs, and how fetched bytes become full pages again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from vericache import ops
from vericache.cache.pages import ALIGNMENT, KVGeometry, LayerSlab, PageRing, aligned_bytes, round_up
from vericache.compressors.interface import Compressor, KeptTokens, LayerEvidence, QuantizedTokens


class DraftCache(ABC):
    """The compressed cache of one request over positions 0 .. tail_start-1."""

    kind: str
    leaves_tail: bool  # verified pages leave the tail into this cache; otherwise the tail keeps generated tokens
    version = 0  # grows when the tables change

    def __init__(self, geometry: KVGeometry, compressor: Compressor, tail_start: int) -> None:
        self.geometry = geometry
        self.compressor = compressor
        self.tail_start = tail_start

    @abstractmethod
    def build_layer(self, layer: int, slab: LayerSlab, tokens: int, evidence: LayerEvidence) -> None:
        """Compress one layer of a prompt of ``tokens`` tokens whose full pages lie in ``slab``."""

    @abstractmethod
    def residual(self, layer: int, slab: LayerSlab) -> tuple[Tensor, int, int]:
        """What the host must hold of the layer: (owner that keeps it alive, device address, bytes)."""

    @abstractmethod
    def slot_bytes(self, layer: int, stored: int) -> int:
        """Staging bytes a verify needs for the layer when the host holds ``stored`` bytes of it."""

    @abstractmethod
    def restore(self, layer: int, slot: int, stored: int) -> np.ndarray:
        """Turn a slot's fetched bytes into full pages; their addresses, int64 [tail_start / page_size]."""


class KeptDraft(DraftCache):
    """Kept tokens as compact head pages; the host holds only the dropped rows (residual s = 1 - ratio)."""

    kind = "kept"
    leaves_tail = False

    def __init__(self, geometry: KVGeometry, compressor: Compressor, tail_start: int) -> None:
        super().__init__(geometry, compressor, tail_start)
        self._pages: list[Tensor] = []
        self._table: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._dropped: list[Tensor] = []
        self._dropped_counts: list[Tensor] = []
        self._dropped_host: list[list[int]] = []
        self._like = torch.empty(0, dtype=geometry.dtype, device=geometry.device)

    @staticmethod
    def residual_bytes_bound(geometry: KVGeometry, tail_start: int) -> int:
        """Most bytes a layer's residual can take: every row dropped, head pages padded."""
        return geometry.kv_heads * geometry.pages(tail_start) * geometry.head_page_bytes

    def build_layer(self, layer: int, slab: LayerSlab, tokens: int, evidence: LayerEvidence) -> None:
        g = self.geometry
        if layer != len(self._pages):
            raise AssertionError(f"layers are built in order; expected {len(self._pages)}, got {layer}")
        if self.tail_start:
            k, v = slab.dense(tokens)
            chosen = self.compressor.compress(k, v, evidence)
            if not isinstance(chosen, KeptTokens):
                raise AssertionError(f"compressor '{self.compressor.name}' said it keeps tokens, and gave {chosen}")
            kept = self._mask(chosen)
        else:
            kept = torch.zeros(g.kv_heads, 0, dtype=torch.bool, device=g.device)
        positions, counts = _ragged(kept)
        dropped, dropped_counts = _ragged(~kept)
        pages, table = self._head_pages(counts.tolist())
        if self.tail_start:
            self._move(ops.gather_tokens, slab.addresses(0, slab.pages), table, positions, counts)
        self._pages.append(pages)
        self._table.append(table)
        self._positions.append(positions)
        self._counts.append(counts)
        self._dropped.append(dropped)
        self._dropped_counts.append(dropped_counts)
        self._dropped_host.append(dropped_counts.tolist())

    def residual(self, layer: int, slab: LayerSlab) -> tuple[Tensor, int, int]:
        pages, table = self._head_pages(self._dropped_host[layer])
        nbytes = self._residual_bytes(layer)
        if nbytes:
            self._move(
                ops.gather_tokens,
                slab.addresses(0, slab.pages),
                table,
                self._dropped[layer],
                self._dropped_counts[layer],
            )
        return pages, pages.data_ptr(), nbytes

    def slot_bytes(self, layer: int, stored: int) -> int:
        return round_up(stored, ALIGNMENT) + self.geometry.pages(self.tail_start) * self.geometry.page_bytes

    def restore(self, layer: int, slot: int, stored: int) -> np.ndarray:
        g = self.geometry
        first = slot + round_up(stored, ALIGNMENT)
        pages = first + np.arange(g.pages(self.tail_start), dtype=np.int64) * g.page_bytes
        if len(pages):
            if stored:
                table = _head_table(slot, self._dropped_host[layer], g)
                self._move(
                    ops.scatter_tokens,
                    pages,
                    torch.from_numpy(table).to(g.device),
                    self._dropped[layer],
                    self._dropped_counts[layer],
                )
            self._move(ops.scatter_tokens, pages, self._table[layer], self._positions[layer], self._counts[layer])
        return pages

    def tables(self, width: int) -> tuple[Tensor, Tensor]:
        """All layers' head-page tables, int64 [layers, kv_heads, width], and lengths, int32 [layers, kv_heads]."""
        g = self.geometry
        out = torch.zeros(g.layers, g.kv_heads, width, dtype=torch.int64, device=g.device)
        for layer, table in enumerate(self._table):
            out[layer, :, : table.shape[1]] = table
        return out, torch.stack(self._counts)

    def drops(self, layer: int) -> bool:
        """Whether some head of the layer has dropped a token."""
        return any(self._dropped_host[layer])

    @property
    def width(self) -> int:
        """Head pages of the longest head."""
        return max(t.shape[1] for t in self._table)

    def device_bytes(self) -> int:
        """Device bytes really held."""
        tensors = [*self._pages, *self._table, *self._positions, *self._dropped]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _mask(self, chosen: KeptTokens) -> Tensor:
        """bool [kv_heads, tail_start]: kept positions; what lies in the tail is kept there anyway."""
        g = self.geometry
        width = chosen.positions.shape[1]
        valid = torch.arange(width, device=g.device)[None] < chosen.counts.to(g.device)[:, None]
        valid &= chosen.positions < self.tail_start
        mask = torch.zeros(g.kv_heads, self.tail_start + 1, dtype=torch.bool, device=g.device)
        index = torch.where(valid, chosen.positions, self.tail_start).to(torch.int64)
        mask.scatter_(1, index, True)
        return mask[:, : self.tail_start]

    def _residual_bytes(self, layer: int) -> int:
        return sum(self.geometry.pages(n) for n in self._dropped_host[layer]) * self.geometry.head_page_bytes

    def _head_pages(self, counts: list[int]) -> tuple[Tensor, Tensor]:
        g = self.geometry
        pages = aligned_bytes(max(1, sum(g.pages(n) for n in counts)) * g.head_page_bytes, g.device)
        table = _head_table(pages.data_ptr(), counts, g)
        return pages, torch.from_numpy(table).to(g.device)

    def _move(self, op, pages: np.ndarray, table: Tensor, positions: Tensor, counts: Tensor) -> None:  # type: ignore[no-untyped-def]
        g = self.geometry
        full = torch.from_numpy(np.ascontiguousarray(pages)).to(g.device)
        op(full, table, positions, counts, self._like, head_dim=g.head_dim, page_size=g.page_size)


class QuantDraft(DraftCache):
    """Quantized pages; the host holds the full pages, and verified pages leave the tail into both."""

    kind = "quant"
    leaves_tail = True

    def __init__(self, geometry: KVGeometry, compressor: Compressor, tail_start: int, max_pages: int) -> None:
        super().__init__(geometry, compressor, tail_start)
        probe = compressor.compress(torch.empty(0), torch.empty(0), LayerEvidence(0, None, 0))
        if not isinstance(probe, QuantizedTokens):
            raise AssertionError(f"compressor '{compressor.name}' said it quantizes, and gave {probe}")
        self.bits, self.group = probe.bits, probe.group
        self.max_pages = max(max_pages, 1)
        self.page_bytes = quant_page_bytes(geometry, self.bits, self.group)
        self.layer_stride = self.max_pages * self.page_bytes
        self.buffer = aligned_bytes(geometry.layers * self.layer_stride, geometry.device)
        self.base = self.buffer.data_ptr()
        self._like = torch.empty(0, dtype=geometry.dtype, device=geometry.device)

    def addresses(self, first: int, last: int) -> np.ndarray:
        """Layer-0 addresses of quantized pages ``first .. last-1``, int64."""
        return self.base + np.arange(first, last, dtype=np.int64) * self.page_bytes

    def build_layer(self, layer: int, slab: LayerSlab, tokens: int, evidence: LayerEvidence) -> None:
        pages = self.geometry.pages(self.tail_start)
        self._quantize(slab.addresses(0, pages), self.addresses(0, pages) + layer * self.layer_stride)

    def append_page(self, page: int, ring: PageRing) -> list[tuple[int, int, int]]:
        """Take the verified tail page ``page``: quantize it in every layer and move ``tail_start`` past it.

        Returns the (layer, address, bytes) rows that the host store must append.
        """
        g = self.geometry
        strides = np.arange(g.layers, dtype=np.int64)
        full = ring.address(page) + strides * ring.layer_stride
        self._quantize(full, self.addresses(page, page + 1)[0] + strides * self.layer_stride)
        self.tail_start = (page + 1) * g.page_size
        self.version += 1
        return [(layer, int(full[layer]), g.page_bytes) for layer in range(g.layers)]

    def residual(self, layer: int, slab: LayerSlab) -> tuple[Tensor, int, int]:
        return slab.buffer, slab.base, self.geometry.pages(self.tail_start) * self.geometry.page_bytes

    def slot_bytes(self, layer: int, stored: int) -> int:
        return stored

    def restore(self, layer: int, slot: int, stored: int) -> np.ndarray:
        g = self.geometry
        return slot + np.arange(stored // g.page_bytes, dtype=np.int64) * g.page_bytes

    def device_bytes(self) -> int:
        """Device bytes really held."""
        return self.buffer.numel()

    def _quantize(self, full: np.ndarray, quant: np.ndarray) -> None:
        if len(full):
            g = self.geometry
            ops.kv_quantize(
                torch.from_numpy(np.ascontiguousarray(full)).to(g.device),
                torch.from_numpy(np.ascontiguousarray(quant)).to(g.device),
                self._like,
                kv_heads=g.kv_heads,
                head_dim=g.head_dim,
                page_size=g.page_size,
                bits=self.bits,
                group=self.group,
            )


def quant_page_bytes(geometry: KVGeometry, bits: int, group: int) -> int:
    """Bytes of a quantized page of one layer (QuantPageLayout in csrc/common/params.h)."""
    g = geometry
    codes = g.page_size * g.head_dim * bits // 8
    k_param = g.page_size // group * g.head_dim * g.elem
    v_param = g.page_size * (g.head_dim // group) * g.elem
    return g.kv_heads * 2 * (codes + k_param + v_param)


def _ragged(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending positions of the set entries of each row, padded: int32 [heads, max count], int32 [heads]."""
    counts = mask.sum(dim=1)
    width = int(counts.max()) if mask.numel() else 0
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :width]
    return order.to(torch.int32).contiguous(), counts.to(torch.int32)


def _head_table(base: int, counts: list[int], geometry: KVGeometry) -> np.ndarray:
    """Addresses of the head pages of ragged heads laid out one after another: int64 [heads, max pages]."""
    pages = [geometry.pages(n) for n in counts]
    table = np.zeros((len(counts), max(1, *pages)), dtype=np.int64)
    next_page = 0
    for head, n in enumerate(pages):
        table[head, :n] = base + (next_page + np.arange(n, dtype=np.int64)) * geometry.head_page_bytes
        next_page += n
    return table
