# SPDX-License-Identifier: Apache-2.0
"""`RopeConfig`: the rotary embedding a config.json describes, in both spellings.

Old files carry `rope_theta` beside a `rope_scaling` object whose kind is called `type` or `rope_type`; new
ones carry everything in `rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vericache.errors import UnsupportedModelError

SUPPORTED_ROPE = ("default", "linear", "dynamic", "yarn", "llama3")

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FIELDS: dict[str, set[str]] = {
    # Some exporters write both fields for every type; the first three types do not read the second one.
    "default": {"factor", "original_max_position_embeddings"},
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
             "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotary embedding (half-split layout).

    Attributes:
        kind: one of `SUPPORTED_ROPE`.
        theta: base of the frequencies.
        head_dim: rotated channels, all of a head's.
        trained_positions: max_position_embeddings of the config.
        factor: context extension factor; 1 for `default`.
        original_positions: context of the pre-training (yarn, llama3).
        low_freq_factor, high_freq_factor: band edges (llama3).
        beta_fast, beta_slow, truncate: band edges (yarn).
        attention_factor: multiplies cos and sin (yarn); 1 for the others.
    """

    kind: str
    theta: float
    head_dim: int
    trained_positions: int
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @property
    def default_positions(self) -> int:
        """Positions a model serves unless told otherwise.

        max_position_embeddings; for YaRN, whose published files leave that field at the pre-training length,
        the extended length `factor * original` where it is greater.
        """
        if self.kind == "yarn":
            return max(self.trained_positions, int(self.factor * self.original_positions))
        return self.trained_positions

    @property
    def position_limit(self) -> int:
        """The most positions a model can be asked to serve: linear and dynamic scaling reach further."""
        if self.kind in ("linear", "dynamic"):
            return int(self.factor * self.trained_positions)
        return self.default_positions


def parse_rope(values: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rotary embedding of a parsed config.json.

    Raises:
        UnsupportedModelError: an unknown kind, an unknown parameter or a bad value, by name.
    """
    source = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(source) or {}
    if not isinstance(given, Mapping):
        raise UnsupportedModelError(f"config.json: {source} is {given!r}, not an object.")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(
            f"config.json: the RoPE type {kind!r} of {source} is not supported; {', '.join(SUPPORTED_ROPE)} "
            "are."
        )
    unknown = sorted(set(given) - _COMMON - _FIELDS[kind])
    if unknown:
        raise UnsupportedModelError(
            f"config.json: {source} of type {kind!r} holds {', '.join(map(repr, unknown))}, which is not "
            "supported; "
            f"its parameters are {', '.join(sorted(_FIELDS[kind] | {'rope_theta'}))}."
        )
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor is {given['partial_rotary_factor']!r}; only 1.0 is "
            "supported."
        )

    def number(name: str, default: float | None) -> float:
        value: Any = given.get(name)
        value = default if value is None else value
        bad = isinstance(value, bool) or not isinstance(value, int | float)
        if bad or not math.isfinite(value) or value <= 0:
            raise UnsupportedModelError(
                f"config.json: {name} of {source} is {value!r}, not a positive number."
            )
        return float(value)

    trained = values.get("max_position_embeddings")
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 1:
        raise UnsupportedModelError(
            f"config.json: max_position_embeddings is {trained!r}, not a positive integer."
        )
    theta = number("rope_theta", values.get("rope_theta", 10000.0))
    base = RopeConfig(kind=kind, theta=theta, head_dim=head_dim, trained_positions=trained)
    if kind == "default":
        return base
    # A top-level field overrides the nested one, as it does in transformers.
    top = values.get("original_max_position_embeddings")
    original = int(number("original_max_position_embeddings", trained) if top is None else top)
    factor = number("factor", trained / original if kind == "yarn" else None)
    if factor < 1.0:
        raise UnsupportedModelError(f"config.json: factor of {source} is {factor:g}; it must be at least 1.")
    base = replace(base, factor=factor)
    if kind == "llama3":
        low, high = number("low_freq_factor", None), number("high_freq_factor", None)
        if high <= low:
            raise UnsupportedModelError(
                f"config.json: high_freq_factor = {high:g} of {source} must be above low_freq_factor = "
                f"{low:g}."
            )
        return replace(base, original_positions=original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return replace(
            base,
            original_positions=original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(given.get("truncate", True)),
            attention_factor=_yarn_attention_factor(given, factor),
        )
    return base


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4)."""
    explicit = given.get("attention_factor")
    if explicit is not None:
        return float(explicit)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    above, below = given.get("mscale"), given.get("mscale_all_dim")
    if above and below:
        return mscale(above) / mscale(below)
    return mscale(1.0)
