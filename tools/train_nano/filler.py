# SPDX-License-Identifier: Apache-2.0
"""Pre-tokenised source text, cut at line starts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .sources import short_functions


@dataclass(frozen=True)
class Filler:
    """Source text as token ids, and the short functions found in it.

    Attributes:
        ids (int16) [tokens]: the texts one after another.
        starts (int64) [lines]: positions in `ids` at which a line starts (with its newline).
        functions: function texts with the name written `@@`.
    """

    ids: npt.NDArray[np.int16]
    starts: npt.NDArray[np.int64]
    functions: tuple[str, ...]

    def take(self, rng: random.Random, count: int, whole_lines: bool) -> npt.NDArray[np.int16]:
        """Returns `count` consecutive tokens from a random line start.

        Args:
            rng: source of the choice.
            count: tokens wanted.
            whole_lines: drop the last, unfinished line, so that fewer than `count` may come back.
        """
        if count <= 0:
            return self.ids[:0]
        last = int(np.searchsorted(self.starts, len(self.ids) - count))
        begin = int(self.starts[rng.randrange(max(1, last))])
        end = begin + count
        if whole_lines:
            at = int(np.searchsorted(self.starts, end, side="right")) - 1
            end = int(self.starts[at])
        return self.ids[begin:end]


def newline_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that start with a newline."""
    return [index for token, index in tokenizer.get_vocab().items() if token.startswith("\u010a")]


def build_filler(tokenizer: Tokenizer, texts: Iterable[str], max_functions: int = 20_000) -> Filler:
    """Tokenises source texts, each of which starts with a newline."""
    functions: dict[str, None] = {}
    parts: list[npt.NDArray[np.int16]] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            parts.append(np.asarray(encoding.ids, dtype=np.int16))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(functions) < max_functions:
            functions.update(dict.fromkeys(short_functions(text)))
        if len(batch) == 256:
            flush()
    flush()
    ids = np.concatenate(parts)
    lookup = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    lookup[newline_ids(tokenizer)] = True
    return Filler(ids, np.flatnonzero(lookup[ids]), tuple(functions))
