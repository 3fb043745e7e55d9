# SPDX-License-Identifier: Apache-2.0
"""`vericache models` and `vericache compressors`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from vericache.cli import common
from vericache.cli.console import human_bytes, out, print_json


def models(
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints to describe.", show_default=False),
    ] = None,
    as_json: common.Json = False,
) -> int:
    """List the shipped models, or describe checkpoints."""
    from vericache.models import list_models

    found = [_describe(name) for name in folders or list_models()]
    if as_json:
        print_json({"models": found})
        return 0
    columns = (
        "model",
        "architecture",
        "layers",
        "q/kv heads",
        "head_dim",
        "positions",
        "KV a token",
        "on disk",
    )
    table = Table(*columns)
    for model in found:
        table.add_row(
            model["name"],
            model["architecture"],
            str(model["layers"]),
            f"{model['q_heads']}/{model['kv_heads']}",
            str(model["head_dim"]),
            str(model["max_positions"]),
            human_bytes(model["kv_bytes_per_token"]),
            human_bytes(model["disk_bytes"]),
        )
    out().print(table)
    return 0


def _describe(name: str) -> dict[str, Any]:
    from vericache.models import find_model, load_config

    folder = find_model(name)
    config = load_config(folder)
    return {
        "name": name,
        "architecture": config.architecture,
        "layers": config.layers,
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "dtype": str(config.dtype).removeprefix("torch."),
        "kv_bytes_per_token": 2 * config.layers * config.kv_heads * config.head_dim * config.dtype.itemsize,
        "disk_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def compressors(as_json: common.Json = False) -> int:
    """List the compression methods and their options."""
    from vericache.compressors import METHODS

    if as_json:
        print_json({"compressors": [_method(method) for method in METHODS]})
        return 0
    table = Table("method", "option", "default", "allowed", "meaning")
    for method in METHODS:
        table.add_row(method.name, "", "", "", method.summary, style="bold")
        for item in method.options:
            table.add_row("", item.name, str(item.default), str(item.allowed), item.help)
        table.add_section()
    out().print(table)
    out().print("A spec is method:option=value,option=value - for example snapkv:ratio=0.25,window=32")
    return 0


def _method(method: Any) -> dict[str, Any]:
    options = [
        {"name": item.name, "default": item.default, "allowed": str(item.allowed), "help": item.help}
        for item in method.options
    ]
    return {"name": method.name, "summary": method.summary, "options": options}
