# SPDX-License-Identifier: Apache-2.0
"""One request's state: tokens, the two cursors, and what it emits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from torch import Tensor

from vericache.cache.draft import DraftCache
from vericache.cache.full_store import HostKV
from vericache.cache.pages import PageRing
from vericache.config import SamplingParams
from vericache.outputs import FinishReason, RequestOutput, RequestStats


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """A request from arrival to its output.

    ``tokens`` is the prompt and what has been emitted; its last entry has not been fed yet. ``verified`` counts the
    positions whose K and V on the device are exact (in mode ``lossy``: have been fed). ``draft`` holds drafted
    tokens beyond ``tokens``; the draft cursor is ``verified + len(draft)``.
    """

    def __init__(
        self,
        request_id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        draft_len: int,
        max_emit: int,
        stop_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str] | None,
        record_logits: bool,
    ) -> None:
        self.id = request_id
        self.prompt_len = len(prompt)
        self.params = params
        self.draft_len = draft_len
        self.max_emit = max_emit
        self.stop_ids = stop_ids
        self.phase = Phase.WAITING
        self.mode = ""
        self.tokens: list[int] = list(prompt)
        self.draft: list[int] = []
        self.verified = 0
        self.verifying = False
        self.exact_to = -1  # last position whose K and V a verification has begun to make exact
        self.ring: PageRing | None = None
        self.cache: DraftCache | None = None
        self.store: HostKV | None = None
        self.stats = RequestStats()
        self.started = 0.0
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._decode = decode
        self._logprobs: list[float] = []
        self._logits: list[Tensor] | None = [] if record_logits else None
        self._stop_at: int | None = None

    @property
    def emitted(self) -> list[int]:
        """Tokens emitted so far."""
        return self.tokens[self.prompt_len :]

    @property
    def remaining(self) -> int:
        """Tokens this request may still emit."""
        return self.max_emit - (len(self.tokens) - self.prompt_len)

    @property
    def last_position(self) -> int:
        """The last position this request can ever feed."""
        return self.prompt_len + self.max_emit - 1

    @property
    def draft_position(self) -> int:
        """Position of the next draft row."""
        return self.verified + len(self.draft)

    def token_at(self, position: int) -> int:
        """Known or drafted token at an absolute position."""
        known = len(self.tokens)
        return self.tokens[position] if position < known else self.draft[position - known]

    @property
    def draft_stopped(self) -> bool:
        """Whether the newest drafted token would end the text: drafting past it is waste."""
        return bool(self.draft) and self.draft[-1] in self.stop_ids

    def wants_draft(self, run_ahead: int) -> bool:
        """Whether the request takes a draft row in this iteration."""
        limit = self.draft_len + (run_ahead if self.verifying else 0)
        return len(self.draft) < min(limit, self.remaining - 1) and not self.draft_stopped

    def wants_verify(self) -> bool:
        """Whether a window is ready to be verified."""
        full = len(self.draft) >= min(self.draft_len, self.remaining - 1)
        return not self.verifying and (full or self.draft_stopped)

    def window(self) -> list[int]:
        """Tokens to verify now: the last emitted one, then up to ``draft_len`` drafted ones, to the first stop."""
        window = [self.tokens[-1]]
        for token in self.draft[: min(self.draft_len, self.remaining - 1)]:
            window.append(token)
            if token in self.stop_ids:
                break
        return window

    def emit(self, token: int, logprob: float, logits: Tensor | None) -> bool:
        """Take one verified token; True when it ends the request."""
        self.tokens.append(token)
        self._logprobs.append(logprob)
        if self._logits is not None and logits is not None:
            self._logits.append(logits)
        self.stats.emitted += 1
        if token in self.stop_ids or self._hits_stop_string():
            self.finish("stop")
        elif self.remaining <= 0:
            self.finish("length")
        return self.phase is Phase.FINISHED

    def _hits_stop_string(self) -> bool:
        if not self.params.stop or self._decode is None:
            return False
        text = self._decode(self.emitted)
        found = [at for at in (text.find(s) for s in self.params.stop) if at >= 0]
        self._stop_at = min(found) if found else None
        return bool(found)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the request; the first reason stays."""
        if self.phase is not Phase.FINISHED:
            self.phase, self.finish_reason, self.error = Phase.FINISHED, reason, error

    def visible_tokens(self) -> list[int]:
        """Emitted tokens without the end token that stopped the request."""
        emitted = self.emitted
        if self.finish_reason == "stop" and emitted and emitted[-1] in self.stop_ids:
            return emitted[:-1]
        return emitted

    def text(self) -> str:
        """The verified text so far, cut before a matched stop string."""
        if self._decode is None:
            return ""
        text = self._decode(self.visible_tokens())
        return text if self._stop_at is None else text[: self._stop_at]

    def output(self) -> RequestOutput:
        """The request's output as it stands."""
        return RequestOutput(
            request_id=self.id,
            prompt_tokens=self.prompt_len,
            token_ids=self.emitted,
            text=self.text(),
            logprobs=list(self._logprobs) if self.params.logprobs else None,
            finish_reason=self.finish_reason or "cancelled",
            error=self.error,
            stats=self.stats,
            logits=self._logits,
        )
