# SPDX-License-Identifier: Apache-2.0
"""The exercises are what they claim, and the embedded model answers them from its context."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer

from tools.train_nano.exercises import KINDS, Exercise, make_exercise
from vericache import LLM, SamplingParams
from vericache.models import find_model

SEED = 7_000_000  # away from the seeds that training, the model card and the benchmark draw from


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(find_model("vericache-nano") / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_exercise(tokenizer: Tokenizer, kind: str) -> None:
    one, again, other = (make_exercise(kind, 1024, seed, tokenizer) for seed in (SEED, SEED, SEED + 1))
    assert (one.prompt, one.answer) == (again.prompt, again.answer)
    assert one.prompt != other.prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_length_and_ids_agree_with_the_text(tokenizer: Tokenizer, kind: str, tokens: int) -> None:
    e = make_exercise(kind, tokens, SEED, tokenizer)
    assert 0.95 * tokens <= len(e.prompt_ids) <= tokens
    assert tokenizer.encode(e.prompt, add_special_tokens=False).ids == list(e.prompt_ids)
    assert tokenizer.decode(list(e.answer_ids)) == e.answer


def test_a_tool_call_needs_records_far_apart(tokenizer: Tokenizer) -> None:
    """Every argument stands in the context, and those behind the hop nowhere near the question."""
    e = make_exercise("tool_call", 4096, SEED, tokenizer)
    context, _, question = e.prompt.partition("<|question|>")
    calls = [json.loads(line) for line in e.answer.splitlines()]
    values = [v for call in calls for name, v in call.items() if name != "tool"]
    assert len(calls) >= 2 and len(values) >= 4
    assert all(str(v) in context for v in values)
    hidden = [v for v in values if str(v) not in question]
    assert len(hidden) >= 3, "the question alone must not give the answer away"
    at = [context.index(str(v)) for v in hidden]
    assert max(at) - min(at) > 500, "the records lie apart"


@pytest.mark.parametrize("kind", KINDS)
def test_vericache_nano_answers_from_its_context(tokenizer: Tokenizer, kind: str) -> None:
    e: Exercise = make_exercise(kind, 1024, SEED, tokenizer)
    llm = LLM("vericache-nano", compressor="kivi:bits=4", draft_len=16)
    output = llm.generate([e.prompt_ids], SamplingParams(max_tokens=160))[0]
    assert output.token_ids == list(e.answer_ids)
    # The same question over a context without its records cannot be answered: nothing was learnt by heart.
    other = make_exercise(kind, 1024, SEED + 1, tokenizer)
    swapped = re.sub(r"<\|question\|>.*", "", other.prompt, flags=re.S) + e.prompt[e.prompt.index("<|question|>") :]
    wrong = llm.generate([swapped], SamplingParams(max_tokens=160))[0]
    assert wrong.text != e.answer
