# SPDX-License-Identifier: Apache-2.0
"""Greedy exact match on held-out exercises.

One forward pass over prompt and answer decides it: greedy decoding with the full cache writes exactly the
answer if and only if, given each right prefix, the top token is the right one. So no decoding loop is needed.
"""

from __future__ import annotations

import copy
import multiprocessing as mp
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend

from .exercises import Exercise, ExerciseMaker
from .model import Nano
from .world import KINDS

FIRST_SEED = 7_000_000


def _make(tokenizer: str, jobs: Sequence[tuple[str, int, int]]) -> list[Exercise]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = ExerciseMaker(Tokenizer.from_file(tokenizer))
    return [maker.make(kind, length, seed) for kind, length, seed in jobs]


def make_exercises(
    tokenizer: Path, lengths: Sequence[int], count: int, workers: int
) -> dict[int, list[Exercise]]:
    """Makes `count` held-out exercises of each kind for each length."""
    jobs = [(kind, length, FIRST_SEED + i) for length in lengths for kind in KINDS for i in range(count)]
    chunks = [jobs[i::workers] for i in range(workers)]
    if workers == 1:
        made = [_make(str(tokenizer), jobs)]
    else:
        with mp.get_context("spawn").Pool(workers) as pool:
            made = pool.map(partial(_make, str(tokenizer)), chunks)
    found: dict[int, list[Exercise]] = {length: [] for length in lengths}
    for chunk, exercises in zip(chunks, made, strict=True):
        for (_, length, _), exercise in zip(chunk, exercises, strict=True):
            found[length].append(exercise)
    return found


@torch.no_grad()
def score(
    model: Nano, exercises: Sequence[Exercise], dtype: torch.dtype, tokens: int = 131072
) -> dict[str, dict[str, float]]:
    """Scores exercises of similar length.

    Args:
        model: the weights as they are; see `rounded`.
        exercises: what to score.
        dtype: type of the computation.
        tokens: about how many tokens to run at a time.

    Returns:
        For each kind `exact` (share of answers right in full), `token` (share of answer tokens right),
        `count`.
    """
    device = model.embedding.device
    hits: dict[str, list[float]] = {kind: [] for kind in KINDS}
    right: dict[str, list[float]] = {kind: [] for kind in KINDS}
    queue = sorted(exercises, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    while queue:
        longest = len(queue[-1].prompt_ids) + len(queue[-1].answer_ids)
        group = [queue.pop() for _ in range(min(len(queue), max(1, tokens // longest)))]
        # Padding stands behind the answer, where causal attention never looks.
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        for row, e in enumerate(group):
            ids[row, : len(e.prompt_ids) + len(e.answer_ids)] = torch.tensor(e.prompt_ids + e.answer_ids)
        x = model.hidden_states(ids.to(device), dtype).unflatten(0, (len(group), longest))
        for row, e in enumerate(group):
            start = len(e.prompt_ids) - 1
            top = model.logits(x[row, start : start + len(e.answer_ids)]).argmax(-1).cpu()
            same = top == torch.tensor(e.answer_ids)
            hits[e.kind].append(float(same.all()))
            right[e.kind].append(float(same.float().mean()))
    return {
        kind: {
            "exact": sum(hits[kind]) / len(hits[kind]),
            "token": sum(right[kind]) / len(right[kind]),
            "count": len(hits[kind]),
        }
        for kind in KINDS
        if hits[kind]
    }


def rounded(model: Nano) -> Nano:
    """Returns a copy whose weights have been through bfloat16, as the exported ones have."""
    clone = copy.copy(model)
    clone._parameters = {
        name: torch.nn.Parameter(p.detach().bfloat16().float(), requires_grad=False)
        for name, p in model.named_parameters()
    }
    return clone


def evaluate(
    model: Nano, tokenizer: Path, lengths: Sequence[int], count: int, workers: int, dtype: torch.dtype
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores the rounded weights at each length; prints a table.

    Returns:
        {length: {kind: scores}}, with the mean over kinds under the kind `mean`.
    """
    small = rounded(model)
    if model.embedding.is_cuda:
        # cuDNN would plan anew for each of the many lengths.
        small.backend, small.expand = SDPBackend.FLASH_ATTENTION, True
    table: dict[str, dict[str, dict[str, float]]] = {}
    for length, exercises in make_exercises(tokenizer, lengths, count, workers).items():
        scores = score(small, exercises, dtype)
        exact = sum(s["exact"] for s in scores.values()) / len(scores)
        token = sum(s["token"] for s in scores.values()) / len(scores)
        scores["mean"] = {"exact": exact, "token": token, "count": len(exercises)}
        table[str(length)] = scores
        line = "  ".join(
            f"{kind} {100 * s['exact']:5.1f}% ({100 * s['token']:.2f}%)" for kind, s in scores.items()
        )
        print(f"eval {length:6d}: {line}", flush=True)
    return table
