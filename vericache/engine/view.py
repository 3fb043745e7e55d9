# SPDX-License-Identifier: Apache-2.0
"""What the model sees of KV in one forward call: where rows write, and which attention each span takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vericache import ops
from vericache.cache.draft import KeptDraft, QuantDraft
from vericache.cache.pages import KVGeometry, LayerSlab, PageRing


class PageSource(Protocol):
    """Full pages of one request as the paged attention reads them."""

    layer_stride: int

    def address(self, page: int) -> int:
        """Layer-0 address of the page that a row writes."""

    def table(self, layer: int, pages: int) -> np.ndarray:
        """Addresses of pages 0 .. pages-1 of a layer, int64."""


class ResidentPages:
    """All pages in one ring (mode ``full``)."""

    def __init__(self, ring: PageRing) -> None:
        self._ring = ring
        self.layer_stride = ring.layer_stride
        self.address = ring.address

    def table(self, layer: int, pages: int) -> np.ndarray:
        """See PageSource."""
        return self._ring.addresses(0, pages) + layer * self.layer_stride


class SlabPages:
    """Pages of the one layer being prefilled."""

    layer_stride = 0

    def __init__(self, slab: LayerSlab) -> None:
        self._slab = slab

    def address(self, page: int) -> int:
        """See PageSource."""
        return int(self._slab.addresses(page, page + 1)[0])

    def table(self, layer: int, pages: int) -> np.ndarray:
        """See PageSource."""
        return self._slab.addresses(0, pages)


class StagedPages:
    """Fetched pages in the staging ring, then the tail (a verifying request)."""

    def __init__(self, ring: PageRing, restored: dict[int, np.ndarray], tail_page: int) -> None:
        self._ring = ring
        self._restored = restored
        self._tail_page = tail_page
        self.layer_stride = ring.layer_stride
        self.address = ring.address

    def table(self, layer: int, pages: int) -> np.ndarray:
        """See PageSource."""
        tail = self._ring.addresses(self._tail_page, pages) + layer * self.layer_stride
        return np.concatenate([self._restored[layer], tail]) if self._tail_page else tail


@dataclass(frozen=True)
class SpanKV:
    """KV of one span: rows ``start .. stop-1`` of one request at ``positions``.

    Exactly one of ``source`` (full pages) and ``draft`` (with the tail ``ring``) is given.
    """

    start: int
    stop: int
    positions: np.ndarray
    source: PageSource | None = None
    draft: KeptDraft | QuantDraft | None = None
    ring: PageRing | None = None

    @property
    def kind(self) -> str:
        """Which attention op serves the span."""
        return "paged" if self.draft is None else self.draft.kind


@dataclass(frozen=True)
class _Group:
    """Consecutive active spans of one kind, and their rows among the active rows."""

    kind: str
    spans: tuple[int, ...]
    rows: slice
    row_offsets: Tensor
    row_position: Tensor


class IterationView:
    """Implements the model's KVView over any mix of spans; spans of one kind must be neighbours."""

    def __init__(self, geometry: KVGeometry, spans: Sequence[SpanKV], scale: float, windows: Sequence[int]) -> None:
        self.page_size = geometry.page_size
        self._g = geometry
        self._spans = spans
        self._scale = scale
        self._windows = windows
        base = np.empty(spans[-1].stop, dtype=np.int64)
        stride = np.empty_like(base)
        for span in spans:
            owner = span.source if span.source is not None else span.ring
            assert owner is not None
            pages = span.positions // geometry.page_size
            for page in np.unique(pages):
                base[span.start : span.stop][pages == page] = owner.address(int(page))
            stride[span.start : span.stop] = owner.layer_stride
        self._base = torch.from_numpy(base).to(geometry.device)
        self._stride = torch.from_numpy(stride).to(geometry.device)
        self._groups: dict[tuple[int, ...], list[_Group]] = {}
        self._draft_tables: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
        """Pages that receive each active row's K and V, int64 [active rows]."""
        pages = self._base + layer * self._stride
        if len(active) == len(self._spans):
            return pages
        return torch.cat([pages[self._spans[i].start : self._spans[i].stop] for i in active])

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        """Attention of the active rows: q and result [active rows, q_heads, head_dim]."""
        outs = [self._attend_group(layer, q[g.rows], g) for g in self._grouped(tuple(active))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _grouped(self, active: tuple[int, ...]) -> list[_Group]:
        groups = self._groups.get(active)
        if groups is None:
            groups, row = [], 0
            for kind, members in groupby(active, key=lambda i: self._spans[i].kind):
                spans = tuple(members)
                offsets = np.cumsum([0, *(self._spans[i].stop - self._spans[i].start for i in spans)])
                positions = np.concatenate([self._spans[i].positions for i in spans])
                groups.append(
                    _Group(
                        kind,
                        spans,
                        slice(row, row + int(offsets[-1])),
                        self._device(offsets, np.int32),
                        self._device(positions, np.int32),
                    )
                )
                row += int(offsets[-1])
            self._groups[active] = groups
        return groups

    def _attend_group(self, layer: int, q: Tensor, group: _Group) -> Tensor:
        g = self._g
        if group.kind == "paged":
            table = self._paged_table(layer, group.spans)
            return ops.paged_attention(
                q,
                table,
                group.row_offsets,
                group.row_position,
                kv_heads=g.kv_heads,
                page_size=g.page_size,
                scale=self._scale,
                window=self._windows[layer],
            )
        tables = self._draft_tables.get(group.spans)
        if tables is None:
            tables = self._draft_tables[group.spans] = self._build_draft_tables(group)
        tail = tables[0] + layer * tables[1]
        if group.kind == "kept":
            drafts = (self._spans[i].draft for i in group.spans)
            return ops.kept_attention(
                q,
                tables[3][layer],
                tables[4][layer],
                tail,
                tables[2],
                group.row_offsets,
                group.row_position,
                page_size=g.page_size,
                scale=self._scale,
                as_full=not any(d.drops(layer) for d in drafts if isinstance(d, KeptDraft)),
            )
        draft = self._spans[group.spans[0]].draft
        assert isinstance(draft, QuantDraft)
        return ops.quant_attention(
            q,
            tables[3] + layer * tables[4],
            tables[2],
            tail,
            group.row_offsets,
            group.row_position,
            kv_heads=g.kv_heads,
            page_size=g.page_size,
            bits=draft.bits,
            group=draft.group,
            scale=self._scale,
        )

    def _paged_table(self, layer: int, spans: tuple[int, ...]) -> Tensor:
        rows = []
        for i in spans:
            span = self._spans[i]
            assert span.source is not None
            rows.append(span.source.table(layer, int(span.positions[-1]) // self.page_size + 1))
        return self._device(_stack(rows), np.int64)

    def _build_draft_tables(self, group: _Group) -> tuple[Tensor, ...]:
        """(tail table and stride, tail_start, then the kind's own tables) for the group's spans."""
        spans = [self._spans[i] for i in group.spans]
        tails, strides, starts = [], [], []
        for span in spans:
            assert span.draft is not None and span.ring is not None
            start = span.draft.tail_start
            tails.append(span.ring.addresses(start // self.page_size, int(span.positions[-1]) // self.page_size + 1))
            strides.append([span.ring.layer_stride])
            starts.append(start)
        common = (
            self._device(_stack(tails), np.int64),
            self._device(np.asarray(strides), np.int64),
            self._device(np.asarray(starts), np.int32),
        )
        if group.kind == "kept":
            kept = [s.draft for s in spans if isinstance(s.draft, KeptDraft)]
            width = max(d.width for d in kept)
            parts = [d.tables(width) for d in kept]
            return (*common, torch.stack([p[0] for p in parts], dim=1), torch.stack([p[1] for p in parts], dim=1))
        quant = [s.draft for s in spans if isinstance(s.draft, QuantDraft)]
        tables = _stack([d.addresses(0, d.tail_start // self.page_size) for d in quant])
        layer_strides = np.asarray([[d.layer_stride] for d in quant])
        return (*common, self._device(tables, np.int64), self._device(layer_strides, np.int64))

    def _device(self, array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self._g.device)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Ragged rows padded with zeros to one [rows, max(1, longest)] int64 array."""
    out = np.zeros((len(rows), max(1, *(len(r) for r in rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
