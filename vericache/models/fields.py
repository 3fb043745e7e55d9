# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint folder's JSON files, with complaints that name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vericache.errors import CheckpointError, UnsupportedModelError


def read_json(path: Path, *, needed: bool) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; {} where the file is absent and not needed."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise CheckpointError(
            f"{path.parent} holds no {path.name}; a Hugging Face checkpoint folder has config.json, "
            "*.safetensors and tokenizer.json."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(values).__name__}, not an object; download it again."
        )
    return values


class Fields:
    """Typed access to a parsed config.json; every complaint names the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModelError(
                f"{self.where} lacks the field {name!r}, which this architecture needs."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UnsupportedModelError(
                f"{self.where}: {name} is {value!r}, not an integer of at least {minimum}."
            )
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModelError(
                f"{self.where} lacks the field {name!r}, which this architecture needs."
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value <= above
        ):
            raise UnsupportedModelError(
                f"{self.where}: {name} is {value!r}, not a finite number above {above:g}."
            )
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UnsupportedModelError(f"{self.where}: {name} is {value!r}, not true or false.")
        return value
