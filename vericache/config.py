# SPDX-License-Identifier: Apache-2.0
"""Validated, frozen configuration: what a request asks for and how an engine is set up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from vericache.errors import InvalidRequestError

Mode = Literal["full", "lossy", "vericache", "auto"]
MODES: tuple[str, ...] = get_args(Mode)

_UNITS = {"": 1, "B": 1, "K": 2**10, "KIB": 2**10, "M": 2**20, "MIB": 2**20, "G": 2**30, "GIB": 2**30}


def parse_bytes(value: int | str) -> int:
    """A byte count from an int or from text such as ``"512MiB"``, ``"2G"`` (binary units).

    Raises:
        InvalidRequestError: if the text is not a positive size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(value))
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise InvalidRequestError(f"'{value}' is not a size; write bytes or a number with KiB, MiB or GiB")
        count = int(float(match.group(1)) * unit)
    if count <= 0:
        raise InvalidRequestError(f"a size must be positive, got '{value}'")
    return count


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidRequestError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens (R4: a pure function of logits, seed and absolute position).

    Args:
        max_tokens: most tokens to emit, at least 1.
        temperature: 0 is greedy; above, logits are divided by it before the filters.
        top_k: keep the k largest logits; 0 is off.
        top_p: keep the smallest set whose probability reaches p, in (0, 1]; 1 is off.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1); 0 is off.
        seed: 64-bit seed of the counter-based noise.
        stop: strings that end the text; the text is cut before the match.
        stop_token_ids: token ids that end the request besides the model's own end tokens.
        ignore_eos: do not stop at the model's end tokens.
        logprobs: return the log-probability of each emitted token (of the raw logits).
        draft_len: tokens drafted a round for this request; None takes the engine's.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    draft_len: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(
            _is_int(self.max_tokens) and self.max_tokens >= 1,
            f"max_tokens must be an integer of at least 1, got {self.max_tokens}",
        )
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be finite and at least 0, got {self.temperature}",
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, f"top_k must be an integer >= 0, got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        _require(0 <= self.min_p < 1, f"min_p must lie in [0, 1), got {self.min_p}")
        _require(
            _is_int(self.seed) and -(2**63) <= self.seed < 2**63, f"seed must be a 64-bit integer, got {self.seed}"
        )
        _require(all(isinstance(s, str) and s for s in self.stop), "a stop string must not be empty")
        _require(
            self.draft_len is None or (_is_int(self.draft_len) and 1 <= self.draft_len <= 127),
            f"draft_len must lie in 1..127, got {self.draft_len}",
        )


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is set up.

    Args:
        mode: ``full`` (all KV on the device), ``lossy`` (drafts straight to the user), ``vericache``, or ``auto``:
            a request runs in ``full`` if its whole KV fits the free budget when it is admitted, else in ``vericache``.
        compressor: spec of the draft cache, such as ``snapkv:ratio=0.25`` or ``kivi:bits=4``.
        draft_len: tokens drafted a round, 1..127 (a verify call takes at most 128 rows).
        run_ahead: tokens a request may draft past the window under verification; None takes ``draft_len``.
        page_size: tokens a page, a power of two in 16..256.
        prefill_chunk: rows of a prefill call; chunks are cut at its absolute multiples (R3).
        memory_budget: device bytes for weights, activations, draft caches, tails, staging, resident KV and prefill.
        host_budget: bytes of the host store; None takes the runtime's default.
        staging_bytes: bytes of the staging ring; None: two layers of the longest possible request, at most a
            quarter of what the weights leave.
        max_batch: most requests admitted at once.
        max_verifying: most requests whose verification is in flight at once.
        record_logits: keep the float32 logits row of every emitted token (tests; costs host memory).
        link_bytes_per_s: slow the CPU's copy engine down to a link of this speed; 0 is off.
        copy_delay_us: largest random delay of a copy, for tests; 0 is off.
    """

    mode: Mode = "vericache"
    compressor: str = "snapkv:ratio=0.25"
    draft_len: int = 16
    run_ahead: int | None = None
    page_size: int = 64
    prefill_chunk: int = 256
    memory_budget: int | str = "4GiB"
    host_budget: int | str | None = None
    staging_bytes: int | str | None = None
    max_batch: int = 32
    max_verifying: int = 4
    record_logits: bool = False
    link_bytes_per_s: int = 0
    copy_delay_us: int = 0

    def __post_init__(self) -> None:
        _require(self.mode in MODES, f"unknown mode '{self.mode}'; choose one of {', '.join(MODES)}")
        _require(
            _is_int(self.draft_len) and 1 <= self.draft_len <= 127,
            f"draft_len must lie in 1..127, got {self.draft_len}",
        )
        _require(
            self.run_ahead is None or (_is_int(self.run_ahead) and 0 <= self.run_ahead <= 127),
            f"run_ahead must lie in 0..127, got {self.run_ahead}",
        )
        _require(
            _is_int(self.page_size) and self.page_size in (16, 32, 64, 128, 256),
            f"page_size must be 16, 32, 64, 128 or 256, got {self.page_size}",
        )
        _require(
            _is_int(self.prefill_chunk) and 1 <= self.prefill_chunk <= 4096,
            f"prefill_chunk must lie in 1..4096, got {self.prefill_chunk}",
        )
        for name in ("max_batch", "max_verifying"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, f"{name} must be an integer of at least 1, got {value}")
        for name in ("memory_budget", "host_budget", "staging_bytes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_bytes(value))

    def budget_bytes(self) -> int:
        """``memory_budget`` as a byte count."""
        return parse_bytes(self.memory_budget)

    def run_ahead_len(self, draft_len: int) -> int:
        """Tokens a request of this draft length may run ahead of its window."""
        return draft_len if self.run_ahead is None else self.run_ahead
