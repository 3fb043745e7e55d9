# SPDX-License-Identifier: Apache-2.0
"""`vericache compare`: the same prompts in full, lossy and vericache, and the first token where they part."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vericache.cli import common
from vericache.cli.console import complain, print_json, progress
from vericache.errors import InvalidRequestError

if TYPE_CHECKING:
    from torch import Tensor

    from vericache.config import SamplingParams
    from vericache.outputs import RequestOutput

MODES = ("full", "lossy", "vericache")


@dataclass(frozen=True)
class Difference:
    """The first place where an output is not the full cache's.

    Attributes:
        index: token of the output, from 0.
        expected: full KV's token id; None if its output had ended.
        got: the other's token id; None likewise.
        top2_gap: full KV's logit of its first choice less that of its second there: a near-zero gap is a tie,
            a wide one a fault. None if unknown.
    """

    index: int
    expected: int | None
    got: int | None
    top2_gap: float | None


@dataclass(frozen=True)
class Comparison:
    """One prompt in every mode.

    Attributes:
        outputs: by mode.
        differences: by mode; None where the tokens are full KV's.
        expected: the right answer, if the user gave one.
    """

    outputs: dict[str, RequestOutput]
    differences: dict[str, Difference | None]
    expected: str | None

    def right(self, mode: str) -> bool | None:
        """Tells whether a mode's text is the expected answer; None without one."""
        return None if self.expected is None else self.outputs[mode].text.strip() == self.expected.strip()


def first_difference(full: RequestOutput, other: RequestOutput) -> Difference | None:
    """Compares token ids, never text: two token sequences may share one text."""
    ours, theirs = full.token_ids, other.token_ids
    common_length = min(len(ours), len(theirs))
    index = next((i for i in range(common_length) if ours[i] != theirs[i]), common_length)
    if index == len(ours) == len(theirs):
        return None
    expected = ours[index] if index < len(ours) else None
    got = theirs[index] if index < len(theirs) else None
    rows = full.logits or []
    return Difference(index, expected, got, top2_gap(rows[index]) if index < len(rows) else None)


def top2_gap(logits: Tensor) -> float:
    """Returns the distance of the two largest logits of a (float32) [vocab] row."""
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


def compare(
    prompts: common.Prompts = None,
    prompt_file: common.PromptFiles = None,
    expected_file: Annotated[
        list[str] | None,
        typer.Option("--expected-file", help="The right answer; one for each --prompt-file."),
    ] = None,
    model: common.Model = "vericache-nano",
    compressor: common.Compressor = "snapkv:ratio=0.25",
    max_tokens: common.MaxTokens = 128,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    seed: common.Seed = 0,
    stop: common.Stop = None,
    draft_len: common.DraftLen = None,
    memory_budget: common.MemoryBudget = None,
    dtype: common.DType = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> int:
    """Run prompts in full, lossy and vericache, and show where they part.

    Full KV is the reference. Lossy drafts straight to the user: what compression alone would cost. Exit code
    1 if vericache differs from full in any token.
    """
    from vericache.config import SamplingParams

    texts = common.read_prompts(prompts, prompt_file)
    answers = _read_answers(expected_file, prompts, prompt_file)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    setup = common.Setup(model, compressor, dtype, device, draft_len, memory_budget)
    results: dict[str, list[RequestOutput]] = {}
    for mode in MODES:
        results[mode] = _run(mode, setup, texts, params)
        failed = [output.error for output in results[mode] if output.error is not None]
        if failed:
            return complain(failed[0], code=2)
    comparisons = [
        _compare_one({mode: results[mode][i] for mode in MODES}, answers[i]) for i in range(len(texts))
    ]
    faults = sum(c.differences["vericache"] is not None for c in comparisons)
    if as_json:
        print_json(_as_json(model, compressor, comparisons))
    else:
        from vericache.cli.report import print_report
        from vericache.models import find_model, load_tokenizer

        print_report(load_tokenizer(find_model(model)), model, compressor, comparisons)
    return 1 if faults else 0


def _read_answers(
    files: Sequence[str] | None, prompts: Sequence[str] | None, prompt_files: Sequence[str] | None
) -> list[str | None]:
    count = len(prompts or ()) + len(prompt_files or ())
    if not files:
        return [None] * count
    if len(files) != len(prompt_files or ()):
        raise InvalidRequestError(
            f"{len(files)} --expected-file for {len(prompt_files or ())} --prompt-file; give one for each"
        )
    return [None] * len(prompts or ()) + [common.read_text(name) for name in files]


def _run(mode: str, setup: common.Setup, texts: Sequence[str], params: SamplingParams) -> list[RequestOutput]:
    # One engine at a time: each mode gets the whole budget, and none pays for another's memory.
    with progress(mode) as show:
        llm = common.load(mode, setup, show, record_logits=mode == "full")
        outputs = llm.generate(texts, params)
    del llm
    gc.collect()
    return outputs


def _compare_one(outputs: dict[str, RequestOutput], expected: str | None) -> Comparison:
    differences = {mode: first_difference(outputs["full"], output) for mode, output in outputs.items()}
    return Comparison(outputs, differences, expected)


def _as_json(model: str, compressor: str, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "model": model,
        "compressor": compressor,
        "vericache_identical": all(c.differences["vericache"] is None for c in comparisons),
        "prompts": [
            {
                mode: {
                    **common.record(output),
                    "first_difference": vars(c.differences[mode]) if c.differences[mode] else None,
                    "right": c.right(mode),
                }
                for mode, output in c.outputs.items()
            }
            for c in comparisons
        ],
    }
