# SPDX-License-Identifier: Apache-2.0
"""What a compressor is given, what it returns, and what it promises.

A compressor sees the tensors of one layer and nothing else: no pages, no engine, no model. It decides *what*
a draft cache holds; the cache decides where it lies.

Draft caches come in two kinds. `kept` holds some tokens, each bit for bit the full cache's (so a verify
fetches only the dropped ones); `quant` holds every token in fewer bits (so a verify fetches everything).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Kind = Literal["kept", "quant"]
Residual = Literal["dropped", "everything"]


@dataclass(frozen=True)
class Evidence:
    """What a method needs beside K and V.

    Attributes:
        window_queries: how many of the prompt's last queries, in every layer; 0 if none.
    """

    window_queries: int = 0


@dataclass(frozen=True)
class LayerEvidence:
    """The evidence of one layer of one request.

    Attributes:
        layer: index of the layer.
        queries: (T) [min(window_queries, prompt), q_heads, head_dim]: rotated queries of the prompt's last
            tokens, in ascending order; None if the method declared no window.
        seed: the same for every layer of a request and for every run of it.
    """

    layer: int
    queries: Tensor | None
    seed: int


@dataclass(frozen=True)
class KeptTokens:
    """A choice of tokens, each kept exactly.

    Attributes:
        positions: (int32) [kv_heads, capacity]: absolute positions, ascending in each row; -1 past a head's
            count.
        counts: (int32) [kv_heads]: tokens kept by each head.
    """

    positions: Tensor
    counts: Tensor


@dataclass(frozen=True)
class QuantizedTokens:
    """Every token, quantized page by page in the byte layout of `QuantPageLayout` (csrc/common/params.h).

    Attributes:
        bits: bits an element: 2, 4, 5, 6, 7 or 8.
        group: tokens that share a scale in K; channels that share one in V.
    """

    bits: int
    group: int


@runtime_checkable
class Compressor(Protocol):
    """A method with its options fixed: frozen, hashable, without any state of a request.

    Verified tokens that leave the full-precision tail after the prompt enter the draft cache by kind: a
    `kept` cache keeps all of them, a `quant` cache quantizes their page. Nothing already in a draft cache
    changes.

    Attributes:
        name: the method's name in a spec such as `snapkv:ratio=0.25`.
        kind: which draft cache holds the result.
        residual: what a verify must fetch so that draft cache and residual make up the full cache, bit for
            bit.
        evidence: what `compress` needs beside K and V.
        residual_window: newest tokens that stay in the full-precision tail; the tail is cut at page
            boundaries, so it holds up to a page more.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def residual(self) -> Residual: ...
    @property
    def evidence(self) -> Evidence: ...
    @property
    def residual_window(self) -> int: ...

    def compress(self, k: Tensor, v: Tensor, evidence: LayerEvidence) -> KeptTokens | QuantizedTokens:
        """Decides what one layer's draft cache holds of the prompt.

        Args:
            k: (T) [kv_heads, tokens, head_dim]: rotated keys of positions 0 .. tokens - 1.
            v: (T) [kv_heads, tokens, head_dim]: their values.
            evidence: what `self.evidence` asked for.

        Returns:
            `KeptTokens` if `kind` is `kept`, on the device of `k`; `QuantizedTokens` if it is `quant`.
        """
        ...

    def draft_bytes(
        self, tokens: int, kv_heads: int, head_dim: int, elem_size: int, page_size: int, appended: int = 0
    ) -> int:
        """Bounds the device bytes of one layer's draft cache from above, the tail not included.

        Args:
            tokens: prompt length.
            kv_heads: KV heads of the layer.
            head_dim: elements of a head.
            elem_size: bytes an element.
            page_size: tokens a page.
            appended: verified tokens that left the tail after the prompt.
        """
        ...
