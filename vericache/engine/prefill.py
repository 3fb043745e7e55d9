# SPDX-License-Identifier: Apache-2.0
"""Layer-major prefill: every chunk of the prompt passes a layer before any enters the next.

Only one layer's full KV need be on the device at a time. Chunks are cut at absolute multiples of the chunk length and
each is its own forward call (R3), so the bits are those of chunk-major prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vericache.cache.draft import DraftCache
from vericache.cache.full_store import HostKV
from vericache.cache.pages import KVGeometry, LayerSlab, PageRing
from vericache.compressors.interface import LayerEvidence
from vericache.engine.request import Request
from vericache.engine.view import IterationView, PageSource, ResidentPages, SlabPages, SpanKV
from vericache.models.interface import RowSpan
from vericache.models.llama import CausalLM


class _WindowQueries:
    """A view that also keeps the rotated queries of the prompt's last tokens (a compressor's evidence)."""

    def __init__(self, view: IterationView, first_row: int) -> None:
        self._view = view
        self._first_row = first_row
        self.page_size = view.page_size
        self.write_pages = view.write_pages
        self.queries: Tensor | None = None

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        """See KVView."""
        self.queries = q[self._first_row :].clone()
        return self._view.attend(layer, q, active)


class PrefillTask:
    """A prompt on its way through the layers."""

    def __init__(self, request: Request, model: CausalLM, geometry: KVGeometry, chunk: int, stream: int) -> None:
        self.request = request
        self._model = model
        self._g = geometry
        self._chunk = chunk
        self._stream = stream
        self._layer = 0
        self._start = 0
        prompt = torch.tensor(request.tokens, dtype=torch.int64, device=geometry.device)
        self._hidden = model.embed(prompt)
        self._queries: list[Tensor] = []
        self._slab: LayerSlab | None = None
        self._residual: Tensor | None = None
        if request.cache is not None:
            self._slab = LayerSlab(geometry, geometry.pages(request.prompt_len))

    @property
    def done(self) -> bool:
        """Whether all layers have been passed."""
        return self._layer == self._g.layers

    @property
    def fraction(self) -> float:
        """Share of the work done, for progress displays."""
        return (self._layer + self._start / self.request.prompt_len) / self._g.layers

    def step(self) -> None:
        """One chunk through one layer."""
        length = self.request.prompt_len
        stop = min(self._start + self._chunk, length)
        rows = slice(self._start, stop)
        positions = np.arange(self._start, stop, dtype=np.int64)
        span = SpanKV(0, stop - self._start, positions, source=self._source())
        view = IterationView(self._g, [span], self._model.config.softmax_scale, self._model.config.windows)
        keep_from = length - self._window()
        watched = _WindowQueries(view, max(0, keep_from - self._start)) if stop > keep_from else None
        self._hidden[rows] = self._model.forward(
            self._hidden[rows],
            torch.from_numpy(positions.astype(np.int32)).to(self._g.device),
            [RowSpan(0, stop - self._start, self._layer, self._layer + 1)],
            view if watched is None else watched,
        )
        if watched is not None and watched.queries is not None:
            self._queries.append(watched.queries)
        self._start = stop
        if stop == length:
            self._finish_layer()
            self._layer, self._start = self._layer + 1, 0

    def last_hidden(self) -> Tensor:
        """Residual stream of the prompt's last token, [1, hidden], once done."""
        return self._hidden[-1:]

    def _window(self) -> int:
        cache = self.request.cache
        return min(cache.compressor.evidence.window_queries, self.request.prompt_len) if cache is not None else 0

    def _source(self) -> PageSource:
        if self._slab is not None:
            return SlabPages(self._slab)
        assert self.request.ring is not None
        return ResidentPages(self.request.ring)

    def _finish_layer(self) -> None:
        request = self.request
        if self._slab is None or request.cache is None:
            return
        assert request.ring is not None
        queries = torch.cat(self._queries) if self._queries else None
        self._queries.clear()
        request.cache.build_layer(
            self._layer, self._slab, request.prompt_len, LayerEvidence(self._layer, queries, request.params.seed)
        )
        if request.store is not None:
            self._offload(request.cache, request.store)
        self._fill_tail(request.cache, request.ring)

    def _offload(self, cache: DraftCache, store: HostKV) -> None:
        assert self._slab is not None
        owner, address, nbytes = cache.residual(self._layer, self._slab)
        extra = 0
        if cache.leaves_tail:  # room for the pages that generated tokens will fill
            extra = self._g.pages(self.request.last_position + 1) * self._g.page_bytes - nbytes
        store.open_layer(self._layer, nbytes + extra)
        store.append([(self._layer, address, nbytes)], self._stream)
        self._residual = owner
        store.settle()  # the next layer writes the slab again

    def _fill_tail(self, cache: DraftCache, ring: PageRing) -> None:
        assert self._slab is not None
        first = cache.tail_start // self._g.page_size
        pages = self._slab.tensor()
        for page in range(first, self._slab.pages):
            ring.page(self._layer, page).copy_(pages[page])
