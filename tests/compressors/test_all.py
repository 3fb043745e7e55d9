# SPDX-License-Identifier: Apache-2.0
"""What every compressor promises. A new method is tested by its line in METHODS."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import vericache.compressors
from vericache.compressors import (
    METHODS,
    Compressor,
    KeptTokens,
    LayerEvidence,
    QuantizedTokens,
    parse_compressor,
    spec_of,
)

SPECS = sorted({spec for method in METHODS for spec in (method.name, method.easy, method.hard)})
KV_HEADS, GROUP, HEAD_DIM, PAGE = 2, 4, 64, 64
LENGTHS = (1, 61, PAGE - 1, PAGE, PAGE + 1, 777)


def make(spec: str, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 7):
    """Returns a compressor, K, V and the evidence it asked for."""
    compressor = parse_compressor(spec)
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=generator).to(dtype)
    v = torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=generator).to(dtype)
    window = min(tokens, compressor.evidence.window_queries)
    q = torch.randn(window, KV_HEADS * GROUP, HEAD_DIM, generator=generator).to(dtype) if window else None
    return compressor, k, v, LayerEvidence(layer=1, queries=q, seed=seed)


def result_bytes(result: KeptTokens | QuantizedTokens) -> bytes:
    if isinstance(result, QuantizedTokens):
        return repr(result).encode()
    return result.positions.numpy().tobytes() + result.counts.numpy().tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_declares_what_the_protocol_names(spec: str) -> None:
    compressor = parse_compressor(spec)
    assert isinstance(compressor, Compressor)
    assert compressor.kind in ("kept", "quant")
    # A dropper holds exact rows, so a verify fetches the others; codes are not rows, so it fetches all.
    assert compressor.residual == ("dropped" if compressor.kind == "kept" else "everything")
    assert compressor.residual_window >= 0 and compressor.evidence.window_queries >= 0
    with pytest.raises(AttributeError):
        compressor.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_well_formed(spec: str, tokens: int, dtype: torch.dtype) -> None:
    compressor, k, v, evidence = make(spec, tokens, dtype)
    before = [t.clone() for t in (k, v, evidence.queries) if t is not None]
    result = compressor.compress(k, v, evidence)
    after = [t for t in (k, v, evidence.queries) if t is not None]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new), "compress changed its input"
    if compressor.kind == "quant":
        assert isinstance(result, QuantizedTokens)
        assert result.bits in (2, 4, 5, 6, 7, 8) and PAGE % result.group == 0 and HEAD_DIM % result.group == 0
        return
    assert isinstance(result, KeptTokens)
    assert result.positions.dtype == result.counts.dtype == torch.int32
    assert result.positions.is_contiguous() and result.positions.shape[0] == KV_HEADS
    for row, count in zip(result.positions.tolist(), result.counts.tolist(), strict=True):
        held = row[:count]
        assert 1 <= count <= tokens
        assert held == sorted(set(held)), "positions must ascend without repeats"
        assert held[0] >= 0 and held[-1] < tokens
        assert all(position == -1 for position in row[count:])


@pytest.mark.parametrize("spec", SPECS)
def test_same_input_same_result(spec: str) -> None:
    first, second = make(spec, 777), make(spec, 777)
    assert result_bytes(first[0].compress(*first[1:])) == result_bytes(second[0].compress(*second[1:]))


def test_seed_matters_to_random_alone() -> None:
    for method in METHODS:
        one, other = make(method.name, 777, seed=1), make(method.name, 777, seed=2)
        same = result_bytes(one[0].compress(*one[1:])) == result_bytes(other[0].compress(*other[1:]))
        assert same == (method.name != "random"), method.name


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("spec", SPECS)
def test_draft_bytes_is_an_upper_bound(spec: str, tokens: int) -> None:
    compressor, k, v, evidence = make(spec, tokens)
    result = compressor.compress(k, v, evidence)
    for appended in (0, 1, PAGE, 200):
        bound = compressor.draft_bytes(tokens, KV_HEADS, HEAD_DIM, 2, PAGE, appended=appended)
        if isinstance(result, KeptTokens):
            pages = sum(-(-(count + appended) // PAGE) for count in result.counts.tolist())
            assert bound >= pages * 2 * PAGE * HEAD_DIM * 2
            assert bound <= pages * 2 * PAGE * HEAD_DIM * 2, (
                "the bound is exact where heads keep equally many"
            )
        else:
            pages = (tokens + appended) // PAGE
            codes = PAGE * HEAD_DIM * result.bits // 8
            params = PAGE // result.group * HEAD_DIM * 2
            assert bound == pages * KV_HEADS * 2 * (codes + params + params)


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trip(spec: str) -> None:
    compressor = parse_compressor(spec)
    assert parse_compressor(spec_of(compressor)) == compressor


def test_registry_is_well_formed() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    for method in METHODS:
        assert parse_compressor(method.hard).name == parse_compressor(method.easy).name == method.name
        assert method.summary
        for item in method.options:
            assert item.help and item.allowed.allows(item.default)


def test_compressors_see_tensors_and_nothing_else() -> None:
    folder = Path(vericache.compressors.__file__).parent
    # Of the ops those that take tensors: none that reaches pages through their addresses.
    allowed = ("vericache.compressors", "vericache.errors")
    allowed_ops = {"window_scores"}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path.name
                names = [node.module or ""]
                if node.module == "vericache.ops":
                    assert {alias.name for alias in node.names} <= allowed_ops, path.name
                    continue
            for name in names:
                assert not name.startswith("vericache") or name.startswith(allowed), f"{path.name}: {name}"
