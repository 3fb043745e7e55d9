# SPDX-License-Identifier: Apache-2.0
"""The model against transformers, on a tiny random checkpoint of each supported kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.tiny_checkpoints import (
    KINDS,
    VOCAB,
    Kind,
    kind_named,
    make_prompt,
    transformers_greedy,
    write_checkpoint,
)
from vericache import reference
from vericache.models import list_models, load_model
from vericache.models.checkpoint import find_model
from vericache.models.tokenizer import load_tokenizer

PROMPT = make_prompt(71)  # past a page, two prefill chunks and every window; no multiple of any
TOKENS = 24


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_greedy_tokens_and_logits(kind: Kind, tmp_path: Path) -> None:
    """Float32: the same tokens, and the logits of each within rounding."""
    theirs = write_checkpoint(kind, tmp_path)
    ours = load_model(tmp_path)
    assert ours.dtype == torch.float32
    tokens, logits = transformers_greedy(theirs, PROMPT, TOKENS)
    assert len(set(tokens)) > 5, "the checkpoint's text is degenerate: equality would say little"
    output = reference.generate(
        ours, PROMPT, max_tokens=TOKENS, ignore_eos=True, prefill_chunk=32, page_size=64, keep_logits=True
    )
    assert output.token_ids == tokens
    assert output.logits is not None
    # Measured: both lie within 1e-5 of the largest logit of a float64 pass, ours nearer.
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=3e-5 * float(logits.abs().max()))
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if "window" in k.name], ids=lambda kind: kind.name)
def test_the_window_matters(kind: Kind, tmp_path: Path) -> None:
    """Negative control: without its window the same checkpoint gives other logits."""
    write_checkpoint(kind, tmp_path)
    with_window = load_model(tmp_path)
    without = load_model(tmp_path)
    object.__setattr__(without.config, "windows", (0,) * without.config.layers)
    one = reference.generate(with_window, PROMPT, max_tokens=1, keep_logits=True)
    other = reference.generate(without, PROMPT, max_tokens=1, keep_logits=True)
    assert one.logits is not None and other.logits is not None
    assert (one.logits - other.logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama2", "qwen2", "qwen3"])
def test_bfloat16_checkpoint(name: str, tmp_path: Path) -> None:
    """A bfloat16 file keeps its dtype; its logits stay near the float32 computation on the same weights."""
    theirs = write_checkpoint(kind_named(name), tmp_path, dtype=torch.bfloat16)
    ours = load_model(tmp_path)
    assert ours.dtype == torch.bfloat16
    _, logits = transformers_greedy(theirs, PROMPT, 1)
    output = reference.generate(ours, PROMPT, max_tokens=1, keep_logits=True)
    assert output.logits is not None and output.logits.dtype == torch.float32
    difference = (output.logits - logits).abs().max() / logits.abs().max()
    assert difference < 0.05, f"relative difference {difference:.3f}"


def test_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    """Asked for float32, a bfloat16 file computes as transformers does in float32."""
    theirs = write_checkpoint(kind_named("llama2"), tmp_path, dtype=torch.bfloat16)
    tokens, _ = transformers_greedy(theirs, PROMPT, TOKENS)
    ours = load_model(tmp_path, dtype=torch.float32)
    assert reference.generate(ours, PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids == tokens


@pytest.mark.parametrize("name", list_models())
def test_embedded_models(name: str) -> None:
    """A shipped model loads in transformers unchanged; in float32 both agree."""
    import transformers

    folder = find_model(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(name, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    text = "def add(left, right):\n    return left + right\n\n\ndef multiply(left, right):\n"
    prompt = tokenizer.encode(text)
    assert prompt == transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    tokens, logits = transformers_greedy(theirs, prompt, 16)
    output = reference.generate(ours, prompt, max_tokens=16, ignore_eos=True, keep_logits=True)
    assert output.token_ids == tokens
    assert output.logits is not None
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-3)
    assert tokenizer.vocab_size <= ours.config.vocab_size


def test_vocabulary_is_odd() -> None:
    """The tiny vocabulary is prime, so that no kernel is tested on round widths only."""
    assert all(VOCAB % divisor for divisor in range(2, VOCAB))
