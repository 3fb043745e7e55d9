# SPDX-License-Identifier: Apache-2.0
"""The plan of one iteration: which rows run, in which layers, and which KV each span of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vericache.cache.draft import KeptDraft, QuantDraft
from vericache.config import EngineConfig
from vericache.engine.fetch import Verification
from vericache.engine.request import Request
from vericache.engine.view import ResidentPages, SpanKV, StagedPages
from vericache.models.interface import RowSpan
from vericache.models.llama import CausalLM


@dataclass
class Rows:
    """Consecutive rows of one request in one iteration.

    ``kind`` is ``direct`` (modes full and lossy: a row that emits), ``verify`` or ``draft``. ``hidden`` is a residual
    stream that waited for its next layers; None: the rows start from their tokens.
    """

    request: Request
    kind: str
    positions: np.ndarray
    layer_lo: int
    layer_hi: int
    hidden: Tensor | None = None
    task: Verification | None = None

    def tokens(self) -> list[int]:
        """Token ids that the rows feed."""
        if self.task is not None:
            return self.task.window
        return [self.request.token_at(int(p)) for p in self.positions]


def plan_rows(
    running: Sequence[Request],
    arrived: Sequence[tuple[Verification, int, int]],
    config: EngineConfig,
    layers: int,
) -> list[Rows]:
    """Rows of the next iteration, spans of one attention kind side by side.

    Args:
        running: requests past their prefill.
        arrived: (verification, layer_lo, layer_hi): layers whose full KV is there and which have not been run.
        config: gives the run-ahead length.
        layers: of the model.
    """
    verifies = [
        Rows(task.request, "verify", np.arange(task.position, task.last_position + 1), lo, hi, task.hidden, task)
        for task, lo, hi in arrived
    ]
    # The window's last position is the one that draft and verifier both feed. Once the verifier's rows are under way
    # its K and V must stay (R2), so a draft that has not fed that position by then waits for the outcome.
    for task, _, _ in arrived:
        task.request.exact_to = task.last_position
    full: list[Rows] = []
    lossy: list[Rows] = []
    drafts: list[Rows] = []
    for request in running:
        if request.mode == "vericache":
            at = request.draft_position
            if at > request.exact_to and request.wants_draft(config.run_ahead_len(request.draft_len)):
                drafts.append(Rows(request, "draft", np.asarray([at]), 0, layers))
        else:
            rows = Rows(request, "direct", np.asarray([request.verified]), 0, layers)
            (full if request.mode == "full" else lossy).append(rows)
    return full + verifies + lossy + drafts


def lay_out(plan: Sequence[Rows]) -> tuple[list[RowSpan], list[SpanKV]]:
    """The plan as the model sees it (spans of layers) and as the view sees it (where each span's KV is)."""
    spans: list[RowSpan] = []
    kv: list[SpanKV] = []
    start = 0
    for rows in plan:
        kv.append(_span_kv(rows, start))
        spans.append(RowSpan(start, kv[-1].stop, rows.layer_lo, rows.layer_hi))
        start = kv[-1].stop
    return spans, kv


def _span_kv(rows: Rows, start: int) -> SpanKV:
    request, stop = rows.request, start + len(rows.positions)
    assert request.ring is not None
    if rows.task is not None:
        pages = StagedPages(request.ring, rows.task.restored, rows.task.tail_page)
        return SpanKV(start, stop, rows.positions, source=pages)
    if request.mode == "full":
        return SpanKV(start, stop, rows.positions, source=ResidentPages(request.ring))
    assert isinstance(request.cache, KeptDraft | QuantDraft)
    return SpanKV(start, stop, rows.positions, draft=request.cache, ring=request.ring)


def embed(plan: Sequence[Rows], model: CausalLM) -> Tensor:
    """Residual stream of all rows, (T) [rows, hidden]: embeddings, and the streams that waited."""
    tokens = [t for rows in plan if rows.hidden is None for t in rows.tokens()]
    fresh = model.embed(torch.tensor(tokens, dtype=torch.int64, device=model.device))
    parts: list[Tensor] = []
    at = 0
    for rows in plan:
        if rows.hidden is not None:
            parts.append(rows.hidden)
        else:
            parts.append(fresh[at : at + len(rows.positions)])
            at += len(rows.positions)
    return torch.cat(parts)
