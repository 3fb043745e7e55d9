# SPDX-License-Identifier: Apache-2.0
"""The application: its commands, and how a failure becomes one sentence and an exit code.

Exit codes: 0 done, 1 `compare` found a token that differs from full KV (a fault), 2 bad input, 130
interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from vericache import __version__
from vericache.cli.compare import compare
from vericache.cli.console import complain
from vericache.cli.generate import generate
from vericache.cli.listing import compressors, models
from vericache.errors import VericacheError

# Typer has its own copy of click in some versions; this base class is public in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="vericache",
    help="Generate text from a compressed KV cache, verified with the full one: identical, bit for bit.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(compare)
app.command()(models)
app.command()(compressors)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vericache {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Generate text from a compressed KV cache, verified with the full one: identical, bit for bit."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    try:
        result = app(args=argv, prog_name="vericache", standalone_mode=False)
    except UsageError as error:
        return complain(f"{error.format_message()}; try --help", code=2)
    except VericacheError as error:
        return complain(str(error), code=2)
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", code=130)
    return result if isinstance(result, int) else 0
