# SPDX-License-Identifier: Apache-2.0
"""The list of methods, and specs such as `snapkv:ratio=0.25,window=32`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vericache.compressors.identity import Identity
from vericache.compressors.interface import Compressor
from vericache.compressors.kivi import KIVI
from vericache.compressors.options import Option, options_of, parse_value, suggestion
from vericache.compressors.random import Random
from vericache.compressors.snapkv import SnapKV
from vericache.errors import InvalidRequestError, UnsupportedModelError


@dataclass(frozen=True)
class Method:
    """One entry of the list.

    Attributes:
        make: the compressor's class.
        easy: a spec that loses little; every shared test runs it.
        hard: a spec that loses much; every shared test runs it too.
    """

    make: Callable[..., Compressor]
    easy: str
    hard: str

    @property
    def name(self) -> str:
        """The name in a spec."""
        return self.easy.partition(":")[0]

    @property
    def options(self) -> list[Option]:
        """The options, in order of declaration."""
        return options_of(self.make)

    @property
    def summary(self) -> str:
        """What the method does and where it is from: the first line of its module."""
        return (sys.modules[self.make.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2]


METHODS: tuple[Method, ...] = (
    Method(SnapKV, "snapkv:ratio=0.5", "snapkv:ratio=0.05,window=8,kernel=7,pool=max"),
    Method(KIVI, "kivi:bits=8", "kivi:bits=2,group=64,residual=0"),
    Method(Random, "random:ratio=0.9", "random:ratio=0.02,sinks=1"),
    Method(Identity, "identity", "identity"),
)


class ModelLike(Protocol):
    """The fields of a model's configuration that decide whether a compressor can serve it."""

    @property
    def head_dim(self) -> int: ...
    @property
    def windows(self) -> tuple[int, ...]: ...
    @property
    def max_positions(self) -> int: ...


def parse_compressor(spec: str) -> Compressor:
    """Reads a spec: a method's name, then `:` and options as `name=value`, separated by commas.

    Raises:
        InvalidRequestError: on an unknown name or option, a repeated option, or a value out of range; the
            message names it and what is allowed.
    """
    name, colon, rest = spec.strip().partition(":")
    names = [method.name for method in METHODS]
    method = next((method for method in METHODS if method.name == name), None)
    if method is None:
        hint = suggestion(name, names)
        raise InvalidRequestError(f"unknown compressor {name!r} (choose {', '.join(names)}){hint}")
    options = {item.name: item for item in method.options}
    values: dict[str, int | float | str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or not text:
            raise InvalidRequestError(f"{name}: an option is written name=value, not {part!r}")
        if key not in options:
            known = ", ".join(options) or "it takes none"
            raise InvalidRequestError(
                f"{name}: unknown option {key!r} ({known}){suggestion(key, list(options))}"
            )
        if options[key].field in values:
            raise InvalidRequestError(f"{name}: option {key!r} is given twice")
        values[options[key].field] = parse_value(name, options[key], text)
    return method.make(**values)


def spec_of(compressor: Compressor) -> str:
    """Writes a compressor as a spec that states every option, so that a result says how it was made."""
    stated = [f"{item.name}={getattr(compressor, item.field)}" for item in options_of(compressor)]
    return compressor.name + (":" + ",".join(stated) if stated else "")


def check_supported(compressor: Compressor, config: ModelLike, page_size: int) -> None:
    """Refuses a compressor that cannot draft for a model.

    Args:
        compressor: the method.
        config: the model's configuration.
        page_size: tokens a page.

    Raises:
        UnsupportedModelError: if the model attends through a sliding window, which no draft attention
            applies.
        InvalidRequestError: if the method's groups do not divide the head dimension or the page.
    """
    # A window that no position can reach past hides nothing.
    window = min((w for w in config.windows if 0 < w < config.max_positions), default=0)
    if window:
        raise UnsupportedModelError(
            f"{compressor.name} cannot draft for a model with a sliding window of {window} tokens: its draft "
            "cache applies no window; use mode full"
        )
    group = getattr(compressor, "group", None)
    if group is not None:
        for what, size in (("head_dim", config.head_dim), ("page_size", page_size)):
            if size % group:
                raise InvalidRequestError(f"{compressor.name}: group {group} does not divide {what} {size}")
