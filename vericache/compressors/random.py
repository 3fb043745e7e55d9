# SPDX-License-Identifier: Apache-2.0
"""Random: keep the first tokens and a random choice of the others. The stress case of verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache.compressors import select
from vericache.compressors.interface import Evidence, KeptTokens, Kind, LayerEvidence, Residual
from vericache.compressors.options import Between, option, validate


@dataclass(frozen=True)
class Random:
    """Keeps `sinks` first tokens and random others; each head and layer has its own, fixed by the seed."""

    ratio: float = option(0.25, Between(0, 1, open_low=True), "kept / all prompt tokens, the sinks included")
    sinks: int = option(4, Between(0, 4096), "first tokens that are always kept")

    name: ClassVar[str] = "random"
    kind: ClassVar[Kind] = "kept"
    residual: ClassVar[Residual] = "dropped"
    residual_window: ClassVar[int] = 0
    evidence: ClassVar[Evidence] = Evidence()

    def __post_init__(self) -> None:
        validate(self)

    def compress(self, k: Tensor, v: Tensor, evidence: LayerEvidence) -> KeptTokens:
        """See `Compressor.compress`."""
        kv_heads, tokens, _ = k.shape
        # Drawn on the CPU, so that every device makes the same choice.
        generator = torch.Generator().manual_seed((evidence.seed * 1_000_003 + evidence.layer) % (1 << 63))
        scores = torch.rand(kv_heads, tokens, generator=generator)
        first = min(self.sinks, tokens)
        scores[:, :first] = torch.arange(first + 1, 1, -1, dtype=torch.float32)
        chosen = select.top_positions(scores, select.budget(self.ratio, tokens))
        return select.kept(chosen.to(k.device))

    def draft_bytes(
        self, tokens: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int, appended: int = 0
    ) -> int:
        """See `Compressor.draft_bytes`."""
        rows = select.budget(self.ratio, tokens) + appended
        return select.head_page_bytes(rows, kv_heads, head_dim, elem_size, page_size)
