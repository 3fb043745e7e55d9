# SPDX-License-Identifier: Apache-2.0
"""Specs that must be refused, each with a sentence that names the value and the choices."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vericache.compressors import check_supported, parse_compressor
from vericache.compressors.identity import Identity
from vericache.compressors.kivi import KIVI
from vericache.compressors.snapkv import SnapKV
from vericache.errors import InvalidRequestError, UnsupportedModelError, VericacheError


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("snapkb", ["'snapkb'", "did you mean 'snapkv'", "kivi", "identity", "random"]),
        ("", ["''", "snapkv"]),
        ("zzzz", ["'zzzz'", "snapkv"]),
        ("snapkv:ratio=0", ["ratio", "more than 0", "at most 1", "0.0"]),
        ("snapkv:ratio=1.5", ["ratio", "1.5"]),
        ("snapkv:ratio=-0.1", ["ratio", "-0.1"]),
        ("snapkv:ratio=nan", ["ratio", "nan"]),
        ("snapkv:ratio=lots", ["ratio", "'lots'"]),
        ("snapkv:ratio=", ["name=value", "'ratio='"]),
        ("snapkv:ratio", ["name=value", "'ratio'"]),
        ("snapkv:", ["name=value", "''"]),
        ("snapkv:ratio=0.5,", ["name=value"]),
        ("snapkv:windw=3", ["'windw'", "did you mean 'window'", "kernel"]),
        ("snapkv:window=1.5", ["window", "'1.5'"]),
        ("snapkv:window=0", ["window", "0"]),
        ("snapkv:kernel=4", ["kernel", "odd", "4"]),
        ("snapkv:pool=sum", ["pool", "avg or max", "'sum'"]),
        ("snapkv:ratio=0.5,ratio=0.6", ["'ratio'", "twice"]),
        ("kivi:bits=3", ["bits", "2 or 4 or 5 or 6 or 7 or 8", "3"]),
        ("kivi:group=48", ["group", "48"]),
        ("kivi:residual_window=3", ["'residual_window'", "residual"]),
        ("kivi:residual=-1", ["residual", "-1"]),
        ("identity:ratio=0.5", ["'ratio'", "none"]),
        ("random:sinks=-1", ["sinks", "-1"]),
    ],
)
def test_bad_spec(spec: str, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_compressor(spec)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert isinstance(caught.value, VericacheError) and isinstance(caught.value, ValueError)


def test_good_specs() -> None:
    assert parse_compressor("snapkv") == SnapKV(ratio=0.25, window=64, kernel=5, pool="avg")
    assert parse_compressor(" snapkv: ratio = 1 , window=32 ") == SnapKV(ratio=1.0, window=32)
    assert parse_compressor("kivi:residual=128,bits=2") == KIVI(bits=2, residual_window=128)
    assert parse_compressor("identity") == Identity()


@pytest.mark.parametrize("arguments", [{"ratio": 0}, {"ratio": 1.5}, {"ratio": True}, {"window": 2.0}])
def test_constructor_refuses_too(arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
        SnapKV(**arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Model:
    head_dim: int = 64
    windows: tuple[int, ...] = (0, 0)
    max_positions: int = 16384


@pytest.mark.parametrize("spec", ["snapkv", "kivi", "identity", "random"])
def test_sliding_window_is_refused(spec: str) -> None:
    compressor = parse_compressor(spec)
    check_supported(compressor, Model(), 64)
    check_supported(compressor, Model(windows=(16384, 0)), 64)
    with pytest.raises(UnsupportedModelError, match=rf"{spec} .* 4096 .* mode full"):
        check_supported(compressor, Model(windows=(0, 4096)), 64)


def test_groups_must_divide() -> None:
    kivi = parse_compressor("kivi:group=64")
    with pytest.raises(InvalidRequestError, match="head_dim 96"):
        check_supported(kivi, Model(head_dim=96), 64)
    with pytest.raises(InvalidRequestError, match="page_size 32"):
        check_supported(kivi, Model(), 32)
