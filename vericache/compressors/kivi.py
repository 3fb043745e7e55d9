# SPDX-License-Identifier: Apache-2.0
"""KIVI: codes of 2 or 4 to 8 bits, keys by channel, values by token (Liu et al., arXiv 2402.02750, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vericache.compressors.interface import Evidence, Kind, LayerEvidence, QuantizedTokens, Residual
from vericache.compressors.options import Between, OneOf, option, validate


@dataclass(frozen=True)
class KIVI:
    """Quantizes pages: K in groups of `group` tokens of a channel, V in groups of `group` channels of a
    token.

    x ~= code * scale + zero with scale = (max - min) / (2^bits - 1) and zero = min, both stored in the
    model's dtype: 32 / group more bits an element in bfloat16. The authors let K's residual and V's residual
    differ (L mod R, and the newest R); here both end at the same page boundary, which leaves between
    `residual` and `residual` + page - 1 of the newest tokens in full precision. 5 to 8 bits are our addition. The
    authors advise 4 bits for GQA models.
    """

    bits: int = option(4, OneOf((2, 4, 5, 6, 7, 8)), "bits an element, scales and zeros not counted")
    group: int = option(
        32, OneOf((16, 32, 64, 128)), "elements that share a scale; must divide head_dim and page"
    )
    residual_window: int = option(
        64, Between(0, 65536), "newest tokens that stay in full precision", "residual"
    )

    name: ClassVar[str] = "kivi"
    kind: ClassVar[Kind] = "quant"
    residual: ClassVar[Residual] = "everything"
    evidence: ClassVar[Evidence] = Evidence()

    def __post_init__(self) -> None:
        validate(self)

    def compress(self, k: Tensor, v: Tensor, evidence: LayerEvidence) -> QuantizedTokens:
        """See `Compressor.compress`: no choice depends on the tensors, the pages do the arithmetic."""
        return QuantizedTokens(self.bits, self.group)

    def draft_bytes(
        self, tokens: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int, appended: int = 0
    ) -> int:
        """See `Compressor.draft_bytes`; only whole pages are quantized."""
        codes = page_size * head_dim * self.bits // 8
        k_params = page_size // self.group * head_dim * elem_size
        v_params = page_size * (head_dim // self.group) * elem_size
        pages = (tokens + appended) // page_size
        return pages * kv_heads * 2 * (codes + k_params + v_params)
