# SPDX-License-Identifier: Apache-2.0
"""`vericache/reference.py`: what it emits, when it stops, what it refuses, and what it must not know."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.models.tiny_checkpoints import VOCAB, kind_named, make_prompt, write_checkpoint
from vericache import ops
from vericache.errors import InvalidRequestError, VericacheError
from vericache.models import CausalLM, load_model
from vericache.reference import generate

PROMPT = make_prompt(37)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(kind_named("llama3"), folder)
    return load_model(folder)


def bits(rows: torch.Tensor | None) -> torch.Tensor:
    assert rows is not None
    return rows.view(torch.int32)


def test_pages_and_chunks_change_no_bit(model: CausalLM) -> None:
    one = generate(model, PROMPT, max_tokens=9, ignore_eos=True, keep_logits=True)
    for page_size, chunk in ((16, 256), (32, 1), (64, 16), (16, 37)):
        other = generate(
            model,
            PROMPT,
            max_tokens=9,
            ignore_eos=True,
            keep_logits=True,
            page_size=page_size,
            prefill_chunk=chunk,
        )
        assert other.token_ids == one.token_ids and other.logprobs == one.logprobs
        assert torch.equal(bits(other.logits), bits(one.logits))


def test_greedy_takes_the_largest_logit(model: CausalLM) -> None:
    output = generate(model, PROMPT, max_tokens=7, ignore_eos=True, keep_logits=True)
    assert output.logits is not None and output.logits.shape == (7, VOCAB)
    assert output.token_ids == output.logits.argmax(-1).tolist()
    assert output.finish_reason == "length" and len(output.logprobs) == 7
    assert generate(model, PROMPT, max_tokens=7, ignore_eos=True).logits is None


def test_sampling_is_a_function_of_logits_seed_and_position(model: CausalLM) -> None:
    """Each token is what the sampler draws from its row at its absolute position."""
    options = {"temperature": 1.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    output = generate(model, PROMPT, max_tokens=12, ignore_eos=True, seed=5, keep_logits=True, **options)
    rows = output.logits
    assert rows is not None
    positions = torch.arange(len(PROMPT), len(PROMPT) + 12, dtype=torch.int32)
    token, logprob = ops.sample(
        rows,
        torch.full((12,), 1.7),
        torch.full((12,), 50, dtype=torch.int32),
        torch.full((12,), 0.95),
        torch.full((12,), 0.01),
        torch.full((12,), 5, dtype=torch.int64),
        positions,
    )
    assert token.tolist() == output.token_ids and logprob.tolist() == output.logprobs
    again = generate(model, PROMPT, max_tokens=12, ignore_eos=True, seed=5, **options)
    other = generate(model, PROMPT, max_tokens=12, ignore_eos=True, seed=6, **options)
    assert again.token_ids == output.token_ids != other.token_ids


def test_stops(model: CausalLM) -> None:
    """The stop token is the last one emitted; the model's own end token is only ignored on request."""
    whole = generate(model, PROMPT, max_tokens=12, ignore_eos=True).token_ids
    stop = whole[4]
    cut = whole[: whole.index(stop) + 1]
    output = generate(model, PROMPT, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    assert output.token_ids == cut and output.finish_reason == "stop"
    ending = CausalLM(replace(model.config, eos_token_ids=(stop,)), model.weights, model.cos, model.sin)
    assert generate(ending, PROMPT, max_tokens=12).token_ids == cut
    assert generate(ending, PROMPT, max_tokens=12, ignore_eos=True).token_ids == whole


def test_positions_bound_the_text(model: CausalLM) -> None:
    """Prompt and emitted tokens together never exceed the model's positions."""
    short = CausalLM(model.config, model.weights, model.cos[:40], model.sin[:40])
    output = generate(short, PROMPT, max_tokens=12, ignore_eos=True)
    assert len(output.token_ids) == 3 and output.finish_reason == "length"
    assert output.token_ids == generate(model, PROMPT, max_tokens=3, ignore_eos=True).token_ids
    assert generate(short, make_prompt(40), max_tokens=5).token_ids == []
    with pytest.raises(
        InvalidRequestError, match="has 41 tokens, but the model has 40 positions; shorten it by 1"
    ):
        generate(short, make_prompt(41), max_tokens=5)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "the prompt is empty"),
        ([3, VOCAB], 5, f"token id {VOCAB}, but the vocabulary has ids 0 to {VOCAB - 1}"),
        ([-1], 5, "token id -1"),
        ([3], -1, "max_tokens is -1"),
    ],
)
def test_refused(model: CausalLM, prompt: list[int], max_tokens: int, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        generate(model, prompt, max_tokens=max_tokens)


def test_nothing_asked_nothing_emitted(model: CausalLM) -> None:
    output = generate(model, [3], max_tokens=0, keep_logits=True)
    assert output.token_ids == [] and output.logits is not None and output.logits.shape == (0, VOCAB)


def test_a_nan_is_an_error(model: CausalLM) -> None:
    norm = model.weights.final_norm.clone()
    norm[5] = float("nan")
    damaged = CausalLM(model.config, model.weights._replace(final_norm=norm), model.cos, model.sin)
    with pytest.raises(VericacheError, match=f"logits for position {len(PROMPT)} hold a NaN"):
        generate(damaged, PROMPT, max_tokens=2)


def test_it_knows_nothing_of_its_opponent() -> None:
    """Importing it loads neither the engine nor caches, compressors or the front end."""
    code = "import sys, vericache.reference; print([m for m in sys.modules if m.startswith('vericache.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "vericache.models.llama" in loaded
    for part in ("engine", "cache", "compressors", "llm", "cli"):
        assert f"vericache.{part}" not in loaded
