# SPDX-License-Identifier: Apache-2.0
"""Identity: nothing is compressed. A draft that is not accepted under it shows a fault, not a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache.compressors import select
from vericache.compressors.interface import Evidence, KeptTokens, Kind, LayerEvidence, Residual


@dataclass(frozen=True)
class Identity:
    """Keeps every token of every head."""

    name: ClassVar[str] = "identity"
    kind: ClassVar[Kind] = "kept"
    residual: ClassVar[Residual] = "dropped"
    residual_window: ClassVar[int] = 0
    evidence: ClassVar[Evidence] = Evidence()

    def compress(self, k: Tensor, v: Tensor, evidence: LayerEvidence) -> KeptTokens:
        """See `Compressor.compress`."""
        kv_heads, tokens, _ = k.shape
        return select.kept(torch.arange(tokens, dtype=torch.int32, device=k.device).expand(kv_heads, tokens))

    def draft_bytes(
        self, tokens: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int, appended: int = 0
    ) -> int:
        """See `Compressor.draft_bytes`."""
        return select.head_page_bytes(tokens + appended, kv_heads, head_dim, elem_size, page_size)
