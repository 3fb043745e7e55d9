# SPDX-License-Identifier: Apache-2.0
"""Cosine and sine tables of the rotary embedding.

One table serves a loaded model for its whole life, whatever the request: a token's rotation depends on its
absolute position alone. That is what the exactness rules need, and it settles dynamic NTK scaling. There the
base depends on the sequence length, and an implementation that recomputes it while a sequence grows gives
early keys another rotation than late ones, so its bits depend on history. Here the base is computed once, for
the number of positions the model was loaded with (at least max_position_embeddings). Loaded with the default
that is the unscaled base, equal to what `transformers` uses for every sequence within
max_position_embeddings; loaded with more positions, all requests use the base of that length.

Tables are computed on the CPU in float32 and copied to the device, so that CPU and GPU rotate by the same
numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vericache.errors import UnsupportedModelError
from vericache.models.rope_config import RopeConfig


def rope_tables(rope: RopeConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Tables for positions 0 .. positions - 1.

    Args:
        rope: the embedding.
        positions: number of positions; at most `rope.position_limit`.

    Returns:
        cos, sin (float32) [positions, head_dim / 2] on the CPU, times the attention factor.

    Raises:
        UnsupportedModelError: more positions than the model reaches.
    """
    if positions < 1 or positions > rope.position_limit:
        raise UnsupportedModelError(
            f"{positions} positions were asked for, but this model serves 1 to {rope.position_limit} "
            f"(RoPE type {rope.kind!r})."
        )
    frequencies = inverse_frequencies(rope, positions)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1.0:
        cos *= rope.attention_factor
        sin *= rope.attention_factor
    return cos, sin


def inverse_frequencies(rope: RopeConfig, positions: int) -> Tensor:
    """Angle per position of each channel pair.

    Args:
        rope: the embedding.
        positions: number of positions the table will hold; only dynamic scaling depends on it.

    Returns:
        (float32) [head_dim / 2].
    """
    if rope.kind in ("default", "linear", "dynamic"):
        theta = _dynamic_theta(rope, positions) if rope.kind == "dynamic" else rope.theta
        plain = _plain(theta, rope.head_dim)
        return plain / rope.factor if rope.kind == "linear" else plain
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "llama3":
        return _llama3(rope)
    raise UnsupportedModelError(f"the RoPE type {rope.kind!r} is not supported.")


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _dynamic_theta(rope: RopeConfig, positions: int) -> float:
    """NTK-aware base for sequences of `positions` tokens; the plain base up to the trained length."""
    length = max(positions, rope.trained_positions)
    stretch = rope.factor * length / rope.trained_positions - (rope.factor - 1)
    return rope.theta * stretch ** (rope.head_dim / (rope.head_dim - 2))


def _llama3(rope: RopeConfig) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    plain = _plain(rope.theta, rope.head_dim)
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    slowed = torch.where(wavelength > rope.original_positions / low, plain / rope.factor, between)
    return torch.where(wavelength < rope.original_positions / high, plain, slowed)


def _yarn(rope: RopeConfig) -> Tensor:
    """NTK-by-parts: fast channels keep their frequency, slow ones are interpolated (arXiv 2309.00071)."""
    dim = rope.head_dim

    def channel_of(turns: float) -> float:
        """The (fractional) channel pair that makes `turns` full turns over the pre-training context."""
        return dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel_of(rope.beta_fast), channel_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    periods = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (1.0 / (rope.factor * periods)) * (1 - keep) + (1.0 / periods) * keep
