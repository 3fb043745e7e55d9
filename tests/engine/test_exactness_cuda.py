# SPDX-License-Identifier: Apache-2.0
"""C1 and C2 on the GPU: over 20,000 emitted tokens of random engine runs, and the negative controls."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.engine.harness import Arrival, difference, expected, keep_draft_kv, record, run
from tests.engine.tiny import VOCAB, tiny_model
from vericache.config import EngineConfig, SamplingParams
from vericache.engine.engine import Engine
from vericache.models import llama
from vericache.models.llama import CausalLM

pytestmark = pytest.mark.cuda

COMPRESSORS = (
    "identity",
    "random:ratio=0.1",
    "random:ratio=0.5",
    "snapkv:ratio=0.25,window=8",
    "kivi:bits=2,group=16,residual=16",
    "kivi:bits=4,group=16,residual=0",
    "kivi:bits=8,group=16,residual=32",
)
SCENARIOS = 28
REQUESTS = 24


def _model(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    return tiny_model(dtype, device="cuda", head_dim=head_dim)


def _scenario(rng: random.Random, requests: int = REQUESTS) -> list[Arrival]:
    arrivals = []
    for _ in range(requests):
        length = rng.choice([1, 15, 16, 17, 63, 64, 65, rng.randint(1, 200)])
        prompt = tuple(rng.randint(3, VOCAB - 1) for _ in range(length))
        sampled = rng.random() < 0.5
        params = SamplingParams(
            max_tokens=rng.randint(30, 60),
            temperature=rng.choice([0.7, 1.5]) if sampled else 0.0,
            top_k=rng.choice([0, 5]) if sampled else 0,
            top_p=rng.choice([1.0, 0.8]) if sampled else 1.0,
            seed=rng.randint(0, 9),
            stop_token_ids=rng.choice([(), (), (7,)]),
            ignore_eos=rng.random() < 0.8,
            draft_len=rng.choice([None, 1, 15, 16, 17]),
        )
        cancel_at = rng.randint(5, 60) if rng.random() < 0.1 else None
        arrivals.append(Arrival(prompt, params, rng.randint(0, 40), cancel_at))
    return arrivals


def _config(rng: random.Random) -> EngineConfig:
    return EngineConfig(
        mode=rng.choice(["vericache", "vericache", "vericache", "auto", "full"]),
        compressor=rng.choice(COMPRESSORS),
        draft_len=rng.randint(1, 20),
        run_ahead=rng.choice([None, 0, 3]),
        page_size=rng.choice([16, 32, 64]),
        prefill_chunk=rng.choice([32, 61, 128]),
        memory_budget=rng.choice(["16MiB", "256MiB"]),
        staging_bytes="1MiB",
        max_batch=rng.choice([4, 32]),
        max_verifying=rng.choice([1, 4]),
        record_logits=True,
    )


def test_over_20000_tokens_equal_the_reference() -> None:
    rng = random.Random(20260612)
    totals = {"tokens": 0, "runs": 0, "requests": 0, "drafted": 0, "matched": 0, "differences": 0}
    problems = []
    for _ in range(SCENARIOS):
        config, arrivals = _config(rng), _scenario(rng)
        model = _model(rng.choice([64, 128]), rng.choice([torch.bfloat16, torch.bfloat16, torch.float32]))
        outputs = run(Engine(model, config), arrivals)
        for arrival, output in zip(arrivals, outputs, strict=True):
            problem = difference(output, expected(model, arrival, config.prefill_chunk))
            if problem:
                problems.append(f"{problem}; {config.compressor}, page {config.page_size}, {arrival.params}")
            totals["tokens"] += len(output.token_ids)
            totals["drafted"] += output.stats.drafted
            totals["matched"] += output.stats.matched
        totals["runs"] += 1
        totals["requests"] += len(arrivals)
    totals["differences"] = len(problems)
    record("engine-exactness-gpu", totals)
    assert not problems, f"{len(problems)} of {totals['requests']} requests differ; the first: {problems[0]}"
    assert totals["tokens"] >= 20_000, totals
    assert totals["matched"] < totals["drafted"], "no draft was ever rejected: the runs prove little"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_control_keeping_draft_kv_breaks_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    assert _first_problem(dtype) is None, "the control starts from a sound engine"
    keep_draft_kv(monkeypatch)
    assert _first_problem(dtype) is not None


def test_control_library_gemm_breaks_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 off: a library's GEMM, whose order of summation follows the number of rows."""
    assert _first_problem(torch.float32, chunk=1) is None, "the control starts from a sound engine"
    original = llama.ops.linear

    def library(x, w, bias=None, residual=None, *, out_float32=False, weight_settled=False):  # type: ignore[no-untyped-def]
        if x.shape[0] == 1:
            return original(x, w, bias, residual, out_float32=out_float32)
        out = F.linear(x, w, bias)
        return out if residual is None else out + residual

    monkeypatch.setattr(llama.ops, "linear", library)
    assert _first_problem(torch.float32, chunk=1) is not None


def _first_problem(dtype: torch.dtype, chunk: int = 32) -> str | None:
    config = EngineConfig(
        compressor="random:ratio=0.25", page_size=16, prefill_chunk=chunk, draft_len=5, record_logits=True,
        memory_budget="64MiB",
    )  # fmt: skip
    model = _model(dtype=dtype)
    rng = random.Random(5)
    arrivals = [
        Arrival(tuple(rng.randint(3, VOCAB - 1) for _ in range(n)), SamplingParams(max_tokens=50, ignore_eos=True))
        for n in (40, 97, 150)
    ]
    truths = [expected(model, a, chunk) for a in arrivals]
    outputs = run(Engine(model, config), arrivals)
    return next((p for o, t in zip(outputs, truths, strict=True) if (p := difference(o, t))), None)
