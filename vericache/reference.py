# SPDX-License-Identifier: Apache-2.0
"""The opponent of every exactness test: one request, one token at a time, full KV.

It shares the model and the ops with the engine and nothing else: it owns its pages, knows no draft, no batch
and no tier, and is short enough to be read as the definition of the right answer. Prefill runs chunk by
chunk, each chunk through all layers (R3); decoding then feeds one row a call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vericache import ops
from vericache.errors import InvalidRequestError, VericacheError
from vericache.models.interface import RowSpan
from vericache.models.llama import CausalLM

_PAGE_ALIGN = 128  # bytes; the kernels' contract on page addresses


@dataclass(frozen=True)
class ReferenceOutput:
    """What one request emits.

    Attributes:
        token_ids: emitted tokens; a stop token that ended the request is the last of them.
        logprobs: log-softmax of the raw logits at each emitted token.
        finish_reason: "stop" (a stop token came) or "length".
        logits (float32) [emitted, vocab]: on the CPU, the row each emitted token was drawn from; None unless
        asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    logits: Tensor | None


class ReferenceCache:
    """Full KV of one request in one allocation a layer; a `KVView` for the rows at `positions`.

    Args:
        model: gives shapes, dtype and device.
        max_tokens: positions to hold.
        page_size: tokens a page.
    """

    def __init__(self, model: CausalLM, max_tokens: int, page_size: int = 64):
        c = model.config
        self.page_size = page_size
        self._config = c
        pages = -(-max_tokens // page_size)
        page_bytes = 2 * c.kv_heads * page_size * c.head_dim * model.dtype.itemsize
        self.page_stride = -(-page_bytes // _PAGE_ALIGN) * _PAGE_ALIGN
        self.memory: list[Tensor] = []  # a layer's pages, uint8; owns what the tables' addresses point into
        self._tables: list[Tensor] = []
        for _ in range(c.layers):
            memory = torch.empty(
                pages * self.page_stride + _PAGE_ALIGN, dtype=torch.uint8, device=model.device
            )
            first = -(-memory.data_ptr() // _PAGE_ALIGN) * _PAGE_ALIGN
            table = torch.arange(pages, dtype=torch.int64, device=model.device) * self.page_stride + first
            self.memory.append(memory)
            self._tables.append(table[None])
        self._positions = torch.empty(0, dtype=torch.int32, device=model.device)
        self._page_of_row = torch.empty(0, dtype=torch.int64, device=model.device)
        self._row_offsets = torch.empty(0, dtype=torch.int32, device=model.device)

    def place(self, positions: Tensor) -> None:
        """Sets the rows of the next forward call.

        Args:
            positions (int32) [rows]: ascending absolute positions.
        """
        self._positions = positions
        self._page_of_row = positions.long() // self.page_size
        self._row_offsets = torch.tensor([0, positions.shape[0]], dtype=torch.int32, device=positions.device)

    def page_table(self, layer: int) -> Tensor:
        """Page addresses of a layer, int64 [1, pages]; page i holds positions i * page_size and on."""
        return self._tables[layer]

    def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
        """See `KVView`; all rows are always active here."""
        return self._tables[layer][0, self._page_of_row]

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        """See `KVView`."""
        c = self._config
        return ops.paged_attention(
            q,
            self._tables[layer],
            self._row_offsets,
            self._positions,
            kv_heads=c.kv_heads,
            page_size=self.page_size,
            scale=c.softmax_scale,
            window=c.windows[layer],
        )


def prefill(
    model: CausalLM, prompt: Sequence[int], cache: ReferenceCache, prefill_chunk: int = 256
) -> Tensor:
    """Fills the cache with a prompt, in chunks cut at absolute multiples of `prefill_chunk` (R3).

    Returns:
        (T) [1, hidden]: residual stream of the prompt's last token.
    """
    hidden = torch.empty(0)
    for start in range(0, len(prompt), prefill_chunk):
        hidden = _feed(model, prompt[start : start + prefill_chunk], start, cache)
    return hidden[-1:]


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_token_ids: Collection[int] = (),
    ignore_eos: bool = False,
    prefill_chunk: int = 256,
    page_size: int = 64,
    keep_logits: bool = False,
) -> ReferenceOutput:
    """Full-KV decoding, one row a step.

    Args:
        model: the model.
        prompt: token ids, at least one.
        max_tokens: most tokens to emit. Prompt and emitted tokens together never exceed the model's
        positions. temperature, top_k, top_p, min_p, seed: sampling (R4). The token at absolute position p is
        drawn with
            row_position = p, so the first emitted token uses p = len(prompt).
        stop_token_ids: tokens that end the request besides the model's own.
        ignore_eos: do not end at the model's own end tokens.
        prefill_chunk: rows of a prefill call.
        page_size: tokens a page.
        keep_logits: also return the logits rows.

    Raises:
        InvalidRequestError: an empty prompt, one longer than the model's positions, or an id outside its
        vocabulary.
        VericacheError: a logits row holds a NaN.
    """
    check_prompt(model, prompt)
    if max_tokens < 0:
        raise InvalidRequestError(f"max_tokens is {max_tokens}; it must not be negative.")
    limit = min(max_tokens, model.max_positions - len(prompt))
    stops = set(stop_token_ids) | (set() if ignore_eos else set(model.config.eos_token_ids))
    device = model.device
    sampling = (
        torch.tensor([temperature], dtype=torch.float32, device=device),
        torch.tensor([top_k], dtype=torch.int32, device=device),
        torch.tensor([top_p], dtype=torch.float32, device=device),
        torch.tensor([min_p], dtype=torch.float32, device=device),
        torch.tensor([seed], dtype=torch.int64, device=device),
    )
    cache = ReferenceCache(model, len(prompt) + max(limit, 0), page_size)
    hidden = prefill(model, prompt, cache, prefill_chunk)
    tokens: list[int] = []
    logprobs: list[float] = []
    rows: list[Tensor] = []
    finish: Literal["stop", "length"] = "length"
    while len(tokens) < limit:
        position = len(prompt) + len(tokens)
        row = model.logits(hidden)
        drawn, logprob = ops.sample(
            row, *sampling, torch.tensor([position], dtype=torch.int32, device=device)
        )
        token = int(drawn)
        if token < 0:
            raise VericacheError(
                f"the logits for position {position} hold a NaN; the model's weights are damaged."
            )
        tokens.append(token)
        logprobs.append(float(logprob))
        if keep_logits:
            rows.append(row[0].cpu())
        if token in stops:
            finish = "stop"
            break
        if len(tokens) < limit:
            hidden = _feed(model, [token], position, cache)
    logits = None
    if keep_logits:
        logits = torch.stack(rows) if rows else torch.empty(0, model.config.vocab_size)
    return ReferenceOutput(tokens, logprobs, finish, logits)


def check_prompt(model: CausalLM, prompt: Sequence[int]) -> None:
    """Refuses a prompt the model cannot take.

    Raises:
        InvalidRequestError: empty, longer than the model's positions, or with an id outside its vocabulary.
    """
    vocab = model.config.vocab_size
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it needs at least one token.")
    if len(prompt) > model.max_positions:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, but the model has {model.max_positions} positions; "
            "shorten it by "
            f"{len(prompt) - model.max_positions}."
        )
    bad = next((token for token in prompt if not 0 <= token < vocab), None)
    if bad is not None:
        raise InvalidRequestError(
            f"the prompt holds the token id {bad}, but the vocabulary has ids 0 to {vocab - 1}."
        )


def _feed(model: CausalLM, tokens: Sequence[int], start: int, cache: ReferenceCache) -> Tensor:
    """Runs consecutive tokens from position `start` on through all layers; (T) [tokens, hidden]."""
    ids = torch.tensor(tokens, dtype=torch.int64, device=model.device)
    positions = torch.arange(start, start + len(tokens), dtype=torch.int32, device=model.device)
    cache.place(positions)
    span = RowSpan(0, len(tokens), 0, model.config.layers)
    return model.forward(model.embed(ids), positions, [span], cache)
