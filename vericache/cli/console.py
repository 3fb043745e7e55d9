# SPDX-License-Identifier: Apache-2.0
"""Where output goes: results to stdout, everything else to stderr, progress only to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_WIDTH = 110


def out() -> Console:
    """Returns the console of stdout; a file or a pipe gets a fixed width."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def err() -> Console:
    """Returns the console of stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH, highlight=False)


def complain(message: str, *, code: int) -> int:
    """Prints one sentence to stderr and returns the exit code."""
    one_line = " ".join(message.split())
    err().print(Text.assemble(("error: ", "bold red"), one_line), soft_wrap=True)
    return code


def print_json(value: Mapping[str, Any]) -> None:
    """Prints a JSON object to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress(label: str) -> Iterator[Callable[[str, float], None]]:
    """Shows on a terminal what is going on, how far it is and for how long; elsewhere it says nothing.

    Yields:
        The callback that `LLM` reports to: what is being done, and the share done.
    """
    console = err()
    if not console.is_terminal:
        yield lambda what, share: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{label}: load", total=None)
        yield lambda what, share: bar.update(task, description=f"{label}: {what}", completed=share, total=1.0)


def human_bytes(count: float) -> str:
    """Writes a byte count with a binary unit, three figures."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
