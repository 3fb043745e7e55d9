# SPDX-License-Identifier: Apache-2.0
"""Trains the tokenizer: `python -m tools.train_nano.prepare --out DIR`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from .exercises import world_for
from .sources import iter_sources, permissive_packages, short_functions
from .tokenizer import save_tokenizer, train_tokenizer
from .words import WORDS
from .world import KINDS

POSITIONS = 17408


def tokenizer_texts(source_mb: float, exercise_mb: float, seed: int) -> Iterator[str]:
    """Yields source files, exercise texts and plain word lists, from which the merges are learned."""
    functions: list[str] = []
    for _, text in iter_sources(permissive_packages(), int(source_mb * 1e6), seed):
        if len(functions) < 1000:
            functions.extend(short_functions(text))
        yield text
    rng = random.Random(seed)
    total = 0.0
    while total < exercise_mb * 1e6:
        world = world_for(rng, 8192, functions, rng.choice(KINDS))
        questions = [part for kind in KINDS for qa in world.questions[kind] for part in qa.render()]
        text = "".join(world.pieces + questions)
        total += len(text)
        yield text
    # Each key word must become one token, with and without the underscore before it.
    for _ in range(400):
        yield "-".join(rng.sample(WORDS, len(WORDS)))
        yield "_".join(rng.sample(WORDS, len(WORDS)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--source-mb", type=float, default=12.0, help="megabytes of Python source")
    parser.add_argument("--exercise-mb", type=float, default=3.0, help="megabytes of exercise text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = train_tokenizer(tokenizer_texts(args.source_mb, args.exercise_mb, args.seed))
    save_tokenizer(tokenizer, args.out, POSITIONS)
    whole = sum(len(tokenizer.encode(word).ids) == 1 for word in WORDS)
    print(f"vocabulary {tokenizer.get_vocab_size()}, key words in one token: {whole} of {len(WORDS)}")


if __name__ == "__main__":
    main()
