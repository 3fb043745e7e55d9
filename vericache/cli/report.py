# SPDX-License-Identifier: Apache-2.0
"""How `vericache compare` is shown to a person."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vericache.cli.compare import MODES, Comparison, Difference
from vericache.cli.console import human_bytes, out

if TYPE_CHECKING:
    from vericache.models import Tokenizer

LABELS = {"full": "full KV", "lossy": "lossy", "vericache": "vericache"}
SHOWN = 3  # prompts whose texts are shown side by side
BEFORE, AFTER = 240, 480  # characters shown before and after the first difference


def print_report(
    tokenizer: Tokenizer, model: str, compressor: str, comparisons: Sequence[Comparison]
) -> None:
    """Prints the table, the differing texts and the verdict.

    Args:
        tokenizer: the model's, to name the tokens that differ.
        model: name, for the heading.
        compressor: spec, for the heading.
        comparisons: one for each prompt.
    """
    console = out()
    tokens = sorted({c.outputs["full"].prompt_tokens for c in comparisons})
    span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]}-{tokens[-1]}"
    console.print(Text(f"{model}, {compressor}, {len(comparisons)} prompt(s) of {span} tokens", style="bold"))
    console.print(_table(comparisons))
    parted = [(i, c) for i, c in enumerate(comparisons, start=1) if c.differences["lossy"] is not None]
    for number, comparison in parted[:SHOWN]:
        _print_texts(console, tokenizer, number, comparison)
    if len(parted) > SHOWN:
        console.print(f"... and {len(parted) - SHOWN} more prompts where lossy differs")
    _print_verdict(console, tokenizer, comparisons)


def _table(comparisons: Sequence[Comparison]) -> Table:
    answered = any(c.expected is not None for c in comparisons)
    # Two-line heads and a light frame: nine columns must fit a terminal of 80.
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for name in ("\nmode", "same\ntokens", "parts at\ntoken", *(("right\nanswer",) if answered else ())):
        table.add_column(name, no_wrap=True)
    for name in ("\ntokens", "tokens\na round", "fetched\na token", "\nprefill", "\ndecode"):
        table.add_column(name, no_wrap=True, justify="right")
    for mode in MODES:
        table.add_row(*_row(mode, comparisons, answered))
    return table


def _row(mode: str, comparisons: Sequence[Comparison], answered: bool) -> list[Text]:
    outputs = [c.outputs[mode] for c in comparisons]
    differences = [c.differences[mode] for c in comparisons]
    firsts = [d.index for d in differences if d is not None]
    same = len(comparisons) - len(firsts)
    verdict = "-" if mode == "full" else f"{same}/{len(comparisons)}"
    cells = [
        Text(LABELS[mode], style="bold"),
        Text(verdict, style="red" if firsts else "green"),
        Text(str(min(firsts)) if firsts else "-", style="red" if firsts else ""),
    ]
    if answered:
        asked = [c.right(mode) for c in comparisons if c.expected is not None]
        cells.append(Text(f"{sum(map(bool, asked))}/{len(asked)}", style="green" if all(asked) else "red"))
    emitted = sum(o.stats.emitted for o in outputs)
    rounds = sum(o.stats.rounds for o in outputs)
    fetched = sum(o.stats.fetched_bytes for o in outputs)
    # Requests of a batch decode together, so the longest one's time is the batch's.
    decode = max(o.stats.decode_s for o in outputs)
    figures = [
        str(emitted),
        f"{sum(o.stats.accepted for o in outputs) / rounds:.1f}" if rounds else "-",
        human_bytes(fetched / emitted) if rounds and emitted else "-",
        f"{max(o.stats.prefill_s for o in outputs):.1f} s",
        f"{decode:.1f} s",
    ]
    return cells + [Text(figure) for figure in figures]


def _print_texts(console: Console, tokenizer: Tokenizer, number: int, comparison: Comparison) -> None:
    difference = comparison.differences["lossy"]
    assert difference is not None
    full, lossy = comparison.outputs["full"].text, comparison.outputs["lossy"].text
    same = _common_prefix(full, lossy)
    left, right = marked(full, lossy, same)
    title = f"prompt {number}: {_sentence(tokenizer, 'lossy', difference)}"
    table = Table(expand=True, title=title, title_justify="left", title_style="")
    verified = comparison.differences["vericache"] is None
    table.add_column("full KV and vericache" if verified else "full KV", ratio=1)
    table.add_column("lossy", ratio=1)
    table.add_row(left, right)
    console.print(table)


def marked(full: str, lossy: str, same: int) -> tuple[Text, Text]:
    """Colours the pieces of two texts that differ, and cuts both to the neighbourhood of the first
    difference.

    Args:
        full: the reference.
        lossy: the other.
        same: characters that both start with.
    """
    start = max(0, same - BEFORE)
    head = ("..." if start else "") + full[start:same]
    left, right = Text(head, style="dim"), Text(head, style="dim")
    a, b = full[same : same + AFTER], lossy[same : same + AFTER]
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left.append(a[a0:a1], style="" if tag == "equal" else "bold green underline")
        right.append(b[b0:b1], style="" if tag == "equal" else "bold red underline")
    for text, whole in ((left, full), (right, lossy)):
        if len(whole) > same + AFTER:
            text.append("...", style="dim")
    return left, right


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sentence(tokenizer: Tokenizer, mode: str, difference: Difference) -> str:
    def name(token: int | None) -> str:
        return "the end" if token is None else f"{tokenizer.token_text(token)!r} ({token})"

    gap = (
        "" if difference.top2_gap is None else f"; full's top two logits lie {difference.top2_gap:.4g} apart"
    )
    return (
        f"{mode} differs first at token {difference.index}: "
        f"{name(difference.got)} instead of {name(difference.expected)}{gap}"
    )


def _print_verdict(console: Console, tokenizer: Tokenizer, comparisons: Sequence[Comparison]) -> None:
    total = sum(len(c.outputs["full"].token_ids) for c in comparisons)
    faults = [
        (i, d) for i, c in enumerate(comparisons, start=1) if (d := c.differences["vericache"]) is not None
    ]
    for number, difference in faults:
        text = f"FAULT, prompt {number}: {_sentence(tokenizer, 'vericache', difference)}"
        console.print(Text(text, style="bold red"), soft_wrap=True)
    if not faults:
        lossy = sum(c.differences["lossy"] is not None for c in comparisons)
        console.print(
            Text.assemble(
                ("vericache: all ", "green"),
                (f"{total} tokens identical to full KV", "bold green"),
                (f"; lossy left it on {lossy} of {len(comparisons)} prompt(s)", "green"),
            )
        )
