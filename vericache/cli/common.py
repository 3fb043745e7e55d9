# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vericache.errors import InvalidRequestError

if TYPE_CHECKING:
    from vericache.llm import LLM
    from vericache.outputs import RequestOutput

Model = Annotated[str, typer.Option("--model", "-m", help="A shipped model's name or a checkpoint folder.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)]
PromptFiles = Annotated[
    list[str] | None,
    typer.Option("--prompt-file", "-f", help="A file with one prompt, used as it is; - is stdin."),
]
Compressor = Annotated[
    str, typer.Option("--compressor", "-c", help="The draft cache's method: see `vericache compressors`.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to emit.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k largest logits; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest up to this probability; 1 is off.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop those below this share of the best; 0 is off.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling noise.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends it. May be repeated.")]
DraftLen = Annotated[
    int | None, typer.Option("--draft-len", help="Tokens drafted a round.", show_default="16")
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget", help="Device memory for everything, such as 512MiB.", show_default="4GiB"
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.", show_default="a GPU if usable")]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16, for weights and KV.", show_default="the checkpoint's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_prompts(prompts: Sequence[str] | None, files: Sequence[str] | None) -> list[str]:
    """Collects the prompts given as arguments, then those of the files.

    Raises:
        InvalidRequestError: if there is none, or a file cannot be read.
    """
    found = list(prompts or ()) + [read_text(name) for name in files or ()]
    if not found:
        raise InvalidRequestError("no prompt: give one as an argument, or a file with --prompt-file")
    return found


def read_text(name: str) -> str:
    """Reads a UTF-8 file, or stdin for `-`.

    Raises:
        InvalidRequestError: if it cannot be read.
    """
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"cannot read {name!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name!r} is not UTF-8 text (byte {error.start})") from None


@dataclass(frozen=True)
class Setup:
    """What the options say about the engine, the mode apart; None takes the engine's default."""

    model: str
    compressor: str
    dtype: str | None
    device: str | None
    draft_len: int | None
    memory_budget: str | None


def load(
    mode: str,
    setup: Setup,
    progress: Callable[[str, float], None],
    record_logits: bool = False,
) -> LLM:
    """Makes an `LLM` in one mode."""
    from vericache.llm import LLM

    stated: dict[str, Any] = {name: value for name, value in asdict(setup).items() if value is not None}
    return LLM(mode=mode, record_logits=record_logits, progress=progress, **stated)  # type: ignore[arg-type]


def record(output: RequestOutput) -> dict[str, Any]:
    """Turns an output into what JSON holds."""
    stats = output.stats
    return {
        "mode": stats.mode,
        "prompt_tokens": output.prompt_tokens,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "logprobs": output.logprobs,
        "finish_reason": output.finish_reason,
        "error": output.error,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "accepted_per_round": stats.accepted_per_round,
        "fetched_bytes": stats.fetched_bytes,
        "fetched_bytes_per_token": stats.fetched_bytes_per_token,
        "prefill_seconds": stats.prefill_s,
        "decode_seconds": stats.decode_s,
        "tokens_per_second": tokens_per_second(output),
    }


def tokens_per_second(output: RequestOutput) -> float:
    """Emitted tokens a second of decoding, the prompt's time not counted."""
    return output.stats.emitted / output.stats.decode_s if output.stats.decode_s > 0 else 0.0
