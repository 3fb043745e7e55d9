# SPDX-License-Identifier: Apache-2.0
"""The engine's promises besides exactness: budgets, refusals, failures that stay with one request, true counters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.harness import Arrival, check, difference, expected, run
from tests.engine.tiny import POSITIONS, VOCAB, tiny_model
from vericache import _C
from vericache.config import EngineConfig, SamplingParams
from vericache.engine.engine import Engine
from vericache.engine.request import Phase
from vericache.errors import CapacityError, InvalidRequestError, UnsupportedModelError
from vericache.models.llama import CausalLM


def _config(**fields: object) -> EngineConfig:
    base = {
        "compressor": "random:ratio=0.25",
        "page_size": 16,
        "prefill_chunk": 32,
        "draft_len": 5,
        "record_logits": True,
    }
    return EngineConfig(**{**base, **fields})  # type: ignore[arg-type]


def _arrival(length: int, max_tokens: int = 30, seed: int = 1, **fields: object) -> Arrival:
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Arrival(tuple(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCAB], f"token id {VOCAB} is outside the vocabulary"),
        ([-1], "token id -1"),
        ([5] * (POSITIONS + 1), f"{POSITIONS + 1} tokens and the model {POSITIONS} positions"),
        ([5] * POSITIONS, "leaves no room for a token"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_others_run(prompt: list[int], message: str) -> None:
    engine = Engine(tiny_model(), _config())
    good = _arrival(50)
    request = engine.add(good.prompt, good.params)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(prompt, SamplingParams())
    while engine.busy:
        engine.step()
    assert difference(request.output(), expected(tiny_model(), good, 32)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"draft_len": 0}, "draft_len must lie in 1..127, got 0"),
        ({"page_size": 48}, "got 48"),
        ({"memory_budget": "lots"}, "'lots' is not a size"),
        ({"memory_budget": 0}, "must be positive"),
        ({"compressor": "snapkv:ratio=0"}, "0"),
        ({"compressor": "snapkv:ratio=1.5"}, "1.5"),
        ({"compressor": "zip"}, "zip"),
    ],
)
def test_a_bad_option_is_one_clear_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Engine(tiny_model(), _config(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens .* got -1"),
        ({"max_tokens": 0}, "max_tokens .* got 0"),
        ({"temperature": -0.5}, "temperature .* -0.5"),
        ({"temperature": float("nan")}, "temperature .* nan"),
        ({"top_p": 0.0}, "top_p .* 0.0"),
        ({"min_p": 1.0}, "min_p .* 1.0"),
        ({"top_k": -2}, "top_k .* -2"),
        ({"draft_len": 128}, "draft_len .* 128"),
        ({"stop": ("",)}, "stop string"),
    ],
)
def test_bad_sampling_parameters(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    engine = Engine(tiny_model(), _config(memory_budget="1MiB", staging_bytes="64KiB"))
    with pytest.raises(
        CapacityError, match=r"mode vericache needs .*draft cache .* = .*memory_budget 1.0 MiB|staging slot"
    ):
        engine.add([5] * 300, SamplingParams(max_tokens=10))
    small = engine.add([5] * 10, SamplingParams(max_tokens=3))  # what fits still runs
    while engine.busy:
        engine.step()
    assert small.phase is Phase.FINISHED and small.error is None


def test_weights_beyond_the_budget_are_refused() -> None:
    with pytest.raises(CapacityError, match="the weights take"):
        Engine(tiny_model(), _config(memory_budget="10KiB"))


def test_a_request_waits_for_memory_and_the_peak_stays_inside_the_budget() -> None:
    arrivals = [_arrival(150, seed=s) for s in range(4)]
    roomy = Engine(tiny_model(), _config(memory_budget="64MiB", staging_bytes="256KiB"))
    check(tiny_model(), roomy.config, arrivals, roomy)
    one = Engine(tiny_model(), _config(memory_budget="64MiB", staging_bytes="256KiB"))
    check(tiny_model(), one.config, arrivals[:1], one)
    # Room for one request and a half: the others queue, and all end the same.
    budget = one.admission.ledger.peak() + (roomy.admission.ledger.peak() - one.admission.ledger.peak()) // 6
    tight = Engine(tiny_model(), _config(memory_budget=budget, staging_bytes="256KiB"))
    check(tiny_model(), tight.config, arrivals, tight)
    assert tight.admission.ledger.peak() <= budget < roomy.admission.ledger.peak()
    assert tight.iterations > roomy.iterations


def test_auto_takes_full_where_it_fits() -> None:
    roomy = Engine(tiny_model(), _config(mode="auto"))
    assert [o.stats.mode for o in check(tiny_model(), roomy.config, [_arrival(100)], roomy)] == ["full"]
    config = {"mode": "auto", "staging_bytes": "300KiB", "compressor": "kivi:bits=2,group=16,residual=16"}
    probe = Engine(tiny_model(), _config(**config))
    arrivals = [_arrival(280), _arrival(280, seed=3)]
    full, drafted = probe.admission.needs(probe.add(arrivals[0].prompt, arrivals[0].params))
    assert drafted.device < full.device
    # Room for one full cache and not quite another.
    budget = probe.admission.ledger.used() + full.device + (full.device + drafted.device) // 2
    tight = Engine(tiny_model(), _config(**config, memory_budget=budget))
    modes = [o.stats.mode for o in check(tiny_model(), tight.config, arrivals, tight)]
    assert modes == ["full", "vericache"]


def test_one_failed_copy_is_fetched_again() -> None:
    for at in (3, 5, 9):
        copies = _C.CopyEngine(-1, _C.CopyEngineOptions(fail_after=at))
        engine = Engine(tiny_model(), _config(), copies=copies)
        arrivals = [_arrival(120), _arrival(90, seed=2)]
        outputs = run(engine, arrivals)
        # Either the failed copy was a fetch, and the retry is invisible, or it was a store, and that request says so.
        assert sum(copies.counters(d).failed for d in ("h2d", "d2h")) == 1
        for arrival, output in zip(arrivals, outputs, strict=True):
            problem = difference(output, expected(tiny_model(), arrival, 32))
            assert problem is None or (output.finish_reason == "error" and output.error)
        assert sum(o.finish_reason == "error" for o in outputs) <= 1


def test_nan_in_one_request_stays_there() -> None:
    sound = tiny_model()
    poisoned_embedding = sound.weights.embedding.clone()
    poisoned_embedding[60] = float("nan")
    model = CausalLM(sound.config, sound.weights._replace(embedding=poisoned_embedding), sound.cos, sound.sin)
    engine = Engine(model, _config())
    bad = engine.add([5, 60, 7], SamplingParams(max_tokens=5))
    arrival = Arrival(tuple(t for t in _arrival(60).prompt if t != 60), SamplingParams(max_tokens=8))
    good = engine.add(arrival.prompt, arrival.params)
    while engine.busy:
        engine.step()
    assert bad.finish_reason == "error" and "NaN" in (bad.error or "")
    assert good.finish_reason in ("stop", "length") and good.error is None


def test_byte_counters_are_true() -> None:
    for compressor in ("random:ratio=0.25", "kivi:bits=4,group=16,residual=16"):
        copies = _C.CopyEngine(-1)
        engine = Engine(tiny_model(), _config(compressor=compressor), copies=copies)
        outputs = run(engine, [_arrival(150), _arrival(77, seed=2)])
        assert sum(o.stats.fetched_bytes for o in outputs) == copies.counters("h2d").bytes > 0
        assert sum(o.stats.stored_bytes for o in outputs) == copies.counters("d2h").bytes > 0


def test_dropped_rows_are_all_that_is_fetched() -> None:
    """The residual lever: keeping a quarter saves a quarter of the link (up to the padding of head pages)."""
    g = Engine(tiny_model(), _config()).geometry
    fetched = {}
    for ratio in ("0.25", "0.75"):
        output = run(
            Engine(tiny_model(), _config(compressor=f"random:ratio={ratio}", run_ahead=0)), [_arrival(288, 6)]
        )[0]
        fetched[ratio] = output.stats.fetched_bytes / output.stats.rounds
    whole = 288 * g.bytes_per_token()
    padding = g.layers * g.kv_heads * g.head_page_bytes
    assert 0.75 * whole <= fetched["0.25"] <= 0.75 * whole + padding
    assert 0.25 * whole <= fetched["0.75"] <= 0.25 * whole + padding


def test_cancelling_frees_everything_at_any_moment() -> None:
    for cancel_at in range(0, 40, 3):
        engine = Engine(tiny_model(), _config(copy_delay_us=200))
        run(engine, [_arrival(120, cancel_at=cancel_at), _arrival(60, seed=5)])
        kinds = engine.admission.ledger.used_by_kind()
        assert {k for k, n in kinds.items() if n} <= {"weights", "activations", "staging"}


def test_a_sliding_window_model_is_refused_where_no_draft_can_serve_it() -> None:
    sound = tiny_model()
    windowed = CausalLM(replace(sound.config, windows=(0, 24, 0)), sound.weights, sound.cos, sound.sin)
    with pytest.raises(UnsupportedModelError, match="sliding window of 24"):
        Engine(windowed, _config())
    arrival = _arrival(100)
    check(windowed, _config(mode="full"), [arrival])
