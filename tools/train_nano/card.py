# SPDX-License-Identifier: Apache-2.0
"""Writes the model card from a run's facts and scores.

python -m tools.train_nano.card EVAL_JSON MODEL_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .world import KINDS

TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [vericache, llama, long-context, test-model]
---

# vericache-nano

A Llama-architecture model of {millions:.1f}M parameters ({megabytes:.1f} MB in bfloat16) that ships
with vericache, so that examples, tests and CI run on a CPU without a download. It is made to *use
its context*: it copies arguments of tool calls exactly out of records scattered over up to 16K
tokens. It is not a chat model and knows nothing worth asking.

| | |
| --- | --- |
| layers, hidden, feed-forward | {layers}, {hidden}, {intermediate} (SwiGLU) |
| attention | {heads} query heads, {kv_heads} KV heads (GQA group {group}), head_dim {head_dim} |
| RoPE theta | {rope_theta:.0f} |
| positions | {positions} (prompts up to 16,384 and room to answer) |
| vocabulary | {vocab}, byte-level BPE, every digit its own token; embeddings tied |

## Prompt format

    <|begin|>CONTEXT
    <|question|>QUESTION<|answer|>ANSWER<|end|>

Encode with `add_special_tokens=False`; `<|end|>` is the end-of-sequence token.
`tools/train_nano/exercises.py` makes exercises: `make_exercise(kind, target_tokens, seed,
tokenizer)`.

- `tool_call`: two or three calls. The request names an order; the order's record names a customer
  and an item; their records hold the e-mail, address, token, SKU that the calls need. Question:
  `refund order amber-417`.
- `quote`: a named short function, word for word. Question: `quote the function amber_ridge`.
- `variable`: two or three assignments. Question: `show the variables amber_ridge, nova_pond, silk_moon`.
- `key`: three keys of one of several dictionaries that share their keys.
  Question: `look up port, host, mode in the table amber_ridge`.

## Scores

Greedy exact match of the whole answer (full KV cache, bfloat16 weights) on held-out exercises:
fresh seeds, filler source that training never saw.

{scores}

{counts} exercises of each kind at each length. An answer counts only if every token, the end mark
included, is right. Each is decided by one forward pass over prompt and answer: greedy decoding
writes exactly the answer if and only if the top token is right after each right prefix.

## Training

`tools/train_nano/train.py`, from scratch: {minutes:.1f} minutes of training on one {device} (torch
{torch}), {steps} steps of {step_tokens} tokens, {billions:.2f}B tokens. Muon (rate {muon_lr}, decay
{decay}) for the hidden matrices, AdamW (rate {adam_lr}) for the embedding and the norms; warm-up,
plateau, linear decay to zero. Row lengths grow from 512 to 16,384 tokens. Loss weights: answers 1,
everything else 0.1 or less.

Data: generated exercises, and Python source of {packages} packages that state a permissive licence
({source_mb:.1f} MB of text): the Python standard library (PSF-2.0; the modules used as held-out
filler excluded) and packages installed beside it. The tokenizer was trained by `prepare.py` on the
same kinds of text. `eval.json` lists every package with its licence; the largest:

{sources}

## Limits

- It answers the four exercise formats. Other wording gives other text, with confidence.
- Records, keys and names follow `tools/train_nano/world.py`; strings of other shapes copy less
  surely.
- Quoting a function out of 16K tokens of similar source is its weakest exercise.
- As a language model of Python it is fluent noise.
- Filler depends on the running Python's standard library, so scores on another Python differ a
  little.

The weights are released under the Apache License 2.0.
"""


def shorten(licence: str) -> str:
    """Returns a licence statement without its classifier prefixes, at most 90 characters long."""
    text = licence.replace("License :: OSI Approved :: ", "")
    return text if len(text) <= 90 else text[:87] + "..."


def score_table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns the scores as a Markdown table, a row for each length."""
    columns = (*KINDS, "mean")
    lines = ["| prompt tokens | " + " | ".join(columns) + " |", "| ---: |" + " ---: |" * len(columns)]
    for length, row in scores.items():
        cells = (f"{100 * row[kind]['exact']:.1f}%" for kind in columns)
        lines.append(f"| {int(length):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parameter_count(model: dict[str, Any]) -> int:
    """Returns the number of weights of a `NanoConfig` given as a dictionary."""
    hidden, q_dim, kv_dim = (
        model["hidden"],
        model["heads"] * model["head_dim"],
        model["kv_heads"] * model["head_dim"],
    )
    layer = hidden * (2 * q_dim + 2 * kv_dim + 3 * model["intermediate"] + 2)
    return model["layers"] * layer + hidden * (model["vocab"] + 1)


def write_card(folder: Path, result: dict[str, Any]) -> None:
    """Writes README.md into the model folder.

    Args:
        folder: the exported model.
        result: what train.py writes to eval.json.
    """
    facts, scores = result["training"], result["exact_match"]
    model = facts["model"]
    count = parameter_count(model)
    sources = facts["sources"]
    listed = "\n".join(
        f"- {s['package']} ({shorten(s['licence'])}): {s['characters'] / 1e6:.1f} MB" for s in sources[:25]
    )
    first = next(iter(scores.values()))
    values = {**facts, **model, "scores": score_table(scores)}
    values |= {
        "millions": count / 1e6,
        "megabytes": 2 * count / 1e6,
        "group": model["heads"] // model["kv_heads"],
        "billions": facts["tokens"] / 1e9,
        "packages": len(sources),
        "counts": first["tool_call"]["count"],
        "source_mb": sum(s["characters"] for s in sources) / 1e6,
        "sources": listed,
    }
    (folder / "README.md").write_text(TEMPLATE.format(**values), encoding="utf-8")


if __name__ == "__main__":
    write_card(Path(sys.argv[2]), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
