# SPDX-License-Identifier: Apache-2.0
"""C1 and C2 over hundreds of random engine runs, and the negative controls that show the test can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engine.harness import Arrival, check, difference, expected, keep_draft_kv, run
from tests.engine.split_attention import split_attention
from tests.engine.tiny import VOCAB, tiny_model
from vericache import ops
from vericache.config import EngineConfig, SamplingParams
from vericache.engine import view as view_module
from vericache.engine.engine import Engine

COMPRESSORS = (
    "identity",
    "random:ratio=0.25",
    "random:ratio=0.1",
    "snapkv:ratio=0.25,window=8",
    "snapkv:ratio=0.5,window=16",
    "kivi:bits=2,group=16,residual=16",
    "kivi:bits=4,group=16,residual=0",
    "kivi:bits=6,group=16,residual=16",
    "kivi:bits=8,group=16,residual=32",
)
RUNS = 250

prompts = st.builds(
    lambda length, seed: tuple(
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    ),
    st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]), st.integers(1, 160)),
    st.integers(0, 7),
)
sampling = st.one_of(
    st.builds(SamplingParams, max_tokens=st.integers(1, 40), draft_len=st.sampled_from([None, 1, 2, 15, 16, 17])),
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 40),
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.05]),
        seed=st.integers(0, 3),
        stop_token_ids=st.sampled_from([(), (7,), (7, 11)]),
        ignore_eos=st.booleans(),
    ),
)
arrivals_strategy = st.lists(
    st.builds(Arrival, prompts, sampling, st.integers(0, 30), st.one_of(st.none(), st.none(), st.integers(0, 60))),
    min_size=1,
    max_size=5,
)
configs = st.builds(
    EngineConfig,
    mode=st.sampled_from(["vericache", "vericache", "vericache", "auto", "full"]),
    compressor=st.sampled_from(COMPRESSORS),
    draft_len=st.integers(1, 20),
    run_ahead=st.sampled_from([None, 0, 1, 5]),
    page_size=st.sampled_from([16, 32]),
    prefill_chunk=st.sampled_from([16, 32, 61]),
    # From one request at a time to all at once; the staging ring from one layer to many.
    memory_budget=st.sampled_from(["4MiB", "8MiB", "64MiB"]),
    staging_bytes=st.sampled_from(["256KiB", "1MiB"]),
    max_batch=st.sampled_from([1, 3, 32]),
    max_verifying=st.sampled_from([1, 4]),
    copy_delay_us=st.sampled_from([0, 0, 300]),
    record_logits=st.just(True),
)


# Whole runs shrink too slowly to be worth it: a failing run prints its scenario, which replays by itself.
PHASES = (Phase.explicit, Phase.generate)


@settings(max_examples=RUNS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES)
@given(
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), config=configs, arrivals=arrivals_strategy
)
def test_tokens_and_bits_equal_the_reference(dtype: torch.dtype, config: EngineConfig, arrivals: list[Arrival]) -> None:
    """Mostly float32: rounding to bfloat16 hides a wrong last bit more often than not."""
    check(tiny_model(dtype), config, arrivals)


def test_float32_storage_too() -> None:
    model = tiny_model(torch.float32)
    for compressor in COMPRESSORS:
        config = EngineConfig(compressor=compressor, page_size=16, prefill_chunk=32, draft_len=6, record_logits=True)
        check(model, config, [_arrival(70, 30), _arrival(33, 20, temperature=1.0, seed=3)])


@pytest.mark.parametrize("context", [15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("draft_len", [15, 16, 17])
def test_lengths_around_a_page(context: int, draft_len: int) -> None:
    for compressor in ("random:ratio=0.25", "kivi:bits=2,group=16,residual=16"):
        config = EngineConfig(
            compressor=compressor, page_size=16, prefill_chunk=16, draft_len=draft_len, record_logits=True
        )
        check(tiny_model(), config, [_arrival(context, 50, ignore_eos=True)])


def test_identity_accepts_every_draft() -> None:
    config = EngineConfig(
        compressor="identity", page_size=16, prefill_chunk=32, draft_len=7, run_ahead=0, record_logits=True
    )
    output = check(tiny_model(torch.float32), config, [_arrival(90, 64, ignore_eos=True)])[0]
    assert output.stats.fetched_bytes == 0, "nothing was dropped, so nothing is to be fetched"
    # Draft attention is free of R1, so its last bits may differ; on this model no token does.
    assert output.stats.matched == output.stats.drafted


def test_random_drops_make_drafts_wrong() -> None:
    config = EngineConfig(
        compressor="random:ratio=0.1", page_size=16, prefill_chunk=32, draft_len=7, record_logits=True
    )
    output = check(tiny_model(), config, [_arrival(150, 60, ignore_eos=True)])[0]
    assert output.stats.matched < output.stats.drafted, "the stress case must stress: some drafts are rejected"
    assert output.stats.fetched_bytes > 0


def test_lossy_is_not_exact() -> None:
    """Straight to the user, the same drafts change the text: guards against a compressor that drops nothing."""
    config = EngineConfig(
        mode="lossy", compressor="random:ratio=0.1", page_size=16, prefill_chunk=32, record_logits=True
    )
    assert _broken(config, Engine(tiny_model(), config)) is not None


def test_control_keeping_draft_kv_breaks_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2 off: verify rows leave the draft's K and V in place, so accepted tokens stand for the wrong state."""
    config = EngineConfig(
        compressor="random:ratio=0.25", page_size=16, prefill_chunk=32, draft_len=5, record_logits=True
    )
    assert _broken(config, Engine(tiny_model(), config)) is None, "the control starts from a sound engine"
    keep_draft_kv(monkeypatch)
    assert _broken(config, Engine(tiny_model(), config)) is not None


def test_control_row_count_dependent_split_breaks_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 off: an attention that is right, but cuts the keys into as many parts as rows ride along."""
    # Chunks of one row: prefill and reference then never take the other path, only verification does.
    config = EngineConfig(
        compressor="random:ratio=0.25", page_size=16, prefill_chunk=1, draft_len=5, record_logits=True
    )
    assert _broken(config, Engine(tiny_model(), config)) is None, "the control starts from a sound engine"
    original = ops.paged_attention

    def split_by_rows(q, table, row_offsets, row_position, *, kv_heads, page_size, scale, window=0):  # type: ignore[no-untyped-def]
        rows = int((row_offsets[1:] - row_offsets[:-1]).max())
        if rows == 1:
            return original(
                q, table, row_offsets, row_position, kv_heads=kv_heads, page_size=page_size, scale=scale, window=window
            )
        return split_attention(q, table, row_offsets, row_position, kv_heads, page_size, scale, parts=rows)

    monkeypatch.setattr(view_module.ops, "paged_attention", split_by_rows)
    assert _broken(config, Engine(tiny_model(), config)) is not None


def _arrival(length: int, max_tokens: int, **params: object) -> Arrival:
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Arrival(tuple(prompt), replace(SamplingParams(max_tokens=max_tokens), **params))  # type: ignore[arg-type]


def _broken(config: EngineConfig, engine: Engine) -> str | None:
    """The first broken promise over a few requests, or None. References are those of unpatched code (cached)."""
    arrivals = [_arrival(n, 50, ignore_eos=True) for n in (40, 97, 150)]
    outputs = run(engine, arrivals)
    return next(
        (
            p
            for a, o in zip(arrivals, outputs, strict=True)
            if (p := difference(o, expected(tiny_model(), a, config.prefill_chunk)))
        ),
        None,
    )
