# SPDX-License-Identifier: Apache-2.0
"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass
class RequestStats:
    """Counters of one request. Bytes are those that really crossed the link for it."""

    mode: str = ""
    rounds: int = 0  # verifications finished
    drafted: int = 0  # drafted tokens that a verification looked at
    matched: int = 0  # of those, equal to the verifier's
    accepted: int = 0  # tokens emitted by rounds: matches plus the correction or bonus
    emitted: int = 0
    fetched_bytes: int = 0
    stored_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def accepted_per_round(self) -> float:
        """Mean tokens emitted a round, correction or bonus included (`a` of the bound)."""
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def fetched_bytes_per_token(self) -> float:
        """Link bytes per emitted token: the project's figure of merit."""
        return self.fetched_bytes / self.emitted if self.emitted else 0.0


@dataclass
class RequestOutput:
    """One finished request.

    ``logits`` (only with ``record_logits``) holds a float32 [vocab] row per emitted token: the row the emitted
    token was drawn from.
    """

    request_id: int
    prompt_tokens: int
    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: FinishReason
    error: str | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    logits: list[Tensor] | None = None


@dataclass(frozen=True)
class StreamChunk:
    """Newly verified tokens of a streamed request; nothing unverified is ever shown.

    ``error`` says in one sentence why a request ended with finish reason ``error``.
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None = None
    error: str | None = None
