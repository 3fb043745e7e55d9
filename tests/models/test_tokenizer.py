# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and streaming: the pieces join to the whole text, and none ends inside a character."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from vericache.errors import CheckpointError, InvalidRequestError
from vericache.models.checkpoint import find_model
from vericache.models.tokenizer import Tokenizer, load_tokenizer

NANO = load_tokenizer(find_model("vericache-nano"))
TEXTS = ["def f(x):\n    return x\n", "naïve café — ≤ ½ 😀👩‍👩‍👧 日本語", "", " leading", "\n\n\t"]


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer: words with a leading mark, bytes for all else."""
    vocab = (
        {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁a": 257, "▁b": 258, "c": 259}
    )
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {})


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str) -> None:
    assert NANO.decode(NANO.encode(text)) == text


def stream(tokenizer: Tokenizer, tokens: list[int], sizes: list[int]) -> list[str]:
    """Pieces of pushing the tokens in groups of the given sizes, the flush last."""
    detokenizer = tokenizer.detokenizer()
    pieces, start = [], 0
    while start < len(tokens):
        size = sizes[start % len(sizes)]
        pieces.append(detokenizer.push(tokens[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_streamed_text(text: str, sizes: list[int]) -> None:
    """Valid text: the pieces join to it and no piece ever shows a replacement character it does not hold."""
    tokens = NANO.encode(text, add_special_tokens=False)
    pieces = stream(NANO, tokens, sizes)
    assert "".join(pieces) == NANO.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, NANO.vocab_size - 1), max_size=40))
def test_streamed_noise(tokens: list[int]) -> None:
    """Any tokens at all, broken UTF-8 and special tokens included, join to the decoded whole."""
    assert "".join(stream(NANO, tokens, [1])) == NANO.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abc é😀", max_size=12))
def test_streamed_byte_fallback(text: str) -> None:
    """A decoder that strips the first space and fuses bytes gives the same text in pieces."""
    tokenizer = byte_fallback()
    tokens = tokenizer.encode(text)
    assert "".join(stream(tokenizer, tokens, [1])) == tokenizer.decode(tokens)


def test_a_character_is_never_halved() -> None:
    """Byte by byte, an emoji comes out once its fourth byte is there; cut short, flush shows what is left."""
    tokenizer = byte_fallback()
    tokens = [byte + 1 for byte in "é😀".encode()]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([token]) for token in tokens] == ["", "é", "", "", "", "😀"]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(tokens[:4]) == "é"
    assert set(detokenizer.flush()) == {"\ufffd"} and detokenizer.flush() == ""


def test_special_tokens() -> None:
    assert NANO.bos_token_id == 0 and NANO.eos_token_id == 1 and {0, 1, 2} <= NANO.special_ids
    assert NANO.token_id("<|end|>") == 1 and NANO.token_id("no such token") is None
    assert NANO.token_text(1) == "<|end|>"
    tokens = [0, *NANO.encode("x"), 1]
    assert NANO.decode(tokens) == "x"
    assert NANO.decode(tokens, skip_special_tokens=False) == "<|begin|>x<|end|>"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no role bad') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("place", ["jinja", "config", "named"])
def test_chat_template(place: str, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(find_model("vericache-nano"), tmp_path / "m", ignore=shutil.ignore_patterns("*.s*"))
    )
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["bos_token"] = {"content": "<|begin|>", "special": True}
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        values.pop("chat_template", None)
    else:
        named = [{"name": "rag", "template": "-"}, {"name": "default", "template": TEMPLATE}]
        values["chat_template"] = TEMPLATE if place == "config" else named
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": " hi "}]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages) == "<|begin|>user: hi\nassistant:"
    text = tokenizer.apply_chat_template(messages, tools=[{"name": "é"}], add_generation_prompt=False)
    assert text == '<|begin|>user: hi\n[{"name": "é"}]\n'
    with pytest.raises(InvalidRequestError, match="refuses the messages: no role bad"):
        tokenizer.apply_chat_template([{"role": "bad", "content": ""}])


def test_without_template() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        byte_fallback().apply_chat_template([])


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
