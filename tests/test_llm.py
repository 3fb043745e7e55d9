# SPDX-License-Identifier: Apache-2.0
"""`LLM` on the embedded model: texts, streams, stop strings, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from vericache import LLM, SamplingParams, reference
from vericache.errors import CheckpointError, InvalidRequestError

PROMPT = (
    "<|begin|>"
    + "".join(
        f"def {a}_{b}(value):\n    return value * {i}\n\n"
        for i, (a, b) in enumerate(
            [("amber", "ridge"), ("nova", "pond"), ("silk", "moon"), ("cedar", "gate"), ("ivory", "lake")] * 4
        )
    )
    + "<|question|>quote the function silk_moon<|answer|>"
)
LENGTH = 24


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("vericache-nano", compressor="snapkv:ratio=0.25,window=16", page_size=16, draft_len=6)


@pytest.fixture(scope="module")
def truth(llm: LLM) -> reference.ReferenceOutput:
    return reference.generate(llm.model, llm.tokenizer.encode(PROMPT), max_tokens=LENGTH)


def test_generate_is_the_references_text(llm: LLM, truth: reference.ReferenceOutput) -> None:
    output = llm.generate(PROMPT, SamplingParams(max_tokens=LENGTH, logprobs=True))[0]
    assert output.token_ids == truth.token_ids
    assert output.logprobs == truth.logprobs  # the same bits, not merely close
    assert output.finish_reason == truth.finish_reason
    assert output.stats.rounds > 0 and output.stats.mode == "vericache"


def test_stream_shows_the_same_text_and_only_whole_characters(llm: LLM) -> None:
    whole = llm.generate(PROMPT, SamplingParams(max_tokens=LENGTH))[0]
    chunks = list(llm.stream(PROMPT, SamplingParams(max_tokens=LENGTH)))
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.token_ids] == whole.token_ids
    assert [c.finished for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 1 and not any("\ufffd" in c.text for c in chunks)


def test_closing_a_stream_frees_its_memory(llm: LLM) -> None:
    before = llm.engine.admission.ledger.used()
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=LENGTH))
    next(stream)
    assert llm.engine.admission.ledger.used() > before
    stream.close()
    assert llm.engine.admission.ledger.used() == before and not llm.engine.busy


def test_stop_string_cuts_text_alike_in_every_mode(llm: LLM) -> None:
    free = llm.generate(PROMPT, SamplingParams(max_tokens=LENGTH))[0]
    stop = free.text[6:10]
    params = SamplingParams(max_tokens=LENGTH, stop=(stop,))
    full = LLM("vericache-nano", mode="full", page_size=16)
    ours, theirs = llm.generate(PROMPT, params)[0], full.generate(PROMPT, params)[0]
    assert ours.finish_reason == "stop" and ours.text == free.text[: free.text.index(stop)]
    assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
    streamed = "".join(c.text for c in llm.stream(PROMPT, params))
    assert streamed == ours.text


def test_a_batch_keeps_order_and_each_its_parameters(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True) for n, t in ((3, 0.0), (9, 1.0), (5, 0.7))
    ]
    outputs = llm.generate([PROMPT, PROMPT, "x = 1"], params)
    assert [len(o.token_ids) for o in outputs] == [3, 9, 5]
    alone = [llm.generate([p], q)[0] for p, q in zip([PROMPT, PROMPT, "x = 1"], params, strict=True)]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]


def test_one_bad_prompt_refuses_the_batch_before_any_work(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.generate([PROMPT, []])
    assert not llm.engine.busy
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate([PROMPT], [SamplingParams(), SamplingParams()])


def test_progress_is_reported(llm: LLM) -> None:
    seen: list[tuple[str, float]] = []
    watched = LLM("vericache-nano", page_size=16, progress=lambda what, share: seen.append((what, share)))
    watched.generate(PROMPT, SamplingParams(max_tokens=4))
    assert {what for what, _ in seen} >= {"prefill", "generate"}
    assert all(0 <= share <= 1 for _, share in seen)


def test_unknown_models_devices_and_dtypes() -> None:
    with pytest.raises(CheckpointError, match="vericache-nano"):
        LLM("vericache-nona")
    with pytest.raises(InvalidRequestError, match="float16"):
        LLM("vericache-nano", dtype="float16")
    with pytest.raises(InvalidRequestError, match="tpu"):
        LLM("vericache-nano", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequestError, match="needs a GPU"):
            LLM("vericache-nano", device="cuda")
