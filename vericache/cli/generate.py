# SPDX-License-Identifier: Apache-2.0
"""`vericache generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from vericache.cli import common
from vericache.cli.console import complain, err, human_bytes, out, print_json, progress
from vericache.errors import InvalidRequestError

if TYPE_CHECKING:
    from vericache.config import SamplingParams
    from vericache.llm import LLM
    from vericache.outputs import RequestOutput


def generate(
    prompts: common.Prompts = None,
    prompt_file: common.PromptFiles = None,
    model: common.Model = "vericache-nano",
    mode: Annotated[str, typer.Option("--mode", help="full, lossy, vericache or auto.")] = "vericache",
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
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Also print each token's log-probability.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is verified.")] = False,
    as_json: common.Json = False,
) -> int:
    """Continue prompts.

    The text goes to stdout and a line of figures to stderr. In mode vericache, the default, it equals the
    text of mode full, token by token.
    """
    from vericache.config import SamplingParams

    texts = common.read_prompts(prompts, prompt_file)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    if stream and (len(texts) > 1 or logprobs):
        raise InvalidRequestError("--stream takes one prompt and no --logprobs")
    setup = common.Setup(model, compressor, dtype, device, draft_len, memory_budget)
    if stream:
        with progress(mode) as show:
            llm = common.load(mode, setup, show)
        return _stream(llm, texts[0], params, as_json)
    with progress(mode) as show:
        llm = common.load(mode, setup, show)
        outputs = llm.generate(texts, params)
    if as_json:
        print_json({"model": model, "compressor": compressor, "outputs": [common.record(o) for o in outputs]})
    else:
        _print_outputs(llm, outputs)
    failed = [output for output in outputs if output.error is not None]
    for output in failed:
        complain(output.error or "", code=2)
    return 2 if failed else 0


def _stream(llm: LLM, prompt: str, params: SamplingParams, as_json: bool) -> int:
    error = None
    for chunk in llm.stream(prompt, params):
        if as_json:
            line = {"text": chunk.text, "token_ids": list(chunk.token_ids), "finished": chunk.finished}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write(chunk.text)
        sys.stdout.flush()
        error = chunk.error or error
    if not as_json:
        sys.stdout.write("\n")
    return 0 if error is None else complain(error, code=2)


def _print_outputs(llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    console = out()
    for number, output in enumerate(outputs, start=1):
        if len(outputs) > 1:
            console.rule(f"prompt {number}", align="left")
        sys.stdout.write(output.text + "\n")
        if output.logprobs is not None:
            console.print(_logprob_table(llm, output))
        err().print(Text(_figures(output), style="dim"), soft_wrap=True)


def _figures(output: RequestOutput) -> str:
    stats = output.stats
    parts = [
        f"{stats.mode}: {output.prompt_tokens} prompt tokens in {stats.prefill_s:.2f} s",
        f"{stats.emitted} tokens ({output.finish_reason}) at {common.tokens_per_second(output):.1f}/s",
    ]
    if stats.rounds:
        parts.append(f"{stats.accepted_per_round:.1f} tokens a round")
        parts.append(f"{human_bytes(stats.fetched_bytes_per_token)} fetched a token")
    return ", ".join(parts)


def _logprob_table(llm: LLM, output: RequestOutput) -> Table:
    table = Table("token", "id", "logprob", box=None)
    for token, logprob in zip(output.token_ids, output.logprobs or (), strict=True):
        table.add_row(Text(repr(llm.tokenizer.decode([token]))), str(token), f"{logprob:.4f}")
    return table
