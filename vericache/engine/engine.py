# SPDX-License-Identifier: Apache-2.0
"""The engine's loop: admit, prefill, plan rows, run them, accept.

An iteration is one forward call over a plan of rows: a row for each request that decodes directly (modes `full` and
`lossy`), the rows of verifying requests in the layers whose full KV has arrived, and a row for each drafting request.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vericache import _C
from vericache.cache.draft import QuantDraft
from vericache.cache.pages import KVGeometry
from vericache.compressors import check_supported, parse_compressor
from vericache.config import EngineConfig, SamplingParams
from vericache.engine.accept import accept
from vericache.engine.admission import Admission
from vericache.engine.fetch import Fetcher, Verification
from vericache.engine.plan import Rows, embed, lay_out, plan_rows
from vericache.engine.prefill import PrefillTask
from vericache.engine.request import Phase, Request
from vericache.engine.sampling import sample_rows
from vericache.engine.view import IterationView
from vericache.errors import InvalidRequestError, VericacheError
from vericache.models.llama import CausalLM
from vericache.profiling import profiler_range


class Engine:
    """Runs any number of requests on one model within a stated memory budget.

    Args:
        model: the model, on its device.
        config: see EngineConfig.
        decode: token ids -> text, for stop strings and texts; None: ids only.
        copies: the copy engine; None makes one. Tests give one that delays or fails.
    """

    def __init__(
        self,
        model: CausalLM,
        config: EngineConfig,
        decode: Callable[[Sequence[int]], str] | None = None,
        copies: _C.CopyEngine | None = None,
    ) -> None:
        c = model.config
        self.model, self.config = model, config
        self.compressor = parse_compressor(config.compressor)
        if config.mode != "full":
            check_supported(self.compressor, c, config.page_size)
        weights = model.weights.embedding
        self.device: torch.device = weights.device
        self.geometry = KVGeometry(
            c.layers, c.q_heads, c.kv_heads, c.head_dim, config.page_size, weights.dtype, self.device
        )
        self._decode = decode
        host_budget = int(config.host_budget) if config.host_budget is not None else _C.default_host_capacity()
        self._pool = _C.HostPool(capacity=host_budget, device=self._device_index())
        options = _C.CopyEngineOptions(delay_us_max=config.copy_delay_us, bandwidth_bytes_per_s=config.link_bytes_per_s)
        self._copies = copies or _C.CopyEngine(self._device_index(), options)
        # Copies in flight must end before the memory they touch goes, whatever order garbage collection takes.
        weakref.finalize(self, self._copies.shutdown)
        self.admission = Admission(
            self.geometry, c, self.compressor, config, model.weight_bytes, self._pool, self._copies, host_budget
        )
        self._fetcher: Fetcher | None = None
        if self.admission.staging_bytes:
            ring = Fetcher.make_buffer(self.admission.staging_bytes, self.device)
            self._fetcher = Fetcher(ring, self._copies, config.max_verifying, self._device_index(), self._stream)
        self._next_id = 0
        self._waiting: list[Request] = []
        self._prefill: list[PrefillTask] = []
        self._running: list[Request] = []
        self.iterations = 0

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request.

        Args:
            prompt: token ids, at least one, at most the model's positions.
            params: how to sample and when to stop.

        Raises:
            InvalidRequestError: empty prompt, unknown token id, prompt longer than the model's positions.
            CapacityError: the request could never fit the budgets.
        """
        c = self.model.config
        if not len(prompt):
            raise InvalidRequestError("the prompt is empty; give at least one token")
        limit = self.model.max_positions
        if len(prompt) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens and the model {limit} positions, which "
                f"leaves no room for a token; shorten it by {len(prompt) - limit + 1} or more"
            )
        bad = next((t for t in prompt if not 0 <= t < c.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(f"token id {bad} is outside the vocabulary of {c.vocab_size}")
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(c.eos_token_ids))
        max_emit = min(params.max_tokens, limit - len(prompt))
        request = Request(
            self._next_id,
            prompt,
            params,
            params.draft_len or self.config.draft_len,
            max_emit,
            stop,
            self._decode,
            self.config.record_logits,
        )
        self.admission.refuse_impossible(request)
        self._next_id += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at once; what it emitted stays."""
        if request.phase is not Phase.FINISHED:
            request.finish("cancelled")
            self._retire(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._prefill or self._running)

    def prefill_fraction(self, request: Request) -> float:
        """Share of a request's prefill that is done, for progress displays."""
        return next(
            (t.fraction for t in self._prefill if t.request is request), 0.0 if request.phase is Phase.WAITING else 1.0
        )

    def step(self) -> None:
        """One iteration; call while ``busy``."""
        self.iterations += 1
        self._admit()
        progressed = self._step_prefill()
        self._begin_verifications()
        if self._fetcher is not None:
            with profiler_range("swap"):
                failed = self._fetcher.pump()
            for request, reason in failed:
                self._fail(request, reason)
        arrived = self._fetcher.runnable() if self._fetcher is not None else []
        plan = plan_rows(self._running, arrived, self.config, self.geometry.layers)
        if plan:
            self._run(plan)
        elif not progressed and self._fetcher is not None and self._fetcher.in_flight:
            self._fetcher.wait()

    # -- admission and prefill -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) + len(self._prefill) < self.config.max_batch:
            request = self._waiting[0]
            if not self.admission.try_admit(request):
                return  # first come, first served: a smaller request behind it must not starve it
            self._waiting.pop(0)
            request.phase = Phase.PREFILL
            request.started = time.perf_counter()
            self._prefill.append(
                PrefillTask(request, self.model, self.geometry, self.config.prefill_chunk, self._stream())
            )

    def _step_prefill(self) -> bool:
        if not self._prefill:
            return False
        task = self._prefill[0]
        try:
            with profiler_range("prefill"):
                task.step()
        except VericacheError as error:  # no host memory, a failed store: this request's own trouble
            self._fail(task.request, str(error))
            return True
        if task.done:
            self._prefill.pop(0)
            request = task.request
            logits = self.model.logits(task.last_hidden())
            request.verified = request.prompt_len
            request.phase = Phase.RUNNING
            self.admission.prefill_done(request)
            now = time.perf_counter()
            request.stats.prefill_s, request.started = now - request.started, now
            self._running.append(request)
            tokens, logprobs = sample_rows(logits, [request.params], [request.prompt_len])
            self._emit(request, tokens, logprobs, logits)
        return True

    # -- planning --------------------------------------------------------------------------------------------------

    def _begin_verifications(self) -> None:
        if self._fetcher is None:
            return
        for request in list(self._running):
            if request.mode == "vericache" and request.wants_verify():
                assert request.cache is not None
                tail_page = request.cache.tail_start // self.geometry.page_size
                task = Verification(request, request.window(), request.verified, tail_page)
                try:
                    self._fetcher.begin(task)
                except VericacheError as error:
                    self._fail(request, f"storing the full cache failed: {error}")
                    continue
                request.verifying = True

    # -- one forward call and what comes of it ---------------------------------------------------------------------

    def _run(self, plan: list[Rows]) -> None:
        spans, kv = lay_out(plan)
        positions = torch.from_numpy(np.concatenate([r.positions for r in plan]).astype(np.int32)).to(self.device)
        view = IterationView(self.geometry, kv, self.model.config.softmax_scale, self.model.config.windows)
        with profiler_range("+".join(sorted({r.kind for r in plan}))):
            hidden = self.model.forward(embed(plan, self.model), positions, spans, view)
        finished, pieces = [], []
        for rows, span in zip(plan, spans, strict=True):
            if rows.task is not None:
                assert self._fetcher is not None
                rows.task.hidden = hidden[span.start : span.stop]
                self._fetcher.ran(rows.task, rows.layer_hi)
            if rows.layer_hi == self.geometry.layers:
                finished.append(rows)
                pieces.append(hidden[span.start : span.stop])
        if finished:
            self._finish_rows(finished, torch.cat(pieces))

    def _finish_rows(self, plan: list[Rows], hidden: Tensor) -> None:
        logits = self.model.logits(hidden)
        params = [rows.request.params for rows in plan for _ in rows.positions]
        drawn = [int(p) + 1 for rows in plan for p in rows.positions]
        tokens, logprobs = sample_rows(logits, params, drawn)
        at = 0
        for rows in plan:
            part = slice(at, at + len(rows.positions))
            at = part.stop
            if rows.kind == "draft":
                self._take_draft(rows.request, tokens[part][0])
            elif rows.kind == "direct":
                rows.request.verified += 1
                self._emit(rows.request, tokens[part], logprobs[part], logits[part])
            else:
                with profiler_range("accept"):
                    self._take_verified(rows, tokens[part], logprobs[part], logits[part])

    def _take_draft(self, request: Request, token: int) -> None:
        # A NaN in a draft is the verifier's to report: any token will do, it cannot be accepted wrongly.
        if request.phase is Phase.RUNNING:
            request.draft.append(max(token, 0))

    def _take_verified(self, rows: Rows, tokens: list[int], logprobs: list[float], logits: Tensor) -> None:
        request, task = rows.request, rows.task
        assert task is not None
        request.verifying, request.exact_to = False, -1
        result = accept(request.draft, tokens)
        request.draft = list(result.draft)
        count = len(result.emitted)
        request.stats.rounds += 1
        request.stats.drafted += len(task.window) - 1
        request.stats.matched += result.matched
        request.verified += count
        before = request.stats.emitted
        self._emit(request, list(result.emitted), logprobs[:count], logits[:count])
        request.stats.accepted += request.stats.emitted - before

    def _emit(self, request: Request, tokens: list[int], logprobs: list[float], logits: Tensor) -> None:
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token < 0:
                self._fail(request, f"the logits at position {len(request.tokens)} hold a NaN; check the weights")
                return
            row = logits[i].clone() if self.config.record_logits else None
            if request.emit(token, logprob, row):
                self._retire(request)
                return
        try:
            self._shed_tail(request)
        except VericacheError as error:
            self._fail(request, f"storing the full cache failed: {error}")

    def _shed_tail(self, request: Request) -> None:
        """Let verified pages leave the tail, the residual window excepted."""
        cache = request.cache
        if not isinstance(cache, QuantDraft):
            return
        assert request.ring is not None
        size = self.geometry.page_size
        while cache.tail_start + size <= request.verified - self.compressor.residual_window:
            if request.store is not None:
                request.store.settle()  # the page before this one gave its slot to a page not yet written
            rows = cache.append_page(cache.tail_start // size, request.ring)
            if request.store is not None:
                request.store.append(rows, self._stream())

    def _fail(self, request: Request, reason: str) -> None:
        request.finish("error", reason)
        self._retire(request)

    def _retire(self, request: Request) -> None:
        """Free everything a finished request holds."""
        if self._fetcher is not None:
            self._fetcher.cancel(request)
        if request.started:
            request.stats.decode_s = time.perf_counter() - request.started if request in self._running else 0.0
        if request.store is not None:
            request.stats.stored_bytes = request.store.stored_bytes
            request.store.close()
        request.ring = request.cache = request.store = None
        self.admission.release(request.id)
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)
        self._prefill = [t for t in self._prefill if t.request is not request]

    def _device_index(self) -> int:
        return -1 if self.device.type == "cpu" else (self.device.index or 0)

    def _stream(self) -> int:
        return 0 if self.device.type == "cpu" else torch.cuda.current_stream(self.device).cuda_stream
