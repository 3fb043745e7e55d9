# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a batch of rows, as the tensors the sampler op takes (R4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache import ops
from vericache.config import SamplingParams


def sample_rows(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Draw one token a row.

    Args:
        logits: (float32) [rows, vocab].
        params: one a row.
        positions: absolute position of the token each row draws.

    Returns:
        Token ids (-1 where the row's logits hold a NaN) and their log-probabilities under the raw logits.
    """
    device = logits.device

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    token, logprob = ops.sample(
        logits,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column([p.seed for p in params], torch.int64),
        column(list(positions), torch.int32),
    )
    return token.tolist(), logprob.tolist()
