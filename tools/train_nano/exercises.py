# SPDX-License-Identifier: Apache-2.0
"""Long-context exercises: tool calls from scattered records, quoting, variable and key look-ups.

`make_exercise` is a pure function of its arguments (and of the filler text): benchmarks and tests may
import it; it needs numpy and tokenizers, not torch. By default the filler is the held-out part of the running
Python's own standard library, so a seed's filler differs between Python versions; its records do not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .filler import Filler, build_filler
from .sources import held_out_files, read_source
from .world import BEGIN, KINDS, World, add_functions, add_records, add_tables, add_variables


@dataclass(frozen=True)
class Exercise:
    """A prompt and the one right continuation.

    Attributes:
        kind: one of `KINDS`.
        prompt: text to feed, special tokens included; encode it with `add_special_tokens=False`.
        answer: expected text; the end mark `<|end|>` follows it.
        prompt_ids: the prompt's token ids.
        answer_ids: the answer's token ids, the end mark included.
        seed: what it was made from.
    """

    kind: str
    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    seed: int


def world_for(rng: random.Random, tokens: int, functions: Sequence[str], first: str) -> World:
    """Makes the records of one context of about `tokens` tokens.

    Args:
        rng: source of all choices.
        tokens: context length; the number of records grows a little slower than it does.
        functions: bodies for the functions to quote.
        first: the kind that must be present; short contexts hold little else.
    """
    world = World()
    scale = (tokens / 8192) ** 0.8
    share = {kind: rng.uniform(0.4, 1.0) for kind in KINDS}
    share[first] = rng.uniform(0.8, 1.2)
    if tokens < 1536:
        others = [kind for kind in KINDS if kind != first]
        keep = rng.randint(0, 1) if tokens >= 768 else 0
        share = {first: share[first], **{kind: share[kind] for kind in rng.sample(others, keep)}}
    if "tool_call" in share:
        add_records(world, rng, round(14 * scale * share["tool_call"]))
    if "variable" in share:
        add_variables(world, rng, max(3, round(16 * scale * share["variable"])))
    if "key" in share:
        add_tables(world, rng, round(8 * scale * share["key"]))
    if "quote" in share:
        add_functions(world, rng, max(2, round(8 * scale * share["quote"])), functions)
    return world


def scatter(
    rng: random.Random, pieces: Sequence[Sequence[int]], filler: Filler, budget: int, whole_lines: bool
) -> list[int]:
    """Places pieces in a random order, with source text of random length between them.

    Args:
        rng: source of all choices.
        pieces: token ids of each piece.
        filler: source text.
        budget: total tokens of the result: exact, or an upper bound where `whole_lines` is set.
        whole_lines: see `Filler.take`.
    """
    spare = max(0, budget - sum(map(len, pieces)))
    order = list(pieces)
    rng.shuffle(order)
    # A third of the gaps are empty: records stand alone and in clusters.
    gaps = [0.0 if rng.random() < 0.33 else rng.expovariate(1.0) for _ in order] + [
        rng.expovariate(1.0) + 1e-6
    ]
    total = sum(gaps)
    ids: list[int] = []
    for gap, piece in zip(gaps, order, strict=False):
        ids.extend(piece)
        ids.extend(filler.take(rng, int(spare * gap / total), whole_lines).tolist())
    # What rounding and unfinished lines left over goes to the front.
    return filler.take(rng, budget - len(ids), whole_lines).tolist() + ids


class ExerciseMaker:
    """Makes held-out exercises with one tokenizer and one filler.

    Args:
        tokenizer: a `tokenizers.Tokenizer` or a fast transformers tokenizer.
        filler: source text; by default the held-out modules of the standard library.
    """

    def __init__(self, tokenizer: Any, filler: Filler | None = None) -> None:
        self.tokenizer: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if filler is None:
            texts = (read_source(path) for path in held_out_files())
            filler = build_filler(self.tokenizer, (text for text in texts if text is not None))
        self.filler = filler

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def make(self, kind: str, target_tokens: int, seed: int) -> Exercise:
        """See `make_exercise`."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
        if target_tokens < 512:
            raise ValueError(f"target_tokens must be at least 512, not {target_tokens}")
        rng = random.Random(f"{kind}/{target_tokens}/{seed}")
        world = world_for(rng, target_tokens, self.filler.functions, kind)
        question, answer = rng.choice(world.questions[kind]).render()
        head, tail = self.encode(BEGIN), self.encode(question)
        pieces = [self.encode(piece) for piece in world.pieces]
        budget = target_tokens - len(head) - len(tail)
        ids = head + scatter(rng, pieces, self.filler, budget, whole_lines=True) + tail
        prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
        answer_ids = self.encode(answer)
        text = self.tokenizer.decode(answer_ids[:-1], skip_special_tokens=False)
        return Exercise(kind, prompt, text, tuple(ids), tuple(answer_ids), seed)


@lru_cache(maxsize=4)
def _maker(tokenizer: Tokenizer) -> ExerciseMaker:
    return ExerciseMaker(tokenizer)


def make_exercise(kind: str, target_tokens: int, seed: int, tokenizer: Any) -> Exercise:
    """Makes one held-out exercise.

    Args:
        kind: `tool_call`, `quote`, `variable` or `key`.
        target_tokens: the prompt's length, which comes out at most a few per cent shorter.
        seed: any integer; training never draws from this stream.
        tokenizer: vericache-nano's, as `tokenizers.Tokenizer` or from `AutoTokenizer`.

    Returns:
        The exercise; the same arguments give the same one.

    Raises:
        ValueError: on an unknown kind or a target below 512.
    """
    return _maker(getattr(tokenizer, "backend_tokenizer", tokenizer)).make(kind, target_tokens, seed)


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Returns token ids as int64 [1, tokens], the shape a model takes."""
    return np.asarray(ids, dtype=np.int64)[None]
