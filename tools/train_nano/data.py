# SPDX-License-Identifier: Apache-2.0
"""Training batches: rows that mix source text, records and many questions, made by worker processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue as queues
import random
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .exercises import scatter, world_for
from .filler import Filler
from .world import BEGIN, KINDS

# Codes of the loss weights; the trainer holds the weights themselves.
SOURCE, PASSAGE, ASKED, ANSWERED = 0, 1, 2, 3
KIND_WEIGHTS = {"tool_call": 0.45, "quote": 0.2, "variable": 0.15, "key": 0.2}
# (progress up to which the stage lasts, {row length: share of the batches})
CURRICULUM: tuple[tuple[float, dict[int, float]], ...] = (
    (0.14, {512: 1.0}),
    (0.26, {512: 0.3, 1024: 0.7}),
    (0.38, {512: 0.1, 1024: 0.2, 2048: 0.7}),
    (0.54, {1024: 0.15, 2048: 0.2, 4096: 0.65}),
    (0.72, {1024: 0.1, 2048: 0.1, 4096: 0.2, 8192: 0.6}),
    (1.01, {1024: 0.05, 2048: 0.1, 4096: 0.1, 8192: 0.25, 16384: 0.5}),
)


@dataclass(frozen=True)
class Batch:
    """One step's rows.

    Attributes:
        ids (int16) [rows, length]: tokens.
        codes (int8) [rows, length]: loss weight code of each token as a target.
    """

    ids: npt.NDArray[np.int16]
    codes: npt.NDArray[np.int8]


class RowMaker:
    """Makes training rows.

    Args:
        tokenizer: vericache-nano's tokenizer.
        filler: training source text.
    """

    def __init__(self, tokenizer: Tokenizer, filler: Filler) -> None:
        self.tokenizer = tokenizer
        self.filler = filler
        self.begin = tokenizer.token_to_id(BEGIN)
        self.vocab = tokenizer.get_vocab_size()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text."""
        return [item.ids for item in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def exercise_row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """Makes a row of one to three phases, each some context followed by questions about all so far."""
        phases = 1 if length <= 1024 or rng.random() < 0.5 else rng.randint(2, 3)
        asked_share = rng.uniform(0.3, 0.6) if length <= 1024 else rng.uniform(0.05, 0.4)
        ids, codes = [self.begin], [SOURCE]
        pool: list[tuple[str, str]] = []
        for phase in range(phases):
            budget = (length - len(ids)) // (phases - phase)
            first = rng.choices(KINDS, weights=[KIND_WEIGHTS[kind] for kind in KINDS])[0]
            world = world_for(rng, max(512, budget), self.filler.functions, first)
            pieces = self.encode(world.pieces)
            room = budget - sum(map(len, pieces))
            new = [qa.render() for kind in KINDS for qa in world.questions[kind]]
            rng.shuffle(new)
            pool = new + pool
            wanted, spent, chosen = asked_share * budget, 0, []
            while pool and spent < min(wanted, room):
                # Mostly the newest context, sometimes an older one.
                index = 0 if rng.random() < 0.7 else rng.randrange(len(pool))
                prompt, answer = self.encode(list(pool.pop(index)))
                if spent + len(prompt) + len(answer) > room:
                    break
                chosen.append((prompt, answer))
                spent += len(prompt) + len(answer)
            context = scatter(rng, pieces, self.filler, budget - spent, whole_lines=False)
            ids += context
            codes += [SOURCE] * len(context)
            for prompt, answer in chosen:
                ids += prompt + answer
                codes += [ASKED] * len(prompt) + [ANSWERED] * len(answer)
        return ids, codes

    def repeat_row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """Makes a row of passages that come twice: the quickest teacher of copying."""
        ids, codes = [self.begin], [SOURCE]
        while len(ids) < length:
            size = int(16 * (length / 32) ** rng.random())
            if rng.random() < 0.5:
                passage = [rng.randrange(5, self.vocab) for _ in range(size)]
            else:
                passage = self.filler.take(rng, size, whole_lines=False).tolist()
            between = self.filler.take(rng, rng.randrange(size) if rng.random() < 0.5 else 0, False).tolist()
            ids += passage + between + passage
            # The start of the second copy cannot be foreseen.
            codes += [PASSAGE] * size + [SOURCE] * len(between) + [PASSAGE] * 4 + [ANSWERED] * (size - 4)
        return ids, codes

    def batch(self, rng: random.Random, rows: int, length: int, repeats: float) -> Batch:
        """Makes a batch in which a share `repeats` of the rows are repeated passages."""
        ids = np.zeros((rows, length), dtype=np.int16)
        codes = np.zeros((rows, length), dtype=np.int8)
        for row in range(rows):
            make = self.repeat_row if rng.random() < repeats else self.exercise_row
            row_ids, row_codes = make(rng, length)
            count = min(length, len(row_ids))
            ids[row, :count] = row_ids[:count]
            codes[row, :count] = row_codes[:count]
        return Batch(ids, codes)


def row_length(rng: random.Random, progress: float, longest: int) -> int:
    """Draws a row length from the curriculum's stage at `progress`, capped at `longest`."""
    shares = next(shares for until, shares in CURRICULUM if progress < until)
    return min(longest, rng.choices(tuple(shares), weights=tuple(shares.values()))[0])


def save_filler(filler: Filler, path: Path) -> None:
    """Writes a filler for the workers."""
    np.savez(path, ids=filler.ids, starts=filler.starts, functions=np.array(filler.functions))


def load_filler(path: Path) -> Filler:
    """Reads what `save_filler` wrote."""
    with np.load(path) as data:
        return Filler(data["ids"], data["starts"], tuple(data["functions"].tolist()))


def _work(
    seed: int,
    tokenizer: str,
    filler: str,
    step_tokens: int,
    longest: int,
    progress: Synchronized,
    out: mp.Queue,
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(seed)
    maker = RowMaker(Tokenizer.from_file(tokenizer), load_filler(Path(filler)))
    while True:
        now = progress.value
        length = row_length(rng, now, longest)
        repeats = 0.15 if now < 0.1 else 0.04
        out.put(maker.batch(rng, step_tokens // length, length, repeats))


class Feeder:
    """Worker processes that keep a queue of batches filled.

    Args:
        tokenizer: path of tokenizer.json.
        filler: path written by `save_filler`.
        workers: number of processes.
        step_tokens: tokens of a batch.
        longest: longest row.
        seed: the workers' streams derive from it.
        progress: where in the curriculum to start; assign `Feeder.progress.value` to move on.
    """

    def __init__(
        self,
        tokenizer: Path,
        filler: Path,
        workers: int,
        step_tokens: int,
        longest: int,
        seed: int,
        progress: float = 0.0,
    ) -> None:
        context = mp.get_context("spawn")
        self.progress = context.Value("d", progress)
        self.queue: mp.Queue = context.Queue(maxsize=max(4, 2 * workers))
        self.processes = [
            context.Process(
                target=_work,
                args=(
                    seed * 1000 + i,
                    str(tokenizer),
                    str(filler),
                    step_tokens,
                    longest,
                    self.progress,
                    self.queue,
                ),
                daemon=True,
            )
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def next(self) -> Batch:
        """Returns the next batch.

        Raises:
            RuntimeError: if no worker is alive.
        """
        while True:
            try:
                return self.queue.get(timeout=20)
            except queues.Empty:
                if not any(process.is_alive() for process in self.processes):
                    raise RuntimeError("every data worker has died") from None

    def close(self) -> None:
        """Stops the workers."""
        for process in self.processes:
            process.terminate()
        self.queue.cancel_join_thread()
        self.queue.close()
