# SPDX-License-Identifier: Apache-2.0
"""Admission arithmetic: what a request takes on the device and on the host, stated before it is admitted."""

from __future__ import annotations

from dataclasses import dataclass

from vericache._C import format_bytes
from vericache.cache.draft import KeptDraft
from vericache.cache.pages import KVGeometry, PageRing
from vericache.compressors.interface import Compressor
from vericache.config import EngineConfig
from vericache.models.config import ModelConfig

INDEX_BYTES = 4  # of a kept or dropped position


@dataclass(frozen=True)
class Need:
    """Bytes one request needs in a mode.

    ``lasting`` and ``prefill`` map a kind to device bytes, held until the request ends and until its prefill ends;
    ``host`` is its share of the host store; ``slot`` is the largest staging slot it will ask for.
    """

    mode: str
    lasting: dict[str, int]
    prefill: dict[str, int]
    host: int
    slot: int

    @property
    def device(self) -> int:
        """Device bytes at the peak."""
        return sum(self.lasting.values()) + sum(self.prefill.values())

    def sentence(self) -> str:
        """The device arithmetic in words."""
        parts = {**self.lasting, **self.prefill}
        return " + ".join(f"{kind} {format_bytes(n)}" for kind, n in parts.items()) + f" = {format_bytes(self.device)}"


def activation_bytes(model: ModelConfig, config: EngineConfig, elem: int) -> int:
    """Bound of what one forward call and its sampling hold besides KV: the widest set of rows through one layer.

    A prefill call takes ``prefill_chunk`` rows; an iteration one row for each request and a window for each verifying
    one. Logits are float32 and are made for an iteration's rows only.
    """
    rows = config.max_batch + config.max_verifying * (config.draft_len + 1)
    width = 4 * model.hidden_size + model.qkv_size + 3 * model.intermediate_size
    return max(rows, config.prefill_chunk) * width * elem + 2 * rows * model.vocab_size * 4


def tail_start_of(prompt_len: int, residual_window: int, page_size: int) -> int:
    """First position of the tail after a prompt: the page boundary that leaves the residual window whole."""
    return max(0, prompt_len - residual_window) // page_size * page_size


def tail_slots(
    geometry: KVGeometry, compressor: Compressor, prompt_len: int, last_position: int, draft_len: int, run_ahead: int
) -> int:
    """Pages a layer's tail ring needs.

    A cache that verified pages never leave for needs them all. Otherwise the tail spans the residual window, the
    part of a page behind it, a window in flight and what runs ahead of it, plus one spare page so that a page on its
    way to the host is not overwritten.
    """
    first = tail_start_of(prompt_len, compressor.residual_window, geometry.page_size) // geometry.page_size
    to_end = geometry.pages(last_position + 1) - first
    if compressor.kind == "kept":
        return to_end
    span = compressor.residual_window + 2 * geometry.page_size + draft_len + 1 + run_ahead
    return min(to_end, geometry.pages(span) + 1)


def need(
    mode: str,
    geometry: KVGeometry,
    model: ModelConfig,
    compressor: Compressor,
    config: EngineConfig,
    prompt_len: int,
    last_position: int,
    draft_len: int,
) -> Need:
    """What a request of this length needs in ``mode`` (``full``, ``lossy`` or ``vericache``)."""
    g = geometry
    hidden = prompt_len * model.hidden_size * g.elem
    all_pages = g.pages(last_position + 1)
    if mode == "full":
        return Need(mode, {"resident KV": PageRing.bytes_needed(g, all_pages)}, {"prefill stream": hidden}, 0, 0)
    tail_start = tail_start_of(prompt_len, compressor.residual_window, g.page_size)
    slots = tail_slots(g, compressor, prompt_len, last_position, draft_len, config.run_ahead_len(draft_len))
    kept = compressor.kind == "kept"
    appended = 0 if kept else last_position + 1 - prompt_len
    draft = g.layers * compressor.draft_bytes(prompt_len, g.kv_heads, g.head_dim, g.elem, g.page_size, appended)
    slab = g.pages(prompt_len) * g.page_bytes
    prefill = {"prefill stream": hidden, "prefill layer": slab}
    lasting = {"draft cache": draft, "tail": PageRing.bytes_needed(g, slots)}
    if kept:
        prefill["prefill keys"] = slab  # K and V of the layer, dense, as the compressor sees them
        lasting["draft index"] = g.layers * g.kv_heads * tail_start * INDEX_BYTES
    if mode == "lossy":
        return Need(mode, lasting, prefill, 0, 0)
    if kept:
        residual = KeptDraft.residual_bytes_bound(g, tail_start)
        prefill["prefill residual"] = residual
        slot = residual + g.pages(tail_start) * g.page_bytes
        return Need(mode, lasting, prefill, g.layers * residual, slot)
    return Need(mode, lasting, prefill, g.layers * all_pages * g.page_bytes, all_pages * g.page_bytes)
