# SPDX-License-Identifier: Apache-2.0
"""Text <-> token ids of a checkpoint folder, streaming included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from vericache.errors import CheckpointError, InvalidRequestError
from vericache.models.fields import read_json

# What a decoder prints for bytes that are no complete character (yet).
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Thin wrapper of a `tokenizers` backend with what tokenizer_config.json adds to it.

    Args:
        backend: the loaded tokenizer.json.
        settings: the parsed tokenizer_config.json; {} if there is none.
        template: a chat template that overrides the one in `settings`.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any], template: str | None = None):
        self._backend = backend
        self._template = template or _default_template(settings.get("chat_template"))
        self._special_text = {
            name: _token_text(settings.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.special_ids: frozenset[int] = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's vocab_size may be greater (padding)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """Id that starts a text, if the tokenizer names one."""
        return self.token_id(self._special_text["bos_token"])

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a text, if the tokenizer names one."""
        return self.token_id(self._special_text["eos_token"])

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be called."""
        return self._template is not None

    def token_id(self, text: str | None) -> int | None:
        """Id of one token by its text; None if there is no such token."""
        return None if text is None else self._backend.token_to_id(text)

    def token_text(self, token: int) -> str:
        """Text of one token, special tokens included (for messages, not for joining)."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text; the names of special tokens in it become those tokens.
            add_special_tokens: add what the tokenizer puts around a text (often a begin token).
        """
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one generated text."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        Args:
            messages: objects with at least `role` and `content`.
            tools: descriptions of callable tools, passed to the template.
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            InvalidRequestError: the checkpoint has no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if self._template is None:
            raise InvalidRequestError("this checkpoint has no chat template; give the prompt as text.")
        try:
            return (
                _environment()
                .from_string(self._template)
                .render(
                    messages=messages,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    **{name: text for name, text in self._special_text.items() if text is not None},
                )
            )
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses the messages: {error}.") from None


class Detokenizer:
    """Turns a growing list of tokens into text, piece by piece.

    The pieces joined equal `Tokenizer.decode` of all tokens. A piece never ends inside a character: its text
    is held back until the tokens that complete it have come, or until `flush`.

    Decoding one token alone is not enough, as decoders treat a text's first token differently and a character
    may span tokens. So each step decodes a short window twice, without and with the new tokens, and the
    difference is the piece.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._emitted = 0  # tokens whose text has been given out
        self._context = 0  # first token of the window that is decoded with the new ones

    def push(self, tokens: Iterable[int]) -> str:
        """Takes new tokens and returns the text that is now certain, possibly none."""
        pieces = []
        for token in tokens:
            self._tokens.append(token)
            before, after = self._window()
            if len(after) > len(before) and not after.endswith(_REPLACEMENT):
                pieces.append(after[len(before) :])
                self._context, self._emitted = self._emitted, len(self._tokens)
        return "".join(pieces)

    def flush(self) -> str:
        """The text still held back, an incomplete character as U+FFFD; call it when the request has ended."""
        before, after = self._window()
        self._context, self._emitted = self._emitted, len(self._tokens)
        return after[len(before) :]

    def _window(self) -> tuple[str, str]:
        window = self._tokens[self._context :]
        given = self._emitted - self._context
        decode = self._tokenizer.decode
        before = decode(window[:given], skip_special_tokens=self._skip)
        return before, decode(window, skip_special_tokens=self._skip)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads tokenizer.json, tokenizer_config.json and chat_template.jinja of a checkpoint folder.

    Raises:
        CheckpointError: there is no tokenizer.json, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no tokenizer.json; convert the tokenizer with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or give prompts as token ids."
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the backend raises bare Exception
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from None
    # A file may ask for cut or padded texts, which would silently change a prompt.
    backend.no_truncation()
    backend.no_padding()
    template = folder / "chat_template.jinja"
    return Tokenizer(
        backend,
        read_json(folder / "tokenizer_config.json", needed=False),
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _token_text(value: object) -> str | None:
    """tokenizer_config.json writes a special token as text or as an object with its text in `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _default_template(value: object) -> str | None:
    """The chat template: one text, or a list of named ones of which `default` is taken."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _environment() -> Any:
    """A sandbox with what published chat templates rely on."""
    import datetime
    import json

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment
