# SPDX-License-Identifier: Apache-2.0
"""Runs an engine over a scenario of arrivals and cancellations, and holds it against the reference, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vericache import reference
from vericache.config import EngineConfig, SamplingParams
from vericache.engine.engine import Engine
from vericache.engine.request import Request
from vericache.engine.view import IterationView, StagedPages
from vericache.models.llama import CausalLM
from vericache.outputs import RequestOutput

STEP_LIMIT = 4_000  # iterations; a scenario that needs more is stuck


@dataclass(frozen=True)
class Arrival:
    """One request of a scenario: when it arrives, and the iteration at which it is cancelled (None: never)."""

    prompt: tuple[int, ...]
    params: SamplingParams
    at: int = 0
    cancel_at: int | None = None


def run(engine: Engine, arrivals: Sequence[Arrival]) -> list[RequestOutput]:
    """Drive the engine until every request of the scenario has ended."""
    requests: dict[int, Request] = {}
    for step in range(STEP_LIMIT):
        for index, arrival in enumerate(arrivals):
            if arrival.at == step:
                requests[index] = engine.add(arrival.prompt, arrival.params)
            if arrival.cancel_at == step and index in requests:
                engine.cancel(requests[index])
        if engine.busy:
            engine.step()
        elif len(requests) == len(arrivals):
            return [requests[i].output() for i in range(len(arrivals))]
    raise AssertionError(f"the engine did not finish within {STEP_LIMIT} iterations")


_references: dict[tuple[object, ...], reference.ReferenceOutput] = {}


def expected(model: CausalLM, arrival: Arrival, chunk: int) -> reference.ReferenceOutput:
    """The reference's answer, computed once for each (model, prompt, parameters, chunk)."""
    p = arrival.params
    key = (
        id(model),
        arrival.prompt,
        p.max_tokens,
        p.temperature,
        p.top_k,
        p.top_p,
        p.min_p,
        p.seed,
        p.stop_token_ids,
        p.ignore_eos,
        chunk,
    )
    if key not in _references:
        _references[key] = reference.generate(
            model,
            list(arrival.prompt),
            max_tokens=p.max_tokens,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            seed=p.seed,
            stop_token_ids=p.stop_token_ids,
            ignore_eos=p.ignore_eos,
            prefill_chunk=chunk,
            keep_logits=True,
        )
    return _references[key]


def difference(output: RequestOutput, truth: reference.ReferenceOutput) -> str | None:
    """Where C1 or C2 is broken, in one sentence; None where both hold.

    Token ids are compared, never text. A broken row is reported with its top-2 gap, which tells a tie from a fault.
    A cancelled request must match as far as it came.
    """
    ours, theirs = output.token_ids, truth.token_ids
    assert truth.logits is not None and output.logits is not None
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            gap = torch.topk(truth.logits[i], 2).values
            return f"token {i}: {a} instead of {b}, top-2 logit gap {float(gap[0] - gap[1]):.3g}"
    for i in range(min(len(ours), len(theirs))):
        problem = row_difference(output.logits[i].cpu(), truth.logits[i])
        if problem:
            return f"logits of token {i}: {problem}"
    if output.finish_reason == "cancelled":
        return None if len(ours) <= len(theirs) else f"{len(ours)} tokens, the reference stops at {len(theirs)}"
    if len(ours) != len(theirs) or output.finish_reason != truth.finish_reason:
        ended = f"{len(ours)} tokens ({output.finish_reason}, {output.error})"
        return f"{ended} instead of {len(theirs)} ({truth.finish_reason})"
    return None


def row_difference(ours: Tensor, theirs: Tensor) -> str | None:
    """First differing element of two float32 rows, by bytes."""
    differs = (ours.view(torch.int32) != theirs.view(torch.int32)).nonzero()
    if not len(differs):
        return None
    at = int(differs[0])
    return f"entry {at} is {ours[at]:.9g} instead of {theirs[at]:.9g} ({len(differs)} of {len(ours)} differ)"


def check(
    model: CausalLM, config: EngineConfig, arrivals: Sequence[Arrival], engine: Engine | None = None
) -> list[RequestOutput]:
    """Run a scenario in an engine (a new one unless given) and assert C1 and C2 for every request."""
    engine = engine or Engine(model, config)
    outputs = run(engine, arrivals)
    for index, (arrival, output) in enumerate(zip(arrivals, outputs, strict=True)):
        problem = difference(output, expected(model, arrival, config.prefill_chunk))
        assert problem is None, f"request {index}: {problem}\n{config}\n{arrival}"
    assert engine.admission.ledger.used() == sum(
        n for k, n in engine.admission.ledger.used_by_kind().items() if k in ("weights", "activations", "staging")
    ), "memory of finished requests is still reserved"
    return outputs


def keep_draft_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch R2 off: verify rows leave the draft's K and V in place, so accepted tokens stand for the wrong state."""
    original = IterationView.write_pages

    def write_pages(view: IterationView, layer: int, active: Sequence[int]) -> Tensor:
        pages = original(view, layer, active).clone()
        row = 0
        for span in (view._spans[i] for i in active):
            rows = span.stop - span.start
            if isinstance(span.source, StagedPages):
                pages[row : row + rows] = 0
            row += rows
        return pages

    monkeypatch.setattr(IterationView, "write_pages", write_pages)


def record(name: str, result: dict[str, Any]) -> None:
    """Leave the figures where the benchmark run collects them (VERICACHE_RESULTS), with what they were made on."""
    folder = os.environ.get("VERICACHE_RESULTS")
    if folder:
        from bench._env import environment

        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps({"environment": environment("cuda"), "result": result}, indent=2) + "\n")
