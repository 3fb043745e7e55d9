# SPDX-License-Identifier: Apache-2.0
"""SnapKV: keep the tokens that the end of the prompt attends to (Li et al., arXiv 2404.14469, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vericache.compressors import select
from vericache.compressors.interface import Evidence, KeptTokens, Kind, LayerEvidence, Residual
from vericache.compressors.options import Between, Odd, OneOf, option, validate
from vericache.errors import InvalidRequestError
from vericache.ops import window_scores


@dataclass(frozen=True)
class SnapKV:
    """Votes with the last `window` queries of the prompt, smooths the votes, keeps the best of each KV head.

    Order of operations: float32 softmax, mean over the window, pooling along the tokens before the window,
    mean over the query heads of a group (the only order that saves memory under GQA: the authors' code
    selects per query head and stores a copy for each). The window itself is always kept, newest first if the
    budget is smaller than it. Chooses once, at the end of the prompt; later tokens are all kept.
    """

    ratio: float = option(0.25, Between(0, 1, open_low=True), "kept / all prompt tokens, the window included")
    window: int = option(64, Between(1, 4096), "queries at the prompt's end that vote; their tokens are kept")
    kernel: int = option(5, Odd(1, 255), "width of the pooling along tokens")
    pool: Literal["avg", "max"] = option("avg", OneOf(("avg", "max")), "how neighbouring votes are pooled")

    name: ClassVar[str] = "snapkv"
    kind: ClassVar[Kind] = "kept"
    residual: ClassVar[Residual] = "dropped"
    residual_window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        validate(self)

    @property
    def evidence(self) -> Evidence:
        """The queries that vote."""
        return Evidence(window_queries=self.window)

    def compress(self, k: Tensor, v: Tensor, evidence: LayerEvidence) -> KeptTokens:
        """See `Compressor.compress`; the values play no part.

        Raises:
            InvalidRequestError: if the evidence lacks the queries.
        """
        if evidence.queries is None:
            raise InvalidRequestError(
                f"snapkv: layer {evidence.layer} came without the prompt's last queries"
            )
        kv_heads, tokens, _ = k.shape
        count = select.budget(self.ratio, tokens)
        window = evidence.queries.shape[0]
        prefix = tokens - window
        votes = window_scores(evidence.queries, k)[:, :prefix]
        scores = select.group_mean(select.pool(votes, self.kernel, self.pool), kv_heads)
        # Window tokens outrank every vote, the newest most, so that a budget below the window keeps its end.
        own = torch.arange(2, window + 2, dtype=torch.float32, device=k.device).expand(kv_heads, window)
        return select.kept(select.top_positions(torch.cat((scores, own), dim=1), count))

    def draft_bytes(
        self, tokens: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int, appended: int = 0
    ) -> int:
        """See `Compressor.draft_bytes`."""
        rows = select.budget(self.ratio, tokens) + appended
        return select.head_page_bytes(rows, kv_heads, head_dim, elem_size, page_size)
