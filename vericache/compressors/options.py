# SPDX-License-Identifier: Apache-2.0
"""Options of a compressor: default, meaning and allowed values, declared once beside the field."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from vericache.errors import InvalidRequestError


@dataclass(frozen=True)
class Between:
    """A closed interval, or one that leaves out its lower end."""

    low: float
    high: float
    open_low: bool = False

    def allows(self, value: object) -> bool:
        """Tells whether the value is a number in the interval; NaN is not."""
        if not isinstance(value, int | float):
            return False
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        lower = f"more than {self.low:g} and" if self.open_low else f"at least {self.low:g} and"
        return f"{lower} at most {self.high:g}"


@dataclass(frozen=True)
class Odd:
    """Odd integers of an interval."""

    low: int
    high: int

    def allows(self, value: object) -> bool:
        """Tells whether the value is an odd integer of the interval."""
        return isinstance(value, int) and self.low <= value <= self.high and value % 2 == 1

    def __str__(self) -> str:
        return f"an odd number from {self.low} to {self.high}"


@dataclass(frozen=True)
class OneOf:
    """A short list of values."""

    values: tuple[int | str, ...]

    def allows(self, value: object) -> bool:
        """Tells whether the value is listed."""
        return value in self.values

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


@dataclass(frozen=True)
class Option:
    """One option as the command line and the error messages see it.

    Attributes:
        name: as a spec writes it.
        field: the dataclass field that holds it.
    """

    name: str
    field: str
    default: int | float | str
    allowed: Between | Odd | OneOf
    help: str


def option(default: int | float | str, allowed: Between | Odd | OneOf, text: str, name: str = "") -> Any:
    """Declares a dataclass field that is an option; `name` where a spec writes it differently."""
    return field(default=default, metadata={"allowed": allowed, "help": text, "name": name})


def _as_option(item: Field[Any]) -> Option:
    name = item.metadata["name"] or item.name
    default: Any = item.default
    return Option(name, item.name, default, item.metadata["allowed"], item.metadata["help"])


def options_of(method: Any) -> list[Option]:
    """Lists the options of a compressor class or instance, in order of declaration."""
    return [_as_option(item) for item in fields(method) if "allowed" in item.metadata]


def validate(compressor: Any) -> None:
    """Checks every option of an instance; `__post_init__` calls it, so no invalid instance exists.

    Raises:
        InvalidRequestError: naming the option, the value and what is allowed.
    """
    for item in options_of(compressor):
        value = getattr(compressor, item.field)
        types = (int, float) if isinstance(item.default, float) else (type(item.default),)
        if type(value) not in types or not item.allowed.allows(value):
            raise InvalidRequestError(f"{compressor.name}: {item.name} must be {item.allowed}, not {value!r}")


def parse_value(name: str, item: Option, text: str) -> int | float | str:
    """Reads an option's value in the type of its default.

    Raises:
        InvalidRequestError: if it is no such number.
    """
    if isinstance(item.default, str):
        return text
    try:
        return int(text) if isinstance(item.default, int) else float(text)
    except ValueError:
        raise InvalidRequestError(f"{name}: {item.name} must be {item.allowed}, not {text!r}") from None


def suggestion(word: str, choices: Sequence[str]) -> str:
    """Returns `; did you mean 'x'?` if a choice is close to the word, else nothing."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
