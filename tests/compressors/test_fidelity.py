# SPDX-License-Identifier: Apache-2.0
"""Each method against its published algorithm, written again here in the plainest way."""

from __future__ import annotations

import itertools

import pytest
import torch

from vericache import ops
from vericache.compressors import LayerEvidence, parse_compressor
from vericache.compressors.select import budget, top_positions


def causal_window_softmax(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Returns [q_heads, window, tokens]: the whole matrix at once, K repeated to the query heads."""
    window, q_heads, head_dim = q.shape
    tokens = k.shape[1]
    logits = torch.einsum("whd,htd->hwt", q, k.repeat_interleave(q_heads // k.shape[0], 0)) / head_dim**0.5
    future = torch.ones(window, tokens, dtype=torch.bool).triu(tokens - window + 1)
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def plain_pool(scores: list[float], kernel: int, how: str) -> list[float]:
    half = kernel // 2
    out = []
    for i in range(len(scores)):
        near = [scores[j] for j in range(i - half, i + half + 1) if 0 <= j < len(scores)]
        out.append(max(near) if how == "max" else sum(near) / kernel)
    return out


def plain_snapkv(q: torch.Tensor, k: torch.Tensor, keep: int, kernel: int, how: str) -> list[list[int]]:
    """Returns ascending positions a KV head: vote, pool per query head, mean over the group, top-k."""
    window, q_heads, _ = q.shape
    kv_heads, tokens, _ = k.shape
    group = q_heads // kv_heads
    votes = causal_window_softmax(q.double(), k.double()).mean(1)[:, : tokens - window]
    pooled = torch.tensor([plain_pool(row, kernel, how) for row in votes.tolist()])
    chosen = []
    for head in range(kv_heads):
        score = pooled[head * group : (head + 1) * group].mean(0).tolist()
        best = sorted(range(tokens - window), key=lambda i: (-score[i], i))[: keep - window]
        chosen.append(sorted(best) + list(range(tokens - window, tokens)))
    return chosen


@pytest.mark.parametrize(
    ("kv_heads", "group", "spec", "kernel", "how"),
    [
        (4, 1, "snapkv:window=32,kernel=7,pool=max", 7, "max"),  # the authors' setting, multi-head attention
        (2, 4, "snapkv:window=64,kernel=5,pool=avg", 5, "avg"),  # the group mean, grouped-query attention
        (2, 4, "snapkv:window=8,kernel=1,pool=avg", 1, "avg"),
        (1, 8, "snapkv:window=16,kernel=7,pool=max", 7, "max"),
    ],
)
def test_snapkv_chooses_as_published(kv_heads: int, group: int, spec: str, kernel: int, how: str) -> None:
    compressor = parse_compressor(spec + ",ratio=0.3")
    generator = torch.Generator().manual_seed(kv_heads * 31 + kernel)
    tokens, window = 409, compressor.evidence.window_queries
    k = torch.randn(kv_heads, tokens, 64, generator=generator)
    q = 2 * torch.randn(window, kv_heads * group, 64, generator=generator)
    result = compressor.compress(k, torch.zeros_like(k), LayerEvidence(0, q, 0))
    keep = budget(0.3, tokens)
    assert keep == 123
    assert result.positions.tolist() == plain_snapkv(q, k, keep, kernel, how)
    # The control: with another kernel the choice differs, so the comparison can fail.
    assert result.positions.tolist() != plain_snapkv(q, k, keep, kernel + 4, how)


def test_snapkv_keeps_what_the_window_attends_to() -> None:
    generator = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 500, 64, generator=generator)
    q = torch.zeros(64, 4, 64)
    q[:, :, 0] = 8.0
    k[0, 123, 0] = 50.0
    result = parse_compressor("snapkv:ratio=0.14").compress(k, k, LayerEvidence(0, q, 0))
    held = set(result.positions[0].tolist())
    # Pooling carries the neighbours along.
    assert {121, 122, 123, 124, 125} <= held and set(range(436, 500)) <= held and len(held) == 70


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 70])
def test_snapkv_short_prompts(tokens: int) -> None:
    compressor = parse_compressor("snapkv:ratio=0.25")
    q = torch.randn(min(64, tokens), 4, 64)
    k = torch.randn(1, tokens, 64)
    positions = compressor.compress(k, k, LayerEvidence(0, q, 0)).positions
    keep = budget(0.25, tokens)
    # The budget is smaller than the window here: its newest tokens stay.
    assert positions.tolist() == [list(range(tokens - keep, tokens))]


def test_snapkv_of_everything_keeps_everything() -> None:
    k, q = torch.randn(2, 130, 64), torch.randn(64, 8, 64)
    positions = parse_compressor("snapkv:ratio=1").compress(k, k, LayerEvidence(0, q, 0)).positions
    assert positions.tolist() == [list(range(130))] * 2


def test_top_positions_is_a_total_order() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0, -0.0, 0.0]])
    expected = [[1], [1, 2], [1, 2, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    for count, held in enumerate(expected, start=1):
        assert top_positions(scores, count).tolist() == [held]
    ties = torch.ones(1, 5000)
    assert top_positions(ties, 1234).tolist() == [list(range(1234))]


@pytest.mark.parametrize(
    ("ratio", "tokens", "count"),
    [(0.25, 4, 1), (0.25, 5, 2), (0.07, 100, 7), (0.1, 30, 3), (1.0, 9, 9), (1e-6, 9, 1)],
)
def test_budget(ratio: float, tokens: int, count: int) -> None:
    assert budget(ratio, tokens) == count


def test_random_keeps_sinks_and_differs_by_head_and_layer() -> None:
    compressor = parse_compressor("random:ratio=0.1,sinks=4")
    k = torch.zeros(3, 1000, 64)
    rows = [compressor.compress(k, k, LayerEvidence(layer, None, 9)).positions.tolist() for layer in (0, 1)]
    for row in itertools.chain(*rows):
        assert row[:4] == [0, 1, 2, 3] and len(row) == 100
    assert len({tuple(row) for row in itertools.chain(*rows)}) == 6


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_kivi_error_is_half_a_step(bits: int, group: int) -> None:
    """A page there and back: within half a step of its group, K grouped along tokens, V along channels."""
    kivi = parse_compressor(f"kivi:bits={bits},group={group}")
    heads, page, dim = 2, 64, 64
    generator = torch.Generator().manual_seed(bits * 100 + group)
    full = torch.randn(2, heads, page, dim, generator=generator)
    # Channels of K and tokens of V differ in scale: grouped along the wrong axis, the error would be far greater.
    full[0] *= 10 ** torch.linspace(-2, 1, dim)
    full[1] *= 10 ** torch.linspace(-2, 1, page)[:, None]
    size, guard = kivi.draft_bytes(page, heads, dim, 4, page), 256
    quant = torch.full((size + guard,), 0xAB, dtype=torch.uint8)
    back = torch.full_like(full, float("nan"))
    sizes = {"kv_heads": heads, "head_dim": dim, "page_size": page, "bits": bits, "group": group}
    table = torch.tensor([quant.data_ptr()])
    ops.kv_quantize(torch.tensor([full.data_ptr()]), table, full[:0], **sizes)
    ops.kv_dequantize(torch.tensor([back.data_ptr()]), table, full[:0], **sizes)
    assert (quant[size:] == 0xAB).all(), "draft_bytes is not the size of a quantized page"
    for part, axis in ((0, 1), (1, 2)):
        x, y = (t[part].movedim(axis, 0).reshape(64 // group, group, -1) for t in (full, back))
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2**bits - 1)
        assert ((y - x).abs() <= step * (0.5 + 1e-4)).all()
        assert ((y - x).abs() > step * 0.4).any(), "the bound is reached: it could have failed"


def test_kivi_keeps_whole_pages_only() -> None:
    kivi = parse_compressor("kivi:bits=2,group=32")
    page = kivi.draft_bytes(64, 2, 64, 2, 64)
    assert [kivi.draft_bytes(n, 2, 64, 2, 64) for n in (0, 63, 64, 65, 128)] == [0, 0, page, page, 2 * page]
    # 2 bits and two 16-bit numbers for 32 elements: 3 bits an element, as the authors count it.
    assert page * 8 == 3 * 2 * 2 * 64 * 64
