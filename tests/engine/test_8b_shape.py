# SPDX-License-Identifier: Apache-2.0
"""C1 and C2 on two layers of an 8B Llama with random weights, in all modes (on a GPU); a small shape on the CPU. The
same with QK-norm, as Qwen3 has it.

The full vocabulary would only add time: 32000 entries here.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import pytest

from bench.random_model import TINY, random_llama, with_qk_norm
from tests.engine.harness import Arrival, difference, expected, keep_draft_kv, record, run
from vericache.config import EngineConfig, SamplingParams
from vericache.engine.engine import Engine
from vericache.engine.memory import activation_bytes
from vericache.models.llama import CausalLM
from vericache.outputs import RequestOutput

COMPRESSORS = (
    "identity",
    "random:ratio=0.5",
    "snapkv:ratio=0.25",
    "kivi:bits=2",
    "kivi:bits=4",
    "kivi:bits=8",
)


@dataclass(frozen=True)
class Setup:
    """A model and how long its prompts are."""

    name: str
    model: CausalLM
    lengths: tuple[int, ...]
    chunk: int

    def arrivals(self) -> list[Arrival]:
        """Greedy and sampled requests with draft lengths of their own; one arrives late."""
        rng = random.Random(11)
        kinds = (
            SamplingParams(max_tokens=40, ignore_eos=True, draft_len=7),
            SamplingParams(max_tokens=40, ignore_eos=True, draft_len=16, temperature=0.8, seed=3),
            SamplingParams(max_tokens=33, ignore_eos=True, draft_len=1),
            SamplingParams(max_tokens=24, ignore_eos=True, draft_len=31, temperature=1.2, top_k=50, top_p=0.9, seed=4),
        )
        vocab = self.model.config.vocab_size
        return [
            Arrival(tuple(rng.randrange(3, vocab) for _ in range(length)), params, at=5 * index)
            for index, (length, params) in enumerate(zip(self.lengths, kinds, strict=True))
        ]

    def config(self, mode: str, compressor: str = "identity", room: str = "4GiB") -> EngineConfig:
        """An engine with `room` beside the weights, the activations and a staging ring."""
        config = EngineConfig(
            mode=mode, compressor=compressor, draft_len=8, prefill_chunk=self.chunk, max_batch=4, staging_bytes="64MiB",
            memory_budget=room, record_logits=True,
        )  # fmt: skip
        fixed = activation_bytes(self.model.config, config, self.model.dtype.itemsize) + self.model.weight_bytes
        staging = int(config.staging_bytes or 0)
        budget = fixed + staging + config.budget_bytes()
        return EngineConfig(**{**config.__dict__, "memory_budget": budget})

    def run(self, config: EngineConfig) -> list[RequestOutput]:
        """All requests in one engine."""
        return run(Engine(self.model, config), self.arrivals())

    def problems(self, outputs: list[RequestOutput]) -> list[str]:
        """Where C1 or C2 is broken."""
        truths = [expected(self.model, arrival, self.chunk) for arrival in self.arrivals()]
        found = [difference(output, truth) for output, truth in zip(outputs, truths, strict=True)]
        return [f"request {i}: {problem}" for i, problem in enumerate(found) if problem]


@pytest.fixture(scope="module", params=["small", pytest.param("8b", marks=pytest.mark.cuda)])
def plain(request: pytest.FixtureRequest) -> Setup:
    if request.param == "small":
        return Setup("small", random_llama("cpu", **TINY), (70, 129, 640, 1700), 64)
    model = random_llama("cuda", num_hidden_layers=2, vocab_size=32000, max_position_embeddings=4096)
    return Setup("8b", model, (1000, 1537, 2048, 3001), 256)


@pytest.fixture(scope="module", params=["plain", "qk_norm"])
def setup(request: pytest.FixtureRequest, plain: Setup) -> Setup:
    if request.param == "plain":
        return plain
    return replace(plain, name=f"{plain.name}-qk-norm", model=with_qk_norm(plain.model))


def test_every_mode_and_compressor(setup: Setup) -> None:
    started = time.perf_counter()
    totals = {"runs": 0, "requests": 0, "tokens": 0, "drafted": 0, "matched": 0, "differences": 0}
    runs = [("full", "identity"), *(("vericache", c) for c in COMPRESSORS)]
    problems = []
    for mode, compressor in runs:
        outputs = setup.run(setup.config(mode, compressor))
        problems += [f"{mode}, {compressor}, {problem}" for problem in setup.problems(outputs)]
        totals["runs"] += 1
        totals["requests"] += len(outputs)
        totals["tokens"] += sum(len(output.token_ids) for output in outputs)
        totals["drafted"] += sum(output.stats.drafted for output in outputs)
        totals["matched"] += sum(output.stats.matched for output in outputs)
    totals["differences"] = len(problems)
    if setup.name.startswith("8b"):
        seconds = round(time.perf_counter() - started, 1)
        model = {"layers": 2, "qk_norm": setup.model.config.qk_norm}
        result = {**totals, "seconds": seconds, **model, "compressors": list(COMPRESSORS)}
        record(f"engine-{setup.name}-shape-gpu", result)
    assert not problems, f"{len(problems)} differ; the first: {problems[0]}"
    assert 0 < totals["matched"] < totals["drafted"], f"every draft alike proves little: {totals}"


def test_auto_takes_full_where_it_fits(setup: Setup) -> None:
    compressor = "kivi:bits=2"
    arrivals = [replace(arrival, at=0) for arrival in setup.arrivals()]
    engine = Engine(setup.model, setup.config("auto", compressor))
    needs = [engine.admission.needs(engine.add(arrival.prompt, arrival.params)) for arrival in arrivals]
    # Full KV for all but the last, which has room for less than its own.
    full, vericache = (need.device for need in needs[-1])
    assert vericache < full
    room = sum(need[0].device for need in needs[:-1]) + (full + vericache) // 2
    outputs = run(Engine(setup.model, setup.config("auto", compressor, room=f"{room}B")), arrivals)
    assert not setup.problems(outputs)
    assert [output.stats.mode for output in outputs] == ["full"] * (len(arrivals) - 1) + ["vericache"]


def test_lossy_differs(setup: Setup) -> None:
    """The compressors lose something here, so that equality above is the verifier's doing."""
    differ = [len(setup.problems(setup.run(setup.config("lossy", c)))) for c in ("random:ratio=0.5", "kivi:bits=2")]
    assert all(differ)
    assert not setup.problems(setup.run(setup.config("lossy", "identity"))), "identity loses nothing"


def test_control_keeping_draft_kv_breaks_bits(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_draft_kv(monkeypatch)
    assert setup.problems(setup.run(setup.config("vericache", "kivi:bits=2")))
