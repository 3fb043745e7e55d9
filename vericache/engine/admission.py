# SPDX-License-Identifier: Apache-2.0
"""Admission: which requests can ever run, which may start now, and what they are given."""

from __future__ import annotations

from vericache import _C
from vericache._C import format_bytes
from vericache.cache.draft import DraftCache, KeptDraft, QuantDraft
from vericache.cache.full_store import HostKV
from vericache.cache.pages import KVGeometry, PageRing
from vericache.compressors.interface import Compressor
from vericache.config import EngineConfig
from vericache.engine.memory import Need, activation_bytes, need, tail_slots, tail_start_of
from vericache.engine.request import Request
from vericache.errors import CapacityError
from vericache.models.config import ModelConfig

ENGINE = -1  # the ledger's owner of weights and staging


class Admission:
    """Holds the two ledgers (device, host) and turns a waiting request into one with memory."""

    def __init__(
        self,
        geometry: KVGeometry,
        model: ModelConfig,
        compressor: Compressor,
        config: EngineConfig,
        weight_bytes: int,
        pool: _C.HostPool,
        copies: _C.CopyEngine,
        host_budget: int,
    ) -> None:
        self.geometry, self.compressor, self.config = geometry, compressor, config
        self.model = model
        self._pool, self._copies = pool, copies
        budget = config.budget_bytes()
        self.ledger = _C.MemoryLedger(budget)
        self.host = _C.MemoryLedger(host_budget)
        if not self.ledger.try_reserve(ENGINE, "weights", weight_bytes):
            raise CapacityError(
                f"the weights take {format_bytes(weight_bytes)} and memory_budget is {format_bytes(budget)}; "
                f"raise memory_budget above the weights"
            )
        activations = activation_bytes(model, config, geometry.elem)
        if not self.ledger.try_reserve(ENGINE, "activations", activations):
            raise CapacityError(
                f"beside the weights, the rows of one call need {format_bytes(activations)} of activations: "
                f"{self.ledger.describe()}; raise memory_budget or lower max_batch or prefill_chunk"
            )
        self.staging_bytes = self._staging() if config.mode in ("vericache", "auto") else 0
        if self.staging_bytes and not self.ledger.try_reserve(ENGINE, "staging", self.staging_bytes):
            raise CapacityError(
                f"the staging ring of {format_bytes(self.staging_bytes)} does not fit beside the weights: "
                f"{self.ledger.describe()}; lower staging_bytes or raise memory_budget"
            )
        self._fixed = self.ledger.used()

    def _staging(self) -> int:
        if self.config.staging_bytes is not None:
            return int(self.config.staging_bytes)
        # Two layers of the longest request keep the link busy while one is being read. A slot may hold a residual
        # beside the assembled pages, hence the factor of two.
        g = self.geometry
        longest = 2 * g.pages(self.model.max_positions) * g.page_bytes
        left = max(0, self.config.budget_bytes() - self.ledger.used())
        return max(min(2 * longest, left // 4) // 256 * 256, 256)

    def needs(self, request: Request) -> list[Need]:
        """What the request would need, in order of preference of modes."""
        modes = {"auto": ["full", "vericache"]}.get(self.config.mode, [self.config.mode])
        return [
            need(
                mode,
                self.geometry,
                self.model,
                self.compressor,
                self.config,
                request.prompt_len,
                request.last_position,
                request.draft_len,
            )
            for mode in modes
        ]

    def refuse_impossible(self, request: Request) -> None:
        """Raise if no mode can ever run the request, with the arithmetic.

        Raises:
            CapacityError: names what it needs and what there is.
        """
        reasons = [self._never(n) for n in self.needs(request)]
        if all(reasons):
            raise CapacityError("; ".join(r for r in reasons if r))

    def _never(self, n: Need) -> str | None:
        budget, room = self.config.budget_bytes(), self.config.budget_bytes() - self._fixed
        if n.device > room:
            return (
                f"mode {n.mode} needs {n.sentence()}, but memory_budget {format_bytes(budget)} leaves "
                f"{format_bytes(room)} after {self.ledger_fixed()}; raise memory_budget or shorten the request"
            )
        if n.slot > self.staging_bytes and n.mode == "vericache":
            return (
                f"one layer of the full KV cache needs a staging slot of {format_bytes(n.slot)}, the staging ring "
                f"holds {format_bytes(self.staging_bytes)}; raise staging_bytes or memory_budget"
            )
        if n.host and not self.host.would_ever_fit(n.host):
            return f"the full KV cache takes {format_bytes(n.host)} of host memory and host_budget is smaller; raise it"
        return None

    def ledger_fixed(self) -> str:
        """What the engine itself holds, for messages."""
        kinds = self.ledger.used_by_kind()
        own = (k for k in ("weights", "activations", "staging") if kinds.get(k))
        return " + ".join(f"{k} {format_bytes(kinds[k])}" for k in own)

    def try_admit(self, request: Request) -> bool:
        """Reserve memory in the first mode that fits now and give the request its caches."""
        for n in self.needs(request):
            if self._never(n) is None and self._reserve(request.id, n):
                self._equip(request, n)
                return True
        return False

    def _reserve(self, request_id: int, n: Need) -> bool:
        lasting, prefill = 2 * request_id, 2 * request_id + 1
        wants = [
            (self.ledger, lasting, n.lasting),
            (self.ledger, prefill, n.prefill),
            (self.host, lasting, {"full store": n.host}),
        ]
        for ledger, owner, kinds in wants:
            for kind, nbytes in kinds.items():
                if nbytes and not ledger.try_reserve(owner, kind, nbytes):
                    self.release(request_id)
                    return False
        return True

    def _equip(self, request: Request, n: Need) -> None:
        g = self.geometry
        request.mode = request.stats.mode = n.mode
        if n.mode == "full":
            request.ring = PageRing(g, g.pages(request.last_position + 1))
            return
        start = tail_start_of(request.prompt_len, self.compressor.residual_window, g.page_size)
        request.ring = PageRing(
            g,
            tail_slots(
                g,
                self.compressor,
                request.prompt_len,
                request.last_position,
                request.draft_len,
                self.config.run_ahead_len(request.draft_len),
            ),
        )
        request.cache = self._draft_cache(start, request)
        if n.mode == "vericache":
            request.store = HostKV(self._pool, self._copies, g.layers)

    def _draft_cache(self, tail_start: int, request: Request) -> DraftCache:
        if self.compressor.kind == "kept":
            return KeptDraft(self.geometry, self.compressor, tail_start)
        return QuantDraft(self.geometry, self.compressor, tail_start, self.geometry.pages(request.last_position + 1))

    def prefill_done(self, request: Request) -> None:
        """Give back what only the prefill needed."""
        self.ledger.release(2 * request.id + 1)

    def release(self, request_id: int) -> None:
        """Give back everything a request holds in the ledgers."""
        self.ledger.release(2 * request_id)
        self.ledger.release(2 * request_id + 1)
        self.host.release(2 * request_id)
