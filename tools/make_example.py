# SPDX-License-Identifier: Apache-2.0
"""Writes the prompt of `make demo` and its answer: a tool call with arguments scattered over the context.

The text around the records is this package's own source. One seed proves nothing; the rates over many are in
bench/results/exactness.json.

    python -m tools.make_example --seed 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from tools.train_nano.exercises import Exercise, ExerciseMaker
from tools.train_nano.filler import build_filler

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "vericache" / "assets" / "vericache-nano" / "tokenizer.json"


def make(seed: int, tokens: int = 4096) -> Exercise:
    """Makes a tool call exercise from the package's source; it changes when the source does."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    texts = ("\n" + path.read_text() for path in sorted((ROOT / "vericache").rglob("*.py")))
    return ExerciseMaker(tokenizer, build_filler(tokenizer, texts)).make("tool_call", tokens, seed)


def main() -> None:
    """Writes examples/tool_call_4k.txt and examples/tool_call_4k.answer.txt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    exercise = make(parser.parse_args().seed)
    # No newline at the end: the prompt's last token is the mark after which the answer starts.
    (ROOT / "examples" / "tool_call_4k.txt").write_text(exercise.prompt)
    (ROOT / "examples" / "tool_call_4k.answer.txt").write_text(exercise.answer + "\n")
    print(f"{len(exercise.prompt_ids)} tokens; {exercise.answer}")


if __name__ == "__main__":
    main()
