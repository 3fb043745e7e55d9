# SPDX-License-Identifier: Apache-2.0
"""Bringing full KV to verifying requests: layer by layer, through the staging ring, in the scheduler's order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vericache import _C
from vericache.cache.pages import aligned_bytes
from vericache.engine.request import Request
from vericache.errors import VericacheError

RETRIES = 3  # submissions of one copy before its request is failed


@dataclass
class Verification:
    """One window on its way through the layers.

    ``hidden`` is the rows' residual stream, which waits here between iterations; None before the first layer.
    ``restored`` maps an arrived layer to the addresses of its full pages in the ring.
    """

    request: Request
    window: list[int]
    position: int
    tail_page: int
    hidden: Tensor | None = None
    restored: dict[int, np.ndarray] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)

    @property
    def last_position(self) -> int:
        """Position of the window's last row."""
        return self.position + len(self.window) - 1


@dataclass
class _Transfer:
    task: Verification
    layer: int
    slot: int
    ticket: int
    attempts: int


class Fetcher:
    """Moves bytes for verifications; decides nothing about what to move (the scheduler) or why (the engine)."""

    def __init__(
        self,
        ring_buffer: Tensor,
        copies: _C.CopyEngine,
        max_verifying: int,
        device_index: int,
        stream: Callable[[], int],
    ) -> None:
        self._buffer = ring_buffer  # keeps the ring's memory alive
        self._ring = _C.StagingRing(ring_buffer.data_ptr(), ring_buffer.numel(), device_index)
        self._copies = copies
        self._scheduler = _C.Scheduler(max_verifying)
        self._stream = stream
        self._tasks: dict[int, Verification] = {}
        self._transfers: list[_Transfer] = []

    @staticmethod
    def make_buffer(nbytes: int, device: torch.device) -> Tensor:
        """Device memory for the ring."""
        return aligned_bytes(nbytes, device)

    @property
    def in_flight(self) -> bool:
        """Whether a copy is on its way."""
        return bool(self._transfers)

    def begin(self, task: Verification) -> None:
        """Queue a verification: FIFO by request, layers in order."""
        request = task.request
        assert request.store is not None and request.cache is not None
        request.store.settle()  # a fetch must not overtake the stores of the pages it reads
        sizes = [
            request.cache.slot_bytes(layer, request.store.used(layer)) for layer in range(request.cache.geometry.layers)
        ]
        self._tasks[request.id] = task
        self._scheduler.enqueue(request.id, sizes)

    def pump(self) -> list[tuple[Request, str]]:
        """Collect arrivals and submit what the ring has room for. Returns requests whose copies failed for good."""
        self._scheduler.begin_iteration()
        failed = self._collect()
        while (item := self._scheduler.next()) is not None:
            request_id, layer = item
            task = self._tasks[request_id]
            cache, store = task.request.cache, task.request.store
            assert cache is not None and store is not None
            stored = store.used(layer)
            nbytes = cache.slot_bytes(layer, stored)
            slot = self._ring.acquire(nbytes)  # a layer that needs none never comes here
            if slot < 0:
                break
            self._scheduler.submitted(request_id, layer)
            task.slots[layer] = slot
            if stored:
                self._transfers.append(self._submit(task, layer, slot, 1))
            else:
                self._arrive(task, layer)
        return failed

    def wait(self) -> None:
        """Block until the oldest copy in flight is done (nothing else to do)."""
        if self._transfers:
            with suppress(VericacheError):  # the next pump sees the failure, with its retry
                self._copies.wait(self._transfers[0].ticket)

    def runnable(self) -> list[tuple[Verification, int, int]]:
        """(verification, layer_lo, layer_hi): contiguous layers that have arrived and have not been run."""
        return [(self._tasks[i], lo, hi) for i, lo, hi in self._scheduler.runnable() if hi > lo]

    def ran(self, task: Verification, layer_hi: int) -> None:
        """The rows have passed layers below ``layer_hi``: their slots are free again."""
        for layer in [n for n in task.slots if n < layer_hi]:
            self._ring.release(task.slots.pop(layer), self._stream())
            task.restored.pop(layer, None)
        if self._scheduler.ran(task.request.id, layer_hi):
            del self._tasks[task.request.id]

    def cancel(self, request: Request) -> None:
        """Drop a request's verification, waiting for copies that still write its slots."""
        task = self._tasks.pop(request.id, None)
        if task is None:
            return
        for transfer in [t for t in self._transfers if t.task is task]:
            with suppress(VericacheError):  # the request is going away; only the slot matters
                self._copies.wait(transfer.ticket)
            self._transfers.remove(transfer)
        for slot in task.slots.values():
            self._ring.release(slot, self._stream())
        task.slots.clear()
        self._scheduler.cancel(request.id)

    def _collect(self) -> list[tuple[Request, str]]:
        waiting: list[_Transfer] = []
        failed: list[tuple[Request, str]] = []
        for transfer in self._transfers:
            try:
                if self._copies.ready(transfer.ticket):
                    self._arrive(transfer.task, transfer.layer)
                else:
                    waiting.append(transfer)
            except VericacheError as error:
                if transfer.attempts < RETRIES:
                    waiting.append(self._submit(transfer.task, transfer.layer, transfer.slot, transfer.attempts + 1))
                else:
                    failed.append(
                        (transfer.task.request, f"fetching layer {transfer.layer} failed {RETRIES} times: {error}")
                    )
        self._transfers = waiting
        return failed

    def _submit(self, task: Verification, layer: int, slot: int, attempt: int) -> _Transfer:
        store = task.request.store
        assert store is not None
        table = store.fetch_table(layer, self._ring.address(slot))
        # The ring makes the copy wait for the slot's last readers, and for nothing else in the compute stream.
        ticket = self._copies.submit(table, "h2d", ring=self._ring, slot=slot)
        task.request.stats.fetched_bytes += store.used(layer)
        return _Transfer(task, layer, slot, ticket, attempt)

    def _arrive(self, task: Verification, layer: int) -> None:
        cache, store = task.request.cache, task.request.store
        assert cache is not None and store is not None
        task.restored[layer] = cache.restore(layer, self._ring.address(task.slots[layer]), store.used(layer))
        self._scheduler.arrived(task.request.id, layer)
